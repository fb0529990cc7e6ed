"""The HTTP port. The supervisor binds it before anything starts and hands it to the frontend, so that a taken
port is known at once, and connections wait in the backlog while a frontend restarts.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.errors import BoxError
from dynamo_box.supervisor.procfs import command_name, open_descriptors, pids

LISTEN_FD_VARIABLE = "DYNBOX_LISTEN_FD"
BACKLOG = 1024
_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class PortHolder:
    pid: int
    command: str


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BoxError: the port is taken (the error names the holder, where that can be read) or can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(port)
            by = f" by {holder.command} (pid {holder.pid})" if holder else ""
            raise BoxError(
                f"port {port} on {host} is taken{by}",
                remedy="stop that program, or choose another port with --port",
            ) from error
        raise BoxError(
            f"can't listen on {host}:{port}: {error.strerror}", remedy="choose another port with --port"
        ) from error
    return listener


def port_holder(port: int) -> PortHolder | None:
    """Who listens on a TCP port of this machine; None if nobody does, or it is another user's process."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return None
    for pid in pids():
        if inodes & open_descriptors(pid):
            return PortHolder(pid, command_name(pid) or "?")
    return None


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, rows):
            if fields[3] == _TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found
