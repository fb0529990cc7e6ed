"""What still works when the workers of a role are missing."""

from __future__ import annotations

import pytest

from dynamo_box.frontend.health import what_still_works


@pytest.mark.parametrize(
    ("roles", "policy", "text"),
    [
        ({}, "", ""),
        ({"aggregated": 2}, "", ""),
        ({"prefill": 1, "decode": 1}, "strict", ""),
        ({"aggregated": 1, "decode": 1}, "strict", ""),
        ({"aggregated": 1, "prefill": 1}, "strict", ""),
        ({"decode": 2}, "strict", "no prefill workers: requests fail (policy strict)"),
        ({"prefill": 2}, "strict", "no decode workers: requests fail (policy strict)"),
        (
            {"decode": 2},
            "conditional",
            "no prefill workers: prompts are computed by decode workers (policy conditional)",
        ),
        ({"prefill": 2}, "fallback", "no decode workers: prefill workers answer by themselves (policy fallback)"),
        (
            {"prefill": 2},
            "",
            "no decode workers: prefill workers answer by themselves (unless the policy is strict: then requests fail)",
        ),
    ],
)
def test_what_still_works(roles: dict[str, int], policy: str, text: str) -> None:
    assert what_still_works(roles, policy) == text
