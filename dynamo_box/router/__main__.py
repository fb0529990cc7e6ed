"""`python -m dynamo_box.router`."""

from __future__ import annotations

import socket
import sys

from dynamo_box.child_main import run_child
from dynamo_box.router.process import RouterProcess


async def serve(status_socket: socket.socket) -> int:
    return await RouterProcess().run(status_socket)


if __name__ == "__main__":
    sys.exit(run_child(serve))
