"""A real supervisor over real children: `box.up(…)` launches one as `dynbox up` does."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from ports import free_port

from dynamo_box.control.client import ControlClient
from dynamo_box.paths import RunDir, home, logs_dir
from dynamo_box.plan.types import DevicePlan, Plan, ProcessPlan, RestartPolicy
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel
from dynamo_box.protocol.spec import FrontendSpec, KvStoreSpec, ModelSpec, RouterSpec, WorkerSpec
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.supervisor.identity import RunId
from dynamo_box.supervisor.sweep import end_processes, processes_of

DEADLINE_S = 90.0
FLUSH_S = 20.0
CHILD = str(Path(__file__).with_name("fake_child.py"))
MODEL = ModelSpec("tiny", "/nowhere", "f", 64, 16)
QUICK = RestartPolicy(first_s=0.05, factor=2.0, longest_s=0.2, stable_s=600.0, give_up_after=3, silence_s=600.0)
"""A fake child reports once at most, and isn't frozen for that."""


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until the condition gives something true, and return that."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s:g} s: {what}")


def alive(pid: int) -> bool:
    """It runs; a zombie doesn't."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@dataclass
class Launched:
    """A supervisor and the socket that it was launched over."""

    process: subprocess.Popen[bytes]
    channel: BlockingChannel[control.ControlReply]
    snapshots: list[BoxSnapshot] = field(default_factory=list)

    def follow_until(self, condition: Callable[[BoxSnapshot], Any]) -> None:
        """Follow the start until a snapshot fits."""
        while not self.snapshots or not condition(self.snapshots[-1]):
            reply = self.channel.receive(DEADLINE_S)
            assert isinstance(reply, control.SnapshotReply), reply
            self._note(reply)

    def result(self) -> control.Done | control.Error | None:
        """Follow the start to its end; None when the stream just ends."""
        while isinstance(reply := self.channel.receive(DEADLINE_S), control.SnapshotReply):
            self._note(reply)
        assert not isinstance(reply, control.Stopped)
        return reply

    def _note(self, reply: control.SnapshotReply) -> None:
        self.snapshots.append(msgspec.msgpack.decode(reply.snapshot, type=BoxSnapshot))

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)


class BoxUnderTest:
    """Everything in it runs with a run dir of its own; the home is that of the environment."""

    def __init__(self, root: Path) -> None:
        self.port = free_port()
        self.run_dir = RunDir(root)
        self.tiers = root.with_name(f"{root.name}-tiers")
        self.environment = {**os.environ, "DYNBOX_RUN_DIR": str(root)}
        self._launched: list[Launched] = []

    def plan(
        self,
        *,
        worker: str = "",
        router: str = "",
        frontend: str = "serve",
        workers: int = 1,
        kvstore: str | None = None,
        **changes: Any,
    ) -> Plan:
        """Workers, a router and a frontend, each told how to behave, with a store of KV tiers before them if that is
        told anything; `changes` are fields of the plan.
        """
        root = str(self.run_dir.root)
        processes = [
            self._process(
                f"tiny.aggregated.{number}",
                "worker",
                WorkerSpec(f"tiny.aggregated.{number}", MODEL, "fake", "aggregated", root, 1, "cpu", 0, 1),
                worker,
                model="tiny",
                role="aggregated",
                device="cpu",
            )
            for number in range(workers)
        ]
        if kvstore is not None:
            store = KvStoreSpec("kvstore", root, 1 << 20, 1 << 30, str(self.tiers), flush_s=FLUSH_S)
            processes.insert(0, self._process("kvstore", "kvstore", store, kvstore))
        processes.append(self._process("router", "router", RouterSpec("router", root, (MODEL,)), router))
        spec = FrontendSpec("frontend", root, (MODEL,), "127.0.0.1", self.port)
        processes.append(self._process("frontend", "frontend", spec, frontend))
        plan = Plan(
            profile="fake",
            host="127.0.0.1",
            port=self.port,
            models=(MODEL,),
            devices=(DevicePlan("cpu", "CPU", "cpu", None, 1 << 30),),
            processes=tuple(processes),
            restart=QUICK,
            drain_s=5.0,
        )
        return msgspec.structs.replace(plan, **changes)

    def _process(self, name: str, kind: str, spec: Any, words: str, **changes: Any) -> ProcessPlan:
        return ProcessPlan(name, kind, ("python", CHILD, *words.split()), spec, **changes)

    def launch(self, plan: Plan) -> Launched:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_box.supervisor", "--launch-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=self.environment,
            )
        launched = Launched(process, BlockingChannel(ours, control.reply_decoder))
        self._launched.append(launched)
        launched.channel.send(control.Launch(1, msgspec.Raw(msgspec.msgpack.encode(plan))))
        return launched

    def up(self, plan: Plan | None = None) -> Launched:
        launched = self.launch(plan or self.plan())
        assert isinstance(reply := launched.result(), control.Done), reply
        return launched

    def client(self) -> ControlClient:
        return ControlClient.connect(self.run_dir, DEADLINE_S)

    def snapshot(self) -> BoxSnapshot:
        with self.client() as client:
            return client.snapshot(DEADLINE_S)

    def process(self, name: str) -> ProcessInfo:
        return next(process for process in self.snapshot().processes if process.name == name)

    def until(self, name: str, condition: Callable[[ProcessInfo], Any], what: str) -> ProcessInfo:
        def holds() -> ProcessInfo | None:
            process = self.process(name)
            return process if condition(process) else None

        found: ProcessInfo = eventually(holds, f"{name} {what}")
        return found

    def answers(self) -> bool:
        """A completion through the endpoint; a connection that was accepted by a dying frontend doesn't count."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request("POST", "/v1/completions", "{}")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def processes(self) -> list[int]:
        """Everything that runs for a box of this run dir, supervisors apart."""
        return sorted(processes_of(self._is_ours))

    def log(self, process: str) -> str:
        return (logs_dir(self.run_dir, home()) / f"{process}.log").read_text()

    def _is_ours(self, run_id: RunId) -> bool:
        return run_id.directory == self.run_dir.key

    def clear_up(self) -> None:
        for launched in self._launched:
            launched.channel.close()
            if launched.process.poll() is None:
                launched.process.send_signal(signal.SIGKILL)
            launched.process.wait(DEADLINE_S)
        end_processes(self._is_ours)
