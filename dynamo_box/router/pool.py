"""One model as the router sees it: its workers, what they hold and what runs on them.

Workers come and go twice over: `join` and `leave` follow the instance directory, `connect` and `disconnect` the
connection. Only a connected worker is placed on. A lost connection drops what is known of the worker's cache but keeps
its load: the requests that run there don't end with our connection.

A worker that withdraws and keeps its connection isn't placed on either, but everything that is known of it stays right
(its events still come), so it is there again in full when it is announced again, in another role or the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.request import Leg
from dynamo_box.protocol.route import Place
from dynamo_box.protocol.spec import ModelSpec
from dynamo_box.router.index import KvIndex
from dynamo_box.router.legs import AGGREGATED, DECODE, PREFILL, Legs
from dynamo_box.router.load import WorkerLoad
from dynamo_box.router.predictions import Predictions

ROLES = (PREFILL, DECODE, AGGREGATED)
EXCLUDED = ", all of them excluded by the request"


@dataclass(slots=True, eq=False)
class Worker:
    """One life of a worker process."""

    instance: Instance
    load: WorkerLoad = field(default_factory=WorkerLoad)
    predictions: Predictions = field(default_factory=Predictions)
    connected: bool = False
    withdrawn: bool = False

    @property
    def serves(self) -> bool:
        return self.connected and not self.withdrawn


class Pool:
    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.index = KvIndex()
        self.workers: dict[str, Worker] = {}
        self.turns: dict[Leg, str] = {}
        """Who was chosen last for each leg."""

    # workers

    def join(self, instance: Instance) -> str:
        """Know a worker; "" or why its announcement doesn't fit this model."""
        if instance.block_size != self.spec.block_size:
            return (
                f"{instance.name} has blocks of {instance.block_size} tokens, "
                f"the model {instance.model} of {self.spec.block_size}"
            )
        if instance.fingerprint != self.spec.fingerprint:
            return f"{instance.name} serves other weights under the name {instance.model}"
        if instance.role not in ROLES:
            return f"{instance.name} has the role {instance.role!r}; there are {', '.join(ROLES)}"
        self.workers[instance.name] = Worker(instance)
        return ""

    def leave(self, name: str) -> None:
        """Forget a worker, its cache and its load, in a time that doesn't depend on their size."""
        self.index.forget(name)
        del self.workers[name]

    def withdraw(self, name: str) -> None:
        self.workers[name].withdrawn = True

    def announce_again(self, instance: Instance) -> None:
        """The same life of a worker, perhaps in another role."""
        worker = self.workers[instance.name]
        worker.instance = instance
        worker.withdrawn = False

    def connect(self, name: str) -> None:
        self.workers[name].connected = True

    def disconnect(self, name: str) -> None:
        worker = self.workers[name]
        worker.connected = False
        worker.predictions = Predictions()
        self.index.forget(name)

    # what placement asks

    @property
    def split(self) -> bool:
        """Whether a worker is there for one leg alone, be it that it can't be reached just now."""
        return any(worker.instance.role != AGGREGATED for worker in self.workers.values() if not worker.withdrawn)

    def serving(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.serves]

    def candidates(self, place: Place) -> list[Worker]:
        """Workers that this request may go to, whatever their role."""
        return [
            worker
            for name, worker in self.workers.items()
            if worker.serves and name not in place.exclude and place.pin in (None, name)
        ]

    def note_turns(self, legs: Legs) -> None:
        if legs.prefill is None:
            self.turns["whole"] = legs.decode.option.worker
        else:
            self.turns["prefill"], self.turns["decode"] = legs.prefill.option.worker, legs.decode.option.worker

    def why_nobody(self, place: Place) -> str:
        """Why there is no candidate."""
        if place.pin is not None:
            return f"worker {place.pin} doesn't serve {place.model} now"
        serving = len(self.serving())
        return f"{_workers(serving)} {place.model} now{EXCLUDED if serving else ''}"

    def why_nobody_for(self, leg: Leg, place: Place) -> str:
        """Why a request that may only go in two legs can't: nobody is there for this one."""
        able = [worker for worker in self.serving() if worker.instance.role in (leg, AGGREGATED)]
        left = [worker.instance.name for worker in able if worker.instance.name not in place.exclude]
        if left:
            reason = f"{left[0]} alone would have to take both legs"
        else:
            reason = f"{_workers(len(able), f'{leg} ')} {place.model} now{EXCLUDED if able else ''}"
        return f"strict: {reason}; start one (`dynbox scale`), or set the policy to fallback"


def _workers(count: int, kind: str = "") -> str:
    return f"{count or 'no'} {kind}{'workers serve' if count > 1 else 'worker serves'}"
