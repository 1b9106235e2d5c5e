"""The frozen language model of stage 2: any `AutoModelForCausalLM` or `Seq2SeqLM`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2fast.frozen.recompute import recompute_forward
from blip2fast.offload.streaming import stream_of
from blip2fast.ops.checks import describe
from blip2fast.ops.tracing import has_values
from blip2fast.stage2.packing import ROW_LENGTH, pack
from blip2fast.stage2.token_rows import IGNORED, IMAGE_PLACE


@torch.no_grad()
def match_embedding_scale(projection: nn.Linear, language_model: PreTrainedModel) -> None:
    """Re-initialise the projection: unit-variance inputs give outputs with the embeddings' std.

    Accounts for `embed_scale`, by which the embedding modules of Gemma and BART scale their output.
    """
    embeddings = language_model.get_input_embeddings()
    spread = float(embeddings.weight.float().std()) * float(getattr(embeddings, "embed_scale", 1))
    nn.init.normal_(projection.weight, std=spread * projection.in_features**-0.5)
    nn.init.zeros_(projection.bias)


def freeze(module: nn.Module) -> None:
    """Freeze the weights and disable dropout; gradients still flow to the inputs."""
    module.requires_grad_(False)
    module.eval()


def use_activation(language_model: PreTrainedModel, name: str) -> None:
    """Replace the activation of a T5's feed-forward layers.

    Raises:
        ValueError: not a T5, or an activation that transformers does not know.
    """
    layers = [m for m in language_model.modules() if hasattr(m, "act") and hasattr(m, "wo")]
    if not layers or not hasattr(language_model.config, "dense_act_fn"):
        raise ValueError(
            f"llm_activation {name!r}: {type(language_model).__name__} is not a T5 (its config "
            "has no dense_act_fn); leave it out"
        )
    if name not in ACT2FN:
        raise ValueError(f"llm_activation {name!r}: transformers knows {', '.join(sorted(ACT2FN))}")
    for layer in layers:
        layer.act = ACT2FN[name]


@contextmanager
def without_dropout(language_model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode within the block, for generation during training."""
    training = [module for module in language_model.modules() if module.training]
    language_model.eval()
    try:
        yield
    finally:
        # one by one: adapters may have dropout in a model that is in evaluation mode
        for module in training:
            module.training = True


def recompute_layers(language_model: PreTrainedModel) -> None:
    """Enable gradient checkpointing of a frozen model's layers.

    transformers' own switch only works in training mode, which a frozen model is not in.

    Raises:
        ValueError: the model has no layers that support gradient checkpointing.
    """
    layers = [m for m in language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(language_model).__name__} has no layers that support gradient checkpointing; "
            "train without it"
        )
    for layer in layers:
        stream = stream_of(layer)
        if stream is not None:
            stream.recompute = True  # the stream runs the layer, so it does the recomputation
        else:
            recompute_forward(layer)


def embedding_width(language_model: PreTrainedModel) -> int:
    """Width of the model's text embeddings.

    Not `config.hidden_size`: OPT-350m has embedding width 512 and projects to 1024. And not the
    weight's shape, which is empty while DeepSpeed ZeRO-3 has it partitioned.
    """
    return int(language_model.get_input_embeddings().embedding_dim)


def is_encoder_decoder(language_model: PreTrainedModel) -> bool:
    return bool(language_model.config.is_encoder_decoder)


def position_limit(language_model: PreTrainedModel) -> int | None:
    """The model's maximum sequence length; None if unlimited (T5)."""
    limit = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def check_positions(language_model: PreTrainedModel, **lengths: int) -> None:
    """Refuse a sequence, given as named parts, that exceeds the model's maximum length."""
    limit, total = position_limit(language_model), sum(lengths.values())
    if limit is not None and total > limit:
        parts = " + ".join(f"{count} {name.replace('_', ' ')}" for name, count in lengths.items())
        raise ValueError(
            f"{parts} = {total} positions, but the language model has max_position_embeddings="
            f"{limit}; shorten the text (max_txt_len) or use fewer query tokens"
        )


