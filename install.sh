#!/usr/bin/env bash
# Installs dynamo_box into .venv beside this file, and optionally starts it or runs its tests. See `./install.sh help`.
#
# An installation ends by writing a stamp; with a stamp of the same inputs there is nothing to do. While it runs, a
# marker lies in .venv: if it is found at the next run, the last one was killed half-way and .venv is made anew.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly VENV=.venv
readonly MARKER=$VENV/.dynbox-installing
readonly LOG=$VENV/dynbox-install.log
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly TORCH_CPU_RELEASE=torch==2.13.0
readonly INDEX_TIMEOUT_S=3
readonly ADMITTED_PYTHONS='python3 python3.13 python3.12 python3.11 python3.14'

usage() {
    cat <<'TEXT'
usage: ./install.sh [COMMAND]

  (none)                install dynamo_box with its native engine into .venv
  up [ARGUMENT...]      install, then `dynbox up ARGUMENT...`: the first time it fetches the embedded model
  test [LANE]           install what the tests need, then run the checks and the tests of a lane:
                        all (default: everything but soak and gpu), quick (nothing slow), soak (the full counts)
  test ARGUMENT...      only pytest, with these arguments
  help                  this text

environment:
  PYTHON                the Python to use (3.11 or newer; default: the first suitable one on PATH)
  DYNBOX_TORCH          cpu or cuda: which build of torch (default: cuda with an NVIDIA driver, else cpu)
  DYNBOX_TORCH_INDEX    a package index with CPU wheels of torch
  DYNBOX_TORCH_WHEEL    a wheel of torch: a file or an address
pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_PROXY, ...) apply.
TEXT
}

say() { printf 'install: %s\n' "$*" >&2; }

# fail WHAT REMEDY
fail() {
    printf 'install: %s\n  %s\n' "$1" "$2" >&2
    exit "${3:-1}"
}

main() {
    case ${1:-install} in
        install)
            [ $# -le 1 ] || fail "install takes no arguments, got: ${*:2}" "see ./install.sh help" 2
            install_box native
            install_launcher
            say "done"
            ;;
        up)
            install_box native
            install_launcher
            shift
            exec "$VENV/bin/dynbox" up "$@"
            ;;
        test)
            shift
            [ "${1:-all}" != all ] || require_tmux
            install_box native,test
            run_tests "$@"
            ;;
        help | -h | --help) usage ;;
        *) fail "there is no command '$1'" "see ./install.sh help" 2 ;;
    esac
}

# ---- installing

# install_box EXTRAS: bring .venv to the state that the stamp of EXTRAS describes; other runs wait meanwhile.
install_box() {
    local extras=$1 key
    check_platform
    torch_flavour >/dev/null
    exec 9<install.sh
    if ! flock -n 9; then
        say "another installation is running here; waiting for it"
        flock 9
    fi
    key=$(installation_key)
    if ! is_installed "$extras" "$key"; then
        trap 'say "interrupted; run it again to start over"; exit 130' INT TERM
        make_venv
        : >"$MARKER"
        rm -f "$VENV"/.dynbox-installed-*
        install_packages "$extras"
        printf '%s\n' "$key" >"$VENV/.dynbox-stamp"
        mv "$VENV/.dynbox-stamp" "$(stamp_of "$extras")"
        rm -f "$MARKER"
        trap - INT TERM
    fi
    exec 9<&-
}

check_platform() {
    local platform
    platform=$(uname -sm)
    [ "$platform" = "Linux x86_64" ] ||
        fail "dynamo_box runs on Linux x86_64, this is $platform" "use a Linux x86_64 machine or virtual machine"
    command -v flock >/dev/null || fail "the command flock is missing" "install the package util-linux"
}

# Everything that decides what gets installed, and where.
installation_key() {
    {
        cat install.sh pyproject.toml
        printf '%s\n' "$PWD" "$(torch_flavour)" "${DYNBOX_TORCH_WHEEL:-}"
    } | sha256sum | cut -d' ' -f1
}

stamp_of() { printf '%s/.dynbox-installed-%s' "$VENV" "$1"; }

# What was installed for the tests serves everything else too.
is_installed() {
    local extras=$1 key=$2 candidate
    [ ! -e "$MARKER" ] && venv_works || return 1
    for candidate in "$extras" native,test; do
        [ "$(cat "$(stamp_of "$candidate")" 2>/dev/null)" = "$key" ] && return 0
    done
    return 1
}

