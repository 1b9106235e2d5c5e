"""Modules that are not plain are called in stage 1, wherever they are and whatever changed them.

The truth is the Q-Former called as a module, on padded texts; that form is held to the textbook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor, nn
from torch.nn.modules import module as modules
from wrapped_layers import SAME_OUTPUT, WRAPPERS, Doubled, Wrapper, wrap

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.model import Blip2Stage1

pytestmark = pytest.mark.usefixtures("own_linear")

NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
LOSSES = ("loss_itc", "loss_itm", "loss_itg")
VALUES = (*LOSSES, "itm_logits", "image_features", "text_features", "query_output")


def a_model(**changes: Any) -> Blip2Stage1:
    torch.manual_seed(0)
    model = Blip2Stage1(Stage1Config.from_dict(SMALL.to_dict() | changes))
    for name, parameter in model.named_parameters():  # biases begin at zero, which hides them
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def a_batch() -> dict[str, Tensor]:
    batch = make_batch(SMALL, batch=6)
    batch["image_embeds"] = batch["image_embeds"].float()
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 2, 6])[:, None]
    return batch | {"image_attention_mask": mask}


def padded(model: Blip2Stage1) -> Blip2Stage1:
    """The same model, that calls its Q-Former."""
    model._why_padded = lambda: "it was told to"  # type: ignore[method-assign]
    return model


def paths(model: Blip2Stage1) -> dict[str, Tensor]:
    """What every path of the model computes, and the gradients of a step."""
    batch = a_batch()
    out = model(**batch, negatives=NEGATIVES)
    found = {name: out[name] for name in VALUES}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
    for name, grad in zip(parameters, grads, strict=True):
        # a key's bias has no gradient in exact arithmetic
        if grad is not None and "key.bias" not in name and "key.parametrizations.bias" not in name:
            found[f"gradient of {name}"] = grad
    images = batch["image_embeds"], batch["image_attention_mask"]
    texts = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        found |= {
            f"{name} without gradients": value
            for name, value in model(**batch, negatives=NEGATIVES).items()
            if name in VALUES
        }
        found["encode_image"] = torch.cat([x.flatten() for x in model.encode_image(*images)])
        found["encode_text"] = model.encode_text(*texts)
        found["match"] = model.match(images[0], *texts, images[1])
        index = torch.tensor([0, 0, 1, 5, 2, 2])
        found["match by index"] = model.match(images[0], *texts, images[1], image_index=index)
        found["generate"] = model.generate(images[0], 3, 4, images[1]).float()
    return found


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in found.items():
        if name == "generate":
            assert torch.equal(value, truth[name])
        elif float(truth[name].detach().norm()) > 1e-6:
            assert relative_error(value, truth[name]) < tolerance, name


def test_the_called_form_is_the_textbook() -> None:
    model = padded(a_model().double())
    batch = make_batch(SMALL, batch=6)
    textbook = TextbookStage1(model)
    ours, truth = (m(**batch, negatives=NEGATIVES) for m in (model, textbook))
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 1e-11, name
    ours.loss.backward()
    truth["loss"].backward()
    for name, parameter in model.named_parameters():
        twin = textbook.twin(name)
        if not name.endswith("key.bias"):
            assert relative_error(parameter.grad, twin.grad.view_as(parameter)) < 1e-9, name


def test_both_forms_agree_on_every_path() -> None:
    assert_same(paths(padded(a_model())), paths(a_model()), 1e-4)
    ours, theirs = padded(a_model()), a_model()
    out, truth = (m(**a_batch(), negatives=NEGATIVES) for m in (ours, theirs))
    assert out.counts == truth.counts
    assert torch.equal(out.accuracy_itg, truth.accuracy_itg)
    for name in ("sim_i2t", "sim_t2i", "itg_logits"):
        assert relative_error(out[name], truth[name]) < 1e-5


@pytest.mark.parametrize("where", ["crossattention.attention.key", "output.dense", "qkv"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_linear_layers(kind: str, where: str) -> None:
    def changed() -> Blip2Stage1:
        model = a_model()
        layer = "attention.attention.value" if where == "qkv" else where
        wrap(model.qformer, f"encoder.layer.0.{layer}", kind)
        return model

    model = changed()
    assert "encoder.layer.0." in model.extra_repr()
    found = paths(model)
    assert_same(found, paths(padded(changed())), 1e-3)
    same = kind in SAME_OUTPUT
    # softmax does not see a shift of all keys
    shift = ("parametrised bias", "broadcast bias", "wrapper", "keyword hook", "forward replaced")
    if not (same or (where.endswith("key") and kind in shift)):
        plain = a_model()(**a_batch(), negatives=NEGATIVES)
        assert relative_error(found["loss_itg"], plain.loss_itg) > 1e-6


def bent(output: Any) -> Any:
    """Another output that no normalisation straightens."""
    if isinstance(output, tuple):
        return (bent(output[0]), *output[1:])
    if isinstance(output, dict):
        output["last_hidden_state"] = bent(output["last_hidden_state"])
        return output
    return output * torch.linspace(0.5, 1.5, output.shape[-1], dtype=output.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_of_another_dtype(dtype: torch.dtype) -> None:
    """Under autocast, which casts it, too, if it is one of its types."""
    model, twin = a_model(), padded(a_model())
    for each in (model, twin):
        each.qformer.encoder.layer[0].attention.attention.key.to(dtype)
        if dtype == torch.float64:
            each.double()
    batch = a_batch()
    batch["image_embeds"] = batch["image_embeds"].to(twin.query_tokens.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, truth = (m(**batch, negatives=NEGATIVES) for m in (model, twin))
    ours.loss.backward()
    truth.loss.backward()
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 0.02, name
    weight = "qformer.encoder.layer.0.attention.attention.key.weight"
    ours_grad, truth_grad = (m.get_parameter(weight).grad for m in (model, twin))
    assert ours_grad.dtype == truth_grad.dtype == dtype
    assert relative_error(ours_grad, truth_grad) < 0.1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_8_bits_are_not_read_as_numbers(dtype: torch.dtype) -> None:
    """They stand for other numbers: the layer is called, and says that it has no such product."""
    model = a_model().eval()
    layer = model.qformer.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    assert f"layer.0.output.dense (Linear, weight {dtype})" in model.extra_repr()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.match(a_batch()["image_embeds"], a_batch()["input_ids"])


def test_a_weight_of_several_layers() -> None:
    model, twin = a_model(), padded(a_model())
    for each in (model, twin):
        layers = each.qformer.encoder.layer
        layers[1].attention.attention.value.weight = layers[0].attention.attention.key.weight
        layers[2].output.dense = layers[0].output.dense
    assert_same(paths(model), paths(twin), 1e-3)


@pytest.mark.parametrize("without", ["query", "key", "value"])
def test_biases_of_some_layers_only(without: str) -> None:
    """The biases of all three were left out of their common product."""
    model, twin = a_model(), padded(a_model())
    for each in (model, twin):
        attention = each.qformer.encoder.layer[0].attention.attention
        attention.get_submodule(without).bias = None
    assert_same(paths(model), paths(twin), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_norm_of_images_of_another_dtype(dtype: torch.dtype) -> None:
    """Folding it into the weights was an error."""
    model, twin = a_model(), padded(a_model())
    for each in (model, twin):
        each.ln_vision.to(dtype)
    out, truth = (each(**a_batch(), negatives=NEGATIVES) for each in (model, twin))
    for each in (out, truth):
        each.loss.backward()
    for name in LOSSES:
        assert relative_error(out[name], truth[name]) < 0.01, name
    for name in ("ln_vision.weight", "ln_vision.bias"):
        ours, theirs = (each.get_parameter(name).grad for each in (model, twin))
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < 0.02, name


def test_layers_without_all_heads() -> None:
    """As structured pruning leaves them; the rows were split into heads of half the width."""

    def pruned() -> Blip2Stage1:
        model = a_model()
        for block in (layers := model.qformer.encoder.layer[0]).attention, layers.crossattention:
            attention, output = block.attention, block.output.dense
            for layer in (attention.query, attention.key, attention.value):
                layer.weight = nn.Parameter(layer.weight.detach()[:16])
                layer.bias = nn.Parameter(layer.bias.detach()[:16])
            output.weight = nn.Parameter(output.weight.detach()[:, :16])
        return model

    model = pruned()
    assert "attention.attention (QFormerMultiHeadAttention) is not plain" in model.extra_repr()
    assert_same(paths(model), paths(padded(pruned())), 1e-3)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "lm_head.bias"])
def test_numbers_of_the_generation_head_that_stand_for_others(name: str) -> None:
    """As a quantised table does; its loss read them as they are."""
    path, _, last = name.rpartition(".")

    def changed() -> Blip2Stage1:
        model = a_model()
        numbers = model.get_parameter(name).detach().as_subclass(Doubled)
        setattr(model.get_submodule(path), last, nn.Parameter(numbers, requires_grad=False))
        return model

    model, truth = changed(), changed()
    assert "generation head called" in model.extra_repr()
    truth.lm_head.register_forward_hook(lambda *_: None)
    found = paths(model)
    assert_same(found, paths(truth), 1e-4)
    plain = a_model()(**a_batch(), negatives=NEGATIVES)
    assert relative_error(found["loss_itg"], plain.loss_itg) > 1e-3


class Bent(nn.Module):
    """Stands for an adapter of a LayerNorm, which has no weight of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **given: Any) -> Any:
        return bent(self.base(*args, **given))


