"""patch and unpatch: the same function, the same parameters, and the way back."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qformer_holders import (
    HOLDERS,
    assert_near,
    assert_same_run,
    build,
    run_with_gradients,
    spread_parameters,
    tensors_in,
)
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from blip2fast.qformer.layers import QFormerLayer
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.patching import patch, unpatch

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
RETRIEVAL = "Blip2ForImageTextRetrieval, match"
INSTRUCT = "InstructBlipForConditionalGeneration"


def qformers(model: nn.Module) -> list[nn.Module]:
    """Every Q-Former in a model, whoever's."""
    return [m for m in model.modules() if type(m).__name__.endswith(("QFormer", "QFormerModel"))]


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["fp64", "fp32"])
def test_outputs_and_gradients_unchanged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, inputs = build(name, dtype)
    expected = run_with_gradients(model, inputs)
    assert patch(model) is model
    assert qformers(model)
    assert all(isinstance(qformer, QFormer) for qformer in qformers(model))
    assert_same_run(expected, run_with_gradients(model, inputs), tolerance)
    unpatch(model)
    assert_same_run(expected, run_with_gradients(model, inputs), 0.0)


@pytest.mark.parametrize("name", [RETRIEVAL, INSTRUCT, "GraniteSpeechForConditionalGeneration"])
def test_dropout_draws_the_same_numbers_in_training(name: str) -> None:
    model, inputs = build(name, torch.float64)
    model.train()
    torch.manual_seed(5)
    expected = run_with_gradients(model, inputs)
    patch(model)
    torch.manual_seed(5)
    assert_same_run(expected, run_with_gradients(model, inputs), 1e-10)


@pytest.mark.parametrize("name", HOLDERS)
def test_parameters_are_the_same_objects_under_the_same_names(name: str) -> None:
    model, _ = build(name)
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    modules = dict(model.named_modules())
    patch(model)
    assert list(model.state_dict()) == keys
    for (old_name, old), (new_name, new) in zip(parameters, model.named_parameters(), strict=True):
        assert old_name == new_name
        assert old is new
    unpatch(model)
    assert list(model.state_dict()) == keys
    restored = dict(model.named_modules())
    assert restored.keys() == modules.keys()
    assert all(restored[key] is modules[key] for key in modules)


def test_optimizer_built_before_trains_the_patched_model() -> None:
    plain, inputs = build(RETRIEVAL)
    patched = copy.deepcopy(plain)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, patched)]
    patch(patched)
    for model, optimizer in zip((plain, patched), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs).logits_per_image.square().sum().backward()
            optimizer.step()
    before, _ = build(RETRIEVAL)
    unpatch(patched)
    for (name, want), got, old in zip(
        plain.named_parameters(), patched.parameters(), before.parameters(), strict=True
    ):
        assert_near(want.detach(), got.detach(), 1e-4, name)
        if name.startswith("qformer") and name.endswith("dense.weight") and "query" in name:
            assert not torch.equal(got, old), name


@pytest.mark.parametrize("name", ["Blip2Model", "Blip2TextModelWithProjection", INSTRUCT])
def test_recorded_outputs_through_the_outer_model(name: str) -> None:
    model, inputs = build(name, torch.float64)
    model.set_attn_implementation("eager")
    inputs |= {"output_attentions": True, "output_hidden_states": True}
    plain = tensors_in(model(**inputs))
    unrecorded = len(tensors_in(model(**inputs | {"output_attentions": False})))
    assert len(plain) > unrecorded
    # recording hooks sit on the modules by now: they must neither be lost nor doubled
    for change in (patch, unpatch, patch):
        change(model)
        got = tensors_in(model(**inputs))
        assert len(got) == len(plain)
        for index, (a, b) in enumerate(zip(plain, got, strict=True)):
            assert_near(a, b, 1e-10, f"output {index} after {change.__name__}")


def test_recording_may_start_while_patched() -> None:
    model, inputs = build("Blip2Model", torch.float64)
    model.set_attn_implementation("eager")
    inputs |= {"output_attentions": True}
    patch(model)
    first = tensors_in(model(**inputs).qformer_outputs.to_tuple())
    unpatch(model)
    second = tensors_in(model(**inputs).qformer_outputs.to_tuple())
    assert len(first) == len(second) > 2
    for a, b in zip(first, second, strict=True):
        assert_near(a, b, 1e-10, "recorded")


