"""The policy as people write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.protocol.spec import Disagg
from dynamo_box.router.disagg import MAX_TOKENS, POLICIES, describe, parse, problem

NOW = Disagg("conditional", min_uncached_tokens=100, min_uncached_share=0.25, max_prefill_tokens=7)

settings = st.builds(
    Disagg,
    policy=st.sampled_from(POLICIES),
    min_uncached_tokens=st.integers(0, MAX_TOKENS),
    min_uncached_share=st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
    max_prefill_tokens=st.integers(0, MAX_TOKENS),
)


@pytest.mark.parametrize(
    ("text", "becomes", "described"),
    [
        ("strict", Disagg("strict", 100, 0.25, 7), "strict"),
        (" fallback ", Disagg("fallback", 100, 0.25, 7), "fallback"),
        ("conditional", NOW, "conditional:min_uncached_tokens=100,min_uncached_share=0.25,max_prefill_tokens=7"),
        (
            "conditional:min_uncached_tokens=512, min_uncached_share = 1,max_prefill_tokens=0",
            Disagg("conditional", 512, 1.0, 0),
            "conditional:min_uncached_tokens=512,min_uncached_share=1,max_prefill_tokens=0",
        ),
        (
            "conditional:min_uncached_share=0",
            Disagg("conditional", 100, 0.0, 7),
            "conditional:min_uncached_tokens=100,min_uncached_share=0,max_prefill_tokens=7",
        ),
    ],
)
def test_what_is_not_named_stays(text: str, becomes: Disagg, described: str) -> None:
    assert parse(text, NOW) == becomes
    assert describe(becomes) == described


def test_thresholds_outlast_a_policy_that_has_none() -> None:
    assert parse("conditional", parse("strict", NOW)) == NOW


@given(settings, settings)
def test_what_is_described_can_be_set(wanted: Disagg, now: Disagg) -> None:
    after = parse(describe(wanted), now)
    assert describe(after) == describe(wanted)
    assert problem(wanted) == ""
    if wanted.policy == "conditional":
        assert after == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no policy ''; there are strict, fallback, conditional"),
        ("sometimes", "no policy 'sometimes'; there are strict, fallback, conditional"),
        ("sometimes:min_uncached_tokens=1", "no policy 'sometimes'"),
        ("fallback:min_uncached_tokens=1", "fallback has no thresholds; give it without them"),
        ("conditional:", "conditional has no threshold ''; there are min_uncached_tokens, min_uncached_share"),
        ("conditional:min_tokens=1", "no threshold 'min_tokens'; there are min_uncached_tokens"),
        (
            "conditional:min_uncached_tokens",
            "min_uncached_tokens must be a whole number from 0 to 2,147,483,648, not ''",
        ),
        ("conditional:min_uncached_tokens=-1", "min_uncached_tokens must be a whole number"),
        ("conditional:max_prefill_tokens=1.5", "max_prefill_tokens must be a whole number from 0 to"),
        ("conditional:max_prefill_tokens=9999999999", "not '9999999999'"),
        ("conditional:min_uncached_share=1.01", "min_uncached_share must be a number from 0 to 1, not '1.01'"),
        ("conditional:min_uncached_share=nan", "min_uncached_share must be a number from 0 to 1, not 'nan'"),
        (
            "conditional:min_uncached_share=0.5,min_uncached_share=0.6",
            "min_uncached_share is there twice; give it once",
        ),
    ],
)
def test_what_cant_be_set(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="disagg") as refused:
        parse(text, NOW)
    assert says in str(refused.value)


def test_what_a_profile_can_get_wrong() -> None:
    assert "no policy 'auto'" in problem(Disagg("auto"))  # type: ignore[arg-type]
    assert "min_uncached_share must be a number from 0 to 1, not '-0.1'" in problem(Disagg(min_uncached_share=-0.1))
    assert "min_uncached_tokens" in problem(Disagg(min_uncached_tokens=-1))
    assert "max_prefill_tokens" in problem(Disagg(max_prefill_tokens=MAX_TOKENS + 1))
