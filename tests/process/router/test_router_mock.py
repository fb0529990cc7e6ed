"""The router and real workers: mock engines, their real events, and a frontend's side of the protocol."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_box.discovery.instances import read_instances
from dynamo_box.kv.hashing import chain_digests, isolation_key, short_hashes
from dynamo_box.protocol import PROTOCOL_VERSION, status
from dynamo_box.protocol.framing import BlockingChannel, connect_unix
from dynamo_box.protocol.request import Generate, Hello, Sampling, Step, pack_tokens, worker_decoder
from dynamo_box.protocol.route import Release
from dynamo_box.protocol.spec import ModelSpec, WorkerSpec

DEADLINE_S = 60.0
SPEC = ModelSpec("smollm2", "/nowhere", "f00", context_length=8192, block_size=16)


class MockWorker:
    """A mock worker process, and a frontend's connection to it."""

    def __init__(self, stage: Any, number: int) -> None:
        self.name = f"smollm2.aggregated.{number}"
        self.process = stage.child(
            "engines.mock",
            WorkerSpec(
                name=self.name,
                model=SPEC,
                engine="mock",
                role="aggregated",
                run_dir=str(stage.run_dir.root),
                threads=1,
                device="cpu",
                kv_bytes=0,
                max_batch=8,
                options={"kv_blocks": 512, "speedup": "infinite"},
            ),
        )
        self.process.expect(status.Ready)
        instance = read_instances(stage.run_dir.instances)[self.name]
        self.key = isolation_key(instance.fingerprint, block_size=instance.block_size, kv_dtype=instance.kv_dtype)
        self.socket = stage.run_dir.worker_socket(self.name)

    def generate(self, tokens: list[int], max_tokens: int = 4) -> int:
        """Run a request to its end; the prompt tokens that were cached."""
        with BlockingChannel(connect_unix(self.socket), worker_decoder) as channel:
            channel.send(Hello("frontend", PROTOCOL_VERSION))
            channel.send(Generate(1, "r", pack_tokens(tokens), Sampling(max_tokens, 0.0), self.key))
            cached = 0
            while True:
                message = channel.receive(DEADLINE_S)
                assert isinstance(message, Step)
                for delta in message.deltas:
                    cached = max(cached, delta.cached_tokens)
                    if delta.finish is not None:
                        assert delta.finish == "length", delta
                        return cached

    def hashes(self, tokens: list[int]) -> tuple[int, ...]:
        return short_hashes(chain_digests(pack_tokens(tokens), SPEC.block_size, self.key))


def test_the_second_request_goes_where_the_first_one_left_its_blocks(stage: Any) -> None:
    workers = {worker.name: worker for worker in (MockWorker(stage, 0), MockWorker(stage, 1))}
    router = stage.router()
    router.figures_when(lambda figures: len(figures.workers) == 2)
    frontend = stage.frontend()
    prompt = list(range(1000, 1200))
    hashes = next(iter(workers.values())).hashes(prompt)

    first = frontend.placed(hashes, prompt_tokens=200)
    assert first.overlap_blocks == 0
    assert workers[first.worker].generate(prompt) == 0
    frontend.send(Release(first.id))
    figures = router.figures_when(lambda figures: figures.indexed_blocks >= 12 and not figures.active_requests)
    assert figures.resyncs == 0

    second = frontend.placed(hashes, prompt_tokens=200)
    assert (second.worker, second.overlap_blocks) == (first.worker, 12)
    assert workers[second.worker].generate(prompt) == 12 * 16


@pytest.mark.parametrize("fault", ["drop_events:1", "garble_events:1"])
def test_a_fault_in_the_events_is_healed_by_a_resync(stage: Any, fault: str) -> None:
    worker = MockWorker(stage, 0)
    router = stage.router()
    router.figures_when(lambda figures: figures.workers == (worker.name,))
    worker.process.status.send(status.Set(1, "fault", fault))
    assert worker.process.expect(status.Answer).error == ""
    spoilt, later = list(range(1000, 1200)), list(range(5000, 5200))
    worker.generate(spoilt)
    worker.generate(later)
    figures = router.figures_when(lambda figures: figures.resyncs >= 1 and figures.indexed_blocks >= 24)
    assert figures.workers == (worker.name,)
    frontend = stage.frontend()
    for prompt in (spoilt, later):
        assert frontend.placed(worker.hashes(prompt), prompt_tokens=200).overlap_blocks == 12


def test_a_killed_worker_is_forgotten(stage: Any) -> None:
    workers = [MockWorker(stage, 0), MockWorker(stage, 1)]
    router = stage.router()
    router.figures_when(lambda figures: len(figures.workers) == 2)
    workers[0].process.process.kill()
    router.figures_when(lambda figures: figures.workers == (workers[1].name,))
    assert stage.frontend().placed(tuple(range(4))).worker == workers[1].name