def test_generation_gives_the_same_tokens() -> None:
    model, inputs = build("Blip2ForConditionalGeneration")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    got = patch(model).generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(expected, got)


def test_saved_while_patched_loads_in_transformers(tmp_path: Path) -> None:
    model, inputs = build("Blip2ForConditionalGeneration")
    expected = model(**inputs).logits
    patch(model).save_pretrained(tmp_path)
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(loaded.qformer) is Blip2QFormerModel
    assert torch.equal(loaded(**inputs).logits, expected)


def test_mode_precision_and_checkpointing_follow_both_ways() -> None:
    model, inputs = build(INSTRUCT)
    original = model.qformer
    model.gradient_checkpointing_enable()
    model.train()
    original.encoder.layer[1].eval()
    patch(model)
    layers = model.qformer.encoder.layer
    assert [layer.training for layer in layers] == [True, False, True]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert model.qformer.is_gradient_checkpointing
    run_with_gradients(model, inputs)

    model.gradient_checkpointing_disable()
    model.eval().double()
    unpatch(model)
    assert model.qformer is original
    assert original.dtype == torch.float64
    assert not any(module.training for module in original.modules())
    assert not original.is_gradient_checkpointing
    inputs["pixel_values"] = inputs["pixel_values"].double()
    assert model(**inputs).logits.dtype == torch.float64


def test_buffers_of_the_original_follow_the_device() -> None:
    model, _ = build(INSTRUCT)
    patch(model).to("meta")
    unpatch(model)
    assert type(model.qformer) is InstructBlipQFormerModel
    assert model.qformer.embeddings.position_ids.device.type == "meta"


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, inputs = build(RETRIEVAL, torch.float64)
    model.train()
    calls: list[int] = []
    patch(model).qformer.encoder.layer[2].output_query.register_forward_hook(
        lambda *_: calls.append(1)
    )
    torch.manual_seed(0)
    expected = run_with_gradients(model, inputs)
    assert len(calls) == 1
    model.qformer.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    assert_same_run(expected, run_with_gradients(model, inputs), 1e-12)
    assert len(calls) == 3


def test_hooks_move_over_and_their_handles_still_remove_them() -> None:
    model, inputs = build("Blip2VisionModelWithProjection")
    seen: list[str] = []

    def note(name: str):  # type: ignore[no-untyped-def]
        return lambda *_: seen.append(name)

    handles = [
        model.qformer.register_forward_hook(note("root")),
        model.qformer.encoder.layer[0].register_forward_hook(note("layer")),
        model.qformer.encoder.layer[0].attention.attention.query.register_forward_pre_hook(
            note("leaf")
        ),
    ]
    patch(model)(**inputs)
    assert sorted(seen) == ["layer", "leaf", "root"]
    for handle in handles:
        handle.remove()
    late = model.qformer.register_forward_hook(note("late"))
    seen.clear()
    unpatch(model)(**inputs)
    assert seen == ["late"]
    late.remove()
    model(**inputs)
    assert seen == ["late"]


def bent(states: Any) -> Any:
    """Other states, or the container of other states."""
    if isinstance(states, torch.Tensor):
        return states * torch.linspace(0.5, 1.5, states.shape[-1]).to(states.dtype)
    if isinstance(states, tuple):
        return (bent(states[0]), *states[1:])
    states["last_hidden_state"] = bent(states["last_hidden_state"])
    return states


def _bend_input(_: nn.Module, args: Any, given: Any) -> tuple[Any, Any]:
    if args:
        return (bent(args[0]), *args[1:]), given
    name = "hidden_states" if "hidden_states" in given else "query_embeds"
    return args, given | {name: bent(given[name])}


def _doubled(_: nn.Module, grads: Any, *__: Any) -> Any:
    # masks are inputs too
    return tuple(x * 2 if x is not None and x.is_floating_point() else x for x in grads)


