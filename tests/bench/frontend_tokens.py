"""CPU time of the frontend process for each streamed token, through real sockets on both sides.

    python tests/bench/frontend_tokens.py [--streams 32] [--tokens 400]

A worker played by this process sends one Step for all streams at a time, as a decoding engine does, and waits until
every client has its event: the figure includes waking up, detokenising, JSON, HTTP and the system calls. Clients run in
this process too and are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "process" / "frontend")]

from fakes.tiny_model import make_tiny_llama  # noqa: E402
from frontend_peers import FrontendUnderTest  # noqa: E402

from dynamo_box.protocol.request import Delta  # noqa: E402

WORD = "the"


async def measure(root: Path, streams: int, tokens: int) -> None:
    model = make_tiny_llama(root / "model", context_length=1_000_000)
    async with FrontendUnderTest(root, model, context_length=1_000_000) as box:
        (worker,) = await box.ready()
        connections = [await box.request({"stream": True}) for _ in range(streams)]
        generates = [await worker.generated() for _ in connections]
        token = worker.ids(WORD)[0]
        for generate in generates:
            worker.send(Delta(generate.id, (token,)))
        for connection in connections:
            await connection.head()
            await connection.chunk()
        process = psutil.Process(box.process.pid)
        before, began = process.cpu_times(), time.perf_counter()
        for _ in range(tokens):
            worker.send(*[Delta(generate.id, (token,)) for generate in generates])
            await asyncio.gather(*[connection.chunk() for connection in connections])
        after, wall_s = process.cpu_times(), time.perf_counter() - began
        for connection in connections:
            connection.close()
    count = streams * tokens
    user_us, system_us = ((after[kind] - before[kind]) * 1e6 / count for kind in (0, 1))
    print(
        f"{count} tokens on {streams} streams in {wall_s:.2f} s: {user_us + system_us:.1f} µs CPU a token "
        f"({user_us:.1f} user, {system_us:.1f} system)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        uvloop.run(measure(Path(root), options.streams, options.tokens))


if __name__ == "__main__":
    main()
