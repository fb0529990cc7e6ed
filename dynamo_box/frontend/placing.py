"""Where a request goes: the router is asked, and asked again for as long as a worker may still come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.losses import FellAsleep, NotTaken
from dynamo_box.frontend.routing import Lease, RouterClient, RouterGone
from dynamo_box.frontend.sleepers import Sleepers
from dynamo_box.frontend.workers import WorkerConnection, Workers
from dynamo_box.protocol.route import Place, Unplaced

CONNECTION_WAIT_S = 2.0
"""The router may learn of a worker a moment before this process has connected to it."""

ASK_AGAIN_S = 0.1
FIRST_ASK_AGAIN_S = 0.005
"""A router that has no worker for a model looks for one at once and needs a moment to connect."""

SHORTEST_ANSWER_WAIT_S = 1.0
"""Asked at the very deadline, a router that lives still gets to say why it has no place."""

ROUTER_SILENT = "the router doesn't answer; see `dynbox ps`"


class Placing:
    """What all requests share."""

    def __init__(
        self, router: RouterClient, workers: Workers, sleepers: Sleepers, *, discovery_timeout_s: float
    ) -> None:
        self.workers = workers
        self._router = router
        self._sleepers = sleepers
        self._discovery_timeout_s = discovery_timeout_s

    async def place(self, place: Place, exclude: Callable[[], tuple[str, ...]]) -> Lease:
        """Wait for a place, for a bounded time; `exclude` is asked each time.

        Raises:
            ApiError: there is none, or the router does not answer.
            FellAsleep: there is no use in waiting for a worker.
        """
        deadline = time.monotonic() + self._discovery_timeout_s
        pause_s = FIRST_ASK_AGAIN_S
        while True:
            self._require_awake(place.model)
            left_s = deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(left_s, SHORTEST_ANSWER_WAIT_S)):
                    reply = await self._router.place(msgspec.structs.replace(place, exclude=exclude()))
            except TimeoutError as error:
                raise errors.unavailable(ROUTER_SILENT) from error
            except RouterGone as error:
                if left_s <= 0:
                    raise errors.unavailable(ROUTER_SILENT) from error
                await self._router.wait_until_connected(left_s)
                continue
            if isinstance(reply, Lease):
                return reply
            if left_s <= 0 or not self._may_come(reply, place):
                raise _refusal(reply, place.model)
            await self.workers.wait_for_change(min(left_s, pause_s))
            pause_s = min(2 * pause_s, ASK_AGAIN_S)

    async def connection(self, model: str, worker: str) -> WorkerConnection:
        """The connection to a worker that the router knows.

        Raises:
            NotTaken: there is none, even after a moment.
        """
        deadline = time.monotonic() + CONNECTION_WAIT_S
        while (connection := self.workers.connection(worker)) is None:
            left_s = deadline - time.monotonic()
            self._require_awake(model)
            if left_s <= 0:
                raise NotTaken("it can't be reached")
            await self.workers.wait_for_change(left_s)
        return connection

    def _require_awake(self, model: str) -> None:
        if self._sleepers.is_sleeping(model):
            raise FellAsleep("the model went to sleep")

    def _may_come(self, reply: Unplaced, place: Place) -> bool:
        """May the router find what it lacks now? The worker that is asked for, if it is announced, in a moment."""
        if reply.code == "pinned_worker_gone":
            return place.pin in self.workers.names
        return reply.code == "no_workers"


def _refusal(reply: Unplaced, model: str) -> ApiError:
    match reply.code:
        case "unknown_model":
            return errors.unavailable(f"the router does not know {model}: {reply.reason}")
        case "bad_request":
            return errors.invalid_request(reply.reason)
        case "pinned_worker_gone":
            return errors.invalid_request(reply.reason, "nvext.backend_instance_id")
        case "no_workers":
            return errors.unavailable(reply.reason)
