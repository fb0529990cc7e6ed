"""Make the recordings that ship with the program: `DYNBOX_HOME=HOME python tests/bench/make_demos.py [NAME …]`.

HOME is a home whose store holds `smollm2` (its tokenizer is what the mock workers use). Each demo is a real box of its
story's profile under a real load, watched over its control socket. Paths, ports and names of the machine are
replaced before they are written, everywhere in a snapshot or a log line, and the result is searched for them.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import openai

from dynamo_box.control.client import ControlClient
from dynamo_box.control.logs import Entry
from dynamo_box.paths import RunDir, home
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui import demos
from dynamo_box.tui.log_feed import LiveLog, LogBatch
from dynamo_box.tui.recorder import Recorder
from dynamo_box.tui.recording import Kind, Recording

PORT = 8000
KEPT_DECISIONS = 16
"""Most of a snapshot are the router's decisions, and of these most are in the snapshot before as well."""
TEXT = (
    "You answer for a company that repairs tide clocks, and you know its manual by heart. Chapter {0} of the manual "
    "says how the movement number {0} is taken apart, cleaned, oiled and set to the tables of the nearest harbour. "
)
QUESTIONS = ("Why does it run fast?", "Which oil?", "How do I set it to spring tides?", "May I open it myself?")


class Load:
    """Chats with a few shared system prompts, some much more popular than others, so that hit rates differ. `chapters`
    is how much longer the longest prompts are than the shortest; `fresh` is the share of prompts of which nothing is
    cached anywhere.
    """

    def __init__(self, port: int, chapters: int, fresh: float = 0.0) -> None:
        self._fresh = fresh
        self.sent = self.failed = 0
        self._random = random.Random(7)
        self._client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        self._running: set[asyncio.Task[None]] = set()
        self._prompts = [
            "".join(TEXT.format(n * 100 + k) for k in range(1 + chapters * (1 + n % 5))) for n in range(24)
        ]

    async def at(self, rate: float, seconds: float, tokens: int = 90, model: str = "mock") -> None:
        """`rate` requests a second for so long, at random moments; answers of about `tokens` tokens."""
        end = time.monotonic() + seconds
        while (wait := self._random.expovariate(rate)) < end - time.monotonic():
            await asyncio.sleep(wait)
            self._begin(tokens, model)
        await asyncio.sleep(max(end - time.monotonic(), 0))

    def burst(self, count: int, tokens: int = 60, model: str = "mock") -> None:
        for _ in range(count):
            self._begin(tokens, model)

    async def settle(self) -> None:
        """Until nothing runs."""
        await asyncio.gather(*self._running)

    async def finish(self) -> None:
        await self.settle()
        await self._client.close()

    def _begin(self, tokens: int, model: str) -> None:
        task = asyncio.create_task(self._chat(tokens, model))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _chat(self, tokens: int, model: str) -> None:
        which = min(int(self._random.paretovariate(0.7)) - 1, len(self._prompts) - 1)
        question = f"{self._random.choice(QUESTIONS)} Order {self._random.randrange(10_000)}."
        self.sent += 1
        customer = f"Customer {self.sent}. " if self._random.random() < self._fresh else ""
        try:
            async for _ in await self._client.chat.completions.create(
                model=model,
                stream=True,
                max_tokens=max(8, int(self._random.gauss(tokens, tokens / 3))),
                messages=[
                    {"role": "system", "content": customer + self._prompts[which]},
                    {"role": "user", "content": question},
                ],
            ):
                pass
        except openai.APIError:
            self.failed += 1


async def routed_load(load: Load, run: RunDir) -> None:
    """Idle, then busy, then bursts with calm between them."""
    await asyncio.sleep(4)
    await load.at(4, 10)
    await load.at(14, 24)
    for count in (60, 100, 140):
        load.burst(count)
        await load.at(3, 8)
    await load.at(1, 6)


async def crash_recovery(load: Load, run: RunDir) -> None:
    """A worker killed under load, then the router; requests go on, and both come back."""
    await load.at(12, 9)
    kill(run, "mock.aggregated.3")
    await load.at(12, 13)
    kill(run, "router")
    await load.at(12, 14)
    await load.at(2, 4)


async def sleep_wake(load: Load, run: RunDir) -> None:
    """Two models that don't fit awake together take turns; a person puts one to sleep, on disk, and wakes it."""
    await asyncio.sleep(2)
    first, second = "smollm2", "smollm2-bf16"
    for model in (first, second, first):
        await load.at(1, 4, tokens=16, model=model)
        await load.settle()
    await asyncio.to_thread(steer, run, lambda client: client.sleep(first, to="disk", timeout_s=60.0))
    await asyncio.sleep(3)
    await asyncio.to_thread(steer, run, lambda client: client.wake(first, timeout_s=60.0))
    await load.at(1, 4, tokens=16, model=first)


async def disagg(load: Load, run: RunDir) -> None:
    """Long prompts in two legs. A prefill worker is killed under load: what it computed is computed elsewhere, and its
    requests go on. Then short prompts go in two legs, too.
    """
    model = await asyncio.to_thread(served, run)
    await asyncio.sleep(3)
    await load.at(5, 14, model=model)
    kill(run, f"{model}.prefill.0")
    await load.at(5, 16, model=model)
    await asyncio.to_thread(steer, run, lambda client: client.set_option("router", "disagg", "fallback"))
    await load.at(5, 12, model=model)
    await load.at(1, 4, model=model)


class Story(NamedTuple):
    """`chapters` and `fresh` as in Load: a model that computes on a cpu has no time for long prompts. `simulate` are
    the devices that a profile is tried on. `hz` is how often it is looked at.
    """

    tell: Callable[[Load, RunDir], Awaitable[None]]
    profile: str = "mock-8gpu"
    chapters: int = 3
    simulate: str = ""
    fresh: float = 0.0
    hz: float = 2.0


