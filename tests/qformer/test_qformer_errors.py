"""Bad input to QFormer: each a ValueError that names the values and the remedy."""

from typing import Any

import pytest
import torch
from qformer_cases import SIZES, B, C, E, H, Q, S, T, blip2_config
from transformers import InstructBlipQFormerConfig, PreTrainedConfig

from blip2fast.qformer.model import QFormer

L = Q + T
IMAGES = torch.zeros(B, S, E)
ROWS = torch.zeros(B, L, C)
GOOD = {"query_embeds": ROWS, "query_length": Q, "encoder_hidden_states": IMAGES}

BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"query_embeds": None}, r"query_embeds is None: give embeddings"),
    "row width": (
        {"query_embeds": torch.zeros(B, L, 30)},
        r"query_embeds has shape \[3, 9, 30\]; expected \[B, tokens, 32\]",
    ),
    "rows without batch": (
        {"query_embeds": torch.zeros(L, C)},
        r"query_embeds has shape \[9, 32\]; expected \[B, tokens, 32\]",
    ),
    "empty batch": (
        {"query_embeds": torch.zeros(0, L, C), "encoder_hidden_states": torch.zeros(0, S, E)},
        r"query_embeds is empty; expected \[B, tokens, 32\], here \[0, 9, 32\]",
    ),
    "no image tokens": (
        {"encoder_hidden_states": torch.zeros(B, 0, E)},
        r"encoder_hidden_states is empty; expected \[B, tokens, 24\], here \[3, 0, 24\]",
    ),
    "image width": (
        {"encoder_hidden_states": torch.zeros(B, S, 1408)},
        r"encoder_hidden_states has shape \[3, 7, 1408\]; expected \[B, tokens, 24\]",
    ),
    "batches": (
        {"encoder_hidden_states": torch.zeros(2, S, E)},
        r"encoder_hidden_states has batch 2 and the rows have batch 3: they must agree, or one",
    ),
    "no images": (
        {"encoder_hidden_states": None},
        r"encoder_hidden_states is None, but 4 queries need image tokens.*query_length=0",
    ),
    "too many queries": ({"query_length": 12}, r"query_length is 12, but query_embeds has 9 rows"),
    "negative queries": ({"query_length": -1}, r"query_length is -1, but query_embeds has 9 rows"),
    "mask length": (
        {"attention_mask": torch.ones(B, T)},
        r"attention_mask has shape \[3, 5\].*expected \[3, 9\], \[3, 9, 9\] or \[3, 1 or heads, 9",
    ),
    "mask batch": (
        {"attention_mask": torch.ones(2, L)},
        r"attention_mask has shape \[2, 9\] and dtype torch.float32; expected \[3, 9\]",
    ),
    "mask rows": (
        {"attention_mask": torch.ones(B, Q, L)},
        r"attention_mask has shape \[3, 4, 9\].*9 attending rows and 9 attended tokens",
    ),
    "mask heads": (
        {"attention_mask": torch.ones(B, 3, L, L)},
        r"attention_mask has 3 heads in its shape \[3, 3, 9, 9\]; expected 1 or 4",
    ),
    "additive mask without heads": (
        {"attention_mask": torch.zeros(B, L, L).masked_fill(torch.eye(L) == 0, -torch.inf)},
        r"attention_mask of shape \[3, 9, 9\] holds negative values.*give an additive mask four",
    ),
    "ids as rows": (
        {"query_embeds": torch.zeros(B, L, C).long()},
        r"query_embeds holds torch.int64.*token ids go into input_ids=\.\.\., by name",
    ),
    "mask dimensions": (
        {"attention_mask": torch.ones(B, 1, 1, L, L)},
        r"attention_mask has shape \[3, 1, 1, 9, 9\]",
    ),
    "lengths of rows": (
        {"attention_mask": torch.full((B,), L)},
        r"attention_mask has shape \[3\] and dtype torch.int64; expected \[3, 9\]",
    ),
    "float lengths": (
        {"encoder_attention_mask": torch.ones(B)},
        r"encoder_attention_mask has shape \[3\] and dtype torch.float32",
    ),
    "encoder mask": (
        {"encoder_attention_mask": torch.ones(B, L)},
        r"encoder_attention_mask has shape \[3, 9\].*expected \[3, 7\], \[3, 4, 7\]",
    ),
    "list and mask": (
        {
            "encoder_hidden_states": [torch.zeros(2, E)] * B,
            "encoder_attention_mask": torch.ones(B, 2),
        },
        r"encoder_attention_mask is not None beside a list.*leave the mask out",
    ),
    "list of batches": (
        {"encoder_hidden_states": [torch.zeros(2, E), torch.zeros(1, 2, E)]},
        r"encoder_hidden_states\[1\] has shape \[1, 2, 24\]; expected \[tokens, 24\]",
    ),
    "empty list": ({"encoder_hidden_states": []}, "encoder_hidden_states is an empty list"),
    "ids": (
        {"input_ids": torch.ones(B, T, dtype=torch.long)},
        r"input_ids given, but a Q-Former with a Blip2QFormerConfig owns no embeddings",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    changes, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        QFormer(blip2_config())(**GOOD | changes)


def test_good_call() -> None:
    """The call that the cases above spoil, each in one place, is itself sound."""
    assert QFormer(blip2_config())(**GOOD).last_hidden_state.shape == (B, L, C)


def test_text_needs_text_networks() -> None:
    qformer = QFormer(blip2_config(text=False))
    with pytest.raises(ValueError, match=r"5 of 9 rows are text \(query_length 4\).*use_qformer_"):
        qformer(**GOOD)
    with pytest.raises(ValueError, match=r"9 of 9 rows are text \(query_length 0\)"):
        qformer(ROWS, query_length=0)


BAD_IDS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": (
        {"input_ids": torch.ones(B, 9, dtype=torch.long)},
        r"input_ids holds 9 tokens a row, but the position table ends at 8 \(max_position_emb",
    ),
    "no batch": (
        {"input_ids": torch.ones(T, dtype=torch.long)},
        r"input_ids has shape \[5\]; expected \[B, T\], not empty",
    ),
    "empty": (
        {"input_ids": torch.ones(B, 0, dtype=torch.long)},
        r"input_ids has shape \[3, 0\]; expected \[B, T\], not empty",
    ),
    "batches": (
        {"input_ids": torch.ones(2, T, dtype=torch.long)},
        r"query_embeds has batch 3 and input_ids batch 2: they must agree",
    ),
    "positions": (
        {"position_ids": torch.zeros(B, T + 1, dtype=torch.long)},
        r"position_ids has shape \[3, 6\]; expected \[3, 5\] or \[1, 5\], as input_ids",
    ),
    "query length": (
        {"query_length": 2},
        r"query_length is 2, but beside input_ids query_embeds holds the queries alone, here 4",
    ),
    "nothing": ({"input_ids": None, "query_embeds": None}, "query_embeds is None"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case: str) -> None:
    changes, message = BAD_IDS[case]
    good = {
        "input_ids": torch.ones(B, T, dtype=torch.long),
        "query_embeds": torch.zeros(B, Q, C),
        "encoder_hidden_states": IMAGES,
    }
    qformer = QFormer(InstructBlipQFormerConfig(**SIZES))
    assert qformer(**good).last_hidden_state.shape == (B, L, C)
    with pytest.raises(ValueError, match=message):
        qformer(**good | changes)


@pytest.mark.parametrize(
    "config",
    [blip2_config(hidden_size=30), InstructBlipQFormerConfig(**SIZES | {"hidden_size": 30})],
)
def test_heads_must_divide_the_width(config: PreTrainedConfig) -> None:
    with pytest.raises(ValueError, match=f"hidden_size 30 is not a multiple of num_.*heads {H}"):
        QFormer(config)
