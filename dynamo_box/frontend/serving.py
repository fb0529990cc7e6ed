"""What the endpoints share: the models, the way to their workers, and whether they can answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend import errors
from dynamo_box.frontend.asking import Asking
from dynamo_box.frontend.execution import Execution
from dynamo_box.frontend.health import Health, what_still_works
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.placing import Placing
from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.frontend.requests import LiveRequest, Requests
from dynamo_box.frontend.routing import RouterClient
from dynamo_box.frontend.sleepers import Sleepers
from dynamo_box.frontend.stats import Stats
from dynamo_box.frontend.tier_metrics import TierMetrics
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.frontend.workers import Workers
from dynamo_box.paths import RunDir
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.spec import FrontendSpec
from dynamo_box.protocol.status import ChildMessage


class Serving:
    """`tell` takes messages for the supervisor."""

    def __init__(
        self,
        spec: FrontendSpec,
        run_dir: RunDir,
        tokenizers: dict[str, ModelTokenizer],
        tell: Callable[[ChildMessage], None],
    ) -> None:
        self.spec = spec
        self.tokenizers = tokenizers
        self.router = RouterClient(run_dir.router_socket)
        self.workers = Workers(run_dir.instances)
        self.stats = Stats()
        self.tier_metrics = TierMetrics({model.name: model.block_size for model in spec.models})
        self.stats.metrics.registry.register(self.tier_metrics)
        self.stats.metrics.simulated.set(spec.simulated)
        self.requests = Requests(
            self.stats,
            max_live=spec.max_queue,
            stall_limit_s=spec.stall_limit_s,
            max_generation_s=spec.max_generation_s,
        )
        self.asking = Asking(tell)
        self.sleepers = Sleepers(
            self.asking,
            self.stats.metrics,
            max_waking=spec.max_waking,
            wake_timeout_s=spec.wake_timeout_s,
            on_change=self._on_residencies,
        )
        self.placing = Placing(self.router, self.workers, self.sleepers, discovery_timeout_s=spec.discovery_timeout_s)

    @property
    def models(self) -> tuple[str, ...]:
        """Those that can answer now, in the profile's order."""
        served = self.workers.served_models if self.router.connected.is_set() else set()
        return tuple(model.name for model in self.spec.models if model.name in served)

    @property
    def listed(self) -> tuple[str, ...]:
        """Those that can answer now, or once they have woken."""
        served = self.models
        return tuple(name for name in self.tokenizers if name in served or self.sleepers.is_sleeping(name))

    @property
    def sleeping(self) -> tuple[str, ...]:
        return tuple(name for name in self.tokenizers if self.sleepers.is_sleeping(name))

    def health(self) -> Health:
        """How well this server can answer for its models. One that sleeps is no reason to call it unhealthy."""
        sleeping = self.sleeping
        reasons: list[str] = []
        notes: list[str] = []
        roles: dict[str, dict[str, int]] = {}
        for model in self.spec.models:
            there = self.workers.roles(model.name)
            if there:
                roles[model.name] = there
            elif model.name not in sleeping:
                reasons.append(f"no worker serves {model.name}")
            policy = self.router.policy
            if text := what_still_works(there, policy):
                (reasons if policy == "strict" else notes).append(f"{model.name}: {text}")
        if not self.router.connected.is_set():
            reasons.append("the router is not connected")
        if self.requests.draining:
            reasons.append(errors.STOPPING)
        return Health(
            reasons=reasons,
            models=self.models,
            roles=roles,
            notes=notes,
            sleeping=sleeping,
            simulated=self.spec.simulated,
        )

    def require_model(self, name: str) -> None:
        """
        Raises:
            ApiError: there is none of that name (404).
        """
        if name not in self.tokenizers:
            raise errors.unknown_model(name, self.tokenizers)

    async def instance_of(self, task: Task, live: LiveRequest) -> Instance:
        """Any worker of the model, waiting for one for a bounded time, and before that for the model to wake.

        Raises:
            ApiError: none came (503), or the request is pinned to one that there isn't (400).
        """
        instance = None
        while instance is None:
            await self.sleepers.wait_until_awake(live)
            instance = await self._discover(task.model)
        if task.pin is not None and task.pin not in self.workers.announced(task.model):
            self.workers.look_again()  # whoever asks for it may have heard that it is ready sooner than the watch
        there = self.workers.announced(task.model)
        if task.pin is not None and task.pin not in there:
            raise errors.invalid_request(
                f"'nvext.backend_instance_id' names {task.pin!r}, but {task.model} has {', '.join(there)}",
                "nvext.backend_instance_id",
            )
        return instance

    async def _discover(self, model: str) -> Instance | None:
        """Any worker of the model; None if the model falls asleep meanwhile.

        Raises:
            ApiError: none came in time (503).
        """
        deadline = time.monotonic() + self.spec.discovery_timeout_s
        while not self.sleepers.is_sleeping(model):
            instance = self.workers.instance_of(model)
            if instance is not None:
                return instance
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                residency = self.sleepers.residency(model)
                note = f" ({residency.note})" if residency is not None and residency.note else ""
                raise errors.unavailable(f"no worker serves {model} now{note}; see `dynbox ps`")
            await self.workers.wait_for_change(left_s)
        return None

    def _on_residencies(self, residencies: Iterable[Residency]) -> None:
        """Models that have just woken have announced their workers: they are looked for at once."""
        served = self.workers.served_models
        if any(each.state == "awake" and each.model not in served for each in residencies):
            self.workers.look_again()
        self.workers.note_change()

    def context_length(self, instance: Instance) -> int:
        """Tokens of prompt and answer together: what both the plan and the worker allow."""
        planned = next(model.context_length for model in self.spec.models if model.name == instance.model)
        return min(planned, instance.context_length)

    def execution(self, task: Task, prompt: Prompt, live: LiveRequest) -> Execution:
        return Execution(
            task,
            prompt,
            live,
            placing=self.placing,
            sleepers=self.sleepers,
            metrics=self.stats.metrics,
            transfer_ttl_s=self.spec.transfer_ttl_s,
        )
