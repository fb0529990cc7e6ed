"""What a profile may say. Frozen; unknown keys are errors; sizes are bytes and durations seconds once loaded.

A mapping that is right by itself but asks for an impossible combination raises `Impossible` with all that is
wrong, so that loading can put each problem at its own line.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dynamo_box.profile.disagg import AdviseSettings, DisaggSettings, TargetSettings
from dynamo_box.profile.engine_options import (
    NATIVE_BATCH_TOKENS,
    accepted_by_the_mock,
    unknown_options,
    wrong_options,
)
from dynamo_box.profile.tiers import KvSettings, Tiers
from dynamo_box.profile.values import (
    Devices,
    Duration,
    IdleTtl,
    Impossible,
    Location,
    Name,
    OptionValue,
    PositiveSize,
    Section,
)

EngineName = Literal["native", "mock", "vllm", "sglang", "trtllm"]
RouterMode = Literal["kv", "round-robin", "random"]
CPU_ENGINES = frozenset({"native", "mock"})
SLEEPLESS_ENGINES = frozenset({"mock"})
"""To put a model of theirs to sleep means to stop its workers."""


class RoleWorkers(Section):
    """Workers of one role. A bare number stands for `replicas`."""

    replicas: int = Field(default=1, ge=1, le=256, description="How many workers.")
    devices: Devices = Field(
        default=None,
        validate_default=False,
        description='"cpu", how many GPUs these workers share out, or their indices. '
        "Default: the cpu for the native engine, else a GPU for each replica and rank.",
    )
    tensor_parallel: int = Field(default=1, ge=1, le=64, description="GPUs that one replica spans.")

    @model_validator(mode="after")
    def _possible(self) -> RoleWorkers:
        count = len(self.devices) if isinstance(self.devices, tuple) else self.devices
        if count == "cpu" and self.tensor_parallel > 1:
            raise Impossible((("tensor_parallel",), "tensor_parallel needs GPUs; there is one cpu device"))
        if isinstance(count, int) and count % self.tensor_parallel:
            text = f"{count} GPUs can't be shared out to replicas of tensor_parallel {self.tensor_parallel}"
            raise Impossible((("devices",), text))
        if isinstance(count, int) and count > self.replicas * self.tensor_parallel:
            need = f"{self.replicas} × {self.tensor_parallel}"
            text = f"{count} GPUs are more than {need} (replicas × tensor_parallel)"
            raise Impossible((("devices",), text))
        return self


class Workers(Section):
    """Aggregated workers, or prefill and decode workers. A bare number stands for aggregated replicas."""

    aggregated: RoleWorkers | None = Field(default=None, description="Workers that do prefill and decode.")
    prefill: RoleWorkers | None = Field(default=None, description="Workers that only compute prompts.")
    decode: RoleWorkers | None = Field(default=None, description="Workers that only generate.")

    @model_validator(mode="after")
    def _possible(self) -> Workers:
        problems: list[tuple[Location, str]] = []
        if self.aggregated and (self.prefill or self.decode):
            problems.append((("aggregated",), "a model has aggregated workers, or prefill and decode workers"))
        elif bool(self.prefill) != bool(self.decode):
            there, missing = ("prefill", "decode") if self.prefill else ("decode", "prefill")
            problems.append(((there,), f"{there} workers need {missing} workers beside them"))
        if problems:
            raise Impossible(*problems)
        return self

    @property
    def roles(self) -> tuple[tuple[str, RoleWorkers], ...]:
        """In start order; one aggregated worker where nothing is said."""
        named = (("prefill", self.prefill), ("decode", self.decode), ("aggregated", self.aggregated))
        return tuple((role, workers) for role, workers in named if workers) or (("aggregated", RoleWorkers()),)


class SleepPolicy(Section):
    """When models sleep. What a model says of its own goes before what the box says, key by key."""

    idle_ttl: IdleTtl = Field(
        default=None, description="Put a model to sleep after so long without requests. Default: never."
    )
    pin: bool = Field(default=False, description="Never put it to sleep for want of requests or for another's sake.")
    min_awake: Duration = Field(
        default=0.0,
        description="So long after waking it isn't put to sleep for want of requests or for another's sake.",
    )
    keep: Literal["device", "host", "disk"] = Field(default="host", description="Where the weights of a sleeper go.")

    @model_validator(mode="after")
    def _possible(self) -> SleepPolicy:
        if self.pin and self.idle_ttl is not None:
            raise Impossible((("idle_ttl",), "a pinned model never sleeps by itself; take out idle_ttl or pin"))
        return self


class ServedModel(Section):
    """A model and the workers that serve it. A bare name stands for a model of the catalogue or the store."""

    name: Name = Field(description="The name that clients ask for.")
    source: str = Field(
        default="",
        max_length=4096,
        description="A name of the catalogue or the store, pypi:…, hf:… or a path. Default: the name.",
    )
    engine: EngineName = Field(default="native", description="The engine of its workers.")
    options: dict[str, OptionValue] = Field(default={}, description="Settings of the engine's own.")
    simulated: dict[str, OptionValue] = Field(
        default={},
        description="Options of the mock engine that stands in with --simulate. Default: by the model's size.",
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens in a KV block.")
    context_length: int | None = Field(
        default=None, ge=1, description="Tokens of prompt and answer. Default: the model's."
    )
    max_batch: int = Field(default=32, ge=1, le=4096, description="Sequences that one worker runs at once.")
    kv_memory: PositiveSize | None = Field(
        default=None, description="KV memory of each worker, over memory.kv_per_worker."
    )
    workers: Workers = Field(default=Workers(), description="Workers by role.")
    sleep: SleepPolicy = Field(default=SleepPolicy(), description="Where this model differs from the box's `sleep`.")
    targets: TargetSettings = Field(default=TargetSettings(), description="How fast its answers are to be.")

    @property
    def origin(self) -> str:
        """What to pull: the source, or the name where there is none."""
        return self.source or self.name

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: dict[str, OptionValue], info: ValidationInfo) -> dict[str, OptionValue]:
        """A validator of the field, so that it speaks up even if other fields of the model are wrong."""
        engine = info.data.get("engine", "")  # not there if it is wrong itself
        unknown = tuple(((key,), text) for key, text in unknown_options(engine, options).items())
        wrong = [((key,), text) for key, text in wrong_options(engine, options).items()]
        if unknown or wrong:
            raise Impossible(*wrong, unknown=unknown)
        return options

    @field_validator("simulated")
    @classmethod
    def _accepted_by_the_mock(cls, options: dict[str, OptionValue]) -> dict[str, OptionValue]:
        return accepted_by_the_mock(options)

    @model_validator(mode="after")
    def _possible(self) -> ServedModel:
        if problems := self.problems():
            raise Impossible(*problems)
        return self

    def problems(self) -> list[tuple[Location, str]]:
        """What can't be together."""
        problems: list[tuple[Location, str]] = []
        for role, workers in self.workers.roles:
            at: Location = ("workers", role, "devices")
            if workers.devices == "cpu" and self.engine not in CPU_ENGINES:
                problems.append((at, f"the {self.engine} engine needs GPUs; native and mock run on the cpu"))
            if self.engine == "native" and workers.tensor_parallel > 1:
                problems.append((("workers", role, "tensor_parallel"), "the native engine has no tensor parallelism"))
        step = self.options.get("max_batch_tokens", NATIVE_BATCH_TOKENS)
        if self.engine == "native" and step < self.max_batch:
            text = f"max_batch_tokens {step} is below max_batch {self.max_batch}: each sequence takes a token a step"
            given = "max_batch_tokens" in self.options
            problems.append((("options", "max_batch_tokens") if given else ("max_batch",), text))
        if self.context_length is not None and self.context_length < self.block_size:
            text = f"a context of {self.context_length} tokens is shorter than a block of {self.block_size}"
            problems.append((("context_length",), text))
        if self.engine in SLEEPLESS_ENGINES and "keep" in self.sleep.model_fields_set:
            text = f"the {self.engine} engine can't sleep: its workers are stopped, which leaves nothing to keep"
            problems.append((("sleep", "keep"), text))
        return problems


