"""How a supervisor comes to life: get the plan, take the run dir, sweep it, detach, and hand over to
`supervision`.

Two ways in. Detached (`--launch-fd`): the plan comes over a socket from `dynbox up`, which follows the start
on it. Foreground (`--plan-fd`): the plan is in a memfd, a terminal or systemd follows, and logs go to stderr.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass

import msgspec

from dynamo_box import paths
from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.plan.types import Plan
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel, FrameError, encode_frame, listen_unix
from dynamo_box.supervisor.guard import PR_SET_CHILD_SUBREAPER, prctl
from dynamo_box.supervisor.identity import RunId
from dynamo_box.supervisor.lock import Holder, RunDirLock
from dynamo_box.supervisor.logs import SUPERVISOR, OwnLog
from dynamo_box.supervisor.supervision import Supervision, print_error, run_on_uvloop
from dynamo_box.supervisor.sweep import sweep, sweep_locked

LAUNCH_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Launched:
    """A plan and who waits for it: `link` is None in the foreground."""

    plan: Plan
    request_id: int
    link: socket.socket | None


def launch_from_socket(fd: int) -> Launched | None:
    """Receive the plan; None when the one who launched us has gone already.

    Raises:
        FrameError: something else than a Launch came.
        TimeoutError: nothing came.
    """
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    request = BlockingChannel(sock, control.request_decoder).receive(LAUNCH_TIMEOUT_S)
    if request is None:
        return None
    if not isinstance(request, control.Launch):
        raise FrameError(f"expected a launch, got {type(request).__name__}")
    return Launched(msgspec.msgpack.decode(request.plan, type=Plan), request.id, sock)


def launch_from_memfd(fd: int) -> Launched:
    """Read the plan from a descriptor that holds one msgpack Launch."""
    with open(fd, "rb") as file:
        file.seek(0)
        request = msgspec.msgpack.decode(file.read(), type=control.Launch)
    return Launched(msgspec.msgpack.decode(request.plan, type=Plan), request.id, None)


def carry_out(launched: Launched) -> int:
    """Run the box until it is stopped; the exit status of the supervisor."""
    run_dir = paths.run_dir()
    home = paths.home()
    logs = paths.logs_dir(run_dir, home)
    try:
        run_dir.create()
        run_id = RunId.of_this_process(run_dir)
        lock = RunDirLock.acquire(run_dir.lock, Holder(os.getpid(), launched.plan.profile, str(run_id)))
        swept = sweep_locked(run_dir)
        if swept.survivors:
            raise BoxError(
                f"processes of a dead box can't be killed: {', '.join(map(str, swept.survivors))}",
                remedy="they hang in the kernel (a device, a network mount); only a reboot may help",
            )
        own_log = _detach(OwnLog(logs / f"{SUPERVISOR}.log")) if launched.link is not None else None
        control_socket = listen_unix(run_dir.control_socket)
        run_dir.plan.touch(mode=0o600)
        run_dir.plan.chmod(0o600)  # one that was there may be anybody's to read
        run_dir.plan.write_bytes(msgspec.json.encode(launched.plan))
    except BoxError as error:
        return _refuse(launched, error)
    except OSError as error:
        return _refuse(launched, BoxError(f"can't prepare {run_dir.root} or {logs}: {error}"))
    prctl(PR_SET_CHILD_SUBREAPER, 1)

    async def supervise() -> int:
        supervision = Supervision(
            launched.plan,
            run_dir,
            home,
            run_id,
            link=launched.link,
            request_id=launched.request_id,
            own_log=own_log,
            lock=lock,
        )
        return await supervision.run(control_socket, swept)

    try:
        return run_on_uvloop(supervise())
    finally:
        if lock.is_in_place:
            run_dir.control_socket.unlink(missing_ok=True)
        lock.release()


def _detach(own_log: OwnLog) -> OwnLog:
    """A session of our own, so that no terminal's signals reach the box; nothing to read on stdin."""
    with contextlib.suppress(PermissionError):  # we lead a session, or a process group, already
        os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return own_log


def _refuse(launched: Launched, error: BoxError) -> int:
    """Nothing was started; say why to whoever asked."""
    if launched.link is None:
        print_error(error)
    else:
        reply = control.Error(launched.request_id, int(error.exit_code), error.what, error.remedy or "", error.details)
        with contextlib.suppress(OSError):  # they have gone
            launched.link.sendall(encode_frame(reply))
        launched.link.close()
    return int(error.exit_code)


def _sweep() -> int:
    try:
        report = sweep(paths.run_dir())
    except BoxError as error:
        print_error(error)
        return int(error.exit_code)
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    return ExitCode.FAILED if report.survivors else ExitCode.OK


def main(arguments: list[str]) -> int:
    """`--launch-fd N`, `--plan-fd N`, or `--sweep` (for `dynbox down` without a box: a report as JSON on stdout)."""
    match arguments:
        case ["--launch-fd", fd] if fd.isdecimal():
            try:
                launched = launch_from_socket(int(fd))
            except (FrameError, TimeoutError, OSError, msgspec.DecodeError) as error:
                sys.stderr.write(f"error: no plan came over descriptor {fd}: {error}\n")
                return ExitCode.USAGE
            return ExitCode.OK if launched is None else carry_out(launched)
        case ["--plan-fd", fd] if fd.isdecimal():
            try:
                launched = launch_from_memfd(int(fd))
            except (OSError, msgspec.DecodeError) as error:
                sys.stderr.write(f"error: descriptor {fd} holds no plan: {error}\n")
                return ExitCode.USAGE
            return carry_out(launched)
        case ["--sweep"]:
            return _sweep()
        case _:
            sys.stderr.write("usage: python -m dynamo_box.supervisor --launch-fd N | --plan-fd N | --sweep\n")
            return ExitCode.USAGE