def check_text(
    language_model: PreTrainedModel, name: str, ids: Tensor, mask: Tensor | None, num_images: int
) -> None:
    """Refuse token ids [B, T] that do not fit the images, their mask or the vocabulary."""
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"{name}: expected [B, T] integers, got {describe(ids)}")
    if ids.shape[0] != num_images:
        raise ValueError(
            f"{name}: expected one text for each of {num_images} images, got {ids.shape[0]} texts"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"the mask of {name}: expected its shape {tuple(ids.shape)}, got {describe(mask)}"
        )
    words = language_model.get_input_embeddings().num_embeddings
    # on a GPU this would synchronise, and the GPU checks the range itself
    if has_values(ids) and ids.numel():
        used = ids.masked_fill(ids == IGNORED, 0) if name == "labels" else ids
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= words:
            raise ValueError(
                f"{name}: expected ids from 0 to {words - 1}, got {low} to {high}; does the "
                "tokenizer belong to this language model?"
            )


def logits_on_rows(language_model: PreTrainedModel, rows: Tensor, **inputs: Any) -> Tensor:
    """Logits at selected positions; the head skips prompts, padding and questions.

    A forward pre-hook selects the rows of the head's input. Calling the model's parts separately
    would miss the scaling or capping that some models apply to their logits after the head
    (Gemma 2, Granite, Cohere). If the head is not called as a module, or not on all positions at
    once, it runs in full and the rows are selected from its output.

    Args:
        language_model: the frozen model.
        rows: [R] positions in the flattened [B * L] of the model's output.
        inputs: the model's arguments.

    Returns:
        [R, V], equal to `language_model(**inputs).logits.flatten(0, 1)[rows]`.
    """
    head = language_model.get_output_embeddings()
    if head is None:
        return language_model(**inputs).logits.flatten(0, 1)[rows]
    cut = False
    places = inputs.get("decoder_input_ids", inputs["inputs_embeds"])

    def keep_rows(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal cut
        if cut or not args or args[0].shape[:-1] != places.shape[:2]:
            return None
        cut = True
        return (args[0].flatten(0, 1)[rows].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_rows)
    try:
        logits = language_model(**inputs).logits.flatten(0, 1)
    finally:
        handle.remove()
    return logits if cut else logits[rows]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of [R, V] logits and [R] targets, in fp32 (fp64 for fp64 logits)."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def target_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the labels [B, T] that are not ignored: sample and position, [R] each.

    Raises:
        ValueError: all labels are ignored.
    """
    image, position = (labels != IGNORED).nonzero(as_tuple=True)
    if image.numel() == 0:
        raise ValueError(
            f"labels: all {labels.numel()} of {describe(labels)} are ignored ({IGNORED}), so there "
            "is no loss; give every batch a text beyond its prompt (raise max_txt_len?)"
        )
    return image, position


def refuse_decoder_inputs(language_model: PreTrainedModel, *inputs: Tensor | None) -> None:
    """Refuse decoder inputs for a decoder-only model."""
    if any(x is not None for x in inputs):
        raise ValueError(
            f"decoder_input_ids, decoder_attention_mask: {type(language_model).__name__} is "
            "decoder-only and has no second sequence; give input_ids and labels"
        )


@dataclass(frozen=True)
class Targets:
    """Training targets of a language model.

    Attributes:
        labels: [B, T], aligned with the text, for a decoder-only model; [B, T'] for a decoder; -100
            where the loss ignores them. None: the text itself (decoder-only).
        decoder_input_ids, decoder_attention_mask: [B, T'], encoder-decoder only.
    """

    labels: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None


def text_loss(
    language_model: PreTrainedModel,
    sequence: tuple[Tensor, Tensor],
    input_ids: Tensor,
    targets: Targets,
    *,
    in_place: bool = False,
    return_logits: bool = False,
    without_padding: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | int]:
    """The loss of texts after soft prompts, decoder-only or encoder-decoder.

    Args:
        language_model: The frozen model.
        sequence: Embeddings and mask of soft prompts and text, from `sequence.read_sequence`.
        input_ids: [B, T], the text.
        targets: The training targets.
        in_place: Whether `input_ids` contains image placeholders.
        return_logits: Also return the logits of all positions.
        without_padding: Pack samples into shared rows (decoder-only).

    Returns:
        The loss (None for an encoder-decoder without labels), the logits if requested, and the
        number of target tokens that the loss is averaged over.
    """
    embeds, mask = sequence
    labels = targets.labels
    if is_encoder_decoder(language_model):
        loss, logits = decoder_loss(
            language_model,
            {"inputs_embeds": embeds, "attention_mask": mask},
            labels,
            targets.decoder_input_ids,
            targets.decoder_attention_mask,
            return_logits,
        )
        return loss, logits, 0 if labels is None else (labels != IGNORED).sum()
    refuse_decoder_inputs(language_model, targets.decoder_input_ids, targets.decoder_attention_mask)
    if labels is None:
        labels = default_labels(input_ids, mask, in_place)
    if in_place:
        labels = predictable(labels)
    loss, logits = continuation_loss(
        language_model, embeds, mask, labels, input_ids.shape[1], return_logits, without_padding
    )
    return loss, logits, (labels != IGNORED).sum()


def default_labels(input_ids: Tensor, mask: Tensor, in_place: bool) -> Tensor:
    """The text tokens [B, T] themselves; padding and soft prompts are ignored.

    Args:
        input_ids: [B, T], the text.
        mask: Mask of the sequence, [B, Q + T], or [B, T] if `in_place`.
        in_place: Whether `input_ids` contains image placeholders.
    """
    labels = input_ids.masked_fill(mask[:, -input_ids.shape[1] :] == 0, IGNORED)
    return labels.masked_fill(input_ids == IMAGE_PLACE, IGNORED) if in_place else labels


def predictable(labels: Tensor) -> Tensor:
    """Labels [B, T] with the first column ignored: no position precedes it."""
    return torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], dim=1)


def continuation_loss(
    language_model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    labels: Tensor,
    T: int,
    return_logits: bool,
    without_padding: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Decoder-only loss of [B, T] labels on the last T of [B, Q + T, L] embeddings.

    Label t is predicted from the position before it, the first one from the last soft prompt.
    With `without_padding` samples are packed into shared rows, unless `return_logits` is set.

    Returns:
        The loss, and the logits [B, Q + T, V] if requested.
    """
    B, length, _ = embeds.shape
    if labels.shape != (B, T):
        raise ValueError(
            f"labels: expected the shape of input_ids {(B, T)}, got {describe(labels)}"
        )
    check_text(language_model, "labels", labels, None, B)
    image, position = target_rows(labels)
    rows = image * length + (length - T) + position - 1
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
    packed = None
    if without_padding and not return_logits:
        width = int(language_model.config.hidden_size)
        packed = pack(mask, width, ROW_LENGTH)
    if packed is not None:
        rows = packed.rows(rows)
        inputs = packed.inputs(embeds, language_model.config._attn_implementation)
    inputs["use_cache"] = False
    return _loss(language_model, rows, labels[image, position], return_logits, inputs)


def decoder_loss(
    language_model: PreTrainedModel,
    encoder_inputs: dict[str, Tensor],
    labels: Tensor | None,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    return_logits: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Encoder-decoder loss of [B, T] labels.

    Returns:
        The loss (None without labels), and the logits [B, T, V] if requested or if there is no
        loss.
    """
    name = type(language_model).__name__
    B = encoder_inputs["inputs_embeds"].shape[0]
    if labels is None and decoder_input_ids is None:
        raise ValueError(
            f"labels: {name} is an encoder-decoder and needs a second sequence; give labels (the "
            "text to write), or decoder_input_ids for the logits alone"
        )
    for what, ids in (("labels", labels), ("decoder_input_ids", decoder_input_ids)):
        if ids is not None:
            check_text(language_model, what, ids, None, B)
            check_positions(language_model, **{what: ids.shape[1]})
    if decoder_input_ids is None:
        if not hasattr(language_model, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(f"{name} does not shift labels itself; give decoder_input_ids")
        decoder_input_ids = language_model.prepare_decoder_input_ids_from_labels(labels)
    inputs = {
        **encoder_inputs,
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": decoder_attention_mask,
        "use_cache": False,
    }
    if labels is None:
        return None, language_model(**inputs).logits
    if labels.shape != decoder_input_ids.shape:
        raise ValueError(
            f"labels: expected the shape of decoder_input_ids {tuple(decoder_input_ids.shape)}, "
            f"got {describe(labels)}"
        )
    image, position = target_rows(labels)
    rows = image * labels.shape[1] + position
    return _loss(language_model, rows, labels[image, position], return_logits, inputs)


def _loss(
    language_model: PreTrainedModel,
    rows: Tensor,
    targets: Tensor,
    return_logits: bool,
    inputs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    if not return_logits:
        return token_loss(logits_on_rows(language_model, rows, **inputs), targets), None
    logits = language_model(**inputs).logits
    return token_loss(logits.flatten(0, 1)[rows], targets), logits
