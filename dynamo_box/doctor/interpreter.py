"""The Python that runs the box, and the packages that the box declares for it."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dynamo_box.doctor.finding import Finding, failed, passed, skipped, warned
from dynamo_box.doctor.machine import Machine

PACKAGE = "dynamo-box"
IMPORT_TIMEOUT_S = 1.2

MODULES = {"nvidia-ml-py": "pynvml"}
"""Distributions whose module isn't called like them with `_` for `-`."""

PIP = f"{shlex.quote(sys.executable)} -m pip"

_IMPORTER = """
import importlib, sys
for name in sys.argv[1:]:
    print(name, end=" ", flush=True)
    try:
        importlib.import_module(name)
        print("ok")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "))
"""


def check(_machine: Machine) -> list[Finding]:
    metadata = _metadata()
    if metadata is None:
        source = Path(__file__).parent.parent.parent
        return [
            failed(
                "installation",
                f"this Python has no package {PACKAGE}; it runs from {source}",
                "what it needs can't be told",
                f"{PIP} install -e {shlex.quote(str(source))}",
            )
        ]
    return [
        judge_python(
            platform.python_version(),
            metadata["Requires-Python"] or "",
            sys.prefix,
            base_interpreter(Path(sys.prefix, "pyvenv.cfg")),
        ),
        *_packages([Requirement(line) for line in metadata.get_all("Requires-Dist") or []]),
    ]


def judge_python(version: str, required: str, prefix: str, base: Path | None) -> Finding:
    """`base` is the directory of the interpreter that the environment was made with; None outside of one."""
    if not SpecifierSet(required).contains(version, prereleases=True):
        return failed("python", f"{version}, and {required} is required", "the box uses what older ones lack")
    if base is None:
        return passed("python", f"{version} in {prefix}, which is no virtual environment")
    if not base.is_dir():
        return failed(
            "python",
            f"{version}; {prefix} was made with an interpreter in {base}, which is gone",
            "the next process can't start",
            f"python3 -m venv --upgrade {shlex.quote(prefix)}",
        )
    return passed("python", f"{version} in {prefix}")


def base_interpreter(configuration: Path) -> Path | None:
    """What pyvenv.cfg calls `home`."""
    try:
        lines = configuration.read_text().splitlines()
    except OSError:
        return None
    settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    return Path(settings["home"]) if "home" in settings else None


def judge_versions(requirements: Sequence[Requirement], installed: Mapping[str, str | None]) -> list[str]:
    """What is missing or of the wrong version, in words."""
    problems = []
    for each in requirements:
        version = installed[each.name]
        if version is None:
            problems.append(f"{each.name} is missing")
        elif not each.specifier.contains(version, prereleases=True):
            problems.append(f"{each.name} is {version}, not {each.specifier}")
    return problems


def judge_imports(modules: Sequence[str], output: str, status: int) -> list[str]:
    """What the importer's output says is broken; a negative `status` is the signal that ended it."""
    outcomes = dict(line.partition(" ")[::2] for line in output.splitlines())
    problems = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome not in ("ok", "")]
    if status != 0:
        unfinished = next((name for name in modules if outcomes.get(name, "") == ""), "python")
        problems.append(f"{unfinished}: importing it ended Python with status {status}")
    return problems


def _metadata() -> importlib.metadata.PackageMetadata | None:
    try:
        return importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(requirements: Sequence[Requirement]) -> list[Finding]:
    needed = _active(requirements, "")
    native = [each for each in _active(requirements, "native") if each not in needed]
    installed = {each.name: _version(each.name) for each in (*needed, *native)}
    return [_needed(needed, installed), _native(native, installed)]


def _needed(requirements: Sequence[Requirement], installed: Mapping[str, str | None]) -> Finding:
    problems = judge_versions(requirements, installed)
    if problems:
        return failed("packages", "; ".join(problems), "parts of the box can't start", _install(requirements))
    return _imported(requirements)


def _native(requirements: Sequence[Requirement], installed: Mapping[str, str | None]) -> Finding:
    problems = judge_versions(requirements, installed)
    if problems:
        why = "the native engine can't start; the others do without"
        return warned("native engine", "; ".join(problems), why, _install(requirements))
    return passed("native engine", ", ".join(f"{each.name} {installed[each.name]}" for each in requirements))


def _imported(requirements: Sequence[Requirement]) -> Finding:
    """Whether all can be imported; in a process of its own, since a broken extension module may end it."""
    modules = [MODULES.get(each.name, each.name.replace("-", "_")) for each in requirements]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _IMPORTER, *modules],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return skipped("packages", f"{len(modules)} of the right version; too slow here to try to import them")
    problems = judge_imports(modules, done.stdout, done.returncode)
    if problems:
        return failed(
            "packages", "; ".join(problems), "parts of the box can't start", _install(requirements, force=True)
        )
    return passed("packages", f"all {len(modules)} are there and can be imported")


def _active(requirements: Sequence[Requirement], extra: str) -> list[Requirement]:
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(requirements: Sequence[Requirement], *, force: bool = False) -> str:
    wanted = " ".join(shlex.quote(f"{each.name}{each.specifier}") for each in requirements)
    return f"{PIP} install {'--force-reinstall --no-deps ' if force else ''}{wanted}"