STORIES = {
    "routed-load": Story(routed_load),
    "crash-recovery": Story(crash_recovery),
    "sleep-wake": Story(sleep_wake, "two-models", 0, hz=1.0),
    "disagg": Story(disagg, "llama70b-disagg", 9, "gpu=8x80GiB", fresh=0.6),
}


def steer(run: RunDir, act: Callable[[ControlClient], object]) -> None:
    with ControlClient.connect(run) as client:
        act(client)


def served(run: RunDir) -> str:
    """The only model's name."""
    with ControlClient.connect(run) as client:
        (model,) = client.snapshot().models
    return model.name


def kill(run: RunDir, process: str) -> None:
    with ControlClient.connect(run) as client:
        pid = next(each.pid for each in client.snapshot().processes if each.name == process)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


class Scrubber:
    """Replaces what names this machine, in every string of a snapshot or an entry, and cuts what makes it large."""

    def __init__(self, run: Path, box_home: Path, port: int) -> None:
        root = Path(__file__).parents[2]
        self._replaced = {
            str(box_home): "/home/demo/.dynbox",
            str(run): "/run/user/1000/dynbox",
            f"127.0.0.1:{port}": f"127.0.0.1:{PORT}",
            str(sys.prefix): "/opt/dynbox",
            str(root): "/opt/dynbox",
        }
        self.forbidden = [*self._replaced, str(Path.home()), tempfile.gettempdir(), socket.gethostname()]
        self.forbidden.remove(f"127.0.0.1:{port}")
        if getpass.getuser() != "root":
            self.forbidden.append(getpass.getuser())

    def snapshot(self, snapshot: BoxSnapshot) -> BoxSnapshot:
        whole = msgspec.convert(self._walk(msgspec.to_builtins(snapshot)), BoxSnapshot)
        return msgspec.structs.replace(whole, processes=tuple(map(_fewer_decisions, whole.processes)))

    def entries(self, entries: Iterable[Entry]) -> list[Entry]:
        return msgspec.convert(self._walk(msgspec.to_builtins(list(entries))), list[Entry])

    def _walk(self, value: Any) -> Any:
        match value:
            case str():
                for old, new in self._replaced.items():
                    value = value.replace(old, new)
                return _REQUEST_ID.sub(r"\1", value)
            case dict():
                return {self._walk(key): self._walk(each) for key, each in value.items()}
            case list() | tuple():
                return [self._walk(each) for each in value]
            case _:
                return value


def _fewer_decisions(process: ProcessInfo) -> ProcessInfo:
    if not isinstance(process.figures, RouterFigures):
        return process
    figures = msgspec.structs.replace(process.figures, decisions=process.figures.decisions[-KEPT_DECISIONS:])
    return msgspec.structs.replace(process, figures=figures)


_REQUEST_ID = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24}\b")


def record(run: RunDir, hz: float, recorder: Recorder, scrubber: Scrubber, stop: threading.Event) -> None:
    """Until the box ends or `stop` is set."""
    log = LiveLog()

    def take(batch: LogBatch) -> None:
        recorder.log(scrubber.entries(batch.entries))

    log.start_log(take)
    with ControlClient.connect(run) as client:
        for snapshot in client.watch(hz):
            if stop.is_set():
                break
            log.look_in(Path(snapshot.box.logs_dir))
            recorder.snapshot(scrubber.snapshot(snapshot))
    log.close_log()


def check(path: Path, scrubber: Scrubber) -> str:
    """What is in it, in a line; fails if it names this machine."""
    with Recording.open(path) as recording:
        kinds = [recording.kind(number) for number in range(len(recording))]
        bodies: list[object] = [
            recording.snapshot(number) if kind is Kind.SNAPSHOT else recording.entries(number)
            for number, kind in enumerate(kinds)
        ]
        text = msgspec.json.encode(bodies).decode()
        for word in scrubber.forbidden:
            assert word not in text, f"{path} names {word}"
        return (
            f"{path.name}: {recording.duration_s:.0f} s, {kinds.count(Kind.SNAPSHOT)} snapshots, "
            f"{path.stat().st_size / 1024:.0f} KiB"
        )


def make(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dynbox-demo-") as directory:
        run, box_home = Path(directory, "run"), Path(directory, "home")
        box_home.mkdir()
        (box_home / "models").symlink_to(home().models)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "DYNBOX_RUN_DIR": str(run), "DYNBOX_HOME": str(box_home)}
        dynbox = [sys.executable, "-m", "dynamo_box"]
        scrubber = Scrubber(run, box_home, port)
        made = Path(directory, name)
        story = STORIES[name]
        up = [*dynbox, "up", "--profile", story.profile, "--port", str(port)]
        if story.simulate:
            up += ["--simulate", story.simulate]
        subprocess.run(up, env=environment, check=True)
        try:
            with Recorder(made) as recorder:
                asyncio.run(tell(story, RunDir(run), port, recorder, scrubber))
        finally:
            subprocess.run([*dynbox, "down", "--drain", "0"], env=environment, check=True)
        print(check(made, scrubber))
        target = demos.path(name)
        target.write_bytes(made.read_bytes())


async def tell(story: Story, run: RunDir, port: int, recorder: Recorder, scrubber: Scrubber) -> None:
    stop = threading.Event()
    recording = asyncio.create_task(asyncio.to_thread(record, run, story.hz, recorder, scrubber, stop))
    load = Load(port, story.chapters, story.fresh)
    await story.tell(load, run)
    await load.finish()
    stop.set()
    await recording
    print(f"{load.sent} requests, {load.failed} failed")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or demos.DEMOS:
        make(wanted)
