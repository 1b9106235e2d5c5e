"""Stage 1 against LAVIS in float64, against the textbook, and against bad input."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from stage1_cases import SMALL, ReferenceCase, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor, nn

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.lavis import to_lavis_name
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.texts import PackedTexts, pack_text

LOSSES = ("loss_itc", "loss_itm", "loss_itg")


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "grad_bound"),
    [(torch.float64, 1e-6, 1e-5), (torch.float32, 1e-5, 1e-4)],
)
def test_reference_losses_outputs_and_gradients(
    reference: ReferenceCase, dtype: torch.dtype, loss_bound: float, grad_bound: float
) -> None:
    model = Blip2Stage1.from_lavis_state_dict(reference.weight, reference.config).to(dtype).eval()
    out = model(**reference.call(dtype))
    for name in LOSSES:
        assert relative_error(out[name], reference.output[name]) < loss_bound, name
    for name, truth in reference.output.items():
        assert relative_error(out[name], truth) < loss_bound, name
    assert torch.equal(out.loss, out.loss_itc + out.loss_itm + out.loss_itg)

    out.loss.backward()
    compared = set()
    for name, parameter in model.named_parameters():
        truth = reference.grad[to_lavis_name(name)].double()
        if name.endswith("key.bias"):
            # softmax does not see a shift of all scores: zero up to rounding on both sides
            assert float(parameter.grad.norm()) < 100 * torch.finfo(dtype).eps, name
        else:
            assert relative_error(parameter.grad, truth) < grad_bound, name
        compared.add(to_lavis_name(name))
    assert compared == set(reference.grad)


def test_lavis_state_dict_round_trip(reference: ReferenceCase) -> None:
    model = Blip2Stage1.from_lavis_state_dict(reference.weight, reference.config)
    saved = model.to_lavis_state_dict()
    assert saved.keys() == reference.weight.keys()
    for name, value in saved.items():
        assert torch.equal(value, reference.weight[name]), name


def test_lavis_extras_are_understood_and_contradictions_refused(reference: ReferenceCase) -> None:
    words = reference.weight["Qformer.bert.embeddings.word_embeddings.weight"]
    extras = {
        "Qformer.cls.predictions.decoder.weight": words,
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
        "visual_encoder.cls_token": torch.zeros(1, 1, 96),
    }
    whole = {**reference.weight, **extras}
    Blip2Stage1.from_lavis_state_dict(whole, reference.config)
    whole["Qformer.cls.predictions.decoder.weight"] = words + 1
    with pytest.raises(ValueError, match="one tied tensor"):
        Blip2Stage1.from_lavis_state_dict(whole, reference.config)


def test_lavis_state_dict_errors_name_tensors_and_shapes(reference: ReferenceCase) -> None:
    weight = dict(reference.weight)
    del weight["temp"]
    with pytest.raises(ValueError, match="temp: missing"):
        Blip2Stage1.from_lavis_state_dict(weight, reference.config)
    with pytest.raises(ValueError, match="extra: unknown"):
        Blip2Stage1.from_lavis_state_dict(
            {**reference.weight, "extra": weight["itm_head.bias"]}, reference.config
        )
    wider = {**reference.config, "encoder_hidden_size": 100}
    with pytest.raises(ValueError, match=r"ln_vision.bias: expected \(100,\), got \(96,\)"):
        Blip2Stage1.from_lavis_state_dict(reference.weight, wider)
    with pytest.raises(ValueError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        Blip2Stage1.from_lavis_state_dict(reference.weight, {"hiden_size": 128})


@pytest.mark.parametrize("with_ids", [False, True])
def test_losses_and_gradients_are_the_textbook(
    small_config: Stage1Config, small_batch: dict[str, Tensor], with_ids: bool
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double()
    textbook = TextbookStage1(model)
    ids = torch.tensor([7, 7, 3, 1, 0, 3]) if with_ids else None
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    ours = model(**small_batch, image_ids=ids, negatives=negatives)
    truth = textbook(**small_batch, image_ids=ids, negatives=negatives)
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 1e-12, name
    ours.loss.backward()
    truth["loss"].backward()
    for name, parameter in model.named_parameters():
        twin = textbook.twin(name)
        if not name.endswith("key.bias"):
            assert relative_error(parameter.grad, twin.grad) < 1e-10, name


def test_negatives_are_sampled_from_the_softmax_without_positives(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    ids = torch.tensor([7, 7, 3, 1, 0, 3])
    draws = 400
    counts = torch.zeros(2, 6, 6)
    with torch.no_grad():
        for _ in range(draws):
            out = model(**small_batch, image_ids=ids)
            counts[0, torch.arange(6), out.negative_image] += 1
            counts[1, torch.arange(6), out.negative_text] += 1
    own = ids[:, None] == ids[None, :]
    assert float(counts[:, own].sum()) == 0
    for count, sim in ((counts[0], out.sim_t2i), (counts[1], out.sim_i2t)):
        p = sim.masked_fill(own, -torch.inf).softmax(1).float()
        # five standard deviations of a binomial, each cell on its own
        assert bool(((count - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt() + 1e-6).all())


def test_generation_pass_and_image_pass_give_the_same_queries(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    out = model(**small_batch)
    features, states = model.encode_image(small_batch["image_embeds"])
    assert torch.allclose(out.query_output, states, atol=1e-12)
    assert torch.allclose(out.image_features, features, atol=1e-12)
    logits = model.match(**small_batch)
    assert torch.allclose(out.itm_logits[:6], logits, atol=1e-12)


def test_packed_text_is_the_same_batch(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    ids, cu_seqlens = pack_text(small_batch["input_ids"], small_batch["attention_mask"])
    assert ids.shape == (int(small_batch["attention_mask"].sum()),)
    padded = model(**small_batch, negatives=negatives)
    packed = model(small_batch["image_embeds"], ids, negatives=negatives, cu_seqlens=cu_seqlens)
    assert torch.equal(padded.loss, packed.loss)
    texts = PackedTexts.of(ids, cu_seqlens.diff())
    back, lengths = texts.padded(small_batch["input_ids"].shape[1], small_config.pad_token_id)
    assert torch.equal(back, small_batch["input_ids"])
    assert torch.equal(lengths, small_batch["attention_mask"].sum(1))


def test_padded_image_tokens_are_not_seen(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    """Every image has another number of tokens; what stands in the padding must not matter."""
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 3, 5, 2, 6])[:, None]
    junk = small_batch["image_embeds"] + 9.0 * torch.randn(6, 7, 1).double() * ~mask[..., None]
    batch = {**small_batch, "image_attention_mask": mask.long()}
    truth = model(**batch, negatives=negatives)
    padded = model(**{**batch, "image_embeds": junk}, negatives=negatives)
    for name in LOSSES:
        assert relative_error(padded[name], truth[name]) < 1e-12, name
    assert relative_error(model(**small_batch, negatives=negatives).loss, truth.loss) > 1e-6

    features, _ = model.encode_image(junk, mask)
    assert torch.allclose(features, truth.image_features, atol=1e-12)
    match = model.match(junk, small_batch["input_ids"], small_batch["attention_mask"], mask)
    assert torch.allclose(match, truth.itm_logits[:6], atol=1e-12)
    written = [
        model.generate(x, 3, 5, image_attention_mask=mask) for x in (junk, junk + ~mask[..., None])
    ]
    assert torch.equal(*written)
    one = small_batch["image_embeds"][1:2, :1]
    assert torch.equal(
        written[0][1, : model.generate(one, 3, 5).shape[1]], model.generate(one, 3, 5)[0]
    )


def test_other_dtypes_of_inputs_are_taken(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    """int32 ids and fp32 tokens into an fp64 model: cached features rarely match the weights."""
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    truth = model(**small_batch, negatives=negatives)
    narrow = {
        "image_embeds": small_batch["image_embeds"].float(),
        "input_ids": small_batch["input_ids"].int(),
        "attention_mask": small_batch["attention_mask"].bool(),
    }
    out = model(**narrow, negatives=tuple(n.int() for n in negatives))
    assert relative_error(out.loss, truth.loss) < 1e-6


def test_accuracies_are_shares_of_right_answers(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    out = Blip2Stage1(small_config).double().eval()(**small_batch)
    i2t = sum(int(out.sim_i2t[i].argmax()) == i for i in range(6)) / 6
    t2i = sum(int(out.sim_t2i[i].argmax()) == i for i in range(6)) / 6
    itm = sum(int(row.argmax()) == (i < 6) for i, row in enumerate(out.itm_logits)) / 18
    right = total = 0
    for b in range(6):
        for t in range(int(small_batch["attention_mask"][b].sum()) - 1):
            right += int(out.itg_logits[b, t].argmax() == small_batch["input_ids"][b, t + 1])
            total += 1
    values = [out.accuracy_i2t, out.accuracy_t2i, out.accuracy_itm, out.accuracy_itg]
    assert [float(v) for v in values] == pytest.approx([i2t, t2i, itm, right / total])


def test_query_feed_forward_starts_as_a_copy_of_the_text_one(small_config: Stage1Config) -> None:
    for layer in Blip2Stage1(small_config).qformer.encoder.layer:
        assert torch.equal(layer.intermediate.dense.weight, layer.intermediate_query.dense.weight)
        assert torch.equal(layer.output.dense.weight, layer.output_query.dense.weight)
        assert layer.output.dense.weight is not layer.output_query.dense.weight


def test_greedy_generation_is_the_argmax_of_the_training_pass(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).double().eval()
    images = small_batch["image_embeds"]
    written = model.generate(images, eos_token_id=3, max_new_tokens=6)
    assert written.shape[0] == 6
    ids = torch.cat([torch.full((6, 1), 2), written], dim=1)
    out = model(images, ids, torch.ones_like(ids))
    for b in range(6):
        for t in range(written.shape[1]):
            assert int(out.itg_logits[b, t].argmax()) == int(written[b, t])
            if int(written[b, t]) == 3:
                assert bool((written[b, t + 1 :] == small_config.pad_token_id).all())
                break


def test_images_go_through_the_frozen_encoder(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.linear = nn.Linear(12, small_config.encoder_hidden_size)

        def forward(self, images: Tensor) -> Tensor:
            return self.dropout(self.linear(images.flatten(2).transpose(1, 2).reshape(6, -1, 12)))

    torch.manual_seed(0)
    encoder = Patches()
    model = Blip2Stage1(small_config, image_encoder=encoder).double().train()
    assert not encoder.training
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    text = {k: v for k, v in small_batch.items() if k != "image_embeds"}
    live = model(images=images, **text, negatives=negatives)
    cached = model(image_embeds=encoder(images), **text, negatives=negatives)
    assert torch.equal(live.loss, cached.loss)
    live.loss.backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert not any(name.startswith("image_encoder") for name in model.to_lavis_state_dict())


def test_gradient_checkpointing_changes_nothing_but_what_is_kept(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    runs = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Blip2Stage1(replace(small_config, hidden_dropout_prob=0.2)).double().train()
        if recompute:
            model.gradient_checkpointing_enable()
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**small_batch, negatives=negatives).loss
        loss.backward()
        runs.append((loss, {n: p.grad for n, p in model.named_parameters()}, kept))
    (loss, grads, kept), (loss_again, grads_again, kept_again) = runs
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert kept_again < kept / 2


def test_bf16_autocast_keeps_losses_in_fp32(
    small_config: Stage1Config, small_batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(small_config).eval()
    batch = {**small_batch, "image_embeds": small_batch["image_embeds"].float()}
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    truth = model(**batch, negatives=negatives)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, negatives=negatives)
    for name in LOSSES:
        assert out[name].dtype == torch.float32, name
        assert relative_error(out[name], truth[name]) < 0.05, name


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_temperature_may_be_saved_as_a_scalar(
    small_config: Stage1Config, shape: tuple[int, ...]
) -> None:
    """Held as [1], since FSDP shards no scalars; loaded in either form, also inside a module."""
    model = Blip2Stage1(small_config)
    assert model.temp.shape == (1,)
    outer = nn.Sequential(model)
    state = outer.state_dict()
    assert model.to_lavis_state_dict()["temp"].shape == ()
    state["0.temp"] = torch.full(shape, 0.05)
    outer.load_state_dict(state)
    assert model.temp.shape == (1,)
    assert model.temperature().item() == pytest.approx(0.05)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.temp"):
        outer.load_state_dict(state | {"0.temp": torch.ones(2)})


def test_an_output_is_pickled_without_the_model() -> None:
    """The functions of its similarities are no part of it."""
    model = Blip2Stage1(replace(SMALL)).double()
    with torch.no_grad():
        out = model(**make_batch(SMALL, batch=6))
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.loss, out.loss)
    assert again.counts == out.counts
    with pytest.raises(AttributeError, match="nor in a pickled output"):
        _ = again.sim_i2t
