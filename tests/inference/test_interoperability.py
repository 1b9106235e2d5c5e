"""The examples of docs/interoperability.md, and the graphs that they make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_models import opt_model, stage2_config
from torch import Tensor, nn

from blip2fast.stage2.model import Blip2Stage2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"


def run_in_onnx(path: Path, *inputs: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, names)
    return names


def test_one_graph_from_pixels_to_soft_prompts(example: dict[str, Any], tmp_path: Path) -> None:
    prompts, program = example["prompts"], example["program"].module()
    with torch.no_grad():
        traced = torch.jit.trace(prompts, example["pixels"], check_trace=False)
        packaged = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(
                example["program"], package_path=str(tmp_path / "prompts.pt2")
            )
        )
        for count in (1, 2, 5):
            pixels = torch.randn(count, 3, 28, 28)
            expected = prompts(pixels)
            for found in (
                program(pixels),
                traced(pixels),
                packaged(pixels),
                run_in_onnx(tmp_path / "prompts.onnx", pixels),
            ):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Patches(nn.Module):
    """A frozen image encoder: pixels to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)


class Prompts(nn.Module):
    def __init__(self, model: Blip2Stage2) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images=images)[0]


def test_stage_2_is_recorded_in_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    config = stage2_config()
    model = Blip2Stage2(config, opt_model(), Patches(config.encoder_hidden_size)).eval()
    module = Prompts(model).eval()
    pixels, path = torch.randn(3, 3, 12, 12), tmp_path / "prompts.onnx"
    dynamic = ({0: torch.export.Dim("images", max=64)},)
    with torch.no_grad():
        program = torch.export.export(module, (pixels,), dynamic_shapes=dynamic).module()
        torch.onnx.export(
            module, (pixels,), path, dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
        traced = torch.jit.trace(module, pixels, check_trace=False)
        for count in (1, 3, 4):
            pixels = torch.randn(count, 3, 12, 12)
            for found in (program(pixels), traced(pixels), run_in_onnx(path, pixels)):
                torch.testing.assert_close(found, module(pixels), rtol=1e-4, atol=1e-5)
