"""What a profile may say of prefill here and decode there: the policy (`disagg`), and what a model is to be
(`targets`).
"""

from __future__ import annotations

from pydantic import Field, model_validator

from dynamo_box.profile.values import Duration, Impossible, Latency, Location, Section
from dynamo_box.protocol.kv import LONGEST_HOLD_S
from dynamo_box.protocol.spec import Disagg, DisaggPolicy

DEFAULTS = Disagg()
MAX_TOKENS = 2**31
"""The largest threshold that the router takes."""
THRESHOLDS = ("min_uncached_tokens", "min_uncached_share", "max_prefill_tokens")


class DisaggSettings(Section):
    """When prompts are computed on prefill workers and answers on decode workers."""

    policy: DisaggPolicy = Field(
        default=DEFAULTS.policy,
        description="strict: always in two legs, else an error. fallback: in two where that works, else in one. "
        "conditional: in two where it pays, by the thresholds below.",
    )
    min_uncached_tokens: int = Field(
        default=DEFAULTS.min_uncached_tokens,
        ge=0,
        le=MAX_TOKENS,
        description="Tokens of a prompt that must be computed, for two legs (policy conditional).",
    )
    min_uncached_share: float = Field(
        default=DEFAULTS.min_uncached_share,
        ge=0,
        le=1,
        description="The share of a prompt that must be computed, for two legs (policy conditional).",
    )
    max_prefill_tokens: int = Field(
        default=DEFAULTS.max_prefill_tokens,
        ge=0,
        le=MAX_TOKENS,
        description="A prefill worker with more to compute than that gets no more (policy conditional).",
    )

    transfer_lease: Duration = Field(
        default=30.0,
        gt=0,
        le=LONGEST_HOLD_S,
        description="How long a prompt's KV is held in the host tier for the decode worker; then it may be evicted.",
    )

    @model_validator(mode="after")
    def _possible(self) -> DisaggSettings:
        given = [name for name in THRESHOLDS if name in self.model_fields_set]
        if self.policy != "conditional" and given:
            text = f"policy {self.policy} has no thresholds; take {'it' if len(given) == 1 else 'them'} out, or set "
            problems: list[tuple[Location, str]] = [((name,), f"{text}policy: conditional") for name in given]
            raise Impossible(*problems)
        return self


class TargetSettings(Section):
    """What 99 of a hundred requests of a model are to stay below; `dynbox advise` goes by it."""

    ttft: Latency | None = Field(default=None, gt=0, description="Time to the first token.")
    itl: Latency | None = Field(default=None, gt=0, description="Time between two tokens.")


class AdviseSettings(Section):
    """What the box does with advice (`dynbox advise`)."""

    auto: bool = Field(default=False, description="Follow it without being asked, one change at a time.")
    lasting: Duration = Field(default=30.0, gt=0, description="Only advice that has been the same for so long.")
    settle: Duration = Field(
        default=60.0, gt=0, description="So long after the last change; five times as long to undo it."
    )
