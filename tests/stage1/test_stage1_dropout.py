"""Stage 1 with dropout: the masks are exported, put into the textbook, and nothing else differs."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from dropout_masks import Masks, dropping, passes_of
from stage1_cases import SMALL, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1

DROPPING = replace(SMALL, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
VIT_G = Stage1Config(encoder_hidden_size=1408)
VIT_L = Stage1Config(encoder_hidden_size=1024)


def compare(
    config: Stage1Config, batch: dict[str, Tensor], dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    """Losses and gradients of a step in training mode against the textbook with the same masks."""
    torch.manual_seed(0)
    model = Blip2Stage1(config).to(dtype).train()
    textbook = TextbookStage1(model).train()
    B, T = batch["input_ids"].shape
    batch = {**batch, "image_embeds": batch["image_embeds"].to(dtype)}
    others = (torch.arange(B) + 1) % B
    negatives = (others, (others + 1) % B)

    torch.manual_seed(1)
    ours = model(**batch, negatives=negatives)
    if config.hidden_dropout_prob == 0:
        truth = textbook(**batch, negatives=negatives)
    else:
        torch.manual_seed(1)
        masks = Masks(config, philox_state())
        Q, S = config.num_query_tokens, batch["image_embeds"].shape[1]
        passes = passes_of(batch["attention_mask"].sum(1), negatives[1], Q, T)
        with dropping(chain.from_iterable(masks.of_pass(p, S) for p in passes)):
            truth = textbook(**batch, negatives=negatives)

    loss_bound, grad_bound = bounds
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert relative_error(ours[name].detach(), truth[name].detach()) < loss_bound, name
    ours.loss.backward()
    truth["loss"].backward()
    for name, parameter in model.named_parameters():
        twin = textbook.twin(name)
        if not name.endswith("key.bias"):
            assert relative_error(parameter.grad, twin.grad) < grad_bound, name


def test_losses_and_gradients_are_the_textbook_with_the_same_masks() -> None:
    compare(DROPPING, make_batch(SMALL, batch=6), torch.float64, (1e-12, 1e-9))


def test_dropout_off_is_another_loss(small_batch: dict[str, Tensor]) -> None:
    """The comparison above would pass if neither side dropped anything."""
    torch.manual_seed(0)
    model = Blip2Stage1(DROPPING).double()
    negatives = ((torch.arange(6) + 1) % 6, (torch.arange(6) + 2) % 6)
    train = model.train()(**small_batch, negatives=negatives)
    again = model(**small_batch, negatives=negatives)
    whole = model.eval()(**small_batch, negatives=negatives)
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        values = [float(out[name].detach()) for out in (train, again, whole)]
        assert abs(values[0] - values[1]) > 1e-6, name
        assert abs(values[0] - values[2]) > 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("config", [VIT_G, VIT_L], ids=["vit_g", "vit_l"])
@pytest.mark.parametrize("dropout", [True, False])
def test_full_size_is_the_textbook(config: Stage1Config, dropout: bool) -> None:
    """BLIP-2's own sizes in fp32."""
    if not dropout:
        config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = make_batch(config, batch=3, tokens=257, text=14)
    compare(config, batch, torch.float32, (1e-5, 1e-4))
