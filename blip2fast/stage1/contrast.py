"""The first pass of a stage-1 step, and ITC over more pairs than one pass has memory for.

A contrastive loss needs all its pairs at once, but its encoders do not: features of every
micro-batch first, without gradient; the loss of all and its gradients with respect to features;
then each micro-batch again, which hands its own down (Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", arXiv 2101.06983). Shapes as in `stage1_types.py`;
B pairs of a micro-batch, D width of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.ops.itc.loss import itc_loss_and_grads
from blip2fast.packed_pass import Dropout
from blip2fast.qformer.packed import PackedQFormer
from blip2fast.stage1 import inputs as stage1_inputs
from blip2fast.stage1 import losses
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.passes import PackedTexts, contrast_pass

if TYPE_CHECKING:
    from blip2fast.stage1.model import Blip2Stage1

# keyword arguments of `features` to `(image features, text features, temperature)`
Encode = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class FirstPass:
    """What ITC and ITG read.

    Attributes:
        query_output: `[B, Q, C]`.
        image_features, text_features: `[B, Q, D]` and `[B, D]`, normalised.
        itg_states: `[T_itg, C]`, rows that predict a word; empty without ITG.
        labels: `[T_itg]`, those words.
    """

    query_output: Tensor
    image_features: Tensor
    text_features: Tensor
    itg_states: Tensor
    labels: Tensor


def first_pass(
    model: Blip2Stage1,
    packed: PackedQFormer,
    keys_values: list[Tensor | None],
    texts: PackedTexts,
    visible: Tensor | None,
    philox: Tensor,
    with_itg: bool,
) -> FirstPass:
    """Images and texts, each alone, and the texts again behind their images.

    A row's dropout depends on its place, and ITG's rows are the last: without them the features
    are the same.
    """
    B = texts.count
    bos = model.config.bos_token_id if with_itg else None
    contrast = contrast_pass(texts, model.config.num_query_tokens, bos, visible)
    query_output, text_states = packed(
        model.query_tokens[0],
        model.embeddings(contrast.ids, contrast.positions),
        keys_values,
        contrast.packed,
        Dropout.of(model.qformer, philox, 0),
    )
    return FirstPass(
        query_output,
        losses.unit(model.vision_projection(query_output)),
        losses.unit(model.text_projection(text_states[:B])),
        text_states[B:],
        contrast.labels,
    )


def products(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The type that ITC rounds normalised features to before it multiplies them; None: none.

    Args:
        dtype: Of the model's products.
        device: Where they are computed. A CPU has no use for fp16.
    """
    return torch.float16 if dtype.itemsize == 2 and device.type == "cuda" else None


@torch.no_grad()
def features(
    model: Blip2Stage1,
    philox: Tensor,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    *,
    image_attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Blip2Stage1.forward` compares in ITC, without gradient.

    Args:
        model: In training mode, with the dropout of `philox`.
        philox: `[2]`, as in `StepContrast`.
        image_embeds, input_ids, attention_mask, image_ids: As in `Blip2Stage1.forward`, like the
            rest.

    Returns:
        Image features `[B, Q, D]`, text features `[B, D]`, rounded as `products` says, and the
        temperature, a scalar.
    """
    image_embeds = model.image_tokens(image_embeds)
    texts = model.packed_texts(input_ids, attention_mask, cu_seqlens)
    stage1_inputs.check_pairs(image_embeds, texts)
    visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
    packed = PackedQFormer(model.qformer, model.computing_dtype(image_embeds.device))
    keys_values = packed.image_keys_values(image_embeds, model.ln_vision)
    found = first_pass(model, packed, keys_values, texts, visible, philox, with_itg=False)
    kind = products(packed.dtype, image_embeds.device) or found.image_features.dtype
    image, text = found.image_features.to(kind), found.text_features.to(kind)
    return image, text, model.temp.detach().reshape(()).clone()


@dataclass(frozen=True)
class StepContrast:
    """What a micro-batch takes from the contrast of the whole optimizer step.

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
        """The loss of the step, with this micro-batch's part of its gradient behind it.

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
    """Compare all pairs of the batches of one optimizer step, of all processes.

    Every process must call this, with as many batches of the same sizes. For the sum over batches
    of `forward(**batch, contrast=...).loss / len(batches)`, ITC's gradient is that of one batch
    with all the pairs.

    Args:
        encode: `features` of the model, as a function of the other arguments.
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
