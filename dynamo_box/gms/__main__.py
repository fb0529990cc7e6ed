"""`python -m dynamo_box.gms`."""

from __future__ import annotations

import socket
import sys
from functools import partial

from dynamo_box.child_life import Life
from dynamo_box.child_main import run_child
from dynamo_box.gms.service import keeper_socket_from_environment, make


async def serve(status_socket: socket.socket) -> int:
    return await Life("weight memory", partial(make, keeper_socket=keeper_socket_from_environment())).run(status_socket)


if __name__ == "__main__":
    sys.exit(run_child(serve))
