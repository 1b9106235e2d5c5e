"""How far are gradients of one stage-1 step from fp32? Prints docs/precision.md's second table.

    python benchmarks/precision_step.py

ViT-g sizes, 8 pairs, 33 image tokens, random weights, no dropout; a minute on two cores.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from shapes import STAGE1_SHAPES
from stage1_contenders import GRADIENTS, NAMES, judged_provider, make_batch, make_models
from torch import Tensor

SHAPE = replace(STAGE1_SHAPES["vit_g_b8"], image_tokens=33)


def main() -> None:
    """Autocast on fp32 parameters, then everything in bf16."""
    device = torch.device("cpu")
    models, batch = make_models(SHAPE, device, NAMES[:2]), make_batch(SHAPE, device)
    truth = judged_provider(models["textbook"], batch, torch.float32)(None).run()
    print(f"| | {' | '.join(f'`{name}`' for name in GRADIENTS)} |")
    print("|---|" + "---:|" * len(GRADIENTS))
    for name, model in models.items():
        row(f"{name}, autocast", judged_provider(model, batch, torch.bfloat16)(None).run(), truth)
    narrow = batch | {"image_embeds": batch["image_embeds"].bfloat16()}
    models["blip2fast"].bfloat16()
    models["textbook"].bfloat16()
    for name, model in models.items():
        row(f"{name}, all bf16", judged_provider(model, narrow, torch.float32)(None).run(), truth)


def row(name: str, found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Relative errors of the gradients, in percent."""
    errors = [float((found[x].float() - truth[x]).norm() / truth[x].norm()) for x in GRADIENTS]
    print(f"| {name} | {' | '.join(f'{100 * error:.1f} %' for error in errors)} |")


if __name__ == "__main__":
    main()
