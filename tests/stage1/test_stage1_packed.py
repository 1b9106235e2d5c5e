"""What the packed form of stage 1 leaves out, and where it falls back: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2fast.qformer.fused_linear import concat_cast
from blip2fast.qformer.plain import is_plain, not_plain
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.passes import _rows_of

NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
LOSSES = ("loss_itc", "loss_itm", "loss_itg")


class LowRank(nn.Module):
    """A linear layer with an update of low rank, as adapters wrap one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def small_model(config: Stage1Config = SMALL) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(config).double()


def gradients(model: Blip2Stage1, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, negatives=NEGATIVES).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_image_tokens_in_training_take_the_plain_path(small_batch: dict[str, Tensor]) -> None:
    """With a trained encoder the tokens need a gradient, so `ln_vision` cannot be folded."""
    model = small_model()
    textbook = TextbookStage1(model)
    own = small_batch["image_embeds"].clone().requires_grad_()
    theirs = small_batch["image_embeds"].clone().requires_grad_()
    ours = model(**{**small_batch, "image_embeds": own}, negatives=NEGATIVES)
    truth = textbook(**{**small_batch, "image_embeds": theirs}, negatives=NEGATIVES)
    ours.loss.backward()
    truth["loss"].backward()
    assert relative_error(own.grad, theirs.grad) < 1e-10
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    folded = gradients(model, small_batch)
    for name, grad in folded.items():
        if not name.endswith("key.bias"):
            assert relative_error(grad, plain[name]) < 1e-10, name


def test_frozen_image_tokens_get_no_gradient_and_keep_no_copy(
    small_batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fold's point: one product for all layers, on tokens outside the graph."""
    calls = []
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1] == SMALL.encoder_hidden_size:
            calls.append((x.requires_grad, tuple(weight.shape)))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    small_model()(**small_batch, negatives=NEGATIVES)
    assert calls == [(False, (2 * 2 * SMALL.hidden_size, SMALL.encoder_hidden_size))]


@pytest.mark.parametrize(
    "where",
    [
        "attention.attention.query",
        "attention.output.dense",
        "crossattention.attention.query",
        "crossattention.attention.value",
        "intermediate.dense",
        "output_query.dense",
    ],
)
def test_wrapped_linear_layers_are_called(small_batch: dict[str, Tensor], where: str) -> None:
    model = small_model()
    truth = gradients(model, small_batch)
    layer = model.qformer.encoder.layer[0]
    parent, _, name = where.rpartition(".")
    wrapped = LowRank(layer.get_submodule(where)).double()
    nn.init.zeros_(wrapped.up.weight)
    setattr(layer.get_submodule(parent), name, wrapped)
    assert f"encoder.layer.0.{where} (LowRank)" in model.extra_repr()
    adapted = gradients(model, small_batch)
    for parameter, grad in truth.items():
        renamed = parameter.replace(f"layer.0.{where}.", f"layer.0.{where}.base.")
        if not parameter.endswith("key.bias"):
            assert relative_error(adapted[renamed], grad) < 1e-10, parameter
    up = f"qformer.encoder.layer.0.{where}.up.weight"
    assert float(adapted[up].abs().max()) > 0


def test_what_counts_as_a_plain_linear_layer() -> None:
    linear = nn.Linear(4, 4)
    assert is_plain(linear)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *args: None)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    root = nn.ModuleDict({"a": linear, "b": hooked, "c": weight_normed, "d": LowRank(linear)})
    assert not_plain(root)[0] == "b (Linear, hooks)"
    assert not_plain(root)[1].startswith("c (")
    assert not_plain(root)[2:] == ["d (LowRank)"]


def test_concat_cast_is_cat_and_cast() -> None:
    parts = [torch.randn(3, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)]
    joined = concat_cast(parts, torch.bfloat16)
    assert torch.equal(joined, torch.cat(parts).bfloat16())
    joined.float().pow(2).sum().backward()
    for part in parts:
        assert part.grad.dtype == torch.float32
        assert torch.equal(part.grad, (2 * part.detach().bfloat16().float()).bfloat16().float())


