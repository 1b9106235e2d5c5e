"""Frozen weights in 8 and 4 bits: rounding bounds, the loss they cost, the same when streamed."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from stage2_models import opt_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM, PreTrainedModel

import blip2fast.scenes
from blip2fast.offload import loss_difference, stream_blocks
from blip2fast.offload.quantised import GROUP, decode, encode, parts_of
from blip2fast.scenes import QUESTION_FORMAT, SceneSpec, captions, make_split, questions

TOWER = Path(blip2fast.scenes.__file__).parent / "towers" / "language"


@pytest.mark.parametrize("shape", [(1, 1), (3, GROUP), (5, 2 * GROUP), (4, 100), (2, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_level_of_its_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = encode("int8", weight)
    assert [(p.dtype, tuple(p.shape)) for p in parts] == parts_of("int8", weight.shape)
    found = decode("int8", parts, torch.empty_like(weight)).float()
    half_a_level = weight.float().abs().amax(dim=1, keepdim=True) / 254
    rounding = weight.float().abs() * torch.finfo(dtype).eps
    assert ((found - weight.float()).abs() <= half_a_level * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, GROUP), (5, 2 * GROUP), (4, 100), (2, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_is_within_half_a_level_of_its_group(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = encode("int4", weight)
    assert [(p.dtype, tuple(p.shape)) for p in parts] == parts_of("int4", weight.shape)
    found = decode("int4", parts, torch.empty_like(weight)).float()
    for row in range(shape[0]):
        for start in range(0, shape[1], GROUP):
            group = weight[row, start : start + GROUP].float()
            error = (found[row, start : start + GROUP] - group).abs()
            rounding = group.abs() * torch.finfo(dtype).eps
            assert (error <= group.abs().max() / 14 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_zeros_and_the_largest_number_are_exact(storage: str) -> None:
    weight = torch.zeros(2, GROUP)
    weight[1, 3] = -2.5
    found = decode(storage, encode(storage, weight), torch.empty_like(weight))  # type: ignore[arg-type]
    assert torch.equal(found, weight)


def small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 100, "num_hidden_layers": 3}
    model = OPTForCausalLM(opt_config(**sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_reported_loss_is_that_of_the_streamed_model(storage: str) -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(24).view(3, 8) + 2
    batches = [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]
    report = loss_difference(model, batches, storage)  # type: ignore[arg-type]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        as_is = sum(float(model(**batch).loss) for batch in batches) / 2
        stream = stream_blocks(model, "cpu", storage=storage)  # type: ignore[arg-type]
        stored = sum(float(model(**batch).loss) for batch in batches) / 2
    assert report.as_is == pytest.approx(as_is, rel=1e-6)
    assert report.stored == pytest.approx(stored, rel=1e-6)
    assert report.difference == pytest.approx(stored - as_is, abs=1e-6)
    assert report.difference != 0
    assert str(report) == (
        f"{storage}: loss {report.stored:.4f}, {report.difference:+.4f} against "
        f"{report.as_is:.4f} with the weights as they are"
    )
    blocks = sum(value.nbytes for name, value in before.items() if ".layers." in name)
    assert stream.host_bytes < blocks * {"int8": 0.35, "int4": 0.25}[storage]
    assert torch.equal(stream.read(0, "fc1.bias"), before["model.decoder.layers.0.fc1.bias"])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_gradients_are_those_of_the_decoded_weights(storage: str, recompute: bool) -> None:
    model = small_model()
    embeds = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(3))

    def gradient() -> torch.Tensor:
        given = embeds.clone().requires_grad_()
        model(inputs_embeds=given, use_cache=False).logits.square().mean().backward()
        assert given.grad is not None
        return given.grad

    stream = stream_blocks(model, "cpu", storage=storage, recompute=recompute)  # type: ignore[arg-type]
    host = [block.host.clone() for block in stream._blocks]
    streamed = gradient()
    assert stream.fetches.most_live == 2
    assert all(torch.equal(b.host, h) for b, h in zip(stream._blocks, host, strict=True))
    stream.undo()
    assert torch.equal(gradient(), streamed)


def test_norms_biases_and_embeddings_keep_their_precision() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    stream_blocks(model, "cpu", storage="int4")
    after = model.state_dict()
    changed = {
        name.rsplit(".", 2)[-2] for name in before if not torch.equal(after[name], before[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert all(torch.equal(after[n], v) for n, v in before.items() if n.endswith("bias"))


def test_what_the_shipped_language_model_loses() -> None:
    """A trained model that answers questions about a description: the loss of its answers."""
    model = AutoModelForCausalLM.from_pretrained(TOWER).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(TOWER)
    end, draw = tokenizer.eos_token_id, random.Random(0)
    batches = []
    for scene in make_split(SceneSpec(), "held_out", 8).scenes:
        for question in questions(scene, draw):
            parts = (*captions(scene, 1, draw), QUESTION_FORMAT.format(question.question))
            read, asked, answer = (
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (*parts, question.answer)
            )
            ids = [*read, end, *asked, *answer, end]
            said = len(answer) + 1
            labels = [-100] * (len(ids) - said) + ids[-said:]
            batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    int8 = loss_difference(model, batches, "int8")
    int4 = loss_difference(model, batches, "int4")
    print(int8, int4, sep="\n")
    assert int8.as_is < 0.1
    assert abs(int8.difference) < 0.01
    assert abs(int8.difference) < abs(int4.difference) < 0.5


def test_refusals() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="storage 'as_is': expected int8 or int4"):
        loss_difference(model, [{}], "as_is")
    with pytest.raises(ValueError, match="batches: none given"):
        loss_difference(model, [], "int8")
