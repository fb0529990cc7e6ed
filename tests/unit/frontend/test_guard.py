"""What counts as this machine's loopback."""

from __future__ import annotations

import pytest

from dynamo_box.frontend.guard import is_loopback


@pytest.mark.parametrize(
    "authority", ["127.0.0.1", "127.255.0.9:65535", "localhost", "LocalHost.:0", "a.b.localhost:80", "[::1]"]
)
def test_loopback(authority: str) -> None:
    assert is_loopback(authority)


@pytest.mark.parametrize(
    "authority",
    [
        "127.0.0.256",
        "127.1",
        "127.0.0.01",
        "128.0.0.1",
        "127.0.0.1:65536",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1.example.com",
        "localhost.example.com",
        "notlocalhost",
        "me@localhost",
        "[::2]",
        "[127.0.0.1]",
        "::1",
    ],
)
def test_not_loopback(authority: str) -> None:
    assert not is_loopback(authority)
