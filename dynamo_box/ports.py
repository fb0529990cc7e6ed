"""Who holds a TCP port of this machine, for the messages of all who find one taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PortHolder:
    """`command` is None where the process can't be read."""

    pid: int
    command: str | None

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})" if self.command else f"pid {self.pid}"


def holder(port: int) -> PortHolder | None:
    """The listener on `port`; None if there is none, or only root may look it up since it is another user's."""
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            if connection.pid is None:
                return None
            try:
                return PortHolder(connection.pid, psutil.Process(connection.pid).name())
            except psutil.Error:
                return PortHolder(connection.pid, None)
    return None
