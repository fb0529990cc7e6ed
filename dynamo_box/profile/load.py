"""From a profile's name or path to a `Profile`, or to every problem at once as `file:line:column: problem`.

A name is looked for among the user's own profiles (`$XDG_CONFIG_HOME/dynbox/profiles`), then among the
shipped ones. `extends:` names another profile the same way, or a file relative to this one. Mappings are
merged key by key, anything else replaces what the base says, and a key without a value (or `null`) takes the
base's away. Environment variables are filled in after merging, so one that has been replaced need not be set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping as Environ
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.errors import ProfileError
from dynamo_box.profile.directories import (
    SUFFIXES,
    name_of,
    profile_files,
    profile_names,
    shipped_directory,
    user_directory,
)
from dynamo_box.profile.interpolate import interpolate
from dynamo_box.profile.problems import validate
from dynamo_box.profile.schema import Profile
from dynamo_box.profile.wording import escaped, nearest
from dynamo_box.profile.yaml_tree import (
    MAX_BYTES,
    Leaf,
    Mapping,
    Place,
    Problem,
    Sequence,
    Tree,
    Unreadable,
    read_tree,
    typed,
)

MAX_EXTENDS = 8


@dataclass(frozen=True)
class ListedProfile:
    """`shipped` tells the project's own from the user's; `problem` is the first thing wrong with it."""

    name: str
    path: Path
    shipped: bool
    description: str = ""
    problem: str = ""


def load_profile(reference: str, environ: Environ[str, str] = os.environ) -> Profile:
    """The profile of that name, or in that file.

    Raises:
        ProfileError: there is none, or it can't be used; `details` has a line for each problem.
    """
    return _finish(_resolved(_find(reference, environ), environ), reference, environ)


def load_text(text: str, name: str, environ: Environ[str, str] = os.environ) -> Profile:
    """A profile that lies in no file, called `name` in errors; it may extend profiles by name.

    Raises:
        ProfileError: as `load_profile`.
    """
    try:
        tree = _expand(read_tree(text.encode(), name), Path.cwd() / f"{name}.yaml", environ, ())
    except Unreadable as error:
        raise _refusal(name, error.problems) from error
    return _finish(tree, name, environ)


def list_profiles(environ: Environ[str, str] = os.environ) -> list[ListedProfile]:
    """By name; the user's own hide shipped ones of the same name. One that can't be used says why."""
    found: dict[str, ListedProfile] = {}
    for directory, shipped in ((shipped_directory(), True), (user_directory(environ), False)):
        for path in profile_files(directory):
            found[name_of(path)] = _listed(path, shipped, environ)
    return [found[name] for name in sorted(found)]


def profile_path(reference: str, environ: Environ[str, str] = os.environ) -> Path:
    """The file that `reference` names.

    Raises:
        ProfileError: there is none.
    """
    return _find(reference, environ)


def profile_text(reference: str, environ: Environ[str, str] = os.environ) -> str:
    """The file as it is.

    Raises:
        ProfileError: there is none, or it can't be read.
    """
    path = _find(reference, environ)
    try:
        return _read(path).decode()
    except (Unreadable, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {path} can't be read", details=(str(error),)) from error


def shipped_profiles(environ: Environ[str, str] = os.environ) -> dict[str, Profile]:
    """The project's own profiles by name."""
    return {name_of(path): load_profile(str(path), environ) for path in profile_files(shipped_directory())}


def _find(reference: str, environ: Environ[str, str], beside: Path | None = None) -> Path:
    if "/" in reference or reference.endswith(SUFFIXES):
        path = (beside or Path.cwd()) / Path(reference).expanduser()
        if path.is_dir():
            raise ProfileError(f"{escaped(reference)} is a directory, not a profile")
        if not path.exists():
            raise ProfileError(
                f"no profile at {escaped(reference)}", remedy="see `dynbox profile list` for those with a name"
            )
        return path
    for directory in (user_directory(environ), shipped_directory()):
        for suffix in SUFFIXES:
            path = directory / f"{reference}{suffix}"
            if path.is_file():
                return path
    raise ProfileError(f'no profile "{escaped(reference)}"; {nearest(reference, profile_names(environ))}')


def _resolved(path: Path, environ: Environ[str, str]) -> Mapping:
    try:
        return _expand(read_tree(_read(path), _shown(path)), path, environ, (path.resolve(),))
    except Unreadable as error:
        raise _refusal(_shown(path), error.problems) from error


def _read(path: Path) -> bytes:
    start = Place(_shown(path), 1, 1)
    try:
        if not path.is_file():
            raise Unreadable(Problem(start, "not a file"))
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unreadable(Problem(start, f"can't be read: {error.strerror}")) from error


