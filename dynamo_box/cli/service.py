"""`dynbox service`: a profile as a systemd service of this user or of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_box.cli import complete, output, render, stderr
from dynamo_box.cli.planning import Planning
from dynamo_box.cli.up import DEFAULT_PROFILE
from dynamo_box.control.launch import is_held
from dynamo_box.errors import BoxError, ExitCode, ProfileError, UsageError
from dynamo_box.paths import RunDir, run_dir
from dynamo_box.profile.directories import SUFFIXES, name_of
from dynamo_box.service import environment
from dynamo_box.service.install import install, installed_names, remove
from dynamo_box.service.systemctl import Systemctl, UnitState, journal, lingers
from dynamo_box.service.unit import SUFFIX, Scope, ServiceUnit, check_name, unit_text

app = complete.verb(help="Run a profile as a systemd service.", no_args_is_help=True)

ProfileArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME|PATH]", help="A profile.", autocompletion=complete.profiles)
]
NameOption = Annotated[
    str | None, typer.Option("--name", metavar="SERVICE", help="What systemd calls it (default: dynbox-PROFILE).")
]
ScopeOption = Annotated[
    bool | None,
    typer.Option("--system/--user", help="Of the machine, or of this user (default: the machine for root)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("install")
def install_service(
    profile: ProfileArgument = None,
    system: ScopeOption = None,
    name: NameOption = None,
    now: Annotated[
        bool, typer.Option("--now/--no-start", help="Start it at once, or only at the next boot or login.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the unit and change nothing.")] = False,
    as_json: JsonOption = False,
) -> ExitCode:
    """Have systemd run a profile: now, after a failure, and from every boot (or login) on.

    Returns when the box answers. Installing again replaces the service, and restarts it if anything changed.
    """
    unit = _checked_unit(profile or DEFAULT_PROFILE, name, _scope(system))
    path = unit.scope.unit_directory() / unit.file_name
    if dry_run:
        _show_unit(unit, path, as_json=as_json)
        return ExitCode.OK
    systemctl = _reachable(unit.scope)
    if now:
        _require_free_run_dir(unit, systemctl)
    installed = install(unit, path.parent, systemctl)
    stderr.say(f"{'wrote' if installed.changed else 'nothing new in'} {path}")
    if now and (installed.changed or not installed.was_up):
        _bring_up(unit, systemctl, again=installed.was_up)
    state = systemctl.state(unit.name)
    if as_json:
        output.json(_as_json(unit.name, path, state) | {"changed": installed.changed})
    else:
        output.text(f"{unit.name} is {state.active}" + (f": {state.text}" if state.text else ""))
    _say_what_to_know(unit)
    return ExitCode.OK


@app.command("remove")
def remove_service(
    profile: ProfileArgument = None,
    system: ScopeOption = None,
    name: NameOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: JsonOption = False,
) -> ExitCode:
    """Drain and stop a service, and take its unit away; without a name, the only one. Models, logs, profiles stay."""
    scope = _scope(system)
    directory = scope.unit_directory()
    chosen = _named(profile, name) or _only_one(installed_names(directory))
    if chosen is None or not os.path.lexists(directory / f"{chosen}{SUFFIX}"):
        removed, words = None, f"{chosen} is not installed" if chosen else f"no service is installed ({scope.flag})"
    elif dry_run:
        removed, words = None, f"would stop {chosen} and remove {directory / chosen}{SUFFIX}"
    else:
        removed = remove(chosen, directory, _reachable(scope))
        words = f"stopped {chosen} and removed {removed}"
    if as_json:
        output.json({"service": chosen, "removed": None if removed is None else str(removed)})
    else:
        output.text(words)
    return ExitCode.OK


@app.command()
def status(
    profile: ProfileArgument = None,
    system: ScopeOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Show what systemd says of the services installed here; exit code 3 if one isn't up, or there is none."""
    scope = _scope(system)
    directory = scope.unit_directory()
    named = _named(profile, name)
    names = [each for each in installed_names(directory) if named in (None, each)]
    systemctl = _reachable(scope, to_change=False) if names else Systemctl(scope)
    states = {each: systemctl.state(each) for each in names}
    if as_json:
        output.json([_as_json(each, directory / f"{each}{SUFFIX}", state) for each, state in states.items()])
    elif states:
        header = ("SERVICE", "STATE", "AT BOOT", "PID", "RESTARTS", "STATUS")
        output.table(render.table(header, (_row(each, state) for each, state in states.items()), right=(3, 4)))
    else:
        stderr.say(f"{named} is not installed" if named else f"no service is installed ({scope.flag})")
    return (
        ExitCode.OK if states and all(state.active == "active" for state in states.values()) else ExitCode.NOT_RUNNING
    )


