"""Start a supervisor, follow its start, and clear up after one that died.

The supervisor is told what to do over a socket that it inherits, not through files, so that its life hangs on this
end of it until the box is ready: when the command that started it goes away, in whatever manner, the stream ends and
the supervisor takes everything down again. It has a session of its own, so that Ctrl-C in the terminal reaches only
the command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from typing import IO, NoReturn

import msgspec

from dynamo_box.control.client import box_error, decode_snapshot
from dynamo_box.errors import BoxError, TimedOut
from dynamo_box.paths import RunDir
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel, FrameError
from dynamo_box.snapshot import BoxSnapshot

SWEEP_TIMEOUT_S = 30.0
SUPERVISOR = (sys.executable, "-P", "-m", "dynamo_box.supervisor")
"""`-P`: a module in the current directory that happens to be called `queue.py` must not end up in the supervisor."""


class Swept(msgspec.Struct, frozen=True):
    """Processes of dead boxes of this run dir that were found, how many of them are gone, and which are not."""

    pids: tuple[int, ...] = ()
    killed: int = 0
    survivors: tuple[int, ...] = ()


class Launching:
    """A supervisor on its way up; a context manager that leaves nothing behind unless `ready` was reached."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: BlockingChannel[control.ControlReply],
        stderr: IO[bytes],
    ) -> None:
        self._process = process
        self._channel = channel
        self._stderr = stderr
        self.ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def next(self, timeout_s: float | None) -> BoxSnapshot | None:
        """The box as it is now; None once it is ready, and from then on it lives by itself.

        Raises:
            TimeoutError: no word in time.
            BoxError: the start failed; nothing of it is left running.
        """
        try:
            reply = self._channel.receive(timeout_s)
        except ConnectionError:
            reply = None
        except FrameError as error:
            raise BoxError(f"the supervisor sent something that is no answer: {error}") from error
        if isinstance(reply, control.SnapshotReply):
            return decode_snapshot(reply)
        if isinstance(reply, control.Done):
            self.ready = True
            return None
        if isinstance(reply, control.Error):
            raise box_error(reply)
        status = self._process.wait()
        raise BoxError(
            f"the supervisor ended with status {status} while it started the box",
            remedy="see `dynbox logs supervisor`; `dynbox down` clears up what it left",
            details=self._last_words(),
        )

    def abort(self) -> None:
        """Tell the supervisor that nobody wants the box any more; it takes down what it has started, and exits."""
        self._channel.close()

    def wait_gone(self, timeout_s: float | None) -> bool:
        """Whether the supervisor has exited within `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Let go of a box that is ready; abort one that isn't."""
        self._channel.close()
        self._stderr.close()
        if self.ready:
            self._process.returncode = 0  # it lives on, and is not this process's to wait for

    def __enter__(self) -> Launching:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_words(self) -> tuple[str, ...]:
        self._stderr.seek(0)
        return tuple(self._stderr.read().decode(errors="replace").splitlines()[-20:])


def launch(plan: bytes) -> Launching:
    """Start a detached supervisor that carries out `plan` (msgpack of `dynamo_box.plan.types.Plan`)."""
    ours, theirs = socket.socketpair()
    # Unlinked: it holds what Python itself says of a supervisor that can't even be imported.
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - `Launching` closes it
    with theirs:
        process = subprocess.Popen(
            [*SUPERVISOR, "--launch-fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    channel = BlockingChannel(ours, control.reply_decoder)
    launching = Launching(process, channel, stderr)
    # If the supervisor is gone already, the first `next` says why.
    with contextlib.suppress(ConnectionError):
        channel.send(_request(plan))
    return launching


def run_in_foreground(plan: bytes) -> NoReturn:
    """Become the supervisor, for systemd and containers; the plan travels in an anonymous file."""
    descriptor = os.memfd_create("dynbox-plan", 0)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(msgspec.msgpack.encode(_request(plan)))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.execv(sys.executable, [*SUPERVISOR, "--plan-fd", str(descriptor)])  # noqa: S606 - no shell is wanted


def is_held(run_dir: RunDir) -> bool:
    """Whether a supervisor holds the run dir, even one so young that its control socket isn't there yet."""
    try:
        descriptor = os.open(run_dir.lock, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _request(plan: bytes) -> control.Launch:
    return control.Launch(1, msgspec.Raw(plan))


def sweep() -> Swept:
    """End what dead boxes of this run dir left running.

    The search lives with the supervisor, which needs it at every start; here it runs as a program of its own.

    Raises:
        BoxError: the search failed.
    """
    try:
        done = subprocess.run([*SUPERVISOR, "--sweep"], capture_output=True, timeout=SWEEP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"looking for leftover processes took more than {SWEEP_TIMEOUT_S:.0f} s") from error
    try:
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Swept)
    except msgspec.DecodeError:
        pass
    lines = done.stderr.decode(errors="replace").splitlines()
    raise BoxError("looking for leftover processes failed", details=tuple(lines[-5:]))
