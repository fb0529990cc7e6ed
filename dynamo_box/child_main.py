"""The first lines of frontend and router as programs: children of the supervisor, which hands them their spec over the
status socket.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine

import uvloop

from dynamo_box import log
from dynamo_box.protocol.framing import status_socket_from_environment


def run_child(serve: Callable[[socket.socket], Coroutine[None, None, int]]) -> int:
    """Serve on the inherited status socket until the end; returns the exit status."""
    log.configure()
    # A Ctrl-C in the terminal reaches every process of the box; what it means is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status_socket = status_socket_from_environment()
    except RuntimeError as error:
        sys.exit(str(error))
    return uvloop.run(serve(status_socket))


def allow_all_descriptors() -> None:
    """Lift the usual soft limit of 1024, which those pass who hold descriptors for others."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # then the limit stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
