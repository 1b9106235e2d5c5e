"""QFormer is transformers' Q-Formers: parameters, outputs, gradients, casts, dropout."""

import pytest
import torch
from qformer_cases import (
    BLIP2_CASES,
    DTYPES,
    INSTRUCT_CASES,
    SIZES,
    B,
    H,
    Q,
    S,
    blip2_config,
    cast,
    make,
    make_pair,
)
from qformer_holders import assert_near, assert_same_run, run_with_gradients
from torch import Tensor
from transformers import InstructBlipQFormerConfig, InstructBlipVideoQFormerConfig, PreTrainedConfig

from blip2fast.qformer.model import QFormer


@pytest.mark.parametrize("case", BLIP2_CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp64", "fp32"])
def test_blip2_outputs_and_gradients(
    case: str, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    if case == "both, boolean pairs" and attention == "eager":
        pytest.skip("transformers adds a boolean mask to the scores as 0 and 1 here")
    theirs, ours = make_pair(blip2_config(), dtype, attention)
    inputs = cast(BLIP2_CASES[case](), dtype)
    assert_same_run(run_with_gradients(theirs, inputs), run_with_gradients(ours, inputs), tolerance)


@pytest.mark.parametrize("case", INSTRUCT_CASES)
@pytest.mark.parametrize("config", [InstructBlipQFormerConfig, InstructBlipVideoQFormerConfig])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp64", "fp32"])
def test_instructblip_outputs_and_gradients(
    case: str, config: type[PreTrainedConfig], dtype: torch.dtype, tolerance: float
) -> None:
    theirs, ours = make_pair(config(**SIZES), dtype)
    inputs = cast({"input_ids": None} | INSTRUCT_CASES[case](), dtype)
    assert_same_run(run_with_gradients(theirs, inputs), run_with_gradients(ours, inputs), tolerance)


@pytest.mark.parametrize(
    "config",
    [
        blip2_config(),
        blip2_config(text=False, cross_attention_frequency=3, num_hidden_layers=5),
        InstructBlipQFormerConfig(**SIZES),
        InstructBlipVideoQFormerConfig(**SIZES),
    ],
    ids=["text", "no text", "instruct", "video"],
)
def test_parameters_have_transformers_names_shapes_and_order(config: PreTrainedConfig) -> None:
    theirs, ours = make_pair(config, torch.float32)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initialisation() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 200}
    qformer = QFormer(InstructBlipQFormerConfig(**SIZES | sizes, pad_token_id=3))
    for name, parameter in qformer.named_parameters():
        if name.lower().endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert abs(float(parameter.detach().std()) - 0.02) < 0.002, name
            assert abs(float(parameter.detach().mean())) < 0.002, name
    assert not qformer.embeddings.word_embeddings.weight[3].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recorded_outputs(attention: str) -> None:
    theirs, _ = make_pair(blip2_config(), torch.float64, "eager")
    _, ours = make_pair(blip2_config(), torch.float64, attention)
    inputs = cast(BLIP2_CASES["both"](), torch.float64)
    inputs |= {"output_attentions": True, "output_hidden_states": True}
    want, got = theirs(**inputs), ours(**inputs)
    assert list(want) == list(got)
    for key in want:
        assert_same_run((_listed(want[key]), {}), (_listed(got[key]), {}), 1e-10)
    assert [a.shape for a in got.cross_attentions] == [(B, H, Q, S)] * 2
    assert torch.equal(got.pooler_output, got.last_hidden_state[:, 0])

    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(got)
    assert torch.equal(as_tuple[0], got.last_hidden_state)
    plain = ours(**inputs | {"output_attentions": False, "output_hidden_states": False})
    assert list(plain) == ["last_hidden_state", "pooler_output"]


def _listed(value: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def test_attention_weights_carry_gradients() -> None:
    qformer = make(blip2_config())
    inputs = cast(BLIP2_CASES["both"](), torch.float64)
    weights = qformer(**inputs, output_attentions=True).cross_attentions[0]
    output = qformer(**inputs, output_attentions=True)
    assert_near(torch.ones(B, H, Q, dtype=torch.float64), weights.sum(-1), 1e-12, "weights")
    (gradient,) = torch.autograd.grad(
        output.last_hidden_state[:, 0].sum(), output.cross_attentions[0]
    )
    assert gradient.abs().max() > 0


def test_dropout_in_training_draws_as_transformers_does() -> None:
    for attention in ("sdpa", "eager"):
        theirs, ours = make_pair(blip2_config(), torch.float64, attention)
        inputs = cast(BLIP2_CASES["both"](), torch.float64)
        runs = []
        for model in (theirs, ours):
            torch.manual_seed(7)
            runs.append(run_with_gradients(model.train(), inputs))
        assert_same_run(runs[0], runs[1], 1e-10)
        torch.manual_seed(8)
        assert not torch.allclose(runs[1][0][0], ours(**inputs).last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    qformer = make(blip2_config()).train()
    inputs = cast(BLIP2_CASES["both"](), torch.float64)
    inputs["query_embeds"].requires_grad_()
    calls: list[int] = []
    qformer.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        qformer.zero_grad()
        qformer(**inputs).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in qformer.parameters()]

    expected = gradients()
    qformer.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients()
    assert len(calls) == 3
    for (name, _), a, b in zip(qformer.named_parameters(), expected, actual, strict=True):
        assert_near(a, b, 1e-12, name, floor=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["both", "text", "queries, one for all"])
def test_half_precision_errs_no_more_than_transformers(case: str, dtype: torch.dtype) -> None:
    theirs, ours = make_pair(blip2_config(), dtype)
    inputs = cast(BLIP2_CASES[case](), dtype)
    truth, _ = make_pair(blip2_config(), torch.float64)
    truth.load_state_dict(theirs.state_dict())
    exact = truth(**cast(inputs, torch.float64)).last_hidden_state

    for record in (False, True):
        got = ours(**inputs, output_attentions=record).last_hidden_state
        assert got.dtype == dtype
        reference = (theirs(**inputs).last_hidden_state.double() - exact).abs()
        error = (got.double() - exact).abs()
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert error.max() <= 2 * reference.max() + rounding
        assert error.mean() <= 2 * reference.mean()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention: str) -> None:
    theirs, ours = make_pair(blip2_config(), torch.float32, attention)
    inputs = BLIP2_CASES["both"]()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(**inputs).last_hidden_state, ours(**inputs).last_hidden_state
    assert got.dtype == want.dtype
    assert_near(want, got, 0.02, "autocast")
    assert not torch.equal(got, ours(**inputs).last_hidden_state)


def test_inputs_are_cast_to_the_weights() -> None:
    theirs, ours = make_pair(blip2_config(), torch.float32)
    inputs = cast(BLIP2_CASES["both"](), torch.bfloat16)
    got = ours(**inputs).last_hidden_state
    assert got.dtype == torch.float32
    assert_near(theirs(**inputs).last_hidden_state, got, 1e-5, "bf16 into fp32")

    config = InstructBlipQFormerConfig(**SIZES)
    inputs = cast(INSTRUCT_CASES["both"](), torch.bfloat16)
    assert make(config, torch.float32)(**inputs).last_hidden_state.dtype == torch.float32