def _hook(path: str) -> Callable[[Blip2Stage1], None]:
    def change(model: Blip2Stage1) -> None:
        model.get_submodule(path).register_forward_hook(lambda _, __, output: bent(output))

    return change


def _forward(path: str) -> Callable[[Blip2Stage1], None]:
    def change(model: Blip2Stage1) -> None:
        module = model.get_submodule(path)
        old = module.forward

        @functools.wraps(old)
        def adapted(*args: Any, **kwargs: Any) -> Any:
            return bent(old(*args, **kwargs))

        module.forward = adapted  # type: ignore[method-assign]

    return change


def _replace(path: str) -> Callable[[Blip2Stage1], None]:
    def change(model: Blip2Stage1) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Bent(model.get_submodule(path)))

    return change


def _root(model: Blip2Stage1) -> None:
    model.qformer.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"query_embeds": bent(given["query_embeds"])}),
        with_kwargs=True,
    )


LAYER = "qformer.encoder.layer.1"
NODES: dict[str, Callable[[Blip2Stage1], None]] = {
    f"{how.__name__} {path}": how(path)
    for how in (_hook, _forward, _replace)
    for path in (
        LAYER,
        f"{LAYER}.attention",
        f"{LAYER}.attention.attention",
        f"{LAYER}.output_query",
        f"{LAYER}.output.LayerNorm",
        f"{LAYER}.output.dropout",
        f"{LAYER}.intermediate_query",
        f"{LAYER}.intermediate_query.intermediate_act_fn",
        "qformer.encoder",
        "qformer.layernorm",
        "qformer.dropout",
        "ln_vision",
        "embeddings",
        "vision_projection",
        "itm_head",
        "lm_head.transform",
    )
    # others reach into these: the table of words, the hooks of transformers
    if how is not _replace or path not in ("embeddings", f"{LAYER}.attention.attention")
} | {"root": _root, "hook of lm_head": _hook("lm_head")}


