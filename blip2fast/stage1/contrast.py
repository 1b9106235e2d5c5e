"""ITC over more pairs than fit into memory at once (GradCache).

A contrastive loss needs the features of all pairs at once, but the encoders can run on one
micro-batch at a time. First, compute the features of every micro-batch without gradient. Then,
compute the loss over all pairs and its gradients with respect to the features. Last, run each
micro-batch again and backpropagate its share of these gradients (Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983). Shapes as in
`config.py`; B pairs of a micro-batch, D width of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.ops.itc.loss import itc_loss_and_grads
from blip2fast.stage1.config import Stage1Config

# `Blip2Stage1.features`, or a wrapper that calls it through an engine: takes a dropout seed
# `philox=` and a batch's keyword arguments, returns (image features, text features, temperature)
Encode = Callable[..., tuple[Tensor, Tensor, Tensor]]


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype in which ITC multiplies normalised features; None: their own dtype.

    Args:
        dtype: The model's compute dtype.
        device: Compute device. fp16 is used on CUDA only.
    """
    return torch.float16 if dtype.itemsize == 2 and device.type == "cuda" else None


@dataclass(frozen=True)
class StepContrast:
    """One micro-batch's share of the ITC loss of a whole optimizer step.

    Attributes:
        philox: `[2]`, dropout seed and offset that the features were computed with.
        loss, accuracy_i2t, accuracy_t2i: Of the whole step, scalars.
        d_image, d_text: `[B, Q, D]` and `[B, D]`, gradient of the loss with respect to the
            micro-batch's features, times the number of micro-batches, because their losses are
            averaged.
        d_temp: Gradient with respect to the temperature, a scalar.
    """

    philox: Tensor
    loss: Tensor
    accuracy_i2t: Tensor
    accuracy_t2i: Tensor
    d_image: Tensor
    d_text: Tensor
    d_temp: Tensor

    def loss_of(self, image_features: Tensor, text_features: Tensor, temp: Tensor) -> Tensor:
        """The loss of the step, whose backward gives this micro-batch's share of the gradient.

        Raises:
            ValueError: The feature shapes are not those of this object's micro-batch.
        """
        for name, given, gradient in (
            ("image", image_features, self.d_image),
            ("text", text_features, self.d_text),
        ):
            if given.shape != gradient.shape:
                raise ValueError(
                    f"contrast: made for {name} features {list(gradient.shape)}, the batch has "
                    f"{list(given.shape)}; give each batch the one that `step_contrast` returned "
                    "in its place"
                )
        handed_down = (image_features * self.d_image).sum()
        handed_down = handed_down + (text_features * self.d_text).sum()
        # DeepSpeed stores temp as [1]
        handed_down = handed_down + (temp * self.d_temp).sum()
        return self.loss + (handed_down - handed_down.detach())


def step_contrast(
    encode: Encode, batches: Sequence[Mapping[str, Any]], config: Stage1Config
) -> list[StepContrast]:
    """ITC over all pairs of an optimizer step, across micro-batches and processes.

    Every process must call this with the same number of batches, of the same sizes. Summing
    `forward(**batch, contrast=...).loss / len(batches)` over batches then gives the ITC gradient of
    a single batch with all pairs.

    Args:
        encode: `Blip2Stage1.features` of the model.
        batches: Keyword arguments of `Blip2Stage1.forward`, with `image_embeds` or `images`.
        config: The model's config.

    Returns:
        One `StepContrast` per batch, for `forward(contrast=...)`.

    Raises:
        ValueError: `batches` is empty, or only some batches have image ids.
    """
    if not batches:
        raise ValueError("batches: expected one or more, got none")
    ids = [batch.get("image_ids") for batch in batches]
    given = [x.reshape(-1) for x in ids if x is not None]
    if 0 < len(given) < len(ids):
        raise ValueError(f"image_ids: given with {len(given)} of {len(ids)} batches; all or none")
    first = batches[0]
    device = first["images" if "images" in first else "image_embeds"].device
    seeds = [philox_state(device=device) for _ in batches]
    encoded = [encode(philox=seed, **batch) for seed, batch in zip(seeds, batches, strict=True)]
    images, texts = (torch.cat([found[i] for found in encoded]) for i in range(2))
    rounded = images.dtype if images.dtype.itemsize == 2 else None
    output, d_image, d_text, d_temp = itc_loss_and_grads(
        images if rounded is None else images.float(),
        texts if rounded is None else texts.float(),
        encoded[0][2],
        label_smoothing=config.label_smoothing,
        image_ids=torch.cat(given) if given else None,
        grad_mode=config.grad_mode,
        negatives="none",
        products=rounded,
    )
    sizes = [len(found[1]) for found in encoded]
    return [
        StepContrast(
            seed,
            output.loss,
            output.accuracy_i2t,
            output.accuracy_t2i,
            len(batches) * of_images,
            len(batches) * of_texts,
            d_temp,
        )
        for seed, of_images, of_texts in zip(
            seeds, d_image.split(sizes), d_text.split(sizes), strict=True
        )
    ]