def _shown(path: Path) -> str:
    """Relative where that is shorter to read."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _expand(tree: Mapping, path: Path, environ: Environ[str, str], chain: tuple[Path, ...]) -> Mapping:
    """`tree` laid over what it extends."""
    tree = _spelled_out(tree)
    if "extends" not in tree.entries:
        return tree
    problems: list[Problem] = []
    value = interpolate(tree.entries["extends"], environ, problems)
    if problems:
        raise Unreadable(*problems)
    reference = typed(value) if isinstance(value, Leaf) else None
    if not isinstance(reference, str):
        raise Unreadable(Problem(value.place, '"extends" must be a profile\'s name or path'))
    try:
        base_path = _find(reference, environ, path.parent)
    except ProfileError as error:
        raise Unreadable(Problem(value.place, f"extends: {error.what}")) from error
    identity = base_path.resolve()
    if identity in chain:
        circle = " → ".join(name_of(one) for one in (*chain, identity))
        raise Unreadable(Problem(value.place, f"extends in a circle: {circle}"))
    if len(chain) >= MAX_EXTENDS:
        line = " → ".join(name_of(one) for one in (*chain, identity))
        raise Unreadable(Problem(value.place, f"extends more than {MAX_EXTENDS} profiles in a row: {line}"))
    base = _expand(read_tree(_read(base_path), _shown(base_path)), base_path, environ, (*chain, identity))
    own = {key: entry for key, entry in tree.entries.items() if key != "extends"}
    inherited = {key: entry for key, entry in base.entries.items() if key != "name"}
    return merge(Mapping(base.place, inherited, base.keys), Mapping(tree.place, own, tree.keys))


def merge(base: Mapping, over: Mapping) -> Mapping:
    """`over` laid over `base`; each value keeps the place it came from."""
    entries = dict(base.entries)
    for key, value in over.entries.items():
        below = entries.get(key)
        entries[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return Mapping(over.place, entries, {**base.keys, **over.keys})


def _spelled_out(tree: Mapping) -> Mapping:
    """Shorthands in full, so that they merge: `model: X`, `workers: N` and `aggregated: N`."""
    entries = dict(tree.entries)
    if "model" in entries:
        entries["model"] = _model_in_full(entries["model"])
    models = entries.get("models")
    if isinstance(models, Sequence):
        entries["models"] = Sequence(models.place, tuple(_model_in_full(model) for model in models.items))
    topologies = entries.get("topologies")
    if isinstance(topologies, Sequence):
        entries["topologies"] = Sequence(topologies.place, tuple(_workers_in_full(one) for one in topologies.items))
    return Mapping(tree.place, entries, tree.keys)


def _model_in_full(model: Tree) -> Tree:
    return _workers_in_full(_in_full(model, "name"))


def _workers_in_full(tree: Tree) -> Tree:
    if not isinstance(tree, Mapping) or "workers" not in tree.entries:
        return tree
    workers = _in_full(tree.entries["workers"], "aggregated")
    if isinstance(workers, Mapping):
        roles = {role: _in_full(entry, "replicas") for role, entry in workers.entries.items()}
        workers = Mapping(workers.place, roles, workers.keys)
    return Mapping(tree.place, {**tree.entries, "workers": workers}, tree.keys)


def _in_full(tree: Tree, key: str) -> Tree:
    if not isinstance(tree, Leaf) or typed(tree) is None:
        return tree
    return Mapping(tree.place, {key: tree}, {key: tree.place})


def _without_empty(tree: Tree) -> Tree:
    if isinstance(tree, Sequence):
        return Sequence(tree.place, tuple(_without_empty(item) for item in tree.items))
    if isinstance(tree, Leaf):
        return tree
    kept = {key: _without_empty(value) for key, value in tree.entries.items() if not _is_empty(value)}
    return Mapping(tree.place, kept, tree.keys)


def _is_empty(tree: Tree) -> bool:
    return isinstance(tree, Leaf) and typed(tree) is None


def _finish(tree: Mapping, reference: str, environ: Environ[str, str]) -> Profile:
    problems: list[Problem] = []
    filled = _without_empty(interpolate(tree, environ, problems))
    if problems or not isinstance(filled, Mapping):
        raise _refusal(tree.place.file, problems)
    profile, problems = validate(filled)
    if profile is None:
        raise _refusal(tree.place.file, problems)
    return profile if profile.name else profile.model_copy(update={"name": name_of(Path(reference))})


def _refusal(file: str, problems: list[Problem] | tuple[Problem, ...]) -> ProfileError:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ProfileError(f"{escaped(file)} has {count}", details=tuple(map(str, problems)))


def _listed(path: Path, shipped: bool, environ: Environ[str, str]) -> ListedProfile:
    name = name_of(path)
    try:
        profile = load_profile(str(path), environ)
    except ProfileError as error:
        problem = error.details[0] if error.details else error.what
        return ListedProfile(name, path, shipped, problem=problem)
    return ListedProfile(name, path, shipped, description=profile.description)


def resolved(profile: Profile) -> dict[str, object]:
    """Every setting as it counts, defaults included: bytes and seconds as numbers."""
    served = tuple(model.model_copy(update={"sleep": profile.sleep_of(model)}) for model in profile.served)
    as_counted = {"model": served[0]} if profile.model else {"models": served}
    return profile.model_copy(update=as_counted).model_dump(mode="json", exclude_none=True)
