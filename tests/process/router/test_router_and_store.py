"""A router process and a real store: what workers put into the tiers is credit, and after a restart from its disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kv_store"))

from store_peers import MIB, Store, chain

HASHES = (2**61, 2**61 + 1, 2**61 + 2, 2**61 + 3)
LATER = (2**62, 2**62 + 1)


def test_what_workers_store_is_credit_until_the_store_dies_and_again_from_its_disk(stage: Any, tmp_path: Path) -> None:
    store = Store(tmp_path, disk_bytes=64 * MIB, directory=str(tmp_path / "tier"))
    try:
        router = stage.router(kvstore="kvstore")
        stage.subscribed_worker(router, 0)
        stage.subscribed_worker(router, 1)
        worker = store.worker()
        worker.store(*chain(*HASHES[:3]))
        router.figures_when(lambda figures: (figures.host_blocks, figures.disk_blocks) == (3, 3))
        worker.store(*chain(HASHES[3], after=HASHES[2]), *chain(*LATER))
        router.figures_when(lambda figures: (figures.host_blocks, figures.disk_blocks) == (6, 6))
        placed = stage.frontend().placed(HASHES)
        assert (placed.overlap_blocks, placed.host_blocks, placed.disk_blocks) == (0, 4, 0)

        store.kill()
        figures = router.figures_when(lambda figures: not figures.tiers_connected)
        assert (figures.host_blocks, figures.disk_blocks) == (0, 0)
        store.start()
        store.worker()  # a layout is read again when a worker comes for it
        figures = router.figures_when(lambda figures: figures.disk_blocks == 6)
        assert (figures.host_blocks, figures.tiers_connected, figures.resyncs) == (0, True, 0)
        placed = stage.frontend().placed(LATER)
        assert (placed.overlap_blocks, placed.host_blocks, placed.disk_blocks) == (0, 0, 2)
        assert "0 of 2 blocks cached, 2 on disk, cost" in placed.reason

        assert store.set("clear", "all").error == ""
        assert router.figures_when(lambda figures: figures.disk_blocks == 0).resyncs == 0
    finally:
        store.close()
