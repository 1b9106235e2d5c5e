#!/bin/sh
# Install blip2fast and pinned versions of what it needs into a virtual environment.
#   tools/install.sh VENV REQUIREMENT     e.g. tools/install.sh .venv ".[dev]"
# torch comes first: its CPU build where no NVIDIA GPU is found, its CUDA build otherwise.
set -eu

venv=$1
requirement=$2
torch=2.13.0
python=${PYTHON:-python3}

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "blip2fast needs Python 3.11 or newer; $python is $("$python" -V)." \
             "Set PYTHON to a newer one: PYTHON=python3.12 make ..." >&2
        exit 1
    }
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "$python cannot create virtual environments." \
             "On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "Installing torch $torch (CUDA build: an NVIDIA GPU was found)"
        pip install --quiet -c constraints.txt "torch==$torch"
    else
        echo "Installing torch $torch (CPU build: no NVIDIA GPU was found)"
        # pip finds the CPU build where it is configured to look for it; uv knows where it lives
        pip install --quiet -c constraints.txt "torch==$torch+cpu" 2>/dev/null || {
            pip install --quiet -c constraints.txt uv
            "$venv/bin/uv" pip install --python "$venv/bin/python" -c constraints.txt \
                --torch-backend cpu "torch==$torch"
        }
    fi
fi

# The extension (C++; CUDA too where nvcc is found) is built beside this torch, not beside another
# one in an isolated environment. It is optional: the last line says what was built.
echo "Installing blip2fast and its pinned dependencies"
pip install --quiet -c constraints.txt setuptools ninja pybind11
pip install --quiet -c constraints.txt --no-build-isolation --editable "$requirement"
cat blip2fast/_C.txt
