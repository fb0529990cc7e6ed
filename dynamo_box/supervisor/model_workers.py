"""All workers of a model at once: brought to rest, woken, or started anew. Each of these takes all of them or fails."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.protocol import status
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.states import State

WAKE_DEADLINE_S = 60.0


async def rest(
    workers: Sequence[Child], drain_s: float, *, why_cancelled: str, engine_sleeps: bool
) -> dict[Child, status.Slept]:
    """Bring all to rest, or none: asleep (with what they gave back), or stopped where the engine can't sleep.

    `why_cancelled` is what requests are told that still run; without it they are waited for.

    Raises:
        BoxError: requests still run; all serve on.
    """
    ready = [worker for worker in workers if worker.is_ready]
    outcomes = await asyncio.gather(
        *(worker.sleep(drain_s, force=bool(why_cancelled), why=why_cancelled) for worker in ready),
        return_exceptions=True,
    )
    slept: dict[Child, status.Slept] = {}
    problem: BoxError | None = None
    for worker, outcome in zip(ready, outcomes, strict=True):
        if isinstance(outcome, status.Slept) and not outcome.error:
            slept[worker] = outcome
        elif isinstance(outcome, status.Slept):
            problem = TimedOut(
                f"{worker.name}: {outcome.error}",
                remedy="wait longer with --drain SECONDS, or cancel them with --force",
            )
        elif isinstance(outcome, NotRunning | TimedOut):
            continue  # it is dead or dying: nothing of it is left to sleep
        elif isinstance(outcome, BaseException):
            raise outcome
    if problem is not None:
        await asyncio.gather(*(worker.wake(WAKE_DEADLINE_S) for worker in slept), return_exceptions=True)
        raise problem
    if not engine_sleeps:
        await asyncio.gather(*(worker.stop(0) for worker in workers if worker.state is not State.FATAL))
        return {}
    await asyncio.gather(*(worker.stop(0) for worker in _on_their_way(workers)))
    return slept


def _on_their_way(workers: Sequence[Child]) -> list[Child]:
    """Up or down: waking starts them anew."""
    at_rest = (State.ASLEEP, State.STOPPED, State.PLANNED, State.FATAL)
    return [worker for worker in workers if worker.state not in at_rest]


async def wake(workers: Sequence[Child], stay_down: Collection[str]) -> dict[str, float]:
    """Those that sleep wake, those that were stopped start unless they `stay_down`; the phases of the slowest.

    Raises:
        BoxError: one of those that slept couldn't wake.
    """
    asleep = [worker for worker in workers if worker.state is State.ASLEEP]
    down = [
        worker
        for worker in workers
        if worker.state in (State.STOPPED, State.PLANNED, State.FATAL) and worker.name not in stay_down
    ]
    for worker in down:
        worker.start()
    outcomes = await asyncio.gather(
        *(_wake_one(worker) for worker in asleep),
        *(_started_in(worker) for worker in down),
        return_exceptions=True,
    )
    failed = next((one for one in outcomes if isinstance(one, BaseException)), None)
    if failed is not None:
        raise failed
    return slowest([one for one in outcomes if isinstance(one, dict)])


async def _wake_one(worker: Child) -> dict[str, float]:
    woken = await worker.wake(WAKE_DEADLINE_S)
    if woken.error:
        raise BoxError(f"{worker.name}: {woken.error}")
    return woken.phases


async def _started_in(worker: Child) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await worker.wait_ready()
    return {"start": loop.time() - began}


async def start_cold(workers: Sequence[Child], stay_down: Collection[str]) -> None:
    """All anew; they map what is committed, or load from the model's source.

    Raises:
        BoxError: one was given up.
    """
    wanted = [worker for worker in workers if worker.name not in stay_down]
    await asyncio.gather(*(worker.stop(0) for worker in wanted))
    for worker in wanted:
        worker.start()
    for worker in wanted:
        await worker.wait_ready()


def slowest(phases: Sequence[dict[str, float]]) -> dict[str, float]:
    """The phases, in seconds, of the worker that took longest."""
    none: dict[str, float] = {}
    return max(phases, key=lambda one: sum(one.values()), default=none)