@pytest.mark.parametrize("change", NODES)
def test_modules_that_are_not_linear(change: str) -> None:
    """Hooks of layers and norms never ran, and a norm's adapter was an AttributeError."""
    model, twin = a_model(), padded(a_model())
    for each in (model, twin):
        NODES[change](each)
    found = paths(model)
    assert_same(found, paths(twin), 1e-3)
    plain = a_model()(**a_batch(), negatives=NEGATIVES)
    assert any(relative_error(found[name], plain[name]) > 1e-6 for name in LOSSES)
    inside = "qformer." in change or change == "root"
    if inside and not change.endswith("intermediate_act_fn"):
        assert "the Q-Former called on padded texts (qformer" in model.extra_repr()


def test_a_hook_in_every_module_fires() -> None:
    model = a_model()
    fired: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    model(**a_batch(), negatives=NEGATIVES)
    # the tied decoder has no module, and lists are not called
    expected = {n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert fired == expected


def test_global_hooks_see_every_call() -> None:
    model, seen = a_model(), []
    handle = modules.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        out = model(**a_batch(), negatives=NEGATIVES)
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, nn.Linear)} <= set(seen)
    assert relative_error(out.loss, a_model()(**a_batch(), negatives=NEGATIVES).loss) < 1e-5


def test_dropout_of_its_own() -> None:
    """A part that was set to evaluation, and a probability that is not the configuration's."""
    model = a_model(hidden_dropout_prob=0.1)
    assert "linear layers fused" in model.extra_repr()
    model.qformer.encoder.layer[0].eval()
    assert "qformer.encoder.layer.0 (QFormerLayer)" in model.extra_repr()
    model.train()
    model.qformer.encoder.layer[2].output.dropout.p = 0.3
    assert "qformer.encoder.layer.2.output.dropout (Dropout)" in model.extra_repr()


