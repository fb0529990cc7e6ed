"""sd_notify(3): tell systemd (or whoever set NOTIFY_SOCKET) what the box is doing. Silent where nobody
asked.
"""

from __future__ import annotations

import contextlib
import os
import socket

WATCHDOG_FRACTION = 0.4
"""systemd advises half the interval or less."""


class Notifier:
    """Takes its variables out of the environment, so that no child speaks for the box."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        os.environ.pop("WATCHDOG_PID", None)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = int(microseconds) / 1e6 * WATCHDOG_FRACTION if microseconds.isdecimal() else None

    def send(self, *states: str) -> None:
        """For example `send("READY=1", "STATUS=smollm2 answers")`."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.sendto("\n".join(states).encode(), self._address)
