#!/bin/sh
# Make .venv and install this project into it: scripts/setup.sh [extra ...]
# With uv if it is there, else with pip. PyTorch goes first, as the CPU build unless a GPU answers:
# asked for by anything else, pip and uv would take the newest build with several GB of CUDA packages.
# Environment: PYTHON, TORCH (a requirement, as torch==2.13.0), NO_UV=1.
set -eu
cd "$(dirname "$0")/.."
extras=$(echo "$*" | tr ' ' ',')
project=.${extras:+[$extras]}
torch_version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python make ..." >&2
    exit 1
}

has_torch() { [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch' 2>/dev/null; }

wants_cpu_build() { [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; }

# install_torch INSTALLER...: the CPU build goes by its local version, which a folder of wheels that
# the installer knows may have, and PyTorch's CPU index has; the plain requirement if neither answers.
install_torch() {
    has_torch && return 0
    if [ -n "${TORCH:-}" ]; then
        "$@" "$TORCH"
    elif wants_cpu_build; then
        "$@" "torch==$torch_version+cpu" 2>/dev/null ||
            "$@" --extra-index-url "$cpu_index" "torch==$torch_version+cpu" ||
            "$@" "torch==$torch_version"
    else
        "$@" "torch==$torch_version"
    fi
}

with_uv() {
    # uv does not read pip's settings; a folder of wheels that pip is told of serves it too.
    if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"; fi
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv || return 1
    install_torch uv pip install --quiet --python .venv/bin/python || return 1
    uv pip install --quiet --python .venv/bin/python -c constraints.txt -e "$project"
}

with_pip() {
    [ -x .venv/bin/pip ] || "$python" -m venv --clear .venv
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch .venv/bin/pip install --quiet --retries 1
    .venv/bin/pip install --quiet -c constraints.txt -e "$project"
}

python=$(find_python)
if [ -z "${NO_UV:-}" ] && command -v uv >/dev/null 2>&1 && with_uv; then
    :
else
    with_pip
fi
