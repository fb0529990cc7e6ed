"""install.sh over a stand-in for the project whose wheels lie in a directory: no network, and seconds, not minutes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "install.sh"
DEADLINE_S = 240
TOOLS = (
    *("awk", "bash", "cat", "cut", "df", "dirname", "env", "flock", "grep", "ln", "mkdir", "mv"),
    *("readlink", "rm", "sh", "sha256sum", "uname"),
)

# A project that installs without anything from outside: an editable wheel made by a backend of its own.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "dynamo-box"
version = "0.1.0"
"""
BACKEND = '''
import os, time, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    pause = os.environ.get("TEST_BUILD_PAUSE")
    if pause:
        open(pause, "w").close()
        time.sleep(300)
    name = "dynamo_box-0.1.0-py3-none-any.whl"
    info = "dynamo_box-0.1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        wheel.writestr("dynbox_stand_in.py", "import sys\\ndef main():\\n    print('dynbox', *sys.argv[1:])\\n")
        wheel.writestr(info + "METADATA", """Metadata-Version: 2.1
Name: dynamo-box
Version: 0.1.0
Provides-Extra: native
Provides-Extra: test
Provides-Extra: cuda
Requires-Dist: torch>=2.5; extra == 'native'
""")
        tags = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\n" + tags)
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\ndynbox = dynbox_stand_in:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
'''


def make_wheel(directory: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    base = f"{name.replace('-', '_')}-{version}"
    path = directory / f"{base}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            f"{base}.dist-info/METADATA", metadata + "".join(f"Requires-Dist: {need}\n" for need in requires)
        )
        wheel.writestr(
            f"{base}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{base}.dist-info/RECORD", "")
    return path


class Checkout:
    """A directory with install.sh and the stand-in, and the environment to run it in."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout with a space"
        self.wheels = root / "wheels"
        self.home = root / "home"
        self.root.mkdir(parents=True)
        self.home.mkdir()
        shutil.copy(SCRIPT, self.root)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        self.environment = kept | {
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin"]),
            "HOME": str(self.home),
            "PYTHON": sys.executable,
            "DYNBOX_TORCH": "cpu",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONFIG_FILE": os.devnull,
            "https_proxy": "http://127.0.0.1:9",  # the index for CPU wheels does not answer
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "install.sh"), *arguments],
            env=self.environment | environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        try:
            output, errors = process.communicate(timeout=DEADLINE_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def launcher(self) -> Path:
        return self.home / ".local/bin/dynbox"

    def has(self, package: str) -> bool:
        return any(self.venv.glob(f"lib/python*/site-packages/{package}-*.dist-info"))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that copies pip into the environments it makes; `ensurepip` takes five seconds for each."""
    root = tmp_path_factory.mktemp("python")
    subprocess.run([sys.executable, "-m", "venv", root / "seed"], check=True, timeout=DEADLINE_S)
    tool(
        root,
        "python",
        f"""
if [ "$1 $2" = "-m venv" ]; then
    "{sys.executable}" -m venv --without-pip "$3" && exec cp -r "{root}/seed/lib" "$3"
fi
exec "{sys.executable}" "$@"
""",
    )
    return root / "python"


@pytest.fixture
def checkout(tmp_path: Path, quick_python: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.environment["PYTHON"] = str(quick_python)
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("installed"))
    make_wheel(checkout.wheels, "torch", "2.13.0")
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    return checkout


# ---- before anything is made


def test_help_goes_to_stdout_and_a_wrong_command_to_stderr(checkout: Checkout) -> None:
    run = checkout.run("help")
    assert run.returncode == 0
    assert "DYNBOX_TORCH_INDEX" in run.stdout
    wrong = checkout.run("instal")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no command 'instal'" in wrong.stderr
    assert checkout.run("install", "more").returncode == 2
    assert not checkout.venv.exists()


