"""The masks against the table of the paper's Figure 2, by definition and by perturbation."""

from __future__ import annotations

import pytest
import torch

from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.qformer.masks import qformer_mask
from blip2fast.stage1.model import Blip2Stage1


def sees(kind: MaskKind, row: int, column: int, Q: int) -> bool:
    """The definition, one pair of tokens at a time."""
    row_is_text, column_is_text = row >= Q, column >= Q
    if kind is MaskKind.BIDIRECTIONAL:
        return True
    if kind is MaskKind.UNIMODAL:
        return row_is_text == column_is_text
    if not row_is_text:
        return not column_is_text
    return not column_is_text or column <= row


@pytest.mark.parametrize("kind", MaskKind)
@pytest.mark.parametrize(("Q", "T"), [(3, 4), (0, 5), (2, 1), (1, 0)])
def test_mask_is_the_definition(kind: MaskKind, Q: int, T: int) -> None:
    text_mask = torch.ones(2, T, dtype=torch.long)
    text_mask[1, T // 2 :] = 0
    mask = qformer_mask(kind, Q, text_mask)
    assert mask.shape == (2, Q + T, Q + T)
    assert mask.dtype == torch.bool
    for b in range(2):
        for i in range(Q + T):
            for j in range(Q + T):
                real = j < Q or bool(text_mask[b, j - Q])
                assert bool(mask[b, i, j]) == (real and sees(kind, i, j, Q)), (b, i, j)


@pytest.mark.parametrize("kind", MaskKind)
def test_states_change_exactly_where_the_mask_allows(
    kind: MaskKind, small_config, small_batch
) -> None:
    """Perturb one token's input; through one layer, only rows that see it may change."""
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    layer = model.qformer.encoder.layer[0]
    Q, T = small_config.num_query_tokens, small_batch["input_ids"].shape[1]
    mask = qformer_mask(kind, Q, small_batch["attention_mask"])
    states = torch.randn(6, Q + T, small_config.hidden_size, dtype=torch.float64)
    tokens = model.ln_vision(small_batch["image_embeds"])

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x, attention_mask=mask[:, None], encoder_hidden_states=tokens, query_length=Q)

    with torch.no_grad():
        before = run(states)
        for column in range(Q + T):
            perturbed = states.clone()
            perturbed[:, column] += 1.0
            changed = (run(perturbed) - before).abs().amax(-1) > 1e-9
            # a token always changes its own row through the residual path
            expected = mask[:, :, column].clone()
            expected[:, column] = True
            assert torch.equal(changed, expected), column


def test_bad_arguments_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"text_mask: expected \[B, T\], got shape \(3,\)"):
        qformer_mask(MaskKind.UNIMODAL, 2, torch.ones(3))
    with pytest.raises(ValueError, match="num_queries: expected 0 or more, got -1"):
        qformer_mask(MaskKind.UNIMODAL, -1, torch.ones(2, 3))