class Topology(Section):
    """One way to lay out the model's workers. The first one that fits is taken."""

    name: str = Field(min_length=1, max_length=100, description="What people read.")
    workers: Workers = Field(description="Workers by role.")
    gpu_memory: PositiveSize | None = Field(
        default=None, description="Only for GPUs with at least so much memory each."
    )
    simulated: dict[str, OptionValue] = Field(default={}, description="Over those of the model.")

    @field_validator("simulated")
    @classmethod
    def _accepted_by_the_mock(cls, options: dict[str, OptionValue]) -> dict[str, OptionValue]:
        return accepted_by_the_mock(options)

    def of(self, model: ServedModel) -> ServedModel:
        """The model laid out this way."""
        simulated = {**model.simulated, **self.simulated}
        return model.model_copy(update={"workers": self.workers, "simulated": simulated})


class RouterSettings(Section):
    mode: RouterMode = Field(default="kv", description="How a worker is chosen.")
    overlap_weight: float = Field(
        default=1.0, ge=0, le=1000, description="What a cached prompt block counts (mode kv)."
    )
    temperature: float = Field(default=0.0, ge=0, le=100, description="0 takes the cheapest worker (mode kv).")
    lease_ttl: Duration = Field(
        default=300.0, gt=0, description="A request unheard of for so long no longer counts as load."
    )
    seed: int | None = Field(default=None, ge=0, description="Makes random choices repeatable.")


