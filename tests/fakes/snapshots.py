"""Snapshots of boxes that no test machine has: eight busy GPUs, one in trouble, and the nastiest that fits the types.

All of them are at the same moment, NOW, and the same call gives the same snapshot.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from dynamo_box.protocol.figures import (
    Candidate,
    Decision,
    Figures,
    FrontendFigures,
    GmsFigures,
    KvLayoutFigures,
    KvStoreFigures,
    Latency,
    LayoutEvent,
    LayoutFigures,
    LockHolder,
    Quantiles,
    RequestFigures,
    RouterFigures,
    TierFigures,
    TierUse,
    WorkerFigures,
    WorkerTiers,
)
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import (
    BoxInfo,
    BoxSnapshot,
    DeviceFigures,
    DeviceInfo,
    DiskInfo,
    EventInfo,
    ModelInfo,
    ProcessInfo,
    Progress,
    Targets,
)
from dynamo_box.tui.history import History
from dynamo_box.tui.model import Frame

NOW = 1_760_000_000.0
MIB = 1 << 20
GIB = 1 << 30

MARKUP = "[bold red]not markup[/] [@click=quit]x[/]"
CONTROL = "title \x1b]0;gone\x07 \x1b[2J\r\nnext\tline \u202edrowkcab"
EMOJI = "🦙 ラマ-モデル 👩‍👩‍👧 é"


def frame(snapshot: BoxSnapshot, history: History | None = None, now: float | None = None) -> Frame:
    """A frame at the moment of the snapshot; its history is the snapshot alone unless one is given."""
    if history is None:
        history = History()
        history.feed(snapshot)
    return Frame(snapshot, history, snapshot.at if now is None else now)


def busy(workers: int = 8, requests: int = 40) -> BoxSnapshot:
    """Eight workers of a 70B-like model's shape on eight GPUs under load, all well but one GPU that is throttled.

    `requests` run, at most 256 of them listed, as a frontend does.
    """
    names = tuple(f"llama.aggregated.{number}" for number in range(workers))
    model = "llama"
    return BoxSnapshot(
        box=_box("ready", "llama-8gpu"),
        models=(ModelInfo(model, "ready", "/models/llama", workers, workers, 0.0),),
        processes=(
            _router(names, model),
            *(_busy_worker(name, model, number) for number, name in enumerate(names)),
            _frontend(names, model, requests),
        ),
        devices=tuple(_gpu(number) for number in range(workers)),
        events=_calm_events(names),
        at=NOW,
        host=DeviceFigures(
            used_bytes=210 * GIB, box_bytes=96 * GIB, other_bytes=92 * GIB, utilisation=0.38, temperature_c=None
        ),
        host_memory_bytes=1024 * GIB,
        disks=(
            DiskInfo("/models", "models, logs", 3_500 * GIB, 1_200 * GIB, 165 * GIB),
            DiskInfo("/scratch", "KV tier", 900 * GIB, 20 * GIB, 640 * GIB),
        ),
    )


def tiny() -> BoxSnapshot:
    """One worker on the cpu that has had a request or two; nothing is known of the disk."""
    figures = WorkerFigures(
        kv_blocks_total=512,
        kv_blocks_cached=12,
        weights_bytes=513 * MIB,
        kv_bytes=180 * MIB,
        prompt_tokens=220,
        output_tokens=64,
        requests=2,
        steps=66,
    )
    worker = ProcessInfo(
        name="smollm2.aggregated.0",
        kind="worker",
        model="smollm2",
        role="aggregated",
        state="ready",
        phase="",
        pid=4003,
        guard_pid=4002,
        restarts=0,
        device="cpu",
        rss_bytes=1100 * MIB,
        uptime_s=95.0,
        info={"torch": "2.9.0", "kv_blocks": "512", "block_size": "16", "context_length": "8192"},
        figures=figures,
    )
    router = _process("router", "router", 4001, RouterFigures(workers=(worker.name,), routed=2))
    frontend = _process(
        "frontend", "frontend", 4005, FrontendFigures(models=("smollm2",), requests=2, output_tokens=64)
    )
    return BoxSnapshot(
        box=_box("ready", "smollm2"),
        models=(ModelInfo("smollm2", "ready", "/models/smollm2", 1, 1, 61.0),),
        processes=(router, worker, frontend),
        devices=(
            DeviceInfo("host", "interpreters and libraries", "host", 16 * GIB, {"overhead": 656 * MIB}),
            DeviceInfo("cpu", "An Ordinary CPU", "cpu", 16 * GIB, {"weights": 513 * MIB, "KV": 180 * MIB}),
        ),
        events=(EventInfo(1, NOW - 95, "info", None, "starting smollm2 at http://127.0.0.1:8000"),),
        at=NOW,
        host=DeviceFigures(used_bytes=6 * GIB, box_bytes=1300 * MIB),
        host_memory_bytes=16 * GIB,
    )


def shared() -> BoxSnapshot:
    """Models on a cpu, their weights in layouts of one gms: `smollm2` awake with two workers that map it once, and of
    four others one each that sleeps in host memory, sleeps on disk and is held, wakes, and falls asleep.
    """
    pair = tuple(_sharing(f"smollm2.aggregated.{number}", "smollm2", 4010 + 10 * number) for number in (0, 1))
    coder = replace(_sharing("coder.aggregated.0", "coder", 4030), state="asleep", figures=WorkerFigures())
    judge = replace(_sharing("judge.aggregated.0", "judge", 4040), state="asleep", figures=WorkerFigures())
    guard = replace(
        _sharing("guard.aggregated.0", "guard", 4050), state="waking", phase="populate", figures=WorkerFigures()
    )
    chat = replace(_sharing("chat.aggregated.0", "chat", 4060), state="draining", phase="1 in flight")
    workers = (*pair, coder, judge, guard, chat)
    kept = {"workers_total": 1, "workers_ready": 0}
    models = (
        ModelInfo(
            "smollm2", "ready", "/models/smollm2", 2, 2, 0.0,
            Residency("smollm2", "awake", "device", NOW - 610, keep="host", pin=True, weights_bytes=513 * MIB),
        ),
        ModelInfo(
            "coder", "asleep", "/models/coder", **kept, idle_s=731.0,
            residency=Residency(
                "coder", "asleep", "host", NOW - 723, idle_ttl_s=300.0, weights_bytes=257 * MIB, sleeps=3, wakes=2,
                slept_s=4000.0, sleep_phases={"drain": 0.002, "unmap": 0.001, "move": 0.11, "total": 0.113},
                wake_phases={"attach": 0.001, "remap": 0.0004, "populate": 0.084, "kv": 0.012, "canary": 0.131,
                             "register": 0.003, "total": 0.2314},
            ),
        ),
        ModelInfo(
            "judge", "asleep", "/models/judge", **kept, idle_s=90000.0,
            residency=Residency("judge", "asleep", "disk", NOW - 86400, held=True, keep="disk", weights_bytes=257 * MIB,
                                sleeps=1),
        ),
        ModelInfo(
            "guard", "waking", "/models/guard", **kept, idle_s=41.0,
            residency=Residency(
                "guard", "waking", "host", NOW - 2.5, phase="populate", weights_bytes=513 * MIB, sleeps=12, wakes=11,
                cold_wakes=1, slept_s=300.0, cold=True, wake_phases={"move": 0.2, "load": 3.1, "total": 3.44},
                note="cold start: the snapshot of guard is damaged (shard 2)",
            ),
        ),
        ModelInfo(
            "chat", "falling_asleep", "/models/chat", workers_ready=1, workers_total=1, idle_s=0.0,
            residency=Residency("chat", "falling_asleep", "device", NOW - 4, phase="drain", min_awake_s=5.0,
                                idle_ttl_s=60.0, weights_bytes=257 * MIB, wakes=1, sleeps=1, slept_s=9.0,
                                wake_phases={"canary": 0.1, "total": 0.19}),
        ),
    )  # fmt: skip
    readers = tuple(LockHolder(worker.name, worker.pid or 0, "ro", NOW - 600) for worker in pair)
    layouts = (
        _layout("smollm2", "device", 513 * MIB, 1, readers=readers),
        _layout("coder", "host", 257 * MIB, 2),
        _layout("judge", "disk", 257 * MIB, 1),
        _layout(
            "guard", "host", 513 * MIB, 4, moving="device", device_bytes=513 * MIB, history=(),
            waiters=(LockHolder("guard.aggregated.0", 4050, "ro", NOW - 2.4),),
        ),
        _layout("chat", "device", 257 * MIB, 1, readers=(LockHolder("chat.aggregated.0", 4060, "ro", NOW - 90),)),
    )  # fmt: skip
    gms = GmsFigures(
        device="cpu", capacity_bytes=2 * GIB, device_bytes=1283 * MIB, host_capacity_bytes=4 * GIB,
        host_bytes=770 * MIB, disk_bytes=257 * MIB, requests=431, refused=1, layouts=layouts,
    )  # fmt: skip
    service = replace(_process("gms@cpu", "gms", 4003, gms), device="cpu", rss_bytes=31 * MIB)
    router = _process("router", "router", 4001, RouterFigures(workers=tuple(each.name for each in pair), routed=200))
    frontend = _process(
        "frontend",
        "frontend",
        4005,
        FrontendFigures(
            models=tuple(model.name for model in models),
            active=3,
            requests=200,
            output_tokens=6400,
            waking={"guard": 2},
        ),
    )
    return BoxSnapshot(
        box=_box("ready", "five-models"),
        models=models,
        processes=(service, router, *workers, frontend),
        devices=(
            DeviceInfo("host", "interpreters and libraries", "host", 16 * GIB, {"overhead": 656 * MIB}),
            DeviceInfo("cpu", "An Ordinary CPU", "cpu", 16 * GIB, {"weights": 1283 * MIB, "KV": 720 * MIB}),
        ),
        events=(EventInfo(1, NOW - 3, "info", None, "guard is waking: a request asks for it"),),
        at=NOW,
        host=DeviceFigures(used_bytes=8 * GIB, box_bytes=4 * GIB, other_bytes=3 * GIB),
        host_memory_bytes=16 * GIB,
        disks=(DiskInfo("/", "models, logs", 200 * GIB, 120 * GIB, 3 * GIB),),
    )


def tiered() -> BoxSnapshot:
    """Two workers of one model on a cpu whose KV outlives their pools in host memory and on disk. The files of a model
    that is served no more are still there.
    """
    pair = tuple(
        _with_tiers(_sharing(f"smollm2.aggregated.{number}", "smollm2", 4010 + 10 * number), number)
        for number in (0, 1)
    )
    names = tuple(worker.name for worker in pair)
    readers = tuple(LockHolder(worker.name, worker.pid or 0, "ro", NOW - 600) for worker in pair)
    weights = _layout("smollm2", "device", 513 * MIB, 1, readers=readers)
    gms = GmsFigures(device="cpu", capacity_bytes=2 * GIB, device_bytes=513 * MIB, requests=43, layouts=(weights,))
    decisions = tuple(
        Decision(
            f"req-{number:04}", "smollm2", NOW - 20 + number, "kv", names[number % 2],
            f"{names[number % 2]}: {9 * number % 50} of 125 blocks cached, {30 + number} in host memory", 125,
            tuple(
                Candidate(name, (9 * number + 4 * place) % 50, 60.0 + place, 40 + place, 71.5 + 3 * place,
                          30 + number, (7 * number) % 20)
                for place, name in enumerate(sorted(names, key=lambda name: name != names[number % 2]))
            ),
        )
        for number in range(14)
    )  # fmt: skip
    router = RouterFigures(
        workers=names, routed=200, hit_rate=0.83, indexed_blocks=104, host_blocks=5_800, disk_blocks=23_900,
        tiers_connected=True, decisions=decisions,
    )  # fmt: skip
    frontend = FrontendFigures(models=("smollm2",), active=2, requests=200, output_tokens=6400, tokens_per_s=48.0)
    whole = shared()
    return replace(
        whole,
        box=replace(whole.box, profile="smollm2-duo"),
        models=(ModelInfo("smollm2", "ready", "/models/smollm2", 2, 2, 0.0, whole.models[0].residency),),
        processes=(
            replace(_process("gms@cpu", "gms", 4003, gms), device="cpu", rss_bytes=31 * MIB),
            replace(_process("kvstore", "kvstore", 4007, store()), rss_bytes=2_100 * MIB),
            _process("router", "router", 4001, router),
            *pair,
            _process("frontend", "frontend", 4005, frontend),
        ),
        events=(EventInfo(1, NOW - 580, "info", "kvstore", "indexed 23,900 blocks on disk in 0.41 s"),),
        devices=(
            DeviceInfo(
                "host", "interpreters and libraries", "host", 16 * GIB, {"overhead": 656 * MIB, "KV tier": 4 * GIB}
            ),
            DeviceInfo("cpu", "An Ordinary CPU", "cpu", 16 * GIB, {"weights": 513 * MIB, "KV": 360 * MIB}),
        ),
        host=DeviceFigures(used_bytes=8 * GIB, box_bytes=5 * GIB, other_bytes=2 * GIB),
        disks=(DiskInfo("/", "models, logs, KV tier", 200 * GIB, 120 * GIB, 18 * GIB),),
    )


def store(**disk: Any) -> KvStoreFigures:
    """What a store says that has two tiers; of the disk tier what is given."""
    block = 720 * 1024
    host = TierFigures(
        "on", "", 4 * GIB, 2_890 * block, 2_890, lookups=40_000, hits=21_000, in_blocks=12_345,
        in_bytes=12_345 * block, in_seconds=7.1, out_blocks=20_400, out_bytes=20_400 * block, out_seconds=4.9,
        evicted=6_545, dropped={"store_full": 12},
    )  # fmt: skip
    on_disk = TierFigures(
        "on", "", 32 * GIB, 23_900 * block, 23_900, lookups=19_000, hits=8_100, in_blocks=12_010,
        in_bytes=12_010 * block, in_seconds=21.0, out_blocks=8_090, out_bytes=8_090 * block, out_seconds=5.2,
        evicted=0, failed=2, dropped={"queue_full": 310}, queued=64,
    )  # fmt: skip
    owners = ("smollm2.aggregated.0", "smollm2.aggregated.1")
    return KvStoreFigures(
        host=host,
        disk=replace(on_disk, **disk),
        layouts=(
            KvLayoutFigures("5f" * 16, "8d31c2aa9be0174c", "float32", 16, block, owners, 5_825, 2_890, 2_901, 22, 12,
                            21_300),
            KvLayoutFigures("c0" * 16, "17f0a3bb2c5d9e61", "bfloat16", 16, block // 2, disk_blocks=2_600),
        ),
        directory="/home/u/.local/share/dynbox/kv",
        indexed_in_s=0.41,
        leases=2,
        reclaimed=1,
        connections=2,
        requests=51_000,
        metadata_bytes=6 * MIB,
    )  # fmt: skip


def tier_suspended() -> BoxSnapshot:
    """The same box whose disk is full, and whose router has lost the store."""
    reason = "no space left on device: /home/u/.local/share/dynbox/kv"
    whole = tiered()
    router = next(process.figures for process in whole.processes if isinstance(process.figures, RouterFigures))
    changed = {
        "kvstore": store(state="suspended", reason=reason, dropped={"suspended": 4_000, "queue_full": 310}),
        "router": replace(router, host_blocks=0, disk_blocks=0, tiers_connected=False),
    }
    return replace(
        whole,
        processes=tuple(
            replace(process, figures=changed.get(process.name, process.figures)) for process in whole.processes
        ),
        events=(*whole.events, EventInfo(2, NOW - 12, "warning", "kvstore", f"disk tier suspended: {reason}")),
    )


def disaggregated() -> BoxSnapshot:
    """A 70B-like model on eight simulated GPUs, one worker for prompts and three for answers, of which one was planned
    for prompts: prompts come faster than the one computes them, and answers leave the others time. Requests in all
    phases; decisions in two legs and in one.
    """
    model = "llama70b"
    answering = ("llama70b.decode.0", "llama70b.decode.1", "llama70b.prefill.1")
    computing = "llama70b.prefill.0"
    names = ("llama70b.prefill.0", "llama70b.prefill.1", "llama70b.decode.0", "llama70b.decode.1")
    workers = tuple(_with_role(name, model, number, name in answering) for number, name in enumerate(names))
    policy = Disagg("conditional", 1024, 0.5, 32_768)
    router = RouterFigures(
        workers=names, routed=9_120, hit_rate=0.42, indexed_blocks=61_000, host_blocks=15_400, tiers_connected=True,
        active_requests=38, decisions=tuple(_in_legs(number, model, computing, answering) for number in range(24)),
        disagg="conditional:min_uncached_tokens=1024,min_uncached_share=0.5,max_prefill_tokens=32768",
        disagg_settings=policy,
    )  # fmt: skip
    live = tuple(
        RequestFigures(
            f"req-{number:05}", model, phase, None if phase == "queued" else answering[number % 3], NOW - 9 + number,
            3_000 + 17 * number, 512 if phase != "queued" else 0,
            40 * number + 9 if phase == "decode" else int(phase == "handover"),
            prefill_worker=None if phase == "queued" or number == 4 else computing,
        )
        for number, phase in enumerate(("decode", "decode", "handover", "prefill", "decode", "queued"))
    )  # fmt: skip
    seen = {name: Latency(Quantiles(0.410, 0.812), Quantiles(0.0190, 0.0264)) for name in answering}
    frontend = FrontendFigures(
        models=(model,), active=38, requests=9_100, errors=2, output_tokens=2_100_000, tokens_per_s=1_480.0,
        ttft=Quantiles(0.410, 0.812), itl=Quantiles(0.0190, 0.0264), live=live, by_worker=seen,
    )  # fmt: skip
    tier = TierFigures("on", "", 64 * GIB, 37 * GIB, 15_400, lookups=90_000, hits=71_000)
    store = KvStoreFigures(host=tier, disk=TierFigures("off"), connections=4, requests=9_000)
    devices = tuple(
        DeviceInfo(f"SIM-{number:02}", "80 GiB GPU", "simulated", 80 * GIB, {"weights": 70 * GIB, "KV": 8 * GIB})
        for number in range(8)
    )
    return BoxSnapshot(
        box=_box("ready", "llama70b-disagg"),
        models=(ModelInfo(model, "ready", "/models/llama70b", 4, 4, 0.0, targets=Targets(0.5, 0.03)),),
        processes=(
            replace(_process("kvstore", "kvstore", 4007, store), rss_bytes=37 * GIB),
            _process("router", "router", 4001, router),
            *workers,
            _process("frontend", "frontend", 4005, frontend),
        ),
        devices=devices,
        events=(EventInfo(1, NOW - 60, "info", answering[2], "serves as decode now"),),
        at=NOW,
        host=DeviceFigures(used_bytes=80 * GIB, box_bytes=41 * GIB),
        host_memory_bytes=512 * GIB,
    )


def _with_role(name: str, model: str, number: int, answers: bool) -> ProcessInfo:
    worker = _busy_worker(name, model, number)
    figures = WorkerFigures(
        running=11 if answers else 3, waiting=0 if answers else 14, kv_blocks_total=32_768,
        kv_blocks_used=9_000 + 700 * number, kv_blocks_cached=4_000, weights_bytes=140 * GIB, kv_bytes=16 * GIB,
        prompt_tokens=3_100_000, cached_tokens=3_000_000 if answers else 800_000, output_tokens=700_000,
        requests=2_800, steps=90_000, tokens_per_s=460.0 + number if answers else 4.0,
        busy_s=1_100.0, computed_prompt_tokens=61_000 if answers else 2_300_000,
        role="decode" if answers else "prefill",
        handed_over=0 if answers else 8_400, taken_over=2_790 if answers else 0,
        handover_seconds=0.0 if answers else 714.0, transfers_failed=3 if number == 3 else 0,
        tiers=WorkerTiers("", offloaded=8_000, host=TierUse(matched=90_000, loaded=88_000)),
    )  # fmt: skip
    devices = f"SIM-{2 * number:02},SIM-{2 * number + 1:02}"
    return replace(worker, role=name.split(".")[1], device=devices, figures=figures, info={"engine": "mock"})


def _in_legs(number: int, model: str, computing: str, answering: tuple[str, ...]) -> Decision:
    """Every fourth in one leg."""
    winner, at = answering[number % 3], NOW - 12 + number / 2
    others = [name for name in answering if name != winner]
    if number % 4 == 3:
        return Decision(
            f"req-{number:05}", model, at, "kv", winner, f"{winner}: 12 of 24 blocks cached", 24,
            (Candidate(winner, 12, 12.0, 300, 71.0), Candidate(others[0], 4, 20.0, 310, 80.5)), "conditional",
            "conditional: 192 uncached tokens are fewer than 1024",
        )  # fmt: skip
    return Decision(
        f"req-{number:05}", model, at, "kv", winner, f"{winner}: {290 + number} blocks in use, the fewest", 190,
        (
            Candidate(winner, 0, 0.0, 290 + number, 290.0 + number),
            *(Candidate(name, 0, 0.0, 340 + place, 340.0 + place) for place, name in enumerate(others)),
        ),
        "conditional", f"conditional: {1_900 + number} of 3040 tokens are uncached",
        computing, f"{computing}: 32 of 190 blocks cached, 40 in host memory, the only one",
        (Candidate(computing, 32, 118.0, 96, 214.0, 40),),
    )  # fmt: skip


def sleepers(models: int = 64) -> BoxSnapshot:
    """As many models on one GPU whose gms has a layout for each: every fourth awake, the others asleep in turn on the
    device, in host memory and on disk.
    """
    whole = busy(1)
    places = ("device", "device", "host", "disk")
    named = [(f"model-{number}", places[number % 4], number % 4 == 0) for number in range(models)]
    device = whole.devices[0].id
    workers = tuple(
        replace(
            _busy_worker(f"{name}.aggregated.0", name, 0),
            state="ready" if awake else "asleep",
            figures=WorkerFigures(weights_bytes=GIB if awake else 0, kv_bytes=GIB if awake else 0, kv_blocks_total=10),
        )
        for name, _, awake in named
    )
    layouts = tuple(
        _layout(name, place, GIB, 1, readers=(LockHolder(f"{name}.aggregated.0", 1, "ro", NOW - 5),) * awake)
        for name, place, awake in named
    )
    gms = GmsFigures(device=device, capacity_bytes=80 * GIB, device_bytes=models // 2 * GIB, layouts=layouts)
    router, _, frontend = whole.processes
    return replace(
        whole,
        models=tuple(
            ModelInfo(
                name, "ready" if awake else "asleep", f"/models/{name}", int(awake), 1, 5.0,
                Residency(name, "awake" if awake else "asleep", place, NOW - number, weights_bytes=GIB),  # type: ignore[arg-type]
            )
            for number, (name, place, awake) in enumerate(named)
        ),
        processes=(replace(_process("gms@0", "gms", 3, gms), device=device), router, *workers, frontend),
    )  # fmt: skip


def degraded() -> BoxSnapshot:
    """The busy box in trouble: a worker loading, one in back-off, one given up, one draining, one without figures; a
    GPU with errors, one that can't be read; a box that is degraded, and the events that led there.
    """
    whole = busy()
    router, *workers, frontend = whole.processes
    changed: dict[int, dict[str, Any]] = {
        2: {
            "state": "starting",
            "phase": "loading weights",
            "progress": Progress(120 * MIB, 513 * MIB, "bytes"),
            "uptime_s": 3.0,
            "restarts": 1,
            "figures": None,
        },
        3: {
            "state": "backoff",
            "pid": None,
            "guard_pid": None,
            "rss_bytes": None,
            "uptime_s": None,
            "restarts": 3,
            "cause": "exited with 1: CUDA error: an illegal memory access was encountered",
            "figures": None,
        },
        4: {
            "state": "fatal",
            "pid": None,
            "guard_pid": None,
            "rss_bytes": None,
            "uptime_s": None,
            "restarts": 5,
            "cause": "failed 5 times in a row: killed by SIGKILL (out of memory?)",
            "figures": None,
        },
        5: {"state": "draining", "phase": "12 in flight"},
        6: {"figures": None, "rss_bytes": None},
    }
    bad_gpu = DeviceFigures(
        used_bytes=70 * GIB,
        utilisation=0.0,
        power_w=96.0,
        power_limit_w=700.0,
        temperature_c=94.0,
        throttled=("thermal", "power brake"),
        errors=("2 uncorrected ECC", "XID 79: GPU has fallen off the bus"),
    )
    devices = list(whole.devices)
    devices[3] = replace(devices[3], figures=bad_gpu)
    devices[4] = replace(devices[4], figures=None)
    started = len(whole.events)
    lost, given_up = workers[3].name, workers[4].name
    troubles = (
        ("error", lost, "exited with 1: CUDA error: an illegal memory access was encountered"),
        ("warning", lost, "starting again in 2.0 s (failure 3 in a row)"),
        ("error", given_up, "failed 5 times in a row: killed by SIGKILL (out of memory?)"),
        ("error", None, f"box degraded: {given_up}: failed 5 times in a row"),
    )
    return replace(
        whole,
        box=replace(whole.box, state="degraded", cause=f"{given_up}: failed 5 times in a row"),
        models=(replace(whole.models[0], workers_ready=4),),
        processes=(
            router,
            *(replace(worker, **changed.get(number, {})) for number, worker in enumerate(workers)),
            frontend,
        ),
        devices=tuple(devices),
        events=whole.events
        + tuple(
            EventInfo(started + number + 1, NOW - 40 + 10 * number, *trouble) for number, trouble in enumerate(troubles)
        ),
    )


def crowded(workers: int = 62, requests: int = 2000) -> BoxSnapshot:
    """64 processes and 2,000 live requests (all of them listed, which is more than a frontend does), 200 events, the
    longest that a snapshot holds.
    """
    whole = busy(workers, requests)
    names = tuple(process.name for process in whole.processes if process.kind == "worker")
    *others, frontend = whole.processes
    figures = frontend.figures
    assert isinstance(figures, FrontendFigures)
    figures = replace(figures, live=_requests(names, "llama", requests))
    events = tuple(
        EventInfo(
            seq + 1, NOW - 200 + seq, ("info", "warning", "error")[seq % 3], names[seq % len(names)], f"event {seq}"
        )
        for seq in range(200)
    )
    return replace(whole, processes=(*others, replace(frontend, figures=figures)), events=events)


def hostile() -> BoxSnapshot:
    """Every text that comes from outside has markup, control characters or wide and joined characters in it."""
    worker = f"{MARKUP}.{EMOJI}.0"
    other = f"w\x1b[31m.{CONTROL}"
    request = RequestFigures(CONTROL, EMOJI, "decode", worker, NOW - 3, 100, 50, 7)
    candidates = (Candidate(worker, 3, 3.0, 7, 1.5, 2, 9), Candidate(other, 0, 6.0, 0, 6.0))
    holder = LockHolder(CONTROL, -1, MARKUP, NOW - 3)
    layout = LayoutFigures(
        MARKUP, "\x1b[1m", CONTROL, -1, EMOJI, -5, -7, 9, 11, moving=MARKUP, writer=holder, readers=(holder,) * 3,
        waiters=(holder,), history=(LayoutEvent(NOW - 5, CONTROL),),
    )  # fmt: skip
    gms = GmsFigures(EMOJI, -1, layouts=(layout, replace(layout, name=CONTROL), replace(layout, name="")))
    residency = Residency(
        MARKUP, "asleep", "host", NOW - 9, CONTROL, held=True, weights_bytes=-3, sleeps=-1, note=CONTROL,
        sleep_phases={CONTROL: 0.1}, wake_phases={EMOJI: 0.2, "total": 0.3}, cold=True,
    )  # fmt: skip
    decision = Decision(MARKUP, EMOJI, NOW - 1, "kv", worker, CONTROL, 6, candidates)
    in_legs = replace(
        decision, at=NOW - 2, policy=CONTROL, policy_reason=CONTROL, prefill=other, prefill_reason=MARKUP + CONTROL,
        prefill_candidates=candidates,
    )  # fmt: skip
    passed_on = replace(request, request_id=MARKUP, phase="handover", prefill_worker=other)
    return BoxSnapshot(
        box=replace(_box("degraded", MARKUP), cause=CONTROL),
        models=(
            ModelInfo(EMOJI, "ready", f"/models/{CONTROL}", 1, 2, None, Residency(EMOJI, "waking", phase=CONTROL)),
            ModelInfo(MARKUP, "weird\x07", residency=residency, targets=Targets(-1.0, 0.0)),
        ),
        processes=(
            replace(_process(f"gms@{CONTROL}", "gms", 9, gms), device=EMOJI),
            _process(
                "router",
                "router",
                1,
                RouterFigures(workers=(worker, other), decisions=(decision, in_legs), disagg=CONTROL),
            ),
            _process(EMOJI, "kvstore", 3, _hostile_store(worker)),
            _hostile_worker(worker),
            replace(
                _busy_worker(other, MARKUP, 1),
                state="starting\x1b[0m",
                phase=CONTROL,
                progress=Progress(-5, 0, "\x1b[5m"),
                device=EMOJI,
                role="prefill",
            ),
            _process(
                "frontend",
                "frontend",
                2,
                FrontendFigures(active=1, live=(request, passed_on), by_worker={worker: Latency(Quantiles(0.1, None))}),
            ),
        ),
        devices=(
            DeviceInfo("GPU-0", EMOJI, "cuda", 80 * GIB, {MARKUP: 1}, DeviceFigures(errors=(CONTROL,))),
            DeviceInfo(EMOJI, MARKUP, CONTROL, None, {}, DeviceFigures(throttled=(MARKUP,))),
        ),
        events=(
            EventInfo(1, NOW - 5, "error", worker, f"{MARKUP} {CONTROL} {EMOJI} " + "long " * 100),
            EventInfo(2, NOW, "\x1b[1m", other, ""),
        ),
        at=NOW,
        disks=(DiskInfo(CONTROL, MARKUP, 0, 0),),
    )


def _hostile_worker(name: str) -> ProcessInfo:
    worker = replace(_busy_worker(name, EMOJI, 0), cause=CONTROL, info={MARKUP: CONTROL, "": EMOJI})
    assert isinstance(worker.figures, WorkerFigures)
    tiers = WorkerTiers(CONTROL, dropped={CONTROL: 3}, terminated={MARKUP: 1}, host=TierUse(-1, -2, 5, 7, -8, 0.5))
    figures = replace(
        worker.figures, tiers=tiers, role=f"prefill{CONTROL}", handed_over=-1, taken_over=3, handover_seconds=-2.0,
        transfers_failed=-1,
    )  # fmt: skip
    return replace(worker, figures=figures)


def _hostile_store(owner: str) -> KvStoreFigures:
    tier = TierFigures("suspended", CONTROL, -1, 5, -3, 1, 9, dropped={CONTROL: 4, MARKUP: -1}, failed=-2, queued=-1)
    layout = KvLayoutFigures(CONTROL, MARKUP, CONTROL, -1, -1, (owner, CONTROL), 0, 5, -3)
    return KvStoreFigures(tier, replace(tier, state=MARKUP), (layout, replace(layout, name="", owners=())), CONTROL,
                          CONTROL, -1, -1.0)  # fmt: skip


def gaps() -> BoxSnapshot:
    """A box of which next to nothing is known: every figure that may be missing is."""
    return BoxSnapshot(
        box=_box("starting", ""),
        models=(ModelInfo("llama", "starting"),),
        processes=(
            ProcessInfo("gms@cpu", "gms", None, None, "planned", "", None, 0, None, None),
            replace(_process("gms@GPU-0", "gms", 6, GmsFigures("GPU-0", 0)), device="GPU-0"),
            ProcessInfo("kvstore", "kvstore", None, None, "planned", "", None, 0, None, None),
            ProcessInfo("router", "router", None, None, "planned", "", None, 0, None, None),
            ProcessInfo("llama.aggregated.0", "worker", "llama", None, "starting", "", None, 0, "GPU-0", None),
            ProcessInfo("llama.aggregated.1", "worker", "llama", "aggregated", "starting", "", 7, 0, None, None),
            replace(_process("frontend", "frontend", 8, FrontendFigures()), uptime_s=None, rss_bytes=None),
        ),
        devices=(DeviceInfo("GPU-0", "", "cuda", None), DeviceInfo("GPU-1", "", "cuda", None, {}, DeviceFigures())),
        at=NOW,
        host=DeviceFigures(),
    )


def empty() -> BoxSnapshot:
    """A box without anything in it."""
    return BoxSnapshot(box=_box("starting", "none"), models=(), processes=(), at=NOW)


def all_kinds() -> dict[str, BoxSnapshot]:
    """Every snapshot above by name, for tests that hold for all."""
    return {
        "busy": busy(),
        "tiny": tiny(),
        "shared": shared(),
        "sleepers": sleepers(),
        "tiered": tiered(),
        "tier_suspended": tier_suspended(),
        "disaggregated": disaggregated(),
        "degraded": degraded(),
        "crowded": crowded(),
        "hostile": hostile(),
        "gaps": gaps(),
        "empty": empty(),
    }


def later(snapshot: BoxSnapshot, seconds: float = 1.0) -> BoxSnapshot:
    """The same box a little later: its workers have done as much as their rates say, half of it from the cache, and of
    that most from the tiers, if it has any. Those for prompts computed all the time, those for answers a third of it.
    """
    processes = []
    for process in snapshot.processes:
        figures = process.figures
        if isinstance(figures, WorkerFigures):
            done = int(figures.tokens_per_s * seconds)
            figures = replace(
                figures,
                prompt_tokens=figures.prompt_tokens + 2 * done,
                cached_tokens=figures.cached_tokens + done,
                output_tokens=figures.output_tokens + done,
                requests=figures.requests + 1,
                steps=figures.steps + 1,
                busy_s=figures.busy_s + seconds * {"prefill": 0.97, "decode": 0.33}.get(figures.role, 0.0),
                handed_over=figures.handed_over + 4 * (figures.role == "prefill"),
                taken_over=figures.taken_over + (figures.role == "decode"),
                tiers=None if figures.tiers is None else _tiers_later(figures.tiers, done, seconds),
            )
            process = replace(process, figures=figures, uptime_s=(process.uptime_s or 0.0) + seconds)
        elif isinstance(figures, KvStoreFigures) and figures.disk.state == "on":
            disk = figures.disk
            moved = (disk.in_bytes + int(84 * MIB * seconds), disk.out_bytes + int(31 * MIB * seconds))
            disk = replace(disk, in_bytes=moved[0], out_bytes=moved[1])
            process = replace(process, figures=replace(figures, disk=disk))
        processes.append(process)
    return replace(snapshot, processes=tuple(processes), at=snapshot.at + seconds)


def moments(snapshot: BoxSnapshot, count: int = 12) -> tuple[BoxSnapshot, ...]:
    """The box a second apart, ending with `count` seconds later: what flows in it has a rate then."""
    found = [snapshot]
    for _ in range(count):
        found.append(later(found[-1]))
    return tuple(found)


def _tiers_later(tiers: WorkerTiers, cached: int, seconds: float) -> WorkerTiers:
    host, disk = cached // 2, cached // 4
    return replace(
        tiers,
        offloaded_bytes=tiers.offloaded_bytes + int(60 * MIB * seconds),
        host=replace(tiers.host, loaded=tiers.host.loaded + host, bytes=tiers.host.bytes + int(210 * MIB * seconds)),
        disk=replace(tiers.disk, loaded=tiers.disk.loaded + disk, bytes=tiers.disk.bytes + int(16 * MIB * seconds)),
    )


def _with_tiers(worker: ProcessInfo, number: int) -> ProcessInfo:
    figures = worker.figures
    assert isinstance(figures, WorkerFigures)
    block = 720 * 1024
    tiers = WorkerTiers(
        connected="", queued=18, pinned=4, offloaded=6_170 + number, offloaded_bytes=(6_170 + number) * block,
        offload_seconds=3.5, known=900, dropped={"evicted": 31, "queue_full": 7}, filtered=140, unset=5_900,
        terminated={"priority": 9}, min_priority=20,
        host=TierUse(168_000, 163_200, 0, 4_800, 10_200 * block, 2.4),
        disk=TierUse(66_000, 64_720, 320, 960, 4_045 * block, 2.6), loads=410, recomputes=16,
    )  # fmt: skip
    figures = replace(figures, prompt_tokens=480_000, cached_tokens=398_000, tiers=tiers)
    return replace(worker, figures=figures)


def _box(state: str, profile: str) -> BoxInfo:
    return BoxInfo(
        state=state,
        profile=profile,
        endpoint="http://127.0.0.1:8000",
        pid=3999,
        uptime_s=4000.0,
        run_id="3999-1",
        run_dir="/run/user/1000/dynbox",
        logs_dir="/home/u/.local/state/dynbox/logs",
    )


def _process(name: str, kind: str, pid: int, figures: Figures) -> ProcessInfo:
    return ProcessInfo(
        name=name,
        kind=kind,
        model=None,
        role=None,
        state="ready",
        phase="",
        pid=pid,
        guard_pid=pid - 1,
        restarts=0,
        device=None,
        rss_bytes=70 * MIB,
        uptime_s=3990.0,
        figures=figures,
    )


def _sharing(name: str, model: str, pid: int) -> ProcessInfo:
    """A worker on the cpu whose weights are mapped from a layout."""
    size = 513 * MIB if model in ("smollm2", "guard") else 257 * MIB
    figures = WorkerFigures(
        running=1,
        kv_blocks_total=512,
        kv_blocks_used=40,
        kv_blocks_cached=12,
        weights_bytes=size,
        kv_bytes=180 * MIB,
        prompt_tokens=2200,
        cached_tokens=400,
        output_tokens=640,
        requests=20,
        tokens_per_s=24.0,
    )
    return ProcessInfo(
        name=name,
        kind="worker",
        model=model,
        role="aggregated",
        state="ready",
        phase="",
        pid=pid,
        guard_pid=pid - 1,
        restarts=0,
        device="cpu",
        rss_bytes=1100 * MIB,
        uptime_s=620.0,
        figures=figures,
    )


def _layout(name: str, place: str, size: int, epoch: int, **more: Any) -> LayoutFigures:
    """A committed one that is where it sleeps, or is mapped."""
    given: dict[str, Any] = {
        f"{place}_bytes": size,
        "allocations": 12,
        "entries": 272,
        "history": (LayoutEvent(NOW - 600, f"epoch {epoch} committed"), LayoutEvent(NOW - 500, "1 reader")),
    }
    return LayoutFigures(name, "committed", place, epoch, "9f2c41d0a7b3e655", size, **(given | more))


def _busy_worker(name: str, model: str, number: int) -> ProcessInfo:
    return ProcessInfo(
        name=name,
        kind="worker",
        model=model,
        role="aggregated",
        state="ready",
        phase="",
        pid=5001 + 10 * number,
        guard_pid=5000 + 10 * number,
        restarts=0,
        device=_gpu_id(number),
        rss_bytes=2 * GIB + number * MIB,
        uptime_s=3900.0 - number,
        info={"vllm": "0.11.0", "kv_blocks": "20480", "block_size": "16", "context_length": "8192"},
        figures=WorkerFigures(
            running=20 + number,
            waiting=number % 3,
            kv_blocks_total=20480,
            kv_blocks_used=6000 + 1000 * (number % 8),
            kv_blocks_cached=4000,
            weights_bytes=16 * GIB,
            kv_bytes=40 * GIB,
            prompt_tokens=1_000_000 + 1000 * number,
            cached_tokens=600_000,
            output_tokens=400_000 + number,
            requests=900 + number,
            errors=number % 2,
            steps=50_000,
            tokens_per_s=1200.0 + 10.5 * number,
        ),
    )


def _router(workers: tuple[str, ...], model: str) -> ProcessInfo:
    decisions = tuple(
        Decision(
            request_id=f"req-{number:04}",
            model=model,
            at=NOW - 4 + number / 8,
            mode="kv",
            winner=workers[number % len(workers)],
            reason=f"{number % 5} of 12 blocks cached there, the lowest cost",
            prompt_blocks=12,
            candidates=tuple(
                Candidate(name, (number + place) % 5, 12.0 - (number + place) % 5, 300 + place, 4.5 + place)
                for place, name in enumerate(workers[:8])
            ),
        )
        for number in range(32)
    )
    figures = RouterFigures(
        workers=workers,
        indexed_blocks=81_000,
        active_requests=190,
        routed=7_300,
        hit_rate=0.61,
        decisions=decisions,
    )
    return replace(_process("router", "router", 4001, figures), info={"mode": "kv", "models": model})


def _frontend(workers: tuple[str, ...], model: str, requests: int) -> ProcessInfo:
    figures = FrontendFigures(
        models=(model,),
        active=requests,
        requests=7_300,
        errors=4,
        disconnected=12,
        output_tokens=3_200_000,
        tokens_per_s=9_894.0,
        ttft=Quantiles(0.042, 0.310),
        itl=Quantiles(0.0084, 0.0192),
        live=_requests(workers, model, min(requests, 256)),
        by_worker={
            name: Latency(Quantiles(0.040 + number / 1000, 0.300), Quantiles(0.0082, 0.019))
            for number, name in enumerate(workers)
        },
        last_ended={model: NOW - 0.5},
    )
    return replace(_process("frontend", "frontend", 4003, figures), info={"address": "127.0.0.1:8000"})


def _requests(workers: tuple[str, ...], model: str, number: int) -> tuple[RequestFigures, ...]:
    phases = ("decode", "decode", "decode", "prefill", "queued")
    return tuple(
        RequestFigures(
            request_id=f"req-{each:05}",
            model=model,
            phase=phases[each % 5],
            worker=None if phases[each % 5] == "queued" else workers[each % len(workers)],
            started=NOW - 90 + each * 90 / number,
            prompt_tokens=500 + each,
            cached_tokens=(each % 4) * 100,
            output_tokens=0 if phases[each % 5] != "decode" else each % 700,
            priority=each % 2,
        )
        for each in range(number)
    )


def _calm_events(workers: tuple[str, ...]) -> tuple[EventInfo, ...]:
    lines: list[tuple[str, str | None, str]] = [("info", None, "starting llama-8gpu at http://127.0.0.1:8000")]
    lines += [("info", name, "ready") for name in (*workers[:8], "router", "frontend")]
    lines += [("info", None, "llama answered its canary in 41 ms"), ("info", None, "box ready")]
    return tuple(EventInfo(number + 1, NOW - 3990 + 5 * number, *line) for number, line in enumerate(lines))


def _gpu_id(number: int) -> str:
    return f"GPU-{0x4F1C2B3D + number * 0x01010101:08x}-9a8b-7c6d-5e4f-{number:012x}"


def _gpu(number: int) -> DeviceInfo:
    figures = DeviceFigures(
        used_bytes=58 * GIB + number * 64 * MIB,
        box_bytes=57 * GIB,
        other_bytes=600 * MIB,
        utilisation=0.97 - 0.05 * (number % 8),
        power_w=612.0 - 9 * (number % 8),
        power_limit_w=700.0,
        temperature_c=61.0 + number % 8,
        throttled=("power cap",) if number == 1 else (),
    )
    planned = {"weights": 16 * GIB, "KV": 40 * GIB, "overhead": GIB}
    return DeviceInfo(_gpu_id(number), "NVIDIA H100 80GB HBM3", "cuda", 80 * GIB, planned, figures)
