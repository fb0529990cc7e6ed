"""`python -m dynamo_box.frontend`: a child of the supervisor, which hands it its spec over the status socket."""

from __future__ import annotations

import signal
import sys

import uvloop

from dynamo_box import log
from dynamo_box.frontend.service import FrontendProcess
from dynamo_box.protocol.framing import status_socket_from_environment


def main() -> int:
    log.configure()
    # A Ctrl-C in the terminal reaches every process of the box; what it means is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status_socket = status_socket_from_environment()
    except RuntimeError as error:
        sys.exit(str(error))

    async def serve() -> int:
        return await FrontendProcess().run(status_socket)

    return uvloop.run(serve())


if __name__ == "__main__":
    sys.exit(main())