class FrontendSettings(Section):
    host: Literal["127.0.0.1", "::1", "localhost"] = Field(default="127.0.0.1", description="Loopback only.")
    port: int = Field(default=8000, ge=1, le=65535)
    max_queue: int = Field(
        default=1024, ge=1, le=1_000_000, description="Requests that may wait or run; one more gets a 503."
    )
    max_body: PositiveSize = Field(default=8 * 1024 * 1024, description="Largest request body.")
    discovery_timeout: Duration = Field(default=10.0, description="Longest wait for a router or a worker to appear.")
    max_waking: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Requests that may wait for one sleeping model; one more gets a 503.",
    )
    wake_timeout: Duration = Field(default=120.0, gt=0, description="Longest wait of a request for a sleeping model.")
    max_generation: Duration = Field(
        default=3600.0, gt=0, description="The longest that a request may take, waiting included; then it ends."
    )


class Memory(Section):
    host: PositiveSize | None = Field(
        default=None, description="All the box may use. Default: 90 % of what is available."
    )
    cpu: PositiveSize | None = Field(default=None, description="Of that, the cpu device's. Default: 80 %.")
    device_fraction: float = Field(default=0.9, gt=0, le=1, description="Of each GPU's memory.")
    kv_per_worker: PositiveSize | None = Field(default=None, description="KV memory of each worker.")
    tiers: Tiers = Field(default=Tiers(), description="KV below the engines' own pools; one set for the whole box.")

    @model_validator(mode="after")
    def _possible(self) -> Memory:
        if self.host is not None and self.cpu is not None and self.cpu > self.host:
            raise Impossible((("cpu",), "the cpu device's budget is part of memory.host, and larger than it"))
        return self


class Restart(Section):
    first: Duration = Field(default=0.5, gt=0, description="Wait before the first restart.")
    factor: float = Field(default=2.0, ge=1, le=100, description="What the wait grows by.")
    longest: Duration = Field(default=30.0, gt=0, description="What it grows to.")
    stable: Duration = Field(default=60.0, gt=0, description="So long ready, and the wait starts over.")
    give_up_after: int = Field(default=5, ge=1, le=1000, description="Failures in a row.")
    silence: Duration = Field(
        default=20.0, ge=5, description="A ready process without a sign of life for so long is frozen, and killed."
    )

    @model_validator(mode="after")
    def _possible(self) -> Restart:
        if self.longest < self.first:
            raise Impossible((("longest",), f"the longest wait is shorter than the first ({self.first:g} s)"))
        return self


class SimulatedDevices(Section):
    name: str = Field(default="simulated GPU", min_length=1, max_length=200)
    count: int = Field(default=1, ge=1, le=256)
    memory: PositiveSize = Field(description="Of each device.")


