"""A repository of the Hugging Face hub, through `huggingface_hub`: its cache, endpoint and token apply."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

from dynamo_box.errors import BoxError
from dynamo_box.profile.pull.local import WANTED
from dynamo_box.profile.pull.progress import Progress
from dynamo_box.profile.pull.sources import HubSource

UNWANTED = ("*/*", "consolidated*.safetensors")
REASON_CHARACTERS = 200


def download_repository(source: HubSource, progress: Progress) -> Path:
    """The repository's snapshot in the hub's own cache, so that a broken download goes on where it was.

    Raises:
        BoxError: no network, no such repository or revision, or no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # OSError, and the base of all errors of whichever HTTP library the hub's client uses.
    transport_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    progress("asking the hub", 0, None, "")
    try:
        return Path(
            snapshot_download(
                source.repo,
                revision=source.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                tqdm_class=_forwarding_bar(progress),
            )
        )
    except GatedRepoError as error:
        raise BoxError(
            f"{source.repo} may be downloaded only by people who accepted its terms",
            remedy="accept them on its page, then set HF_TOKEN to a token of yours",
        ) from error
    except RevisionNotFoundError as error:
        raise BoxError(f"{source.repo} has no revision {source.revision or 'main'!r}") from error
    except RepositoryNotFoundError as error:
        raise BoxError(
            f"the hub has no repository {source.repo}, or it is private",
            remedy="check the name; for a private one set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise BoxError(
            f"can't reach the hub for {source.repo}, and its cache doesn't hold all of it",
            remedy="check the network; HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 must not be set",
        ) from error
    except transport_errors as error:
        raise BoxError(
            f"the download of {source.repo} failed: {type(error).__name__}: {str(error)[:REASON_CHARACTERS]}",
            remedy="try again: it goes on where it was; HF_ENDPOINT names a mirror",
        ) from error


def _forwarding_bar(progress: Progress) -> type[Any]:
    """A progress bar that draws nothing and reports the bytes that have arrived."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class ForwardingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            options |= {"file": io.StringIO(), "disable": False}
            super().__init__(*arguments, **options)

        def display(self, *_arguments: Any, **_options: Any) -> bool:
            if self.unit == "B":
                progress("downloading", int(self.n), int(self.total) if self.total else None, "bytes")
            return True

    return ForwardingBar
