"""Two worker processes and a store between them, whose roles are changed while requests run on both."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from native_harness import DEADLINE_S, ISOLATION
from store_peers import Store
from test_tiers import prompts, spec_on
from worker_process import Peer, WorkerProcess

from dynamo_box.protocol import status
from dynamo_box.protocol.request import Delta, Generate, Leg, Sampling, Transfer, pack_tokens
from engines.shell_role import CHANGING

pytestmark = pytest.mark.slow

MAX_TOKENS = 24
ROUNDS = 4


class Client:
    """Sends requests to the two workers until it is told to stop: whole ones, and in two legs where they are served."""

    def __init__(self, workers: list[WorkerProcess], asked: list[list[int]], number: int) -> None:
        self._workers = workers
        self._asked = asked
        self._number = number
        self._stream = 0
        self.stop = threading.Event()
        self.answers: list[tuple[int, list[int]]] = []
        self.refused = self.in_two_legs = 0
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self.stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        peers = [worker.peer() for worker in self._workers]
        try:
            while not self.stop.is_set():
                self._stream += 1
                which = (self._stream + self._number) % len(self._asked)
                first, second = peers if self._stream % 3 else peers[::-1]
                self._ask(which, first, second)
        except BaseException as error:  # noqa: BLE001  told by whoever joins
            self.errors.append(repr(error))
        finally:
            for peer in peers:
                peer.close()

    def _ask(self, which: int, first: Peer, second: Peer) -> None:
        prompt = self._asked[which]
        deltas = self._send(first, prompt, "prefill", MAX_TOKENS)
        if deltas[-1].error == CHANGING:
            self.refused += 1
            return
        transfer = deltas[-1].transfer
        assert transfer is not None, deltas[-1].error
        begun = [token for delta in deltas for token in delta.tokens]
        rest = self._send(second, prompt + begun, "decode", MAX_TOKENS - 1, transfer)
        if rest[-1].error == CHANGING:
            self.refused += 1
            rest = self._send(first, prompt + begun, "whole", MAX_TOKENS - 1)
            if rest[-1].error == CHANGING:
                return
        else:
            self.in_two_legs += 1
        assert rest[-1].finish == "length", rest[-1].error
        self.answers.append((which, begun + [token for delta in rest for token in delta.tokens]))

    def _send(
        self, peer: Peer, tokens: list[int], leg: Leg, max_tokens: int, transfer: Transfer | None = None
    ) -> list[Delta]:
        knobs = Sampling(max_tokens, temperature=1.1, seed=5, ignore_eos=True)
        peer.send(Generate(self._stream, "r", pack_tokens(tokens), knobs, ISOLATION, leg=leg, transfer=transfer))
        deltas: list[Delta] = []
        for delta in peer.deltas():
            deltas.append(delta)
            if delta.finish is not None:
                return deltas
        raise AssertionError("the worker is gone")


def enough(clients: list[Client]) -> bool:
    """Requests for this to have been a test; or one of them has failed."""
    in_two_legs, refused = sum(client.in_two_legs for client in clients), sum(client.refused for client in clients)
    return (in_two_legs > 10 and refused > 0) or any(client.errors for client in clients)


def test_roles_change_under_load_and_no_answer_does(tiny_model: Path, tmp_path: Path) -> None:
    """What a worker refuses while it changes is asked of the other; nothing else fails, and weights and KV stay."""
    asked = prompts(5, length=150, seed=4)
    store = Store(tmp_path)
    workers = [
        WorkerProcess(store.run.root, spec_on(store, tiny_model, name, role=role), "engines.native")
        for name, role in (("one", "prefill"), ("two", "decode"))
    ]
    clients: list[Client] = []
    try:
        for worker, role in zip(workers, ("prefill", "decode"), strict=True):
            worker.ready().figures(lambda figures: not figures.tiers.connected)
            assert worker.figures(lambda _: True).role == worker.instance().role == role  # type: ignore[union-attr]
        pids = [worker.pid for worker in workers]
        with workers[0].peer() as peer:
            knobs: dict[str, Any] = {"temperature": 1.1, "seed": 5, "ignore_eos": True, "isolation": ISOLATION}
            expected = [
                peer.run(prompt, stream=number, max_tokens=MAX_TOKENS, **knobs)[0]
                for number, prompt in enumerate(asked)
            ]
        clients = [Client(workers, asked, number) for number in range(4)]
        number = 0
        while number < ROUNDS or number % 2 or not enough(clients):
            for worker, role in zip(
                workers, ("decode", "prefill") if number % 2 else ("aggregated", "decode"), strict=True
            ):
                worker.status.send(status.SetRole(number, role, DEADLINE_S))
                answer = worker.await_status(status.Answer)
                assert (answer.id, answer.error) == (number, "")
                assert worker.instance().role == role  # type: ignore[union-attr]
            number += 1
        for client in clients:
            client.join()
            assert not client.errors
            assert all(tokens == expected[which] for which, tokens in client.answers)
        figures = [
            worker.figures(lambda figures: figures.running == figures.waiting == figures.kv_blocks_used == 0)
            for worker in workers
        ]
        assert [one.role for one in figures] == ["decode", "prefill"]
        assert all(one.handed_over and one.taken_over for one in figures)
        assert all(one.kv_blocks_cached for one in figures), "it keeps its KV"
        assert [worker.process.poll() for worker in workers] == [None, None]
        assert [worker.instance().pid for worker in workers] == pids  # type: ignore[union-attr]
    finally:
        for client in clients:
            client.stop.set()
        for worker in workers:
            worker.end()
        store.close()
