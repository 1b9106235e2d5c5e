"""Q-Formers of small random weights, transformers' and ours, and inputs for them."""

from collections.abc import Callable
from typing import Any

import torch
from qformer_holders import spread_parameters
from torch import Tensor
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVideoQFormerConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoQFormerModel,
)

from blip2fast.qformer.model import QFormer

B, Q, T, S, C, E, H = 3, 4, 5, 7, 32, 24, 4
SIZES = {
    "vocab_size": 40,
    "hidden_size": C,
    "num_hidden_layers": 3,
    "num_attention_heads": H,
    "intermediate_size": 48,
    "encoder_hidden_size": E,
    "max_position_embeddings": 8,
}
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
TEXT_LENGTHS = torch.tensor([5, 2, 3])
IMAGE_LENGTHS = torch.tensor([7, 4, 1])

Inputs = dict[str, Any]


def blip2_config(text: bool = True, **changes: Any) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(**SIZES | {"use_qformer_text_input": text} | changes)


def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> QFormer:
    qformer = QFormer(config)
    spread_parameters(qformer)
    return qformer.to(dtype).eval()


def make_pair(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str = "sdpa"
) -> tuple[PreTrainedModel, QFormer]:
    """transformers' Q-Former and ours, of equal weights."""
    classes = {
        Blip2QFormerConfig: Blip2QFormerModel,
        InstructBlipQFormerConfig: InstructBlipQFormerModel,
        InstructBlipVideoQFormerConfig: InstructBlipVideoQFormerModel,
    }
    config._attn_implementation = attention
    theirs, ours = classes[type(config)](config).eval(), QFormer(config).eval()
    spread_parameters(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def rows(batch: int = B, length: int = Q + T, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, C, generator=torch.Generator().manual_seed(seed))


def images(batch: int = B, seed: int = 1) -> Tensor:
    return torch.randn(batch, S, E, generator=torch.Generator().manual_seed(seed))


def up_to(lengths: Tensor, size: int) -> Tensor:
    """Padding mask `[B, size]` of 0 and 1."""
    return (torch.arange(size) < lengths[:, None]).long()


def row_mask() -> Tensor:
    """Queries and real text of every sample, `[B, Q + T]`."""
    return torch.cat([torch.ones(B, Q, dtype=torch.long), up_to(TEXT_LENGTHS, T)], 1)


def pair_mask() -> Tensor:
    """Multimodal causal mask `[B, Q + T, Q + T]`: text sees the queries and its past."""
    mask = torch.zeros(B, Q + T, Q + T, dtype=torch.bool)
    mask[:, :, :Q] = True
    mask[:, Q:, Q:] = torch.ones(T, T, dtype=torch.bool).tril()
    return mask & row_mask()[:, None].bool()


def as_additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask.bool(), torch.finfo(torch.float32).min)


def per_head() -> Tensor:
    """A mask that differs by head: head 0 sees all, the others the pair mask."""
    mask = pair_mask()[:, None].repeat(1, H, 1, 1)
    mask[:, 0] = True
    return mask


def ids(batch: int = B) -> Tensor:
    return torch.randint(1, 40, (batch, T), generator=torch.Generator().manual_seed(2))


BLIP2_CASES: dict[str, Callable[[], Inputs]] = {
    "queries": lambda: {"query_embeds": rows(length=Q), "encoder_hidden_states": images()},
    "queries, one for all": lambda: {
        "query_embeds": rows(1, Q),
        "encoder_hidden_states": images(),
    },
    "image, one for all": lambda: {
        "query_embeds": rows(length=Q),
        "encoder_hidden_states": images(1),
    },
    "queries, padded images": lambda: {
        "query_embeds": rows(length=Q),
        "encoder_hidden_states": images(),
        "encoder_attention_mask": up_to(IMAGE_LENGTHS, S),
    },
    "text": lambda: {
        "query_embeds": rows(length=T),
        "query_length": 0,
        "attention_mask": up_to(TEXT_LENGTHS, T),
    },
    "both": lambda: {
        "query_embeds": rows(),
        "query_length": Q,
        "attention_mask": row_mask(),
        "encoder_hidden_states": images(),
        "encoder_attention_mask": torch.ones(B, S, dtype=torch.long),
    },
    "both, boolean padding": lambda: {
        "query_embeds": rows(),
        "query_length": Q,
        "attention_mask": row_mask().bool(),
        "encoder_hidden_states": images(),
    },
    "both, additive": lambda: {
        "query_embeds": rows(),
        "query_length": Q,
        "attention_mask": as_additive(pair_mask()[:, None]),
        "encoder_hidden_states": images(),
    },
    "both, additive by head": lambda: {
        "query_embeds": rows(),
        "query_length": Q,
        "attention_mask": as_additive(per_head()),
        "encoder_hidden_states": images(),
    },
    "both, boolean pairs": lambda: {
        "query_embeds": rows(),
        "query_length": Q,
        "attention_mask": pair_mask()[:, None],
        "encoder_hidden_states": images(),
    },
}
INSTRUCT_CASES: dict[str, Callable[[], Inputs]] = {
    "both": lambda: {
        "input_ids": ids(),
        "query_embeds": rows(length=Q),
        "attention_mask": row_mask(),
        "encoder_hidden_states": images(),
    },
    "both, padded images": lambda: {
        "input_ids": ids(),
        "query_embeds": rows(length=Q),
        "attention_mask": row_mask(),
        "encoder_hidden_states": images(),
        "encoder_attention_mask": up_to(IMAGE_LENGTHS, S),
    },
    "text, given positions": lambda: {
        "input_ids": ids(),
        "position_ids": torch.tensor([[3, 1, 4, 1, 5]]),
    },
    "queries": lambda: {
        "input_ids": None,
        "query_embeds": rows(length=Q),
        "encoder_hidden_states": images(),
    },
}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
