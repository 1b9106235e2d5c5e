"""A stage-1 step on a GPU: by our kernels as by PyTorch's, with dropout too, without a wait.

Both draw the same dropout masks, so that trained steps can be compared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage1_cases import SMALL, make_batch
from torch import Tensor

from blip2fast._choices import Kernels
from blip2fast.ops import kernels_set_to
from blip2fast.stage1.model import Blip2Stage1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# heads of 64 and texts that do not fill a tile; 37 image tokens
CONFIG = replace(
    SMALL,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    num_query_tokens=32,
    embed_dim=64,
    initializer_range=0.05,
)
BATCH = 24


def step(
    kernels: Kernels, dtype: torch.dtype, dropout: float, device: str = "cuda"
) -> dict[str, Tensor]:
    """Losses and gradients of one step, in fp64 on the CPU."""
    config = replace(CONFIG, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    torch.manual_seed(0)
    model = Blip2Stage1(config).to(device)
    batch = make_batch(config, BATCH, tokens=37)
    images = batch.pop("image_embeds").float().to(device)
    own = torch.arange(BATCH, device=device)
    negatives = (own + 1) % BATCH, (own + 2) % BATCH
    torch.manual_seed(1)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with kernels_set_to(kernels), autocast:
        out = model(image_embeds=images, **batch, negatives=negatives)
    out.loss.backward()
    found = {name: out[name].detach() for name in ("loss_itc", "loss_itm", "loss_itg")}
    for name, parameter in model.named_parameters():
        # what a softmax takes out again has no gradient but rounding
        if "key.bias" not in name:
            found[name] = parameter.grad
    return {name: x.cpu().double() for name, x in found.items()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    return torch.stack([(found[n] - truth[n]).norm() / truth[n].norm() for n in truth])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_in_fp32_a_step_is_that_of_pytorch(dropout: float) -> None:
    ours, plain = (step(kernels, torch.float32, dropout) for kernels in ("trust", "never"))
    assert float(errors(ours, plain).max()) < 1e-3


def test_without_dropout_the_gpu_agrees_with_the_cpu() -> None:
    truth = step("never", torch.float32, 0.0, "cpu")
    assert float(errors(step("trust", torch.float32, 0.0), truth).max()) < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_errors_are_those_of_pytorch(dtype: torch.dtype, dropout: float) -> None:
    truth = step("never", torch.float32, dropout)
    ours, plain = (errors(step(k, dtype, dropout), truth) for k in ("trust", "never"))
    assert float(ours.median()) < 1.2 * float(plain.median()) + 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twice_the_same_bits(dropout: float) -> None:
    first, again = (step("trust", torch.bfloat16, dropout) for _ in range(2))
    different = [name for name, x in first.items() if not torch.equal(x, again[name])]
    assert not different


@pytest.mark.parametrize("kernels", ["trust", "never"])
def test_the_host_does_not_wait(kernels: Kernels) -> None:
    config = replace(CONFIG, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = Blip2Stage1(config).cuda()
    batch = make_batch(config, BATCH, tokens=37)
    batch["image_embeds"] = batch["image_embeds"].float().cuda()
    with kernels_set_to(kernels), torch.autocast("cuda", torch.bfloat16):
        model(**batch).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
