"""Ask a running box, over its control socket. Blocking: commands need no event loop, and a loop costs import time.

One request is open at a time on a client. `Down` and `Restart` answer when they are done, which takes as long as a
drain does; everything else answers at once or the supervisor is stuck.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import msgspec

from dynamo_box.errors import BoxError, ExitCode, NotRunning, TimedOut, UsageError
from dynamo_box.paths import RunDir
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel, FrameError, connect_unix, peer_uid
from dynamo_box.protocol.gms import Place
from dynamo_box.snapshot import BoxSnapshot

ANSWER_TIMEOUT_S = 5.0

_snapshots = msgspec.msgpack.Decoder(BoxSnapshot)
_error_types: dict[int, type[BoxError]] = {
    ExitCode.USAGE: UsageError,
    ExitCode.NOT_RUNNING: NotRunning,
    ExitCode.TIMED_OUT: TimedOut,
}


def box_error(reply: control.Error) -> BoxError:
    """The exception that stands for an Error: its type carries the exit code."""
    error_type = _error_types.get(reply.code, BoxError)
    return error_type(reply.what, remedy=reply.remedy or None, details=reply.details)


def decode_snapshot(reply: control.SnapshotReply) -> BoxSnapshot:
    """Raises:
    BoxError: the box runs another version of the program.
    """
    try:
        return _snapshots.decode(reply.snapshot)
    except msgspec.DecodeError as error:
        raise BoxError(
            f"the running box speaks another version of the protocol ({error})",
            remedy="stop it with the dynbox that started it",
        ) from error


class ControlClient:
    """A connection to the supervisor of the box in `run_dir`; a context manager."""

    def __init__(self, channel: BlockingChannel[control.ControlReply]) -> None:
        self._channel = channel
        self._last_id = 0

    @classmethod
    def connect(cls, run_dir: RunDir, timeout_s: float = ANSWER_TIMEOUT_S) -> ControlClient:
        """Raises:
        NotRunning: nobody listens in this run dir.
        TimedOut: a supervisor is there and takes no connection.
        BoxError: somebody else listens there.
        """
        try:
            sock = connect_unix(run_dir.control_socket, timeout_s)
        except TimeoutError as error:
            raise _stuck() from error
        except OSError as error:
            raise NotRunning(
                "no box is running", remedy="start one with `dynbox up`", details=(f"run dir {run_dir.root}",)
            ) from error
        if (uid := peer_uid(sock)) != os.getuid():
            sock.close()
            raise BoxError(
                f"{run_dir.control_socket} belongs to uid {uid}, not to you",
                remedy="set DYNBOX_RUN_DIR to a directory of your own",
            )
        return cls(BlockingChannel(sock, control.reply_decoder))

    def snapshot(self, timeout_s: float = ANSWER_TIMEOUT_S) -> BoxSnapshot:
        reply = self._ask(control.GetSnapshot(self._next_id()), timeout_s)
        if not isinstance(reply, control.SnapshotReply):
            raise _unexpected(reply)
        return decode_snapshot(reply)

    def watch(self, hz: float = 4.0) -> Iterator[BoxSnapshot]:
        """Snapshots as the box changes, the first at once, until the box ends.

        Raises:
            BoxError: the supervisor refused.
        """
        request = control.Watch(self._next_id(), hz)
        self._send(request)
        while (reply := self._receive(None)) is not None:
            if isinstance(reply, control.Error):
                raise box_error(reply)
            if isinstance(reply, control.SnapshotReply):
                yield decode_snapshot(reply)

    def down(
        self, drain_s: float, timeout_s: float, on_snapshot: Callable[[BoxSnapshot], None] | None = None
    ) -> control.Stopped:
        """Drain for at most `drain_s` and stop the box; `on_snapshot` sees it go if the supervisor tells.

        `timeout_s` bounds each wait for word from the supervisor, and should lie well above `drain_s`.
        """
        reply = self._ask(control.Down(self._next_id(), drain_s), timeout_s, on_snapshot)
        if not isinstance(reply, control.Stopped):
            raise _unexpected(reply)
        return reply

    def restart(self, process: str, drain_s: float, timeout_s: float) -> str:
        """Drain and restart one process; returns the supervisor's words once it is ready again."""
        return self._done(control.Restart(self._next_id(), process, drain_s), timeout_s)

    def drain(self, process: str, drain_s: float, timeout_s: float) -> str:
        """Let one worker finish and stop it; returns the supervisor's words once nothing of it is left."""
        return self._done(control.Drain(self._next_id(), process, drain_s), timeout_s)

    def set_role(self, process: str, role: str, drain_s: float, timeout_s: float) -> str:
        """Let one worker finish and serve as `role` (prefill, decode, aggregated) from then on; returns the
        supervisor's words once it does.
        """
        return self._done(control.SetRole(self._next_id(), process, role, drain_s), timeout_s)

    def scale(self, model: str, role: str, count: int, drain_s: float, timeout_s: float) -> str:
        """Have `count` workers of a model in a role; returns the supervisor's words once they are ready or gone."""
        return self._done(control.Scale(self._next_id(), model, role, count, drain_s), timeout_s)

    def sleep(
        self,
        model: str,
        *,
        to: Place | None = None,
        force: bool = False,
        hold: bool = False,
        drain_s: float = 30.0,
        timeout_s: float,
    ) -> control.ModelSlept:
        """Put a model to sleep; returns where its weights are then and what was freed, by measurement."""
        reply = self._ask(control.SleepModel(self._next_id(), model, to, force, hold, drain_s), timeout_s)
        if not isinstance(reply, control.ModelSlept):
            raise _unexpected(reply)
        return reply

    def wake(self, model: str, timeout_s: float) -> control.ModelWoken:
        """Wake a model; returns once it serves."""
        reply = self._ask(control.WakeModel(self._next_id(), model), timeout_s)
        if not isinstance(reply, control.ModelWoken):
            raise _unexpected(reply)
        return reply

    def set_option(self, process: str, key: str, value: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """Change a setting of a live process (router `mode`, mock `fault`)."""
        return self._done(control.SetOption(self._next_id(), process, key, value), timeout_s)

    def cancel_request(self, request_id: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        return self._done(control.CancelRequest(self._next_id(), request_id), timeout_s)

    def interrupt(self) -> None:
        """End what waits for an answer in another thread, as if the box had gone. Close afterwards, in that thread."""
        self._channel.interrupt()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _done(self, request: control.ControlRequest, timeout_s: float) -> str:
        reply = self._ask(request, timeout_s)
        if not isinstance(reply, control.Done):
            raise _unexpected(reply)
        return reply.text

    def _ask(
        self,
        request: control.ControlRequest,
        timeout_s: float,
        on_snapshot: Callable[[BoxSnapshot], None] | None = None,
    ) -> control.ControlReply:
        """Send, and wait for the answer; snapshots that come on the way to a Down or Restart are not the answer."""
        self._send(request)
        while (reply := self._receive(timeout_s)) is not None:
            if reply.id != request.id:
                continue
            if isinstance(reply, control.Error):
                raise box_error(reply)
            if isinstance(reply, control.SnapshotReply) and not isinstance(request, control.GetSnapshot):
                if on_snapshot is not None:
                    on_snapshot(decode_snapshot(reply))
                continue
            return reply
        raise BoxError(
            "the supervisor went away before it answered",
            remedy="see `dynbox logs supervisor`; `dynbox down` clears up what it left",
        )

    def _send(self, request: control.ControlRequest) -> None:
        try:
            self._channel.send(request)
        except TimeoutError as error:
            raise _stuck() from error
        except OSError as error:
            raise NotRunning("the box has just ended", remedy="start one with `dynbox up`") from error

    def _receive(self, timeout_s: float | None) -> control.ControlReply | None:
        try:
            return self._channel.receive(timeout_s)
        except TimeoutError as error:
            raise _stuck() from error
        except ConnectionError:
            return None
        except FrameError as error:
            raise BoxError(f"the supervisor sent something that is no answer: {error}") from error

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id


def _stuck() -> TimedOut:
    return TimedOut(
        "the supervisor doesn't answer",
        remedy="if it stays like this: kill -9 the process named `dynamo_box.supervisor`, then `dynbox down`",
    )


def _unexpected(reply: control.ControlReply) -> BoxError:
    return BoxError(f"the supervisor answered with {type(reply).__name__}, which doesn't fit the question")
