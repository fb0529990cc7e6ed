"""The children of one plan as one thing: start them all, prove that every model answers, keep them up, stop
them all.

starting ─► ready ◄─► degraded (a process is FATAL, or a worker drained) ─► stopping ─► stopped
    └─────► failed (the start did)
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass

from dynamo_box.discovery.instances import withdraw
from dynamo_box.errors import BoxError
from dynamo_box.paths import Home, RunDir, logs_dir
from dynamo_box.plan.scale import as_of_now
from dynamo_box.plan.types import Plan, ProcessPlan
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.spec import ModelSpec
from dynamo_box.snapshot import BoxInfo, BoxSnapshot
from dynamo_box.supervisor import listener, thresholds
from dynamo_box.supervisor.acts import FRONTEND, Acts
from dynamo_box.supervisor.cgroups import BoxCgroup
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.devices import DeviceSampler, load_pynvml
from dynamo_box.supervisor.events import EventList
from dynamo_box.supervisor.following import Following
from dynamo_box.supervisor.guard import children_of
from dynamo_box.supervisor.identity import RUN_ID_VARIABLE, RunId
from dynamo_box.supervisor.keeper import Keeper
from dynamo_box.supervisor.life import Surroundings
from dynamo_box.supervisor.logs import ProcessLog, RotatingFile
from dynamo_box.supervisor.models import Models
from dynamo_box.supervisor.procfs import resident_bytes
from dynamo_box.supervisor.scaling import Scaling
from dynamo_box.supervisor.snapshot_builder import SnapshotBuilder
from dynamo_box.supervisor.states import State
from dynamo_box.supervisor.sweep import end_processes
from dynamo_box.supervisor.tiers import KVSTORE, TierNews, disk_directories, flush_s
from dynamo_box.supervisor.waiting import first_of

GMS = "gms"


class BoxState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class StopReport:
    """`processes` were running, `killed` of them needed KILL, `freed_bytes` were resident before; `survivors`
    are pids.
    """

    processes: int
    killed: int
    freed_bytes: int
    survivors: tuple[int, ...]


class Box:
    """Lives on the main thread's event loop. `watchers` are called on any change that people may see."""

    def __init__(self, plan: Plan, run_dir: RunDir, home: Home, run_id: RunId, environment: Mapping[str, str]) -> None:
        self.plan = plan
        self.state = BoxState.STARTING
        self.cause = ""
        self.watchers: list[Callable[[], None]] = []
        self.events = EventList(self._notify)
        self._run_dir = run_dir
        self._logs = logs_dir(run_dir, home)
        self._run_id = run_id
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._listener: socket.socket | None = None
        self._cgroup = BoxCgroup.create(run_id)
        self._surroundings = Surroundings(run_id, self._shared_environment(environment), self._cgroup)
        self._start_failed: asyncio.Future[Child] = self._loop.create_future()
        self._keepers = {
            process.name: self._make_keeper(process.name) for process in plan.processes if process.kind == GMS
        }
        self.children = {process.name: self._make_child(process) for process in plan.processes}
        self.acts = Acts(
            self.children,
            why_not=self._why_not_act,
            why_not_child=lambda child: self.models.why_not_act(child),
            before_start=self._before_start,
            emit=self.events.add,
            changed=self._reconsider,
        )
        self._tiers = TierNews(self.children)
        tier_directories = disk_directories(plan)
        self._sampler = DeviceSampler(
            plan.devices,
            {"models": home.models, "logs": home.logs, **tier_directories},
            changed=self._notify,
            emit=lambda level, text: self.events.add(level, None, text),
            load_nvml=load_pynvml,
            sizes=dict.fromkeys(tier_directories, self._tiers.disk_bytes),
        )
        self._thresholds = thresholds.Thresholds()
        self._builder = SnapshotBuilder(plan, self.children, self._sampler)
        self.models = Models(
            plan,
            self.children,
            run_dir.key,
            idle_s=self._builder.idle_s,
            stays_down=lambda: self.acts.drained,
            emit=self.events.add,
            changed=self._notify,
        )
        self._builder.residency = self.models.residency
        self.scaling = Scaling(
            plan,
            self.children,
            self.acts,
            self.models,
            add=self._add_worker,
            remove=self._remove_worker,
            emit=self.events.add,
        )

        self._following = Following(
            plan.following, self.acts, snapshot=self.snapshot, changing=self._changing, emit=self.events.add
        )

    def _shared_environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        shared = dict(environment)
        shared[RUN_ID_VARIABLE] = str(self._run_id)
        shared["DYNBOX_RUN_DIR"] = str(self._run_dir.root)
        shared.setdefault("DYNBOX_LOG_LEVEL", "info")
        return shared

    def _make_child(self, process: ProcessPlan) -> Child:
        def withdraw_instance() -> None:
            withdraw(self._run_dir.instances, process.name)

        return Child(
            process,
            self.plan.restart,
            self._surroundings,
            ProcessLog(process.name, RotatingFile(self._logs / f"{process.name}.log")),
            changed=self._on_child_change,
            emit=lambda level, text: self.events.add(level, process.name, text),
            gone=withdraw_instance,
            inherit=lambda: self._inherited(process),
            asked=lambda child, message: self.models.asked(child, message),
        )

    def _make_keeper(self, name: str) -> Keeper:
        return Keeper(lambda level, text: self.events.add(level, name, text))

    def _inherited(self, process: ProcessPlan) -> contextlib.AbstractContextManager[Mapping[str, int]]:
        """What a new life of a process gets beside its status socket."""
        if process.kind == GMS:
            return self._keepers[process.name].connect()
        if process.kind == FRONTEND and self._listener is not None:
            return contextlib.nullcontext({listener.LISTEN_FD_VARIABLE: self._listener.fileno()})
        return contextlib.nullcontext({})

    # start

    async def start(self) -> None:
        """Start everything and wait until every model has answered.

        Raises:
            BoxError: it failed; what runs is still running, so call `stop`.
        """
        try:
            self._listener = listener.bind(self.plan.host, self.plan.port)
            tree = "with a cgroup for each process" if self._cgroup else "without cgroups (none is writable)"
            self.events.add("info", None, f"starting {self.plan.profile} at {self.plan.endpoint}, {tree}")
            await self._bring_up_unless_fatal()
        except BoxError as error:
            self._to(BoxState.FAILED, error.what)
            raise
        self._sample_memory()
        self._to(BoxState.READY)
        self._reconsider()

    async def _bring_up_unless_fatal(self) -> None:
        bring_up = self._loop.create_task(self._bring_up())
        try:
            await first_of(bring_up, self._start_failed)
            if self._start_failed.done():
                raise self._start_failed.result().failure_error()
            await bring_up
        finally:
            bring_up.cancel()
            with contextlib.suppress(asyncio.CancelledError, BoxError):
                await bring_up

    async def _bring_up(self) -> None:
        """Models that have no room to stay awake come first, one after the other: each proves itself, then sleeps."""
        awake = set(self.plan.awake) or {model.name for model in self.plan.models}
        waiting = list(self.children.values())

        async def start(model: str | None, *models: str) -> None:
            now = [child for child in waiting if child.plan.model in (model, None, *models)]
            waiting[:] = [child for child in waiting if child not in now]
            await _all_or_first_error(self._start_child(child) for child in now)

        for model in self.plan.models:
            if model.name not in awake:
                await start(model.name)
                self.models.started(model.name)
                await self._prove(model)
                await self.models.retire(model.name)
        await start(None, *awake)
        for name in awake:
            self.models.started(name)
        await _all_or_first_error(self._prove(model) for model in self.plan.models if model.name in awake)

    async def _start_child(self, child: Child) -> None:
        for name in child.plan.after:
            await self.children[name].started.wait()
            await self.children[name].wait_ready()
        child.start()
        with contextlib.suppress(BoxError) if child.plan.kind == KVSTORE else contextlib.nullcontext():
            await child.wait_ready()

    async def _prove(self, model: ModelSpec) -> None:
        from dynamo_box.supervisor.canary import one_token

        took_s = await one_token(self.plan.endpoint, model.name)
        self.events.add("info", None, f"{model.name} answered its canary in {took_s * 1000:.0f} ms")

    # while it runs

    def _why_not_act(self) -> str:
        return "" if self.state in (BoxState.READY, BoxState.DEGRADED) else f"the box is {self.state}"

    def _before_start(self, child: Child) -> None:
        if child.plan.kind == FRONTEND and self._listener is None:
            self._listener = listener.bind(self.plan.host, self.plan.port)

    def _changing(self) -> str:
        """What is on its way, so that nothing else should be begun."""
        if self.state is not BoxState.READY:
            return f"the box is {self.state}"
        return self.acts.under_way or self.scaling.under_way

    def _add_worker(self, process: ProcessPlan) -> Child:
        """Before the frontend, so that it stops after that."""
        child = self._make_child(process)
        behind = {
            name: self.children.pop(name) for name, each in list(self.children.items()) if each.plan.kind == FRONTEND
        }
        self.children |= {child.name: child} | behind
        self._note_workers()
        return child

    def _remove_worker(self, child: Child) -> None:
        del self.children[child.name]
        self.acts.forget(child.name)
        child.log.close()
        self._note_workers()
        self._reconsider()

    def _note_workers(self) -> None:
        plan = as_of_now(self.plan, [child.plan for child in self.children.values()])
        self._builder.note_workers(plan)
        self.models.note_workers(plan)
        self.models.tell_frontends()
        self._notify()

    def tick(self) -> None:
        """Once a second: look for signs of life, sample memory and devices, and end what was adopted."""
        self._sampler.tick()
        self._judge_figures()
        if self.state in (BoxState.READY, BoxState.DEGRADED):
            self.models.tick()
            self._following.tick()
        self._tiers.tick()
        changed = self._sample_memory()
        for child in self.children.values():
            child.check_sign_of_life()
        self._end_adopted()
        if changed:
            self._notify()

    def _sample_memory(self) -> bool:
        """Whether anybody has more or less than before."""
        changed = False
        for child in self.children.values():
            sample = resident_bytes(child.pid) if child.pid is not None else None
            changed = changed or sample != child.resident_bytes
            child.resident_bytes = sample
        return changed

    def _judge_figures(self) -> None:
        """Events for what has crossed a limit since the last look."""
        now, devices, host = self._loop.time(), self._builder.devices(), self._sampler.host
        workers = (
            (child.name, child.figures) for child in self.children.values() if isinstance(child.figures, WorkerFigures)
        )
        readings = itertools.chain(
            thresholds.device_readings(devices),
            thresholds.host_readings(host.memory_bytes, host.available_bytes) if host is not None else (),
            thresholds.disk_readings(self._sampler.disks),
            thresholds.pool_readings(workers),
        )
        for crossing in (*self._thresholds.judge(readings, now), *self._thresholds.judge_errors(devices, now)):
            self.events.add(crossing.level, crossing.process, crossing.text)

    def _end_adopted(self) -> None:
        """KILL and reap orphans: children of this process that are no guards have lost theirs."""
        for pid in children_of(os.getpid()):
            if pid not in self._surroundings.guards:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)

    # stop

    async def stop(self, drain_s: float) -> StopReport:
        """Stop in reverse order (processes of one kind at once), and verify that nothing is left.

        `drain_s` is for all together: what is left of it when the frontend has drained is for those behind
        it. The store of KV tiers gets as long as it needs to write what waits, whatever is left.
        """
        if self.state is not BoxState.FAILED:
            self._to(BoxState.STOPPING)
        self.tick()
        running = [child for child in self.children.values() if child.pid is not None]
        killed_before = sum(child.killed for child in running)
        freed = sum(child.resident_bytes or 0 for child in running)
        deadline = self._loop.time() + drain_s
        await self._following.close()
        await self.models.close()
        self._close_listener()
        for _, group in itertools.groupby(reversed(list(self.children.values())), key=lambda child: child.plan.kind):
            left_s = max(0.0, deadline - self._loop.time())
            await asyncio.gather(*(child.stop(max(left_s, flush_s(child))) for child in group))
        self._end_adopted()
        report = await asyncio.to_thread(end_processes, self._run_id.__eq__)
        self._end_adopted()
        await self._sampler.close()
        for keeper in self._keepers.values():
            keeper.close()
        if self._cgroup is not None:
            self._cgroup.remove()
        for path in self._run_dir.root.glob("*.sock"):
            if path != self._run_dir.control_socket:
                path.unlink(missing_ok=True)
        if self.state is not BoxState.FAILED:
            self._to(BoxState.STOPPED)
        killed = sum(child.killed for child in running) - killed_before + report.killed
        return StopReport(len(running), killed, freed, report.survivors)

    def hurry(self) -> None:
        """Cut all drains short."""
        for child in self.children.values():
            child.hurry()

    def close(self) -> None:
        for child in self.children.values():
            child.log.close()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # state

    def _on_child_change(self, child: Child) -> None:
        if child.state is State.FATAL:
            if child.plan.kind == FRONTEND:
                self._close_listener()  # better refused than waiting for nobody
            needed = child.plan.kind != KVSTORE
            if needed and self.state is BoxState.STARTING and not self._start_failed.done():
                self._start_failed.set_result(child)
        self._reconsider()
        self.acts.note_change(child)
        self.models.note_change()
        self.models.tell_frontends()
        self._notify()

    def _reconsider(self) -> None:
        """ready or degraded, as the children are."""
        if self.state not in (BoxState.READY, BoxState.DEGRADED):
            return
        fatal = next((child for child in self.children.values() if child.state is State.FATAL), None)
        if fatal is not None:
            self.state, self.cause = BoxState.DEGRADED, fatal.failure_error().what
        elif self.acts.drained:
            names = self.acts.drained
            name, one = (names[0], "it") if len(names) == 1 else ("NAME", "one")
            back = f"`dynbox restart {name}` brings {one} back"
            self.state, self.cause = BoxState.DEGRADED, f"drained by request: {', '.join(names)}; {back}"
        else:
            self.state, self.cause = BoxState.READY, ""

    def _to(self, state: BoxState, cause: str = "") -> None:
        self.state, self.cause = state, cause
        self.events.add("error" if cause else "info", None, f"box {state}" + (f": {cause}" if cause else ""))

    def _notify(self) -> None:
        for watcher in self.watchers:
            watcher()

    def snapshot(self) -> BoxSnapshot:
        now = self._loop.time()
        info = BoxInfo(
            state=str(self.state),
            profile=self.plan.profile,
            endpoint=self.plan.endpoint,
            pid=os.getpid(),
            uptime_s=round(now - self._began, 3),
            run_id=str(self._run_id),
            run_dir=str(self._run_dir.root),
            logs_dir=str(self._logs),
            plan_digest=self.plan.digest,
            cause=self.cause,
        )
        return self._builder.build(info, self.events.recent, now)


async def _all_or_first_error(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Do all at once; the first error cancels the rest."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