venv_works() { [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import pip' 2>/dev/null </dev/null; }

make_venv() {
    if [ -e "$VENV" ]; then
        if [ -e "$MARKER" ]; then
            say "an earlier installation was cut off; starting over"
        elif ! venv_works; then
            say "$VENV is broken (no working Python with pip); making it anew"
        elif [ "$(cat "$VENV/.dynbox-checkout" 2>/dev/null || pwd)" != "$PWD" ]; then
            say "$VENV was made for another directory; making it anew"
        elif ! is_admitted "$VENV/bin/python"; then
            say "$VENV has a Python older than 3.11; making it anew"
        else
            return 0
        fi
        rm -rf "$VENV"
    fi
    local python
    python=$(find_python)
    check_disk
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python can't make virtual environments" \
            "install its venv module (Debian, Ubuntu: apt install python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv)"
    say "making $VENV with $("$python" --version)"
    mkdir "$VENV"
    : >"$MARKER"
    "$python" -m venv "$VENV" </dev/null || fail "$python could not make $VENV" "see the lines above"
    pwd >"$VENV/.dynbox-checkout"
}

is_admitted() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 </dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_admitted "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or newer" "set it to one, or unset it"
        command -v "$PYTHON"
        return
    fi
    for candidate in $ADMITTED_PYTHONS; do
        if is_admitted "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on PATH" \
        "install one (Debian 12, Ubuntu 24.04 and newer: apt install python3 python3-venv), or set PYTHON to it"
}

check_disk() {
    local needed_gib=3 free_kib
    [ "$(torch_flavour)" = cpu ] || needed_gib=10
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge $((needed_gib << 20)) ] ||
        fail "an installation takes up to $needed_gib GiB, $((free_kib >> 20)) GiB are free on this disk" "free some space"
}

install_packages() {
    local extras=$1
    install_torch
    [ "$(torch_flavour)" = cpu ] || extras+=,cuda
    say "installing dynamo_box [$extras]"
    pip_install -e ".[$extras]"
}

# pip_install ARGUMENT...: quiet, unless it fails. (In a subshell, so that what a trap says doesn't go to the log.)
pip_install() {
    (pip install "$@") >"$LOG" 2>&1 </dev/null && return
    cat "$LOG" >&2
    rm -f "$MARKER" # pip ended by itself: what it left is whole
    fail "pip could not install: $*" \
        "pip's reasons are above; without network set PIP_INDEX_URL or PIP_FIND_LINKS to what this machine reaches"
}

pip() { PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip --no-input "$@"; }

# ---- torch: never gigabytes of CUDA packages onto a machine without a GPU

torch_flavour() {
    case ${DYNBOX_TORCH:-} in
        cpu | cuda) printf '%s' "$DYNBOX_TORCH" ;;
        '') if has_nvidia_driver; then printf cuda; else printf cpu; fi ;;
        *) fail "DYNBOX_TORCH is '$DYNBOX_TORCH'" "set it to cpu or cuda, or unset it" 2 ;;
    esac
}

# A library alone (a stub, a CUDA image without a GPU) is no driver.
has_nvidia_driver() {
    [ -r /proc/driver/nvidia/version ] ||
        nvidia-smi -L 2>/dev/null </dev/null | grep -q '^GPU ' ||
        { [ -e /dev/dxg ] && [ -e /usr/lib/wsl/lib/libcuda.so.1 ]; }
}

install_torch() {
    if torch_is_suitable; then return; fi
    if [ -n "${DYNBOX_TORCH_WHEEL:-}" ]; then
        say "installing torch from DYNBOX_TORCH_WHEEL"
        pip_install --no-deps "$DYNBOX_TORCH_WHEEL"
    elif [ "$(torch_flavour)" = cuda ]; then
        say "installing torch for CUDA (several GB)"
        pip_install --upgrade torch
    elif [ -n "${DYNBOX_TORCH_INDEX:-}" ]; then
        say "installing torch for CPUs from DYNBOX_TORCH_INDEX"
        pip_install --no-deps --index-url "$DYNBOX_TORCH_INDEX" torch
    elif index_answers "$TORCH_CPU_INDEX"; then
        say "installing torch for CPUs from $TORCH_CPU_INDEX"
        pip_install --no-deps --index-url "$TORCH_CPU_INDEX" torch
    else
        say "installing $TORCH_CPU_RELEASE as pip is configured"
        refuse_cuda_packages
        pip_install "$TORCH_CPU_RELEASE"
    fi
}

# Any build computes on a CPU; a GPU needs one that is not for CPUs only.
torch_is_suitable() {
    "$VENV/bin/python" - "$(torch_flavour)" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    torch = version("torch")
except PackageNotFoundError:
    sys.exit(1)
release = tuple(int(part) for part in torch.split("+")[0].split(".")[:2])
sys.exit(release < (2, 5) or (sys.argv[1] == "cuda" and torch.endswith("+cpu")))
PYTHON
}

