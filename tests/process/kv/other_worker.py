"""A worker in a process of its own: `other_worker.py SOCKET store|load NAME COUNT` does it and says how many."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from client_engine import Engine, chain


def main() -> None:
    path, act, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    engine, blocks = Engine(path), chain(name, count)
    if act == "store":
        print(engine.store(blocks).stored)
    else:
        print(engine.load(engine.find(blocks), blocks).count)
    engine.close()


if __name__ == "__main__":
    main()
