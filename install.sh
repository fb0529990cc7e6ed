#!/usr/bin/env bash
# dynamo_box: from a clone to a running box.
#
#   ./install.sh              install into .venv, and put `dynbox` into ~/.local/bin
#   ./install.sh up [ARG…]    install, fetch the embedded model, and run `dynbox up`
#   ./install.sh test [LANE]  install what the tests need and run them; lanes: all (default), quick, soak
#   ./install.sh help         this text
#
# Settings (environment):
#   PYTHON                 the interpreter to use (3.11 or newer)
#   DYNBOX_TORCH_INDEX     a package index that holds CPU builds of torch
#   DYNBOX_TORCH_WHEEL     a torch wheel: a file or an address
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly venv=.venv
readonly torch_version=2.13.0
readonly default_torch_index=https://download.pytorch.org/whl/cpu
readonly index_timeout_s=3
readonly need_mib=4096

say() { printf '%s\n' "$*" >&2; }

fail() { # WHAT REMEDY [EXIT STATUS]
    say "install.sh: $1"
    say "  → $2"
    exit "${3:-1}"
}

usage() { sed -n '2,12{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ -n ${PYTHON:-} ]]; then
            fail "PYTHON=$PYTHON is not Python 3.11 or newer" "name another interpreter, or unset PYTHON"
        fi
    done
    fail "there is no Python 3.11 or newer" "install one: 'apt-get install python3 python3-venv' on Debian 12 or Ubuntu 24.04"
}

check_machine() {
    [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
        fail "this is $(uname -s) on $(uname -m)" "dynamo_box runs on Linux x86_64"
    local free_mib
    free_mib=$(df -Pm . | awk 'NR == 2 {print $4}')
    if [[ ! -e $venv/bin/python ]] && ((free_mib < need_mib)); then
        fail "only $free_mib MiB of disk are free here" "make room for at least $need_mib MiB"
    fi
}

# One installation at a time; the lock goes with this process.
take_lock() {
    exec 9>.venv.lock
    flock -n 9 || { say "another install.sh is at work here; waiting for it"; flock 9; }
}

make_venv() {
    local python
    if [[ -e $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" >&2; then
        rm -rf "$venv"
        fail "$python can't make a virtual environment" "install its venv module: 'apt-get install python3-venv' on Debian and Ubuntu"
    fi
}

has_nvidia_driver() {
    [[ -e /proc/driver/nvidia/version ]] || ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_module() { "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

index_answers() { # URL
    "$venv/bin/python" - "$1" "$index_timeout_s" <<'PY' 2>/dev/null
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=float(sys.argv[2])) as answer:
    sys.exit(answer.status != 200)
PY
}

# Packages that a torch installation would bring and that only a GPU has a use for.
cuda_packages_of() { # REQUIREMENT [PIP OPTION…]
    local report
    report=$(mktemp)
    if ! pip install --quiet --dry-run --report "$report" "$@" >&2; then
        rm -f "$report"
        fail "pip can't resolve $1" "look at its message above; set DYNBOX_TORCH_INDEX or DYNBOX_TORCH_WHEEL to a CPU build of torch"
    fi
    "$venv/bin/python" - "$report" <<'PY'
import json, sys
names = sorted(each["metadata"]["name"] for each in json.load(open(sys.argv[1]))["install"])
print(" ".join(name for name in names if name.lower().startswith(("nvidia-", "cuda-"))))
PY
    rm -f "$report"
}

install_torch() {
    has_module torch && return
    if has_nvidia_driver; then
        say "installing torch (CUDA build: there is an NVIDIA driver)"
        pip install --quiet torch
        return
    fi
    say "installing torch (CPU build: there is no NVIDIA driver)"
    local index=${DYNBOX_TORCH_INDEX:-$default_torch_index} brought
    if [[ -n ${DYNBOX_TORCH_WHEEL:-} ]]; then
        pip install --quiet "$DYNBOX_TORCH_WHEEL"
        return
    fi
    if index_answers "$index"; then
        pip install --quiet "torch==$torch_version" --index-url "$index"
        return
    fi
    if [[ -n ${DYNBOX_TORCH_INDEX:-} ]]; then
        fail "DYNBOX_TORCH_INDEX=$index doesn't answer" "correct it, or unset it"
    fi
    brought=$(cuda_packages_of "torch==$torch_version")
    if [[ -n $brought ]]; then
        fail "torch as pip is configured here would bring CUDA packages (${brought%% *}, …), and there is no NVIDIA driver" \
            "set DYNBOX_TORCH_INDEX to an index of CPU builds, or DYNBOX_TORCH_WHEEL to a CPU wheel of torch"
    fi
    pip install --quiet "torch==$torch_version"
}

fingerprint() { # EXTRAS
    { printf '%s\n' "$1" "$PWD"; cat pyproject.toml install.sh; "$venv/bin/python" --version; } | sha256sum | cut -d' ' -f1
}

# The stamp is written last, so that an interrupted installation is taken up again.
install_package() { # EXTRAS
    local stamp="$venv/.dynbox-$1" wanted
    wanted=$(fingerprint "$1")
    [[ -e $stamp && $(<"$stamp") == "$wanted" ]] && return
    install_torch
    say "installing dynamo_box [$1]"
    pip install --quiet -e ".[$1]"
    printf '%s\n' "$wanted" >"$stamp"
}

place_launcher() {
    [[ ${CI:-} == true ]] && return
    local folder=$HOME/.local/bin target=$PWD/$venv/bin/dynbox
    local launcher=$folder/dynbox
    if [[ -L $launcher && $(readlink "$launcher") == "$target" ]]; then
        :
    elif [[ -e $launcher && ! -L $launcher ]]; then
        say "$launcher is there already and not ours; run the box as: $target"
        return
    elif ! { mkdir -p "$folder" && ln -sfn "$target" "$launcher"; } 2>/dev/null; then
        say "can't write to $folder; run the box as: $target"
        return
    fi
    case ":$PATH:" in
    *":$folder:"*) ;;
    *) say "$folder is not on your PATH; run: export PATH=\"$folder:\$PATH\"" ;;
    esac
}

install() { # EXTRAS
    check_machine
    take_lock
    make_venv
    install_package "$1"
    exec 9>&-
}

run_tests() { # LANE [PYTEST ARG…]
    local lane=${1:-all} bin=$venv/bin selection
    shift || true
    case $lane in
    all) selection='not soak and not gpu' ;;
    quick) selection='not slow and not soak and not gpu' ;;
    soak) selection='soak and not gpu' ;;
    *) fail "there is no test lane '$lane'" "use all, quick or soak" 2 ;;
    esac
    if [[ $lane != soak ]]; then
        "$bin/ruff" check
        "$bin/ruff" format --check
        "$bin/mypy"
        PYTHONPATH=. "$bin/lint-imports"
    fi
    "$bin/python" -m pytest --durations=10 -m "$selection" "$@"
}

case ${1:-install} in
install)
    install native
    place_launcher
    say "installed; start with: dynbox up"
    ;;
up)
    shift
    install native
    place_launcher
    exec "$venv/bin/dynbox" up "$@"
    ;;
test)
    shift
    install native,test
    run_tests "$@"
    ;;
help | -h | --help) usage ;;
*)
    usage >&2
    fail "there is no command '$1'" "use install, up, test or help" 2
    ;;
esac