def test_what_leaves_modules_plain() -> None:
    """transformers' recording hooks, gradient checkpointing and FlopCounterMode's tracker."""
    model = a_model()
    image = torch.randn(1, 3, SMALL.encoder_hidden_size)
    queries = model.query_tokens.detach()
    model.qformer(queries, encoder_hidden_states=image, output_hidden_states=True)
    model.gradient_checkpointing_enable()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert model._why_padded() == ""
    assert "linear layers fused" in model.extra_repr()


def test_dropout_of_a_step_of_several_batches_is_drawn_twice_alike() -> None:
    """The features that all pairs are compared with are those that the step differentiates."""
    model = a_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model.qformer.encoder.layer[1].register_forward_hook(lambda *_: None)
    assert "padded texts" in model.extra_repr()
    batch = a_batch()
    (contrast,) = step_contrast(model.features, [batch], model.config)
    image, text, _ = model.features(contrast.philox, **batch)
    out = model(**batch, contrast=contrast, negatives=NEGATIVES)
    assert torch.equal(out.image_features, image)
    assert torch.equal(out.text_features, text)
    again, _, _ = model.features(contrast.philox + 1, **batch)
    assert not torch.equal(again, image)


@pytest.mark.parametrize("tuned", ["cpu_offload", "disk"])
def test_a_device_map_inside(tuned: str, tmp_path: Any) -> None:
    """Weights on the meta device but while a module runs."""
    accelerate = pytest.importorskip("accelerate")
    model = a_model().eval()
    images, texts = a_batch()["image_embeds"], a_batch()["input_ids"]
    with torch.no_grad():
        expected = model.match(images, texts)
        if tuned == "cpu_offload":
            accelerate.cpu_offload(model.qformer, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model.qformer, str(tmp_path), torch.device("cpu"))
        assert model.qformer.encoder.layer[0].output.dense.weight.is_meta
        found = model.match(images, texts)
    assert relative_error(found, expected) < 1e-5
    assert "linear layers fused" not in model.extra_repr()


def test_a_head_without_word_embeddings_to_share_says_so() -> None:
    model = a_model()
    model.embeddings.word_embeddings = Wrapper(model.embeddings.word_embeddings)
    with pytest.raises(RuntimeError, match=r"word_embeddings is a Wrapper without a weight, but"):
        model(**a_batch(), negatives=NEGATIVES)


def test_a_device_map_of_the_whole_model_says_what_to_leave_out() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = a_model().eval()
    with torch.no_grad():
        itc_itm = a_model(), Blip2Stage1(model.config, losses=("itc", "itm")).eval()
        expected = itc_itm[0].eval()(**a_batch(), negatives=NEGATIVES)
        itc_itm[1].load_state_dict(model.state_dict())
        for each in (model, itc_itm[1]):
            accelerate.cpu_offload(each, execution_device=torch.device("cpu"))
        with pytest.raises(
            RuntimeError, match=r"word_embeddings\.weight is on the meta device but"
        ):
            model(**a_batch(), negatives=NEGATIVES)
        found = itc_itm[1](**a_batch(), negatives=NEGATIVES)
    assert relative_error(found.loss_itm, expected.loss_itm) < 1e-5
