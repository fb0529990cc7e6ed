"""`python -m dynamo_box.frontend`."""

from __future__ import annotations

import socket
import sys

from dynamo_box.child_main import run_child
from dynamo_box.frontend.service import FrontendProcess


async def serve(status_socket: socket.socket) -> int:
    return await FrontendProcess().run(status_socket)


if __name__ == "__main__":
    sys.exit(run_child(serve))
