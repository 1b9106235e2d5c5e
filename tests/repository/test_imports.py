"""What importing costs: the ops need PyTorch alone, and names come when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import blip2fast

# of pyproject.toml, but for torch and numpy
NOT_NEEDED = (
    "transformers",
    "deepspeed",
    "PIL",
    "psutil",
    "pydantic",
    "yaml",
    "safetensors",
    "tokenizers",
    "rich",
    "tensorboard",
    "matplotlib",
    "sklearn",
)


def test_the_ops_import_with_pytorch_alone() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}, None))  # importing one of them fails
import torch
import blip2fast
from blip2fast.ops import bias_gelu, check_kernels, kernel_records, set_kernels
import blip2fast.ops._check_worker
set_kernels("check")
print(bias_gelu(torch.zeros(1, 3)).tolist(), check_kernels(), blip2fast.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[0.0, 0.0, 0.0]] [] 0.")


def test_every_name_is_there() -> None:
    assert set(blip2fast.__all__) <= set(dir(blip2fast))
    for name in blip2fast.__all__:
        assert getattr(blip2fast, name).__name__ == name
    assert blip2fast.ops.bias_gelu.__name__ == "bias_gelu"
    assert not hasattr(blip2fast, "no_such_name")


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, blip2fast; assert 'torch' not in sys.modules; blip2fast.QFormer"
    subprocess.run([sys.executable, "-c", code], check=True)
