"""`dynbox up` and `down` around a supervisor that does as it is told: the real command, plan and protocol."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ports import free_port

from dynamo_box.protocol import control

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
DEADLINE_S = 90

SUPERVISOR = '''
"""Stands for `python -m dynamo_box.supervisor`: takes the launch, plays the acts named in FAKE_ACTS."""
import json, os, pathlib, socket, sys
import msgspec
from dynamo_box.plan.types import Plan
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ModelInfo, ProcessInfo, Progress

story = pathlib.Path(os.environ["FAKE_STORY"])
if sys.argv[1] == "--sweep":
    print(os.environ["FAKE_SWEEP"])
    sys.exit(0)

def tell(word):
    with story.open("a") as file:
        file.write(word + "\\n")

if sys.argv[1] == "--plan-fd":
    with open(int(sys.argv[2]), "rb") as file:
        launch = msgspec.msgpack.decode(file.read(), type=control.Launch)
    plan = msgspec.msgpack.decode(launch.plan, type=Plan)
    tell(f"foreground {plan.profile} {plan.port} pid {os.getpid()}")
    sys.exit(0)

channel = BlockingChannel(socket.socket(fileno=int(sys.argv[2])), control.request_decoder)
request = channel.receive(60)
plan = msgspec.msgpack.decode(request.plan, type=Plan)
assert all(model.path for model in plan.models)
tell(f"launched {plan.profile} {plan.port} session {os.getsid(0) == os.getpid()}")

def snapshot(state, done=None):
    progress = None if done is None else Progress(done, 100 * 2**20, "bytes")
    worker = ProcessInfo("w", "worker", "smollm2", "aggregated", state, "weights", 9, 0, "cpu", 1, progress=progress)
    cause = "kvstore: no memory to be had" if state == "degraded" else ""
    box = BoxInfo(state, plan.profile, plan.endpoint, os.getpid(), 1.0, cause=cause)
    body = BoxSnapshot(box, (ModelInfo("smollm2", state),), (worker,))
    channel.send(control.SnapshotReply(request.id, msgspec.Raw(msgspec.msgpack.encode(body))))

def play(act):
    if act == "weights":
        for done in range(0, 101, 5):
            snapshot("starting", done * 2**20)
    elif act in ("ready", "degraded"):
        snapshot(act)
        channel.send(control.Done(request.id))
    elif act == "fail":
        channel.send(control.Error(request.id, 1, "worker w failed", "give it memory", ("last line",)))
    elif act == "crash":
        raise SystemError("no uvloop here")
    elif act == "wait":
        tell("waiting")
        assert channel.receive(300) is None
        tell("aborted")

try:
    for act in os.environ["FAKE_ACTS"].split():
        play(act)
except (BrokenPipeError, ConnectionResetError):
    tell("aborted")  # the command has gone before it was told, or had read, everything
tell("end")
'''


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home whose store holds a tiny model under the name that the shipped profiles ask for."""
    home = tmp_path_factory.mktemp("store")
    subprocess.run(
        [sys.executable, "-m", "dynamo_box", "pull", str(tiny_model), "--name", "smollm2"],
        env={**os.environ, "DYNBOX_HOME": str(home)},
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    return home / "models"


class Up:
    """Runs `dynbox` with the supervisor above."""

    def __init__(self, directory: Path) -> None:
        self.story_path = directory / "story"
        self.port = free_port()
        script = directory / "supervisor.py"
        script.write_text(SUPERVISOR)
        self._code = (
            "import sys; from dynamo_box.control import launch; "
            f"launch.SUPERVISOR = (sys.executable, {str(script)!r}); "
            "from dynamo_box.cli.app import main; sys.exit(main(sys.argv[1:]))"
        )

    def start(self, *arguments: str, acts: str = "", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", self._code, *arguments],
            env={**os.environ, "FAKE_ACTS": acts, "FAKE_STORY": str(self.story_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, acts: str = "", code: int = 0, **environment: str) -> tuple[str, str]:
        process = self.start(*arguments, acts=acts, **environment)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def up(self, *arguments: str, acts: str = "", code: int = 0, **environment: str) -> tuple[str, str]:
        return self.run("up", "--port", str(self.port), *arguments, acts=acts, code=code, **environment)

    @property
    def story(self) -> list[str]:
        return self.story_path.read_text().splitlines() if self.story_path.exists() else []

    def wait_for(self, word: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while word not in self.story:
            assert time.monotonic() < end, f"{word!r} never came: {self.story}"
            time.sleep(0.01)


@pytest.fixture
def box(tmp_path: Path, box_env: Any, models: Path) -> Up:
    box_env.home.mkdir()
    (box_env.home / "models").symlink_to(models)
    return Up(tmp_path)


def test_up_shows_progress_and_ends_with_the_endpoint(box: Up) -> None:
    out, err = box.up(acts="weights ready")
    assert box.story == [f"launched smollm2 {box.port} session True", "end"]
    assert out.startswith(f"http://127.0.0.1:{box.port} serves smollm2 (profile smollm2)")
    assert "curl " in out
    lines = [line for line in err.splitlines() if line.startswith("w ")]
    assert len(lines) == 12, "a line a tenth, and one when it is ready"
    assert "50.0 MiB of 100 MiB" in err
    assert "\x1b" not in out + err


def test_a_box_that_starts_without_its_tiers_is_said_to_be_degraded(box: Up) -> None:
    out, err = box.up(acts="degraded")
    assert out.startswith(f"http://127.0.0.1:{box.port} serves smollm2")
    assert err.splitlines()[-1] == "warning: the box is degraded: kvstore: no memory to be had"


def test_json_lines_tell_progress_and_result(box: Up) -> None:
    out, _ = box.up("--json", acts="weights ready")
    *progress, last = map(json.loads, out.splitlines())
    assert {line["event"] for line in progress} == {"progress"}
    assert progress[0]["unit"] == "bytes"
    assert last["event"] == "ready"
    assert last["box"]["endpoint"] == f"http://127.0.0.1:{box.port}"


def test_a_failed_start_says_why_and_shows_the_last_lines(box: Up) -> None:
    out, err = box.up(acts="weights fail", code=1)
    assert out == ""
    assert err.splitlines()[-3:] == ["error: worker w failed", "  last line", "hint: give it memory"]


def test_a_supervisor_that_dies_is_reported_with_its_own_words(box: Up) -> None:
    out, _ = box.up("--json", acts="crash", code=1)
    error = json.loads(out.splitlines()[-1])
    assert error["event"] == "error"
    assert error["exit_code"] == 1
    assert "status 1" in error["what"]
    assert "SystemError: no uvloop here" in error["details"]


def test_ctrl_c_ends_the_supervisor_first(box: Up) -> None:
    up = box.start("up", "--port", str(box.port), acts="weights wait")
    box.wait_for("waiting")
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=DEADLINE_S)
    assert up.returncode == 130, err
    assert box.story[-2:] == ["aborted", "end"]


def test_a_killed_up_aborts_as_well(box: Up) -> None:
    up = box.start("up", "--port", str(box.port), acts="wait")
    box.wait_for("waiting")
    up.kill()
    up.communicate(timeout=DEADLINE_S)
    box.wait_for("end")


def test_a_timeout_is_exit_4_and_leaves_nothing(box: Up) -> None:
    _, err = box.up("--timeout", "2", acts="weights wait", code=4)
    assert "not ready in time" in err
    assert box.story[-1] == "end"


def test_a_taken_port_is_refused_with_its_holder_before_anything_starts(box: Up) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", box.port))
        holder.listen()
        _, err = box.up(code=1)
    assert f"port {box.port}" in err
    assert f"pid {os.getpid()}" in err
    assert box.story == []


def test_a_dry_run_starts_nothing_and_needs_no_model(box: Up, box_env: Any) -> None:
    (box_env.home / "models").unlink()
    out, _ = box.up("--dry-run")
    assert "smollm2.aggregated.0" in out
    plan = json.loads(box.up("--dry-run", "--json")[0])
    assert plan["port"] == box.port
    assert plan["endpoint"] == f"http://127.0.0.1:{box.port}"
    assert box.story == []


TIERED = "model: smollm2\nmemory: {tiers: {host: 64MiB, disk: 256MiB, directory: /tiers}}\n"


def test_the_references_variables_for_tiers_go_before_the_profile(box: Up, tmp_path: Path) -> None:
    profile = tmp_path / "tiered.yaml"
    profile.write_text(TIERED)
    variables = {"DYN_KVBM_CPU_CACHE_GB": "0.5", "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "40"}
    out, _ = box.up("--profile", str(profile), "--dry-run", **variables)
    assert out.splitlines()[1] == (
        "KV tiers: 477 MiB of host memory (DYN_KVBM_CPU_CACHE_GB), 256 MiB on disk (profile) in /tiers (profile), "
        "blocks of priority 40 and above (DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY)"
    )
    plan = json.loads(box.up("--profile", str(profile), "--dry-run", "--json", **variables)[0])
    store = next(process["spec"] for process in plan["processes"] if process["kind"] == "kvstore")
    assert (store["host_bytes"], store["disk_bytes"]) == (500_000_000, 256 << 20)
    assert plan["origins"]["memory.tiers.host"] == "DYN_KVBM_CPU_CACHE_GB"


@pytest.mark.parametrize("value", ["4 0", "101", ""])
def test_a_variable_that_can_not_be_used_refuses_before_anything_starts(box: Up, value: str) -> None:
    name = "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY"
    out, err = box.up("--json", code=2, **{name: value})
    assert err.splitlines() == [
        f'error: the environment variable {name} is "{value}", but must be a whole number from 0 to 100',
        f"hint: export {name}=40, or unset {name}: then the profile counts",
    ]
    assert json.loads(out)["exit_code"] == 2
    assert box.story == []


def test_what_the_store_lacks_is_an_error_without_pulling(box: Up, box_env: Any) -> None:
    (box_env.home / "models").unlink()
    _, err = box.up("--no-pull", code=1)
    assert "dynbox pull smollm2" in err
    assert box.story == []


def test_a_profile_that_does_not_fit_is_exit_2_with_reasons(box: Up) -> None:
    _, err = box.up("--profile", "llama70b-disagg", code=2)
    assert "GPU" in err
    assert "smollm2" in err
    assert box.story == []


def test_in_the_foreground_it_becomes_the_supervisor(box: Up) -> None:
    up = box.start("up", "--port", str(box.port), "--foreground")
    _, err = up.communicate(timeout=DEADLINE_S)
    assert up.returncode == 0, err
    assert box.story == [f"foreground smollm2 {box.port} pid {up.pid}"]


def test_a_model_gets_a_profile_of_its_own(box: Up) -> None:
    box.up("--model", "smollm2", acts="ready")
    assert box.story[0].startswith("launched smollm2 ")
    _, err = box.up("--model", "smollm2", "--profile", "smollm2", code=2)
    assert "exclude" in err


def test_the_same_profile_again_is_ok_and_another_is_told_who_holds_the_box(box: Up, supervisor: Any) -> None:
    supervisor.state = msgspec.structs.replace(
        supervisor.state,
        box=msgspec.structs.replace(supervisor.state.box, endpoint=f"http://127.0.0.1:{box.port}"),
    )
    _, err = box.up()
    assert "already up" in err
    _, err = box.up("--profile", "smollm2-duo", code=1)
    assert f"profile smollm2 on http://127.0.0.1:{box.port}, supervisor pid {os.getpid()}" in err
    assert box.story == []


def test_a_box_that_another_up_is_starting_is_waited_for(box: Up, supervisor: Any) -> None:
    def at(state: str) -> Any:
        info = msgspec.structs.replace(
            supervisor.state.box, endpoint=f"http://127.0.0.1:{box.port}", state=state, cause=""
        )
        return msgspec.structs.replace(supervisor.state, box=info)

    supervisor.handlers[control.Watch] = lambda request: [
        supervisor.reply(request, at("starting")), supervisor.reply(request, ending)
    ]  # fmt: skip
    ready, failed = at("ready"), at("failed")
    supervisor.state = at("starting")
    ending = ready
    out, err = box.up()
    assert "already being started" in err
    assert "smollm2.aggregated.0  starting" in err
    assert out.startswith(f"http://127.0.0.1:{box.port}")
    ending = failed
    _, err = box.up(code=1)
    assert "failed, not ready" in err


def test_the_slower_of_two_ups_joins_the_quicker(box: Up, box_env: Any, make_supervisor: Any) -> None:
    """The other holds the lock; its control socket comes only later."""
    box_env.run.mkdir()
    lock = os.open(box_env.run / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    up = box.start("up", "--port", str(box.port), acts="fail")

    def appear() -> None:
        fake = make_supervisor()
        fake.state = msgspec.structs.replace(
            fake.state, box=msgspec.structs.replace(fake.state.box, endpoint=f"http://127.0.0.1:{box.port}")
        )

    later = threading.Timer(1.0, appear)
    later.start()
    _, err = up.communicate(timeout=DEADLINE_S)
    later.join()
    os.close(lock)
    assert up.returncode == 0, err
    assert "already up" in err


@pytest.fixture
def doomed(supervisor: Any) -> Iterator[Any]:
    """A fake box whose supervisor pid is a process that ends when it is told to."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        supervisor.state = msgspec.structs.replace(
            supervisor.state, box=msgspec.structs.replace(supervisor.state.box, pid=process.pid)
        )

        def stop(request: Any, **figures: Any) -> list[Any]:
            process.kill()
            return [supervisor.reply(request), control.Stopped(request.id, 3, 1, 900 * 2**20, **figures)]

        supervisor.stop = stop
        supervisor.handlers[control.Down] = stop
        yield supervisor
        process.kill()


def test_down_says_what_was_freed(box: Up, doomed: Any) -> None:
    out, err = box.run("down", "--drain", "7")
    assert out == "stopped 3 processes, 1 of them by KILL; 900 MiB freed; nothing is left running\n"
    assert "7 s" in err
    assert [request.drain_s for request in doomed.requests if isinstance(request, control.Down)] == [7.0]


def test_down_fails_when_something_survives(box: Up, doomed: Any) -> None:
    doomed.handlers[control.Down] = lambda request: doomed.stop(request, survivors=(4242,))
    out, err = box.run("down", "--json", code=1)
    assert json.loads(out)["survivors"] == [4242]
    assert "4242" in err


def test_down_without_a_box_clears_up_or_says_that_there_is_nothing(box: Up, box_env: Any) -> None:
    box_env.run.mkdir()
    _, err = box.run("down", FAKE_SWEEP='{"pids": [], "killed": 0}', code=3)
    assert "no box is running" in err
    out, err = box.run("down", FAKE_SWEEP='{"pids": [17, 18], "killed": 2, "survivors": []}')
    assert "2 of 2 leftover processes" in out
    assert "17, 18" in out
    _, err = box.run("down", FAKE_SWEEP='{"pids": [17], "killed": 0, "survivors": [17]}', code=1)
    assert "17" in err


def test_restart_waits_until_the_process_is_back(box: Up, supervisor: Any) -> None:
    supervisor.handlers[control.Restart] = lambda request: [
        supervisor.reply(request), control.Done(request.id, "router is back")
    ]  # fmt: skip
    out, _ = box.run("restart", "router", "--drain", "3")
    assert out == "router is back\n"
    assert supervisor.requests[1] == control.Restart(2, "router", 3.0)
    supervisor.handlers[control.Restart] = lambda request: [control.Error(request.id, 1, "no room", "", ("oops",))]
    _, err = box.run("restart", "router", code=1)
    assert err.splitlines() == ["error: no room", "  oops"]
