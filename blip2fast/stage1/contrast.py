"""ITC over more pairs than fit into memory at once (GradCache).

A contrastive loss needs all its pairs at once, but its encoders do not: features of every
micro-batch first, without gradient; the loss of all and its gradients with respect to features;
then each micro-batch again, which hands its own down (Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", arXiv 2101.06983). Shapes as in `config.py`;
B pairs of a micro-batch, D width of features.
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

# `Blip2Stage1.features`, or the same through an engine: `(image features, text features,
# temperature)` of a dropout seed `philox=` and the keyword arguments of a batch
Encode = Callable[..., tuple[Tensor, Tensor, Tensor]]


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype in which ITC multiplies normalised features; None: as they are.

    Args:
        dtype: Of the model's products.
        device: Where they are computed. A CPU has no use for fp16.
    """
    return torch.float16 if dtype.itemsize == 2 and device.type == "cuda" else None


@dataclass(frozen=True)
class StepContrast:
    """One micro-batch's share of the ITC loss of a whole optimizer step.

    Attributes:
        philox: `[2]`, seed and offset of the dropout with which its features were computed.
        loss, accuracy_i2t, accuracy_t2i: Of the whole step, scalars.
        d_image, d_text: `[B, Q, D]` and `[B, D]`, gradient of the loss with respect to its
            features, times the number of micro-batches, since their losses are averaged.
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
            ValueError: The features are not of the micro-batch that this was made for.
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
        # DeepSpeed holds it as [1]
        handed_down = handed_down + (temp * self.d_temp).sum()
        return self.loss + (handed_down - handed_down.detach())


def step_contrast(
    encode: Encode, batches: Sequence[Mapping[str, Any]], config: Stage1Config
) -> list[StepContrast]:
    """ITC over all pairs of an optimizer step, of all micro-batches and processes.

    Every process must call this, with as many batches of the same sizes. For the sum over batches
    of `forward(**batch, contrast=...).loss / len(batches)`, ITC's gradient is that of one batch
    with all the pairs.

    Args:
        encode: `Blip2Stage1.features` of the model.
        batches: Keyword arguments of `Blip2Stage1.forward`, image tokens given.
        config: Of the model.

    Returns:
        One for each batch, for `forward(contrast=...)`.

    Raises:
        ValueError: There is no batch, or some but not all have image ids.
    """
    if not batches:
        raise ValueError("batches: expected one or more, got none")
    ids = [batch.get("image_ids") for batch in batches]
    given = [x.reshape(-1) for x in ids if x is not None]
    if 0 < len(given) < len(ids):
        raise ValueError(f"image_ids: given with {len(given)} of {len(ids)} batches; all or none")
    device = batches[0]["image_embeds"].device
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