def test_it_finds_bash_when_called_by_another_shell(checkout: Checkout) -> None:
    run = subprocess.run(
        ["sh", str(checkout.root / "install.sh"), "help"], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert run.returncode == 0, run.stderr


def tool(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def test_other_platforms_are_refused(checkout: Checkout, tmp_path: Path) -> None:
    tool(tmp_path / "bin", "uname", "echo Darwin arm64")
    run = checkout.run(PATH=f"{tmp_path}/bin:{checkout.environment['PATH']}")
    assert run.returncode == 1
    assert "this is Darwin arm64" in run.stderr


APT_GET = """
echo "apt-get $*" >>"$0.calls"
[ "$2" = update ] && exec touch "$0.updated"
[ -e "$0.updated" ] && [ ! -e "$0.broken" ] && printf '#!/bin/sh\\n' >"${0%/*}/tmux" && chmod +x "${0%/*}/tmux"
"""


@pytest.mark.parametrize("uid", [0, 1000])
def test_tmux_is_installed_by_root_and_named_to_others(checkout: Checkout, tmp_path: Path, uid: int) -> None:
    """Before anything else; the quick lane needs none."""
    directory = tmp_path / "bin"
    tool(directory, "id", f"echo {uid}")
    tool(directory, "apt-get", APT_GET)
    tool(directory, "uname", "echo Darwin arm64")  # what comes next ends it here
    for name in ("bash", "chmod", "dirname", "env", "touch", "sh"):
        (directory / name).symlink_to(shutil.which(name) or "")
    (directory / "apt-get.broken").touch()
    refused = checkout.run("test", PATH=str(directory))
    assert refused.returncode == 1
    assert "apt install tmux" in refused.stderr
    assert "Darwin" not in refused.stderr
    assert "Darwin" in checkout.run("test", "quick", PATH=str(directory)).stderr
    if uid == 0:
        (directory / "apt-get.broken").unlink()
        assert "Darwin" in checkout.run("test", PATH=str(directory)).stderr
        assert (directory / "apt-get.calls").read_text().count("apt-get -q install -y") == 3
    else:
        assert not (directory / "apt-get.calls").exists()


def test_a_missing_python_is_named_with_what_to_install(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None, name
        (tmp_path / "bin" / name).symlink_to(found)
    tool(tmp_path / "bin", "python3", "exit 1")
    run = checkout.run(PATH=str(tmp_path / "bin"), PYTHON="")
    assert run.returncode == 1
    assert "no Python 3.11 or newer" in run.stderr
    assert "apt install python3" in run.stderr
    named = checkout.run(PATH=str(tmp_path / "bin"), PYTHON="python3")
    assert "PYTHON=python3 is no Python 3.11" in named.stderr
    assert not checkout.venv.exists()


def test_a_python_without_venv_is_named_with_what_to_install(checkout: Checkout, tmp_path: Path) -> None:
    tool(tmp_path / "bin", "python", f'case "$2" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"')
    run = checkout.run(PYTHON=str(tmp_path / "bin" / "python"))
    assert run.returncode == 1
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in run.stderr
    assert not checkout.venv.exists()


def test_a_full_disk_is_told_before_anything_is_made(checkout: Checkout, tmp_path: Path) -> None:
    tool(tmp_path / "bin", "df", "echo Filesystem; echo disk 1 1 1048576 1 /")
    run = checkout.run(PATH=f"{tmp_path}/bin:{checkout.environment['PATH']}")
    assert run.returncode == 1
    assert "1 GiB are free" in run.stderr
    assert not checkout.venv.exists()


def test_a_wrong_setting_is_a_usage_error(checkout: Checkout) -> None:
    run = checkout.run(DYNBOX_TORCH="gpu")
    assert run.returncode == 2
    assert "cpu or cuda" in run.stderr


# ---- installing


@pytest.mark.slow
def test_an_installation_has_the_box_and_a_launcher(installed: Checkout) -> None:
    assert installed.has("torch")
    assert not (installed.venv / ".dynbox-installing").exists()
    run = subprocess.run(
        [installed.launcher, "ps", "a b"], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert run.stdout == "dynbox ps a b\n"


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_is_quick(installed: Checkout) -> None:
    before = os.times()
    run = installed.run()
    assert run.returncode == 0
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert "installing" not in run.stderr


@pytest.mark.slow
def test_up_ends_as_dynbox_up_with_its_arguments(installed: Checkout) -> None:
    run = installed.run("up", "--profile", "a b")
    assert run.stdout == "dynbox up --profile a b\n"


@pytest.mark.slow
def test_a_changed_pyproject_installs_again_and_keeps_torch(installed: Checkout) -> None:
    with (installed.root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    run = installed.run()
    assert run.returncode == 0, run.stderr
    assert "installing dynamo_box [native]" in run.stderr
    assert "torch" not in run.stderr


@pytest.mark.slow
def test_a_launcher_that_is_something_else_stays(installed: Checkout, tmp_path: Path) -> None:
    (tmp_path / ".local/bin").mkdir(parents=True)
    foreign = tmp_path / ".local/bin/dynbox"
    foreign.write_text("mine")
    run = installed.run(HOME=str(tmp_path))
    assert "something else and stays" in run.stderr
    assert str(installed.venv / "bin/dynbox") in run.stderr
    assert foreign.read_text() == "mine"
    foreign.unlink()
    foreign.symlink_to("/elsewhere/.venv/bin/dynbox")
    assert installed.run(HOME=str(tmp_path)).returncode == 0
    assert foreign.readlink() == installed.venv / "bin/dynbox"


@pytest.mark.slow
def test_no_launcher_in_ci_and_a_hint_where_it_is_not_on_path(installed: Checkout, tmp_path: Path) -> None:
    installed.run(HOME=str(tmp_path), CI="true")
    assert not (tmp_path / ".local").exists()
    assert f'export PATH="{tmp_path}/.local/bin:$PATH"' in installed.run(HOME=str(tmp_path)).stderr
    (tmp_path / "blocked").touch()
    assert "no place for a launcher" in installed.run(HOME=str(tmp_path / "blocked")).stderr


@pytest.mark.slow
def test_a_broken_environment_is_made_anew(installed: Checkout) -> None:
    (installed.venv / "bin/python").unlink()
    (installed.venv / "bin/python").symlink_to("/no/python")
    run = installed.run()
    assert run.returncode == 0, run.stderr
    assert "is broken" in run.stderr


@pytest.mark.slow
def test_an_installation_cut_off_is_started_over(checkout: Checkout, tmp_path: Path) -> None:
    make_wheel(checkout.wheels, "torch", "2.13.0")
    process = checkout.start(TEST_BUILD_PAUSE=str(tmp_path / "paused"))
    wait_for(tmp_path / "paused", process)
    second = checkout.start()
    assert second.stderr is not None
    assert "another installation" in second.stderr.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    _, errors = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 0, errors
    assert "cut off; starting over" in errors


@pytest.mark.slow
def test_an_interrupt_is_told_and_leaves_no_doubt_for_the_next_run(checkout: Checkout, tmp_path: Path) -> None:
    make_wheel(checkout.wheels, "torch", "2.13.0")
    process = checkout.start(TEST_BUILD_PAUSE=str(tmp_path / "paused"))
    wait_for(tmp_path / "paused", process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert (checkout.venv / ".dynbox-installing").exists()
    assert not list(checkout.venv.glob(".dynbox-installed-*"))


@pytest.mark.slow
def test_cuda_packages_stay_away_from_a_machine_without_a_driver(checkout: Checkout) -> None:
    make_wheel(checkout.wheels, "nvidia-cublas", "13.0")
    make_wheel(checkout.wheels, "torch", "2.13.0", ("nvidia-cublas",))
    run = checkout.run()
    assert run.returncode == 1
    for word in ("nvidia-cublas", "DYNBOX_TORCH_INDEX", "DYNBOX_TORCH_WHEEL", "PIP_FIND_LINKS"):
        assert word in run.stderr
    assert not checkout.has("torch")

    wheel = make_wheel(checkout.root / "cpu", "torch", "2.13.0+cpu")
    index = checkout.root / "simple" / "torch"
    index.mkdir(parents=True)
    (index / "index.html").write_text(f'<a href="../../cpu/{wheel.name}">{wheel.name}</a>')
    fixed = checkout.run(DYNBOX_TORCH_INDEX=(checkout.root / "simple").as_uri(), PIP_NO_INDEX="", PIP_FIND_LINKS="")
    assert fixed.returncode == 0, fixed.stderr
    assert checkout.has("torch")
    assert not checkout.has("nvidia_cublas")


@pytest.mark.slow
def test_what_pip_says_is_shown_when_it_fails(checkout: Checkout) -> None:
    run = checkout.run()
    assert run.returncode == 1
    assert "No matching distribution found for torch==2.13.0" in run.stderr
    assert "DYNBOX_TORCH_WHEEL" in run.stderr

    wheel = make_wheel(checkout.root / "cpu", "torch", "2.13.0+cpu")
    fixed = checkout.run(DYNBOX_TORCH_WHEEL=str(wheel))
    assert fixed.returncode == 0, fixed.stderr
    assert "starting over" not in fixed.stderr


@pytest.mark.slow
def test_a_driver_asks_for_another_torch_than_one_for_cpus_only(checkout: Checkout) -> None:
    make_wheel(checkout.wheels, "torch", "2.13.0+cpu")
    assert checkout.run().returncode == 0
    make_wheel(checkout.wheels, "torch", "2.13.1")
    assert checkout.run(DYNBOX_TORCH="cuda").returncode == 0
    assert checkout.has("torch-2.13.1".partition("-")[0])
    assert any(checkout.venv.glob("lib/python*/site-packages/torch-2.13.1.dist-info"))
