"""The forward passes of an optimizer step: the wrapped module, and the arguments of each pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run
from blip2fast.training.config import OptimSection
from blip2fast.training.word_means import Weights, pass_weights, weighted

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class TrainingStep(nn.Module):
    """The module that the engine wraps; returns the loss, and other scalars detached.

    DeepSpeed traverses everything that its module returns, so logits and features are not returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, *, for_contrast: bool = False, weights: Weights | None = None, **batch: Any
    ) -> tuple[Any, ...]:
        """Return `(loss, scalars)` of the model, or with `for_contrast` its `features`.

        Args:
            weights: the weights of the losses in their optimizer step, from `pass_weights`.
        """
        if for_contrast:
            return cast(Blip2Stage1, self.model).features(**batch)
        found = weighted(self.model(**batch), weights or {})
        return found["loss"], {name: value.detach().float() for name, value in found.items()}


class DeviceBatches:
    """Moves batches of a run to the device, with images as tokens [B, S, E].

    They stay pixels [B, 3, h, w] where the model has its own image encoder.
    Stage-1 texts stay on the CPU for packing, where reading their lengths needs no sync.

    Args:
        parts: of the run; its image encoder is on the device.
        device: the device of this process.
        dtype: of the tokens; the run's precision.
    """

    def __init__(self, parts: Run, device: torch.device, dtype: torch.dtype) -> None:
        self._encoder, self.device, self._dtype = parts.image_encoder, device, dtype
        on_host = {"input_ids", "attention_mask"}
        self._on_host = on_host if isinstance(parts.model, Blip2Stage1) else set()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as the model takes it."""
        moved = {
            name: value if name in self._on_host else value.to(self.device, non_blocking=True)
            for name, value in batch.items()
        }
        if "images" in moved and self._encoder is not None:
            moved["image_embeds"] = self._encoder(moved.pop("images"))
        if "image_embeds" in moved:
            moved["image_embeds"] = moved["image_embeds"].to(self._dtype)
        return moved


def step_passes(
    engine: DeepSpeedEngine,
    model: Blip2Stage1 | Blip2Stage2,
    optim: OptimSection,
    batches: Iterator[dict[str, Tensor]],
    to_device: DeviceBatches,
) -> Iterable[dict[str, Any]]:
    """The arguments of the forward passes of the next optimizer step.

    They are moved to the device one by one, unless ITC contrasts all of them.

    Args:
        engine: runs a `TrainingStep` of `model`.
        model: of either stage.
        optim: says how many passes a step has.
        batches: of micro-steps; those of the step are taken from it.
        to_device: moves a batch.
    """
    if optim.word_mean == "per_pass" or optim.accumulation * dist.get_world_size() == 1:
        weights: Iterable[Weights] = repeat({})
        of_step: Iterable[dict[str, Tensor]] = islice(batches, optim.accumulation)
    else:
        of_step = list(islice(batches, optim.accumulation))
        weights = pass_weights(model, of_step, to_device.device)
    moved = ({**to_device(b), "weights": w} for b, w in zip(of_step, weights, strict=False))
    if not optim.grad_cache or not isinstance(model, Blip2Stage1):
        return moved
    held = list(moved)
    alone = [{n: v for n, v in batch.items() if n != "weights"} for batch in held]
    shares = step_contrast(partial(engine, for_contrast=True), alone, model.config)
    return [{**batch, "contrast": share} for batch, share in zip(held, shares, strict=True)]