def test_several_captions_an_image_and_cross_attention_in_every_layer() -> None:
    config = replace(
        SMALL, cross_attention_frequency=1, num_query_tokens=1, max_position_embeddings=512
    )
    model = small_model(config)
    batch = make_batch(config, batch=6, text=40)
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    batch["image_embeds"] = batch["image_embeds"][ids]
    # a negative of another image for every pair
    negatives = (torch.tensor([2, 3, 0, 1, 0, 2]), torch.tensor([5, 4, 1, 0, 2, 1]))
    ours = model(**batch, image_ids=ids, negatives=negatives)
    truth = TextbookStage1(model)(**batch, image_ids=ids, negatives=negatives)
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 1e-12, name


@pytest.mark.parametrize("chosen", [("itc",), ("itc", "itm"), ("itg", "itc")])
def test_a_step_computes_the_losses_it_is_asked_for(
    small_batch: dict[str, Tensor], chosen: tuple[str, ...]
) -> None:
    whole = small_model()
    some = Blip2Stage1(SMALL, losses=chosen).double()
    some.load_state_dict(whole.state_dict())
    truth = whole(**small_batch, negatives=NEGATIVES)
    with FlopCounterMode(display=False) as counter:
        out = some(**small_batch, negatives=NEGATIVES)
    with FlopCounterMode(display=False) as everything:
        whole(**small_batch, negatives=NEGATIVES)
    assert counter.get_total_flops() < everything.get_total_flops()
    assert {n[5:] for n in out if n.startswith("loss_")} == set(chosen)
    assert ("accuracy_itg" in out) == ("itg" in chosen)
    wanted = sum(truth[f"loss_{name}"] for name in chosen)
    torch.testing.assert_close(out.loss, wanted, rtol=1e-12, atol=0)
    out.loss.backward()
    wanted.backward()
    for (name, ours), theirs in zip(some.named_parameters(), whole.parameters(), strict=True):
        if ours.grad is None:
            assert theirs.grad is None or not theirs.grad.any(), name
        elif not name.endswith("key.bias"):
            assert relative_error(ours.grad, theirs.grad) < 1e-10, name


@pytest.mark.parametrize("chosen", [("itm", "itg"), ("itc", "mlm")])
def test_losses_without_itc_or_unknown_ones_are_refused(chosen: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"losses: .*got .*{chosen[1]}"):
        Blip2Stage1(SMALL, losses=chosen)