index_answers() {
    "$VENV/bin/python" - "$1/torch/" "$INDEX_TIMEOUT_S" >/dev/null 2>&1 <<'PYTHON'
import signal, sys, urllib.request
seconds = int(sys.argv[2])
signal.alarm(seconds + 1)  # the time-out below is one for each step, name look-up excluded
urllib.request.urlopen(sys.argv[1], timeout=seconds).read(1)
PYTHON
}

# Resolve first: stop before anything is downloaded.
refuse_cuda_packages() {
    local found
    if ! (pip install --dry-run --report "$VENV/torch-report.json" "$TORCH_CPU_RELEASE") >"$LOG" 2>&1 </dev/null; then
        cat "$LOG" >&2
        rm -f "$MARKER"
        fail "pip can't find $TORCH_CPU_RELEASE" \
            "set DYNBOX_TORCH_INDEX to an index with CPU wheels, or DYNBOX_TORCH_WHEEL to such a wheel"
    fi
    found=$("$VENV/bin/python" - "$VENV/torch-report.json" <<'PYTHON'
import json, sys
names = sorted(item["metadata"]["name"].lower() for item in json.load(open(sys.argv[1]))["install"])
print(*(name for name in names if name.startswith(("nvidia-", "cuda-"))))
PYTHON
    )
    [ -z "$found" ] && return
    rm -f "$MARKER"
    fail "no NVIDIA driver here, but pip would install torch for CUDA, several GB: $found" \
        "set DYNBOX_TORCH_INDEX to an index with CPU wheels, DYNBOX_TORCH_WHEEL to such a wheel, or PIP_FIND_LINKS
  to a directory with one"
}

# ---- the launcher

# A link in ~/.local/bin; one to another checkout is turned, anything else stays.
install_launcher() {
    local directory=${HOME:-}/.local/bin target=$PWD/$VENV/bin/dynbox launcher
    launcher=$directory/dynbox
    [ "${CI:-}" != true ] || return 0
    if [ -e "$launcher" ] || [ -L "$launcher" ]; then
        case $(readlink "$launcher" || true) in
            */.venv/bin/dynbox) ;;
            *)
                say "$launcher is something else and stays; start dynamo_box as $target"
                return
                ;;
        esac
    fi
    if [ -z "${HOME:-}" ] || ! { mkdir -p "$directory" && ln -sfn "$target" "$launcher"; } 2>/dev/null; then
        say "no place for a launcher; start dynamo_box as $target"
        return
    fi
    case ":$PATH:" in
        *":$directory:"*) ;;
        *) say "$directory is not on PATH; add it: export PATH=\"$directory:\$PATH\"" ;;
    esac
}

# ---- the checks and the tests

run_tests() {
    local marks failed=() together=()
    case ${1:-all} in
        all) marks="not soak and not gpu" ;;
        quick) marks="not slow and not soak and not gpu" ;;
        soak) marks="soak and not gpu" ;;
        *) exec "$VENV/bin/python" -m pytest "$@" </dev/null ;;
    esac
    [ $# -le 1 ] || fail "a lane takes no further arguments, got: ${*:2}" "give a lane, or arguments for pytest" 2
    if [ "${1:-all}" != soak ]; then
        check ruff check . || failed+=("ruff check")
        check ruff format --check . || failed+=("ruff format")
        check mypy || failed+=(mypy)
        PYTHONPATH=. check lint-imports || failed+=(lint-imports)
    fi
    # Most tests wait half of their time. A file's tests share what was made for them, so they stay together; files keep
    # their order, in which the quick ones come last. The full counts want the machine to themselves.
    [ "${1:-all}" = soak ] || together=(--numprocesses "$(test_processes)" --dist loadfile --no-loadscope-reorder)
    "$VENV/bin/python" -m pytest --durations=10 "${together[@]}" -m "$marks" </dev/null || failed+=("pytest")
    [ ${#failed[@]} -eq 0 ] || fail "failed: $(IFS=,; printf '%s' "${failed[*]}")" "see above"
}

# One more than there are cores, and no more than 5: a box under test is several processes itself.
test_processes() {
    local cores
    cores=$(nproc)
    printf '%s' $((cores < 4 ? cores + 1 : 5))
}

# The slow tests drive `dynbox top` in a real terminal.
require_tmux() {
    if command -v tmux >/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing tmux, in which the tests run \`dynbox top\`"
        apt_install tmux || { apt-get -q update && apt_install tmux; } || true
    fi >&2 </dev/null
    command -v tmux >/dev/null ||
        fail "the command tmux is missing, in which the tests run \`dynbox top\`" \
            "install the package tmux (Debian, Ubuntu: apt install tmux), or run ./install.sh test quick"
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"; }

check() {
    say "$*"
    "$VENV/bin/$1" "${@:2}" </dev/null
}

main "$@"
