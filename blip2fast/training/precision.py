"""The compute precisions of a run."""

from __future__ import annotations

import torch

DTYPE_OF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
