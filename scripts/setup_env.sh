#!/usr/bin/env bash
# Make sure there is a Python environment that can run megatron_prune.
#
#   bash scripts/setup_env.sh [EXTRA...]                   make it
#   source scripts/setup_env.sh; setup_env [EXTRA...]      make it and activate it in this shell
#
# EXTRA is an extra of pyproject.toml: walk (the default), dev (which contains walk), gpu.
#
# Where it installs
#   an active virtual or conda environment   there
#   an NGC container                         into the container's own Python
#   otherwise                                into .venv of this checkout; a torch that the system's
#                                            Python has is seen and used from there
# A torch that is already there is never replaced. What is missing comes in the version of
# requirements/tested.txt. When all is done already, it costs a fraction of a second.
#
# Variables
#   PYTHON            the interpreter to make .venv with (3.10 or newer)
#   TORCH_INDEX_URL   where a missing torch comes from, for example
#                     https://download.pytorch.org/whl/cpu or .../whl/cu128
#                     (default: a CPU build without a GPU, otherwise what PyPI has)

# Strict where it runs by itself; a shell that sources it keeps its own settings.
[[ "${BASH_SOURCE[0]}" != "$0" ]] || set -euo pipefail
# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

# Active by name, or by its Python being the first on PATH.
_is_active_environment() {
    [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] ||
        python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null
}

# The first Python of 3.10 or newer, by name; nothing when there is none.
_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# pip install with everything in a log and, of that, what takes long on the screen. Python compiles
# what it imports, a tenth of what is installed, and keeps it, unless it is told not to.
_pip_install() (
    set -o pipefail
    log=$1 compile=(--no-compile)
    shift
    [[ -z "${PYTHONDONTWRITEBYTECODE:-}" ]] || compile=()
    python -m pip install --disable-pip-version-check "${compile[@]}" "$@" 2>&1 | tee -a "$log" |
        { grep --line-buffered -E '^ *(Downloading|Building|Successfully)' || true; } | cut -c1-100 >&2
)

_pip_failed() {
    local what=$1 files=$2
    tail -n 15 "$files/pip.log" >&2
    die "$what could not be installed; the whole log and the constraints are in $files"
}

_make_venv() {
    local python=$1 venv=$2 system_packages=()
    if "$python" -c 'import torch' 2>/dev/null; then
        say "using the torch of $python"
        system_packages=(--system-site-packages)
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "${system_packages[@]}" "$venv" ||
        die "$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
}

# torch by itself and first: the one package whose build depends on the machine.
_install_torch() {
    local constraints=$1 log=$2 wanted version
    wanted=$(grep -E '^torch==' "$constraints") || wanted=torch
    version=${wanted#torch==}
    if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
        say "installing $wanted from $TORCH_INDEX_URL"
        _pip_install "$log" --index-url "$TORCH_INDEX_URL" "$wanted"
        return
    fi
    if [[ "$(uname -s)" == Linux ]] && ! _has_gpu; then
        # Without a GPU the two gigabytes of CUDA libraries in PyPI's build are of no use. pip's own
        # places first (a find-links folder may have the CPU build), then PyTorch's index.
        say "installing $wanted, CPU build"
        _pip_install "$log" "torch==$version+cpu" && return
        _pip_install "$log" --timeout 15 --retries 1 \
            --index-url https://download.pytorch.org/whl/cpu "$wanted" && return
        say "no CPU build within reach; taking PyPI's"
    fi
    say "installing $wanted"
    _pip_install "$log" "$wanted"
}

# Whether this environment was set up before, with the same lists and for the same checkout.
_is_set_up() {
    local wanted=$1 stamp
    shift
    for stamp in "$@"; do
        [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]] || return 0
    done
    return 1
}

_install() {
    local extras=$1 files constraints log
    files=$(mktemp -d)
    constraints=$files/constraints.txt log=$files/pip.log
    python "$REPO/tools/environment_constraints.py" "$REPO/requirements/tested.txt" >"$constraints"
    if ! python -c 'import torch' 2>/dev/null; then
        _install_torch "$constraints" "$log" || _pip_failed torch "$files"
        # Once more: from here on, the torch that has just come in must stay.
        python "$REPO/tools/environment_constraints.py" "$REPO/requirements/tested.txt" >"$constraints"
    fi
    say "installing megatron_prune[$extras]"
    _pip_install "$log" --constraint "$constraints" --editable "${REPO}[$extras]" ||
        _pip_failed "megatron_prune[$extras]" "$files"
    rm -r "$files"
}

setup_env() {
    local extras where venv=$REPO/.venv python prefix wanted
    extras=$(IFS=, && echo "${*:-walk}")

    if _is_active_environment; then
        where="the active environment $(python -c 'import sys; print(sys.prefix)')"
    elif [[ -n "${NVIDIA_PYTORCH_VERSION:-}" ]]; then
        where="the NGC PyTorch $NVIDIA_PYTORCH_VERSION container"
    else
        where=$venv
        # A .venv whose making was interrupted has no pip.
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            python=$(_find_python)
            [[ -n "$python" ]] || die "no Python of 3.10 or newer found; install one, or set PYTHON=/path/to/python3"
            _make_venv "$python" "$venv"
        fi
        export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
        hash -r
    fi
    prefix=$(python -c 'import sys; print(sys.prefix if sys.version_info >= (3, 10) else "")')
    [[ -n "$prefix" ]] || die "$where has $(python --version 2>&1); megatron_prune needs Python 3.10 or newer"

    # The stamp names everything that decides what gets installed, and the checkout it points to.
    wanted="$(cat "$REPO/pyproject.toml" "$REPO/requirements/tested.txt" | cksum) $REPO"
    local stamps=("$prefix/.megatron_prune-${extras//,/-}")
    [[ "$extras" != walk ]] || stamps+=("$prefix/.megatron_prune-dev")
    _is_set_up "$wanted" "${stamps[@]}" && return

    say "setting up $where (the first time takes a few minutes)"
    _install "$extras"
    echo "$wanted" >"${stamps[0]}"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    help_if_asked "$@"
    setup_env "$@"
fi
