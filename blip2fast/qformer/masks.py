"""Attention masks of the Q-Former: converts every accepted form to the one that the kernels take.

`scaled_dot_product_attention` gets a mask `[B, 1|H, 1|L, S]`, either boolean (True: may be seen) or
additive floating-point, or None when nothing is masked. Accepted input forms:

==============  ==========================  ====================================================
mask            shape                       meaning
==============  ==========================  ====================================================
lengths         `[B]` integers              encoder only: sample b has that many real image tokens
padding         `[B, S]`                    0/1 or boolean: 1 where the token is real
pairs           `[B, L, S]`                 0/1 or boolean: row l may see token s
prepared        `[B, 1|H, 1|L, S]`          boolean or integer 0/1; a float is added to the scores
==============  ==========================  ====================================================
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.ops.tracing import has_values


def prepare_mask(
    mask: Tensor | None,
    *,
    batch: int,
    heads: int,
    rows: int,
    keys: int,
    name: str,
    device: torch.device,
) -> Tensor | None:
    """Converts a user's mask to `[B|1, 1|H, 1|rows, keys]`; None if it masks nothing.

    Args:
        mask: any of the forms in this module's table, or None.
        batch: B, the largest batch in the call; a mask of batch 1 is broadcast.
        heads: H, number of attention heads.
        rows: number of attending rows (L; Q for cross-attention).
        keys: number of tokens attended to (L, or S image tokens).
        name: the argument's name in error messages.
        device: where the attention runs.

    Raises:
        ValueError: on a shape that is none of the accepted ones.
    """
    if mask is None:
        return None
    _check_shape(mask, batch=batch, rows=rows, keys=keys, name=name)
    if mask.ndim == 4 and mask.shape[1] not in (1, heads):
        raise ValueError(
            f"{name} has {mask.shape[1]} heads in its shape {list(mask.shape)}; "
            f"expected 1 or {heads}"
        )
    if mask.device != device:
        mask = mask.to(device)
    if mask.ndim == 1:
        mask = torch.arange(keys, device=device) < mask[:, None]
    additive = mask.ndim == 4 and mask.is_floating_point()
    if not additive and mask.is_floating_point() and _is_additive(mask):
        raise ValueError(
            f"{name} of shape {list(mask.shape)} holds negative values: masks of two or three "
            "dimensions are 0/1 (1: may be seen); give an additive mask four dimensions"
        )
    if not additive and mask.dtype != torch.bool:
        mask = mask != 0
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    elif mask.ndim == 3:
        mask = mask[:, None]
    if not additive and _hides_nothing(mask):
        return None
    return mask


def _is_additive(mask: Tensor) -> bool:
    """Whether a float mask has negative values, so is additive rather than 0/1.

    False where the values must not be looked at.
    """
    return has_values(mask) and bool((mask < 0).any())


def _hides_nothing(mask: Tensor) -> bool:
    """Whether the mask is all true; False where the values must not be looked at."""
    return has_values(mask) and bool(mask.all())


def _check_shape(mask: Tensor, *, batch: int, rows: int, keys: int, name: str) -> None:
    shape = tuple(mask.shape)
    fits = shape[:1] in ((batch,), (1,))
    if mask.ndim == 1:
        fits = fits and name.startswith("encoder") and not mask.is_floating_point()
        fits = fits and mask.dtype != torch.bool
    elif mask.ndim in (2, 3, 4):
        fits = fits and shape[-1] == keys
        fits = fits and (mask.ndim == 2 or shape[-2] == rows or (mask.ndim == 4 and shape[-2] == 1))
    else:
        fits = False
    if not fits:
        pairs = f"{rows}, {keys}"
        forms = f"[{batch}, {keys}], [{batch}, {pairs}] or [{batch}, 1 or heads, {pairs}]"
        raise ValueError(
            f"{name} has shape {list(shape)} and dtype {mask.dtype}; expected {forms} "
            f"for a batch of {batch}, {rows} attending rows and {keys} attended tokens"
        )


def pad_ragged(states: list[Tensor] | tuple[Tensor, ...], width: int) -> tuple[Tensor, Tensor]:
    """Pads per-sample image tokens `[S_b, E]` to `[B, S, E]`; also returns the lengths `[B]`.

    Raises:
        ValueError: when the list is empty or a member is not `[S_b, width]`.
    """
    if not states:
        raise ValueError(
            "encoder_hidden_states is an empty list: give one [S, E] tensor per sample"
        )
    for index, item in enumerate(states):
        if item.ndim != 2 or item.shape[1] != width:
            raise ValueError(
                f"encoder_hidden_states[{index}] has shape {list(item.shape)}; "
                f"expected [tokens, {width}] (one sample's image tokens)"
            )
    lengths = torch.tensor([len(item) for item in states], device=states[0].device)
    return pad_sequence(list(states), batch_first=True), lengths


def qformer_mask(kind: MaskKind, num_queries: int, text_mask: Tensor) -> Tensor:
    """Self-attention mask over Q query rows followed by T text rows.

    Args:
        kind: One of the three masks that `MaskKind` draws.
        num_queries: Q, the number of query rows; 0 for text alone.
        text_mask: `[B, T]`, nonzero where a text token is real.

    Returns:
        `[B, Q+T, Q+T]` bool, true where the row may attend to the column.

    Raises:
        ValueError: `text_mask` is not two-dimensional or `num_queries` is negative.
    """
    if text_mask.dim() != 2:
        raise ValueError(f"text_mask: expected [B, T], got shape {tuple(text_mask.shape)}")
    if num_queries < 0:
        raise ValueError(f"num_queries: expected 0 or more, got {num_queries}")
    B, T = text_mask.shape
    Q, L = num_queries, num_queries + T
    device = text_mask.device
    text_rows = torch.arange(L, device=device) >= Q

    if kind is MaskKind.BIDIRECTIONAL:
        visible = torch.ones(L, L, dtype=torch.bool, device=device)
    elif kind is MaskKind.UNIMODAL:
        visible = text_rows[:, None] == text_rows[None, :]
    else:
        # all queries come before the text, so the causal mask lets text rows see every query
        not_later = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        visible = torch.where(text_rows[:, None], not_later, ~text_rows[None, :])

    real = torch.cat([text_mask.new_ones(B, Q).bool(), text_mask.bool()], dim=1)
    return visible[None] & real[:, None, :]
