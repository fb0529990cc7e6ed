"""`python -m dynamo_box.router`."""

from __future__ import annotations

import socket
import sys

from dynamo_box.child_life import Life
from dynamo_box.child_main import run_child
from dynamo_box.router.service import make


async def serve(status_socket: socket.socket) -> int:
    return await Life("router", make).run(status_socket)


if __name__ == "__main__":
    sys.exit(run_child(serve))