# what is meant


def _scope(system: bool | None) -> Scope:
    wanted = os.geteuid() == 0 if system is None else system
    return Scope.SYSTEM if wanted else Scope.USER


def _named(profile: str | None, name: str | None) -> str | None:
    if name is not None:
        return check_name(name)
    return None if profile is None else check_name(f"dynbox-{name_of(Path(profile))}")


def _only_one(names: list[str]) -> str | None:
    if len(names) > 1:
        raise UsageError("several services are installed", remedy=f"name one with --name: {', '.join(names)}")
    return names[0] if names else None


def _checked_unit(reference: str, name: str | None, scope: Scope) -> ServiceUnit:
    """The unit for a profile that loads in the service's environment and fits this machine.

    Raises:
        ProfileError: it can't be used there.
        PlanRefused: this machine can't carry it.
    """
    from dynamo_box.profile.load import load_profile

    service = _named(reference, name)
    assert service is not None
    kept = environment.kept()
    file = scope.environment_file(service)
    environ = environment.of_service(kept, file)
    try:
        profile = load_profile(reference, environ)
    except ProfileError as error:
        load_profile(reference)  # wrong here too: that says why
        remedy = f"this shell has variables that the service won't have: put them into {file}"
        raise ProfileError(error.what, details=error.details, remedy=remedy) from error
    planning = Planning(profile, None, environ)
    if unknown := planning.unknown_origins():
        stderr.warn(f"not checked whether it fits: nothing is known of {', '.join(unknown)} before it is pulled")
    elif missing := planning.missing_origins(planning.plan()):
        stderr.warn(f"the first start will take long: it pulls {', '.join(missing)}")
    is_file = "/" in reference or reference.endswith(SUFFIXES)
    return ServiceUnit(
        name=service,
        scope=scope,
        profile=str(Path(reference).expanduser().absolute()) if is_file else reference,
        python=str(Path(sys.executable).absolute()),
        drain_s=profile.drain,
        environment=kept,
    )


# what is done


def _reachable(scope: Scope, *, to_change: bool = True) -> Systemctl:
    """Raises:
    UsageError: no right to change anything in this scope.
    NotRunning: there is no systemd to speak to.
    """
    if to_change and scope is Scope.SYSTEM and os.geteuid() != 0:
        raise UsageError("--system needs root", remedy="run it with sudo, or install for this user with --user")
    systemctl = Systemctl(scope)
    systemctl.require()
    return systemctl


def _require_free_run_dir(unit: ServiceUnit, systemctl: Systemctl) -> None:
    """Raises:
    BoxError: a box that isn't this service's is in the way.
    """
    where = RunDir(Path(unit.run_dir)) if unit.run_dir else run_dir()
    if not systemctl.state(unit.name).is_up and is_held(where):
        raise BoxError(
            f"a box is running in {where.root} already",
            remedy="stop it with `dynbox down`; or --no-start, and the service is started at the next boot or login",
        )


def _bring_up(unit: ServiceUnit, systemctl: Systemctl, *, again: bool) -> None:
    stderr.say(f"{'restarting' if again else 'starting'} {unit.name}; `{journal(unit.scope, unit.name)} -f` shows how")
    if again:
        systemctl.restart(unit.name)
    else:
        systemctl.start(unit.name)


def _say_what_to_know(unit: ServiceUnit) -> None:
    if unit.scope is Scope.USER and not lingers():
        stderr.say("it runs while this user is logged in; `loginctl enable-linger` has it run from boot on")
    if unit.scope is Scope.SYSTEM:
        stderr.say(f"for `dynbox ps` and others: export DYNBOX_RUN_DIR={unit.run_dir}")


# what is shown


def _show_unit(unit: ServiceUnit, path: Path, *, as_json: bool) -> None:
    text = unit_text(unit)
    if as_json:
        output.json({"service": unit.name, "path": str(path), "text": text})
    else:
        stderr.say(f"would write {path}:")
        output.text(text.rstrip())


def _as_json(name: str, path: Path, state: UnitState) -> dict[str, Any]:
    return {
        "service": name,
        "path": str(path),
        "state": state.active,
        "result": state.result,
        "at_boot": state.enabled,
        "pid": state.pid,
        "restarts": state.restarts,
        "status": state.text,
    }


def _row(name: str, state: UnitState) -> tuple[str, ...]:
    failed = state.result not in ("", "success")
    return (
        name,
        f"{state.active} ({state.result})" if failed else state.active,
        "yes" if state.enabled else "no",
        "-" if state.pid is None else str(state.pid),
        str(state.restarts),
        state.text or "-",
    )
