"""What QFormer does where transformers' Q-Formers fail or do more work."""

from typing import Any

import pytest
import torch
from qformer_cases import (
    BLIP2_CASES,
    IMAGE_LENGTHS,
    INSTRUCT_CASES,
    SIZES,
    TEXT_LENGTHS,
    B,
    C,
    Q,
    S,
    T,
    as_additive,
    blip2_config,
    cast,
    images,
    make,
    make_pair,
    pair_mask,
    row_mask,
    rows,
    up_to,
)
from qformer_holders import assert_near, run_with_gradients
from torch import Tensor
from torch.nn import functional as F
from transformers import InstructBlipQFormerConfig

from blip2fast.qformer.model import QFormer


def test_padded_images_with_text_equal_each_sample_alone() -> None:
    qformer = make(blip2_config())
    embeds, image = rows().double(), images().double()
    whole = qformer(
        embeds,
        Q,
        row_mask(),
        encoder_hidden_states=image,
        encoder_attention_mask=up_to(IMAGE_LENGTHS, S),
    ).last_hidden_state
    for b in range(B):
        length = Q + int(TEXT_LENGTHS[b])
        alone = qformer(
            embeds[b : b + 1, :length],
            Q,
            encoder_hidden_states=image[b : b + 1, : IMAGE_LENGTHS[b]],
        ).last_hidden_state
        assert_near(alone[0], whole[b, :length], 1e-12, f"sample {b}")


@pytest.mark.parametrize("form", ["list", "lengths", "boolean", "pairs", "prepared", "float"])
def test_ragged_images_in_every_form(form: str) -> None:
    qformer = make(blip2_config())
    mask = up_to(IMAGE_LENGTHS, S)
    image = images().double()
    call = {"query_embeds": rows().double(), "query_length": Q, "attention_mask": row_mask()}
    expected = qformer(**call, encoder_hidden_states=image, encoder_attention_mask=mask)[0]
    if form == "list":
        ragged = [x[:n] for x, n in zip(image, IMAGE_LENGTHS, strict=True)]
        got = qformer(**call, encoder_hidden_states=ragged)
    else:
        forms = {
            "lengths": IMAGE_LENGTHS,
            "boolean": mask.bool(),
            "pairs": mask[:, None].repeat(1, Q, 1),
            "prepared": mask[:, None, None].bool(),
            "float": as_additive(mask[:, None, None]),
        }
        image = image.masked_fill(mask[:, :, None] == 0, 1e6)
        call |= {"encoder_attention_mask": forms[form]}
        got = qformer(**call, encoder_hidden_states=image)
    assert_near(expected, got[0], 1e-12, form)


def test_a_pair_mask_rules_what_each_row_sees() -> None:
    """Changes one text row; exactly the rows that may see it change."""
    qformer = make(blip2_config())
    call = {"query_length": Q, "encoder_hidden_states": images().double()}
    embeds = rows().double()
    for mask in (pair_mask(), pair_mask().long(), pair_mask()[:, None], pair_mask().float()):
        before = qformer(embeds, attention_mask=mask, **call)[0]
        for column in range(T):
            changed = embeds.clone()
            changed[:, Q + column] += torch.linspace(-2, 2, C)
            after = qformer(changed, attention_mask=mask, **call)[0]
            moved = (after - before).abs().amax(-1) > 1e-9
            # three layers carry a change no further than the causal mask allows
            seen = pair_mask()[:, :, Q + column].clone()
            seen[:, Q + column] = True
            assert torch.equal(moved, seen)


def test_one_query_batch_is_attended_once_and_broadcast() -> None:
    qformer = make(blip2_config())
    batches: list[int] = []
    for layer in qformer.encoder.layer:
        layer.attention.register_forward_hook(lambda _, __, out: batches.append(len(out)))
    embeds, image = rows(1).double(), images().double()
    got = qformer(embeds, Q, encoder_hidden_states=image).last_hidden_state
    assert batches == [1, B, B]
    full = qformer(embeds.repeat(B, 1, 1), Q, encoder_hidden_states=image)
    assert_near(full.last_hidden_state, got, 1e-12, "broadcast")
    masked = qformer(embeds, Q, row_mask(), encoder_hidden_states=image).last_hidden_state
    full = qformer(embeds.repeat(B, 1, 1), Q, row_mask(), encoder_hidden_states=image)
    assert_near(full.last_hidden_state, masked, 1e-12, "broadcast under a mask")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["boolean", "-inf", "lowest"])
