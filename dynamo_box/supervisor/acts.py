"""What people may ask of the processes of a running box: restart or drain one, change its role or a setting, cancel a
request.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping

from dynamo_box.errors import BoxError, NotRunning, UsageError
from dynamo_box.protocol import status
from dynamo_box.supervisor.child import Child

FRONTEND = "frontend"
WORKER = "worker"
ROUTER = "router"
ROLES = ("prefill", "decode", "aggregated")
RESTARTED, DRAINED, REASSIGNED = "restarted", "drained", "given another role"
COMMAND_TIMEOUT_S = 10.0


class Acts:
    """`why_not` says why the box can't be acted on now, "" when it can, `why_not_child` the same of one process;
    `before_start` is called with a child that is
    about to stop and start again, and may raise a BoxError; `emit(level, process, text)` adds to the event list;
    `changed` is called when `drained` has grown.
    """

    def __init__(
        self,
        children: Mapping[str, Child],
        *,
        why_not: Callable[[], str],
        why_not_child: Callable[[Child], str],
        before_start: Callable[[Child], None],
        emit: Callable[[str, str, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._children = children
        self._why_not = why_not
        self._why_not_child = why_not_child
        self._before_start = before_start
        self._emit = emit
        self._changed = changed
        self._under_way: dict[str, str] = {}
        self._drained: dict[str, None] = {}
        self._settings: dict[str, str] = {}
        self._settled: int | None = None

    @property
    def drained(self) -> tuple[str, ...]:
        """Workers that were stopped by request and not restarted since, in that order."""
        return tuple(self._drained)

    async def restart(self, name: str, drain_s: float) -> str:
        """Drain, stop and start one process; on return it is ready. In words for people.

        Raises:
            BoxError: it didn't come back, or this is no time for it.
        """
        child = self._child(name)
        with self.alone(name, RESTARTED):
            self._emit("info", name, "restart was asked for")
            self._before_start(child)
            if unfinished := await child.stop(drain_s):
                self._emit("warning", name, f"stopped with {_requests(unfinished)} unfinished")
            self.check_is_up()
            self._drained.pop(name, None)
            child.start()
            await child.wait_ready()
        return f"{name} is ready"

    async def drain(self, name: str, drain_s: float) -> str:
        """Let a worker finish what it runs, for at most `drain_s`, and stop it for good; on return nothing of it is
        left. With 0 it also ends a drain that is under way. In words for people.

        Raises:
            UsageError: it is no worker: without its router or frontend the box would serve nobody.
            BoxError: this is no time for it.
        """
        child = self._child(name)
        if child.plan.kind != WORKER:
            raise UsageError(
                f"{name} can't be drained: only workers can",
                remedy=f"`dynbox restart {name}` replaces it without losing a request, `dynbox down` stops the box",
            )
        back = f"`dynbox restart {name}` brings it back"
        if drain_s == 0 and self._under_way.get(name) == DRAINED:
            self._emit("info", name, "the drain was cut short")
            return f"{name} is {_outcome(await child.stop(0))}; {back}"
        with self.alone(name, DRAINED):
            if name in self._drained:
                return f"{name} was drained already; {back}"
            self._emit("info", name, f"drain was asked for (running requests get {drain_s:g} s)")
            unfinished = await child.stop(drain_s)
            self.check_is_up()
            self._drained[name] = None
            self._changed()
            self._emit("warning" if unfinished else "info", name, f"{_outcome(unfinished)}; {back}")
        return f"{name} is {_outcome(unfinished)}; {back}"

    @property
    def under_way(self) -> str:
        """What is being done to a process now, in words; "" for nothing."""
        return next((f"{name} is being {done}" for name, done in self._under_way.items()), "")

    def forget(self, name: str) -> None:
        """It is no process of this box any more."""
        self._drained.pop(name, None)

    async def set_role(self, name: str, role: str, drain_s: float) -> str:
        """Let a worker finish what it runs, for at most `drain_s`, and serve in another role, with its weights where
        they are; on return it does. In words for people.

        Raises:
            UsageError: it is no worker, or there is no such role.
            BoxError: it serves on as before, or this is no time for it.
        """
        child = self._child(name)
        if child.plan.kind != WORKER:
            raise UsageError(f"{name} has no role: only workers have", remedy="`dynbox ps` shows which are")
        if role not in ROLES:
            raise UsageError(f"there is no role {role!r}", remedy=f"there are {', '.join(ROLES)}")
        with self.alone(name, REASSIGNED):
            was = child.plan.role
            if was == role:
                return f"{name} serves as {role} already"
            self._emit("info", name, f"is to serve as {role} (running requests get {drain_s:g} s)")
            answer = await child.set_role(role, drain_s)
            if answer.error:
                self._emit("warning", name, f"goes on as {was}: {answer.error}")
                raise BoxError(f"{name} goes on as {was}: {answer.error}")
            self.check_is_up()
            self._emit("info", name, f"serves as {role}, was {was}")
        return f"{name} serves as {role}, was {was}"

    async def set_option(self, name: str, key: str, value: str) -> str:
        """What is set of the router stays set when it is restarted.

        Raises:
            BoxError: the process refuses, or can't be asked.
        """
        child = self._child(name)
        text = await self._ask(child, lambda number: status.Set(number, key, value))
        if child.plan.kind == ROUTER:
            self._settings[key] = text.removeprefix(f"{key} ")
            self._settled = child.pid
        return text

    def note_change(self, child: Child) -> None:
        """A router in a new life hears what was set in an earlier one. Its answers are nobody's."""
        if child.plan.kind == ROUTER and self._settings and child.is_ready and child.pid != self._settled:
            self._settled = child.pid
            for key, value in self._settings.items():
                child.tell(status.Set(0, key, value))

    async def cancel(self, request_id: str) -> str:
        """Cancel a live request at the frontend, which knows all of them."""
        frontend = next((child for child in self._children.values() if child.plan.kind == FRONTEND), None)
        if frontend is None:
            raise NotRunning("this box has no frontend")
        return await self._ask(frontend, lambda number: status.CancelRequest(number, request_id))

    async def _ask(self, child: Child, make: Callable[[int], status.Set | status.CancelRequest]) -> str:
        answer = await child.command(make, COMMAND_TIMEOUT_S)
        if answer.error:
            raise BoxError(f"{child.name}: {answer.error}")
        return answer.text

    def _child(self, name: str) -> Child:
        """Raises NotRunning, with the nearest names, when there is none."""
        found = self._children.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._children, n=3)
            names = ", ".join(near or self._children)
            raise NotRunning(
                f"there is no process {name!r} in this box",
                remedy=f"{'did you mean' if near else 'there are'}: {names}",
            )
        return found

    @contextlib.contextmanager
    def alone(self, name: str, done: str) -> Iterator[None]:
        """One act on a process at a time; `done` is what it is being."""
        self.check_is_up()
        if why_not := self._why_not_child(self._children[name]):
            raise BoxError(f"{name} can't be {done}: its model {why_not}")
        if under_way := self._under_way.get(name):
            remedy = "`dynbox ps` shows how far that is"
            if under_way == DRAINED:
                remedy += f", `dynbox drain {name} --drain 0` cuts it short"
            raise BoxError(f"{name} is being {under_way} already", remedy=remedy)
        self._under_way[name] = done
        try:
            yield
        finally:
            del self._under_way[name]

    def check_is_up(self) -> None:
        """Raises:
        BoxError: the box starts or stops.
        """
        if why_not := self._why_not():
            raise BoxError(why_not, remedy="processes can be restarted and drained while it is ready")


def _outcome(unfinished: int) -> str:
    """What became of a worker that was to finish its requests."""
    return f"stopped with {_requests(unfinished)} unfinished" if unfinished else "drained"


def _requests(count: int) -> str:
    return f"{count} {'request' if count == 1 else 'requests'}"