class Simulate(Section):
    """Hardware that isn't there; only the mock engine runs on it."""

    devices: tuple[SimulatedDevices, ...] = Field(min_length=1)


class Profile(Section):
    """A Dynamo Box profile."""

    name: Name = Field(default="", validate_default=False, description="Default: the file's name.")
    description: str = Field(default="", max_length=1000)
    model: ServedModel | None = Field(default=None, description="The one model.")
    models: tuple[ServedModel, ...] = Field(
        default=(), max_length=64, description="Several models, in place of `model`."
    )
    topologies: tuple[Topology, ...] = Field(
        default=(), max_length=16, description="In place of the model's `workers`: the first that fits is planned."
    )
    router: RouterSettings = RouterSettings()
    frontend: FrontendSettings = FrontendSettings()
    disagg: DisaggSettings = Field(
        default=DisaggSettings(), description="When prefill and decode workers share a request."
    )
    advise: AdviseSettings = AdviseSettings()
    memory: Memory = Memory()
    kv: KvSettings = Field(default=KvSettings(), description="What goes into the KV tiers.")
    sleep: SleepPolicy = Field(
        default=SleepPolicy(), description="When models sleep, where they don't say it themselves."
    )
    restart: Restart = Restart()
    drain: Duration = Field(default=30.0, description="Longest wait for running requests at the end.")
    simulate: Simulate | None = Field(
        default=None, description="Plan for this hardware in place of the GPUs that are here."
    )

    @property
    def served(self) -> tuple[ServedModel, ...]:
        return (self.model,) if self.model else self.models

    def sleep_of(self, model: ServedModel) -> SleepPolicy:
        """The box's policy with what the model says in its place. A model that is pinned doesn't inherit `idle_ttl`."""
        own = {key: getattr(model.sleep, key) for key in model.sleep.model_fields_set}
        if own.get("pin"):
            own["idle_ttl"] = None
        return self.sleep.model_copy(update=own)

    @model_validator(mode="after")
    def _possible(self) -> Profile:
        problems: list[tuple[Location, str]] = []
        if self.model and self.models:
            problems.append((("models",), "a profile has `model` or `models`, not both"))
        elif not self.served:
            problems.append(((), "names no model: add `model: NAME`, or a list `models:`"))
        seen: set[str] = set()
        for index, model in enumerate(self.models):
            if model.name in seen:
                problems.append((("models", index, "name"), f'two models are called "{model.name}"'))
            seen.add(model.name)
        for index, model in enumerate(self.served):
            inherits_pin = self.sleep.pin and "pin" not in model.sleep.model_fields_set
            if inherits_pin and model.sleep.idle_ttl is not None:
                at: Location = ("model",) if self.model else ("models", index)
                text = "the box's `sleep` pins every model; say pin: false beside this idle_ttl, or take it out"
                problems.append(((*at, "sleep", "idle_ttl"), text))
        problems += self._topology_problems()
        if self.simulate:
            for index, model in enumerate(self.served):
                at = ("model",) if self.model else ("models", index)
                if model.engine != "mock":
                    problems.append(((*at, "engine"), f"simulated devices carry the mock engine, not {model.engine}"))
        if problems:
            raise Impossible(*problems)
        return self

    def _topology_problems(self) -> list[tuple[Location, str]]:
        if not self.topologies:
            return []
        if self.model is None:
            return [(("topologies",), "topologies lay out the workers of one model; say `model`, not `models`")]
        problems: list[tuple[Location, str]] = []
        if "workers" in self.model.model_fields_set:
            text = "the workers are said twice: here and in `topologies`; take one out"
            problems.append((("model", "workers"), text))
        seen: set[str] = set()
        for index, topology in enumerate(self.topologies):
            if topology.name in seen:
                problems.append((("topologies", index, "name"), f'two topologies are called "{topology.name}"'))
            seen.add(topology.name)
            laid_out = topology.of(self.model).problems()
            problems += [(("topologies", index, *at), text) for at, text in laid_out if at[0] == "workers"]
        return problems
