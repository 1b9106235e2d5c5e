"""A recorded Q-Former is the Q-Former: torch.export, ONNX, AOTInductor and TorchScript.

Programs are recorded at one size and run at others, with images that are padded to the last token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qformer_holders import spread_parameters
from torch import Tensor, nn
from torch.export import Dim
from transformers import Blip2QFormerConfig

from blip2fast import QFormer
from blip2fast.qformer import absorption

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

Q = 4
# images and image tokens: one, more of either than when recorded, the recorded ones
SIZES = [(1, 1), (2, 300), (3, 15), (16, 15)]
# batch equal to heads, where absorption would run
RECORDED = (16, 15)


class Tokens(nn.Module):
    """Queries and image tokens to the query states, without the output's container."""

    def __init__(self, qformer: QFormer, masks: str) -> None:
        super().__init__()
        self.qformer, self.masks = qformer, masks

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and self.masks == "additive":
            mask = torch.where(mask != 0, 0.0, -torch.inf)[:, None, None]
        output = self.qformer(
            query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=mask
        )
        states: Tensor = output.last_hidden_state
        return states


def model(masks: str = "padding") -> Tokens:
    config = Blip2QFormerConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=16,
        intermediate_size=48,
        encoder_hidden_size=96,
    )
    torch.manual_seed(0)
    qformer = QFormer(config).eval()
    spread_parameters(qformer)
    return Tokens(qformer, masks).eval()


def inputs(images: int, tokens: int, masks: str, shared: bool = False) -> tuple[Tensor, ...]:
    """Queries, image tokens and their mask; one image of several has no visible token."""
    generator = torch.Generator().manual_seed(images * 1000 + tokens)
    queries = torch.randn(1 if shared else images, Q, 128, generator=generator)
    image = torch.randn(images, tokens, 96, generator=generator)
    if masks == "none":
        return queries, image
    counts = torch.randint(1, tokens + 1, (images,), generator=generator)
    counts[-1] = 0
    if masks == "ones":
        counts[:] = tokens
    return queries, image, (torch.arange(tokens) < counts[:, None]).long()


def dynamic(masks: str, shared: bool = False) -> tuple[dict[int, Any], ...]:
    images, tokens = Dim("images", max=64), Dim("tokens", max=1024)
    shapes: tuple[dict[int, Any], ...] = ({} if shared else {0: images}, {0: images, 1: tokens})
    return shapes if masks == "none" else (*shapes, {0: images, 1: tokens})


def assert_same(program: Callable[..., Tensor], module: Tokens, masks: str, shared: bool) -> None:
    for images, tokens in SIZES:
        call = inputs(images, tokens, "padding" if masks == "ones" else masks, shared)
        with torch.no_grad():
            expected = module(*call)
        torch.testing.assert_close(program(*call), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def absorbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Absorption wherever nothing is recorded: the programs are compared with another form."""
    monkeypatch.setattr(absorption, "_FEWER_OPERATIONS", torch.inf)
    with warnings.catch_warnings():
        yield


# "ones": recorded with a mask that hides nothing, run with one that hides
MASKS = ["none", "padding", "additive", "ones"]


@pytest.mark.parametrize(
    ("masks", "shared", "strict", "grad"),
    [
        *((masks, shared, False, False) for masks in MASKS for shared in (False, True)),
        ("padding", False, True, False),
        ("padding", True, False, True),
    ],
)
def test_torch_export(masks: str, shared: bool, strict: bool, grad: bool) -> None:
    module = model(masks)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            module,
            inputs(*RECORDED, masks, shared),
            dynamic_shapes=dynamic(masks, shared),
            strict=strict,
        )
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("mkldnn" in name or "blip2fast" in name for name in names)
    assert_same(program.module(), module, masks, shared)


class Runtime:
    """A file in ONNX Runtime, called like the module."""

    def __init__(self, path: Path) -> None:
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        self.session, self.names = session, [given.name for given in session.get_inputs()]

    def __call__(self, *call: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(self.names, call, strict=True)}
        return torch.from_numpy(self.session.run(None, given)[0])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_onnx(masks: str, shared: bool, tmp_path: Path) -> None:
    """The optimiser dropped reshapes of absorption where batch and heads are equal."""
    pytest.importorskip("onnxscript")
    module, path = model(masks), tmp_path / "qformer.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module,
            inputs(*RECORDED, masks, shared),
            path,
            dynamo=True,
            dynamic_shapes=dynamic(masks, shared),
            verbose=False,
        )
    assert_same(Runtime(path), module, masks, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_onnx_of_torchscript(masks: str, shared: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    module, path = model(masks), tmp_path / "qformer.onnx"
    call = inputs(*RECORDED, masks, shared)
    names = ["queries", "tokens", "mask"][: len(call)]
    sizes: dict[str, dict[int, str]] = {
        name: {0: "images", 1: "tokens"} for name in ("tokens", "mask") if name in names
    }
    if not shared:
        sizes["queries"] = {0: "images"}
    with torch.no_grad():
        torch.onnx.export(module, call, path, dynamo=False, input_names=names, dynamic_axes=sizes)
    assert_same(Runtime(path), module, masks, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_torchscript(masks: str, shared: bool) -> None:
    """oneDNN's operator cannot be traced, and a mask of ones was dropped for good."""
    module = model(masks)
    with torch.no_grad():
        program = torch.jit.trace(module, inputs(*RECORDED, masks, shared), check_trace=False)
    assert_same(program, module, masks, shared)


def test_aot_inductor(tmp_path: Path) -> None:
    module = model()
    with torch.no_grad():
        program = torch.export.export(
            module, inputs(*RECORDED, "padding"), dynamic_shapes=dynamic("padding")
        )
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "qformer.pt2")
        )
    assert_same(torch._inductor.aoti_load_package(path), module, "padding", False)