def test_a_row_that_sees_nothing_is_finite(attention: str, dtype: torch.dtype, value: str) -> None:
    _, qformer = make_pair(blip2_config(), dtype, attention)
    mask = pair_mask()[:, None]
    mask[1] = False
    image_mask = up_to(IMAGE_LENGTHS, S)[:, None, None].bool()
    image_mask[0] = False
    if value != "boolean":
        low = float("-inf") if value == "-inf" else torch.finfo(dtype).min
        mask, image_mask = (
            torch.zeros(m.shape, dtype=dtype).masked_fill(~m, low) for m in (mask, image_mask)
        )
    inputs = cast({"query_embeds": rows(), "encoder_hidden_states": images()}, dtype)
    inputs |= {"query_length": Q, "attention_mask": mask, "encoder_attention_mask": image_mask}
    # raises where a NaN is made, also where a later step would hide it
    with torch.autograd.set_detect_anomaly(True):
        outputs, gradients = run_with_gradients(qformer, inputs)
    # the float mask itself is no parameter: masks are not learned here
    assert all(output.isfinite().all() for output in outputs)
    for name, gradient in gradients.items():
        assert gradient is None or "mask" in name or gradient.isfinite().all(), name

    recorded = qformer(**inputs, output_attentions=True)
    # the lowest number everywhere hides nothing: softmax is blind to a constant
    assert recorded.cross_attentions[0][0].any() == (value == "lowest")
    assert recorded.attentions[0][1].any() == (value == "lowest")
    assert_near(outputs[0], recorded[0].detach(), 0.05, "explicit")


def test_nothing_hidden_means_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    qformer = make(blip2_config())
    masks: list[Tensor | None] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    full = {"attention_mask": torch.ones(B, Q + T), "encoder_attention_mask": torch.ones(B, S)}
    call = {"query_length": Q, "encoder_hidden_states": images().double()}
    qformer(rows().double(), **call, **full)
    assert masks == [None] * 5
    masks.clear()
    qformer(rows().double(), attention_mask=row_mask(), **call)
    assert [m if m is None else tuple(m.shape) for m in masks] == [
        (B, 1, 1, Q + T),
        None,
        (B, 1, 1, Q + T),
        (B, 1, 1, Q + T),
        None,
    ]


def test_forward_never_asks_for_a_value_on_the_device() -> None:
    """On the meta device tensors have no values: reading one raises."""
    qformer = QFormer(InstructBlipQFormerConfig(**SIZES)).to("meta").train()
    inputs = INSTRUCT_CASES["both, padded images"]()
    output = qformer(**{key: value.to("meta") for key, value in inputs.items()})
    assert output.last_hidden_state.shape == (B, Q + T, C)


def test_compiles_into_one_graph() -> None:
    qformer = make(blip2_config())
    compiled = torch.compile(qformer, backend="eager", fullgraph=True)
    inputs = cast(BLIP2_CASES["both"](), torch.float64)
    assert_near(qformer(**inputs)[0], compiled(**inputs)[0], 1e-12, "compiled")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_the_gpu_agrees_with_the_cpu_and_never_waits(dtype: torch.dtype, tolerance: float) -> None:
    qformer = make(blip2_config(), torch.float32)
    masks = {"attention_mask": row_mask(), "encoder_attention_mask": up_to(IMAGE_LENGTHS, S)}
    # sample 1: no row sees anything, sample 0: no query sees its image
    masks["attention_mask"][1] = 0
    masks["encoder_attention_mask"][0] = 0
    inputs = BLIP2_CASES["both"]() | masks
    expected = run_with_gradients(qformer, inputs)
    qformer.cuda().to(dtype)
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in cast(inputs, dtype).items()}
    qformer(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = qformer(**inputs).last_hidden_state
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(expected[0][0], output.detach().cpu().float(), tolerance, "output")
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in qformer.parameters())