def test_padding_kept_as_texts_that_nobody_reads_changes_nothing(
    small_batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form for accelerators, where the negatives' lengths are not known on the host."""
    model = small_model()
    truth = gradients(model, small_batch)
    dropped = []

    def kept(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        dropped.append(int(padded.numel() - lengths.sum()))
        B, T = padded.shape
        pieces = torch.stack([lengths, T - lengths], dim=1).flatten().to(torch.int32)
        return padded.flatten(), torch.arange(T).repeat(B), pieces, True

    monkeypatch.setattr("blip2fast.stage1.passes._rows_of", kept)
    padded = gradients(model, small_batch)
    assert dropped[0] > 0
    for name, grad in truth.items():
        if not name.endswith("key.bias"):
            assert relative_error(padded[name], grad) < 1e-10, name
    with torch.device("meta"):
        rows = _rows_of(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([3, 5]))
    assert [tuple(r.shape) for r in rows[:3]] == [(10,), (10,), (4,)]
    assert rows[3]


def test_match_by_image_index_is_match_of_repeated_images(small_batch: dict[str, Tensor]) -> None:
    model = small_model().eval()
    index = torch.tensor([1, 1, 0, 2, 1, 0])
    images = small_batch["image_embeds"][:3]
    text = small_batch["input_ids"], small_batch["attention_mask"]
    once = model.match(images, *text, image_index=index)
    assert torch.allclose(once, model.match(images[index], *text), atol=1e-12)
    projected = model.project_images(images)
    assert torch.equal(model.match(projected, *text, image_index=index), once)
    with pytest.raises(ValueError, match="images from 0 to 2, got 1 to 3"):
        model.match(images, *text, image_index=index + 1)


def test_texts_on_the_cpu_are_packed_there(small_batch: dict[str, Tensor]) -> None:
    texts = small_model().packed_texts(small_batch["input_ids"], small_batch["attention_mask"])
    moved = texts.to(torch.device("meta"))
    assert moved.ids.device.type == moved.positions.device.type == "meta"
    assert moved.lengths.device.type == "cpu"
    assert moved.longest == int(small_batch["attention_mask"].sum(1).max())
    assert texts.to(texts.ids.device) is texts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gpu_agrees_with_the_cpu_and_never_waits(
    small_batch: dict[str, Tensor], dropout: float
) -> None:
    config = replace(SMALL, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = small_model(config).float()
    batch = {**small_batch, "image_embeds": small_batch["image_embeds"].float()}
    truth = model(**batch, negatives=NEGATIVES).loss
    model.cuda()
    batch["image_embeds"] = batch["image_embeds"].cuda()
    negatives = tuple(index.cuda() for index in NEGATIVES)
    model(**batch).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if dropout == 0:
        assert relative_error(model(**batch, negatives=negatives).loss.cpu(), truth) < 1e-4


def hidden_flops(config: Stage1Config, lengths: list[int], T: int, S: int) -> dict[str, int]:
    """What stands in fused ops, where the counter does not look, forward and backward.

    Attention: of every pair that sees each other two products forward and five backward, on a CPU
    for the textbook too. Ours besides: the word head on label rows, the similarities of all pairs.
    """
    B, Q, C = len(lengths), config.num_query_tokens, config.hidden_size
    crossing = len(range(0, config.num_hidden_layers, config.cross_attention_frequency))
    # ITG drops a text's last token; the negatives' texts are the batch's, in another order
    seen = sum(Q * Q + t * t + (t - 1) * Q + (t - 1) * t // 2 + 3 * (Q + t) ** 2 for t in lengths)
    padded = B * (Q * Q + T * T + 4 * (Q + T) ** 2)
    words = 6 * sum(t - 1 for t in lengths) * config.vocab_size * C
    similarities = 6 * B * Q * B * config.embed_dim
    return {
        "ours": 14 * C * (config.num_hidden_layers * seen + crossing * 4 * B * Q * S)
        + words
        + similarities,
        "textbook": 14 * C * (config.num_hidden_layers * padded + crossing * 5 * B * Q * S),
    }


def counted_flops(step: Callable[..., dict[str, Tensor]], batch: dict[str, Any]) -> int:
    """Of products outside fused ops."""
    with FlopCounterMode(display=False) as counter:
        step(**batch)["loss"].backward()
    operations = {str(op) for op in counter.get_flop_counts()["Global"]}
    products = {"aten.mm", "aten.addmm", "aten.bmm", "mkldnn._linear_pointwise"}
    assert operations <= products, "some of it is counted twice"
    return counter.get_total_flops()


@pytest.mark.slow
def test_half_the_arithmetic() -> None:
    """ViT-g, 16 pairs, 12 words of 32 on average: forward and backward against the textbook.

    Both are counted on two of the twelve layers and scaled, with the parts outside the layers
    counted once: `total(12) = total(2) + 5 * (total(4) - total(2))`.
    """
    B, T, S = 16, 32, 257
    lengths = 12 + (torch.arange(B) * 5) % 13 - 6
    mask = (torch.arange(T)[None] < lengths[:, None]).long()
    assert float(lengths.float().mean()) == pytest.approx(12, abs=0.5)
    others = (torch.arange(B) + 1) % B
    counts: dict[str, dict[int, int]] = {"ours": {}, "textbook": {}}
    for layers in (2, 4):
        config = Stage1Config(
            num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        torch.manual_seed(0)
        model = Blip2Stage1(config)
        batch = {
            "image_embeds": torch.randn(B, S, config.encoder_hidden_size),
            "input_ids": torch.randint(4, 30000, (B, T)) * mask,
            "attention_mask": mask,
            "negatives": (others, (others + 1) % B),
        }
        hidden = hidden_flops(config, lengths.tolist(), T, S)
        for name, form in (("ours", model), ("textbook", TextbookStage1(model))):
            counts[name][layers] = hidden[name] + counted_flops(form, batch)
    total = {name: c[2] + 5 * (c[4] - c[2]) for name, c in counts.items()}
    assert total["textbook"] / total["ours"] > 1.8, total
    # the plain-PyTorch trial of the design counted 121.7 GF a sample
    assert total["ours"] / B < 130e9, total