# what each sort of hook changes
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda module: module.register_forward_hook(lambda _, __, output: bent(output)),
    "input": lambda module: module.register_forward_pre_hook(_bend_input, with_kwargs=True),
    "gradient of output": lambda module: module.register_full_backward_pre_hook(_doubled),
    "gradient of input": lambda module: module.register_full_backward_hook(_doubled),
}
HOOKED = [
    *("embeddings", "encoder", "encoder.layer.0", "encoder.layer.0.attention"),
    *("encoder.layer.0.attention.attention", "encoder.layer.0.crossattention"),
    *("encoder.layer.0.crossattention.attention", "encoder.layer.0.attention.output"),
    *("encoder.layer.0.intermediate_query", "encoder.layer.0.output_query"),
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("name", ["Blip2VisionModelWithProjection", INSTRUCT])
def test_hooks_change_what_they_change_without_the_patch(name: str, where: str, hook: str) -> None:
    """Nodes were called with other arguments: hooks of inputs and gradients had other effects."""
    model, inputs = build(name, torch.float64)
    if where == "embeddings" and name != INSTRUCT:
        where = ""
    HOOKS[hook](model.get_submodule("qformer").get_submodule(where))
    expected = run_with_gradients(model, inputs)
    assert_same_run(expected, run_with_gradients(patch(model), inputs), 1e-10)


class Scaled(nn.Module):
    """Stands for an adapter that takes a projection's place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1.5


def test_a_leaf_replaced_before_or_while_patched_is_kept() -> None:
    model, inputs = build("Blip2VisionModelWithProjection", torch.float64)
    first = model.qformer.encoder.layer[0].attention.attention
    first.value = Scaled(first.value)
    expected = model(**inputs).image_embeds
    patch(model)
    assert_near(expected, model(**inputs).image_embeds, 1e-10, "before")
    last = model.qformer.encoder.layer[2].output_query
    last.dense = Scaled(last.dense)
    expected = model(**inputs).image_embeds
    unpatch(model)
    assert isinstance(model.qformer.encoder.layer[2].output_query.dense, Scaled)
    assert_near(expected, model(**inputs).image_embeds, 1e-10, "while")


def test_assigned_weights_reach_the_original() -> None:
    model, inputs = build("Blip2VisionModelWithProjection")
    other, _ = build("Blip2VisionModelWithProjection")
    spread_parameters(other, seed=9)
    patch(model).load_state_dict(other.state_dict(), assign=True)
    unpatch(model)
    assert torch.equal(model(**inputs).image_embeds, other(**inputs).image_embeds)


def test_one_qformer_in_two_places_stays_one() -> None:
    config, width = tiny_config(), 24
    shared = Blip2QFormerModel(config)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(width, 2)])})
    patch(model)
    assert isinstance(model["a"], QFormer)
    assert model["a"] is model["b"][0]
    unpatch(model)
    assert model["a"] is model["b"][0] is shared


def test_a_bare_qformer_is_returned_in_its_new_form() -> None:
    original = Blip2QFormerModel(tiny_config()).eval()
    inputs = {"query_embeds": torch.randn(2, 4, 16), "encoder_hidden_states": torch.randn(2, 5, 24)}
    qformer = patch(original)
    assert isinstance(qformer, QFormer)
    assert_near(original(**inputs)[0], qformer(**inputs)[0], 1e-5, "bare")
    assert unpatch(qformer) is original


def test_copies_of_a_patched_model_are_independent() -> None:
    model, inputs = build("Blip2VisionModelWithProjection")
    twin = copy.deepcopy(patch(model))
    spread_parameters(twin, seed=4)
    changed = twin(**inputs).image_embeds
    unpatch(twin)
    assert type(twin.qformer) is Blip2QFormerModel
    assert_near(changed, twin(**inputs).image_embeds, 1e-5, "copy")
    assert isinstance(model.qformer, QFormer)
    assert not torch.allclose(changed, model(**inputs).image_embeds, atol=1e-3)


def tiny_config() -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        encoder_hidden_size=24,
    )


def test_patch_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"Linear holds no transformers Q-Former \(Blip2QFormer"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="QFormer holds no transformers Q-Former"):
        patch(QFormer(tiny_config()))
    model = nn.ModuleDict({"q": Blip2QFormerModel(tiny_config())})
    with pytest.raises(ValueError, match="ModuleDict is not patched: there is nothing to undo"):
        unpatch(model)
    patch(model)
    with pytest.raises(ValueError, match=r"ModuleDict is patched already: call unpatch"):
        patch(model)


def test_patch_refuses_subclasses_replaced_forwards_and_other_attention() -> None:
    class Mine(Blip2QFormerModel):
        pass

    with pytest.raises(ValueError, match="Mine is a subclass"):
        patch(nn.ModuleList([Mine(tiny_config())]))

    changed = Blip2QFormerModel(tiny_config())
    layer = changed.encoder.layer[1]
    layer.forward = lambda *args, **kwargs: None
    model = nn.ModuleList([Blip2QFormerModel(tiny_config()), changed])
    with pytest.raises(ValueError, match=r"forward of Blip2QFormerModel.encoder.layer.1 was repl"):
        patch(model)
    assert type(model[0]) is Blip2QFormerModel
    del layer.forward
    changed.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"forward of Blip2QFormerModel was replaced on the inst"):
        patch(model)

    flexible = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    flexible.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*set_attn_impl"):
        patch(nn.ModuleList([flexible]))


PARTS = ("query_tokens", "vision_model", "language_projection", "language_model")
QFORMER_PARTS = {
    "one device": {"qformer": "cpu"},
    "on the disk": {"qformer": "disk"},
    "a layer on the disk": {
        "qformer.layernorm": "cpu",
        "qformer.dropout": "cpu",
        "qformer.encoder.layer.0": "cpu",
        "qformer.encoder.layer.1": "disk",
        "qformer.encoder.layer.2": "cpu",
    },
    "embeddings on the disk": {"qformer.embeddings": "disk", "qformer.encoder": "cpu"},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("language", ["cpu", "disk"])
@pytest.mark.parametrize("where", QFORMER_PARTS)
def test_device_maps(where: str, language: str, when: str, tmp_path: Path) -> None:
    """A map of several entries put hooks on the Q-Former's blocks, which patch refused."""
    accelerate = pytest.importorskip("accelerate")
    name = INSTRUCT if "embeddings" in where else "Blip2ForConditionalGeneration"
    model, inputs = build(name)
    places = {part: language if part == "language_model" else "cpu" for part in PARTS}
    with torch.no_grad():
        expected = tensors_in(model(**inputs))
        if when == "after":
            patch(model)
        accelerate.dispatch_model(
            model,
            places | QFORMER_PARTS[where],
            main_device="cpu",
            offload_dir=str(tmp_path),
            force_hooks=True,
        )
        if when == "before":
            assert isinstance(qformers(patch(model))[0], QFormer)
        for change in (None, unpatch, patch):
            if change is not None:
                change(model)
            for index, (a, b) in enumerate(zip(expected, tensors_in(model(**inputs)), strict=True)):
                assert_near(a, b, 1e-5, f"output {index} after {change}")
        accelerate.hooks.remove_hook_from_submodules(unpatch(model))
        if where == "one device" and language == "cpu":
            # the methods that accelerate leaves behind are those of the classes
            assert "forward" in vars(model.qformer)
            patch(model)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("where", ["encoder.layer.0", "encoder.layer.0.attention.attention", ""])
def test_patch_refuses_a_forward_replaced_on_a_class(
    where: str, wraps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code was lost without a word."""
    model, _ = build("Blip2VisionModelWithProjection")
    cls = type(model.qformer.get_submodule(where))
    old = cls.forward

    def doubled(*args: Any, **given: Any) -> Any:
        return old(*args, **given) * 2

    monkeypatch.setattr(cls, "forward", functools.wraps(old)(doubled) if wraps else doubled)
    with pytest.raises(ValueError, match=f"forward of the class {cls.__name__} was replaced"):
        patch(model)
    assert not any(isinstance(each, QFormer) for each in qformers(model))


def test_unpatch_refuses_foreign_modules_in_the_tree() -> None:
    model = nn.ModuleList([Blip2QFormerModel(tiny_config())])
    layer = patch(model)[0].encoder.layer[0]
    assert isinstance(layer, QFormerLayer)
    layer.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"differ in the modules \['adapter'\]"):
        unpatch(model)
    del layer.adapter
    unpatch(model)
