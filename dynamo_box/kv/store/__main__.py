"""`python -m dynamo_box.kv.store`."""

from __future__ import annotations

import socket
import sys

from dynamo_box.child_life import Life
from dynamo_box.child_main import run_child
from dynamo_box.kv.store.service import make


async def serve(status_socket: socket.socket) -> int:
    return await Life("KV store", make).run(status_socket)


if __name__ == "__main__":
    sys.exit(run_child(serve))
