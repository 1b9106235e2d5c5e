"""AdamW's parameter groups and the learning rate, as in BLIP-2 (paper, section 3.4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from blip2fast.training.config import OptimSection


def learning_rate(step: int, optim: OptimSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    A linear rise that reaches `lr` at step `warmup_steps`, then a cosine that would reach
    `min_lr` at step `max_steps`. A pure function: nothing to save for a resume.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / (optim.max_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases, norms, temperature and queries."""
    return parameter.ndim > 1 and name.rpartition(".")[2] != "query_tokens"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: decayed, and not. Frozen ones are left out.

    Raises:
        ValueError: nothing to train.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    decayed = [p for name, p in trained if is_decayed(name, p)]
    others = [p for name, p in trained if not is_decayed(name, p)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """PyTorch's AdamW in one fused pass.

    Not DeepSpeed's CPU Adam, which compiles C++ on first use and makes a compiler a requirement.
    """
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )
