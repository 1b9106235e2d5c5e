"""Bad input to stage 1: each a clear error that names the values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage1_cases import make_batch
from torch import Tensor

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1


@pytest.fixture
def model(small_config: Stage1Config) -> Blip2Stage1:
    return Blip2Stage1(small_config).double().eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_embeds": torch.zeros(6, 7, 30)}, r"expected \[B, S, 24\].*got \(6, 7, 30\)"),
        ({"image_embeds": torch.zeros(0, 7, 24)}, "the batch is empty"),
        ({"image_embeds": None}, "either image_embeds or images, got neither"),
        ({"images": torch.zeros(6, 3, 8, 8)}, "got both"),
        ({"input_ids": None}, "input_ids: expected"),
        ({"input_ids": torch.zeros(6, 9)}, "expected .* integers, got .*float32"),
        (
            {"input_ids": torch.full((6, 9), 50)},
            r"from 0 to 49 \(vocab_size=50\), got 50 to 50",
        ),
        ({"attention_mask": torch.ones(6, 8)}, r"the shape of input_ids \(6, 9\)"),
        ({"attention_mask": torch.zeros(6, 9)}, "text 0 starts with padding"),
        ({"image_ids": torch.arange(5)}, r"image_ids: expected \[B\] = \[6\]"),
        ({"image_ids": torch.rand(6)}, r"expected \[B\] = \[6\] integers"),
        ({"image_ids": torch.arange(6).view(2, 3)}, r"expected \[B\] = \[6\] integers"),
        ({"image_attention_mask": torch.ones(6, 8)}, r"expected \[B, S\] = \[6, 7\]"),
        ({"negatives": (torch.arange(1, 7), torch.arange(1, 7))}, "indices from 0 to 5"),
        ({"negatives": (torch.arange(1, 7) - 3, torch.arange(6))}, "from 0 to 5 .* or -1 for none"),
        ({"negatives": (torch.arange(6), torch.arange(6))}, "point at their own pair"),
        ({"attention_mask": torch.eye(9)[:1].expand(6, 9)}, "none to predict"),
        ({"negatives": (torch.arange(5), torch.arange(6))}, r"negative_image: expected \[B\]"),
        ({"cu_seqlens": torch.tensor([0, 54])}, "packed text has no padding"),
    ],
)
def test_message_names_the_value(
    model: Blip2Stage1, small_batch: dict[str, Tensor], change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{**small_batch, **change})


def test_caption_longer_than_the_position_table(
    model: Blip2Stage1, small_config: Stage1Config
) -> None:
    batch = make_batch(small_config, batch=3, text=17)
    with pytest.raises(ValueError, match="17 tokens do not fit the position table of 16"):
        model(**batch)


def test_batch_of_one_has_no_negatives(model: Blip2Stage1, small_config: Stage1Config) -> None:
    with pytest.raises(ValueError, match=r"batch of 1 pair on 1 process.*need negatives"):
        model(**make_batch(small_config, batch=1))


def test_texts_for_other_images(model: Blip2Stage1, small_batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="one text for each of 5 images, got 6 texts"):
        model(**{**small_batch, "image_embeds": small_batch["image_embeds"][:5]})


def test_images_without_an_encoder(model: Blip2Stage1, small_batch: dict[str, Tensor]) -> None:
    call = {**small_batch, "image_embeds": None, "images": torch.zeros(6, 3, 8, 8)}
    with pytest.raises(ValueError, match="the model has no image encoder"):
        model(**call)


def test_packed_offsets(model: Blip2Stage1, small_batch: dict[str, Tensor]) -> None:
    call = {
        "image_embeds": small_batch["image_embeds"],
        "input_ids": torch.full((30,), 5),
        "cu_seqlens": torch.tensor([0, 5, 10, 15, 20, 25, 29]),
    }
    with pytest.raises(ValueError, match="rising from 0 to 30"):
        model(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_mode": "global"}, "expected 'local' or 'full', got 'global'"),
        ({"bos_token_id": 50}, "bos_token_id is 50, vocab_size 50"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"num_query_tokens": 0}, "num_query_tokens: expected an integer from 1 on, got 0"),
        ({"hidden_size": "32"}, "hidden_size: expected an integer from 1 on, got '32'"),
        ({"num_attention_heads": 5}, "32 is not a multiple of num_attention_heads 5"),
    ],
)
def test_sizes_are_checked_when_the_config_is_built(
    small_config: Stage1Config, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_config, **change)


def test_partitioned_parameters_say_how_to_gather_them(
    model: Blip2Stage1, small_batch: dict[str, Tensor]
) -> None:
    model.query_tokens.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="GatheredParameters"):
        model.encode_image(small_batch["image_embeds"])


@pytest.mark.parametrize("count", [0, 17])
def test_texts_to_write_must_fit_the_position_table(
    model: Blip2Stage1, small_batch: dict[str, Tensor], count: int
) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens: expected 1 to 16, got {count}"):
        model.generate(small_batch["image_embeds"], eos_token_id=3, max_new_tokens=count)
