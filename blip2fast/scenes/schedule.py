"""The towers' learning-rate schedule."""

import math


def cosine_factor(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` steps, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
