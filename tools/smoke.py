"""What an installed blip2fast must do anywhere, in a few seconds on a CPU.

    python tools/smoke.py      # in the environment to be tried, outside a checkout

Imports every room; holds `QFormer` to transformers' Q-Former in outputs and gradients; trains one
step of stage 1 and of stage 2 on small random models; runs `blip2fast --version`. Prints the line
that docs/releasing.md keeps of an environment, or fails.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import platform
import subprocess
import sys

import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel, OPTConfig, OPTForCausalLM

import blip2fast
from blip2fast import Blip2Stage1, Blip2Stage2, QFormer, Stage1Config, Stage2Config, _extension

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 24,
}
B, Q, S, T = 3, 4, 5, 7


def check_rooms() -> None:
    """Import every room of the package that the installed packages allow."""
    for room in blip2fast._ROOMS:
        importlib.import_module(f"blip2fast.{room}")


def _run(model: torch.nn.Module, queries: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    queries = queries.clone().requires_grad_()
    hidden = model(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden.square().sum(), queries)
    return hidden.detach(), gradient


def check_qformer() -> None:
    """Outputs and gradients of `QFormer` are transformers'."""
    config = Blip2QFormerConfig(**SMALL, vocab_size=100)
    theirs = Blip2QFormerModel(config).eval()
    ours = QFormer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    queries = torch.randn(B, Q, SMALL["hidden_size"])
    images = torch.randn(B, S, SMALL["encoder_hidden_size"])
    for a, b in zip(_run(ours, queries, images), _run(theirs, queries, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _step(model: torch.nn.Module, loss: Tensor) -> None:
    """One step of AdamW; every trained parameter has a finite gradient."""
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise SystemExit(f"{type(model).__name__}: {name} has no finite gradient")
    torch.optim.AdamW(trained.values(), lr=1e-3).step()


def check_stage1() -> None:
    """A step of stage 1 on random images and texts."""
    sizes = {"vocab_size": 100, "bos_token_id": 99, "embed_dim": 16, "num_query_tokens": Q}
    model = Blip2Stage1(Stage1Config(**SMALL, **sizes))
    texts = torch.randint(5, 90, (B, T))
    _step(model, model(torch.randn(B, S, 24), texts).loss)


def check_stage2() -> None:
    """A step of stage 2 through a frozen OPT, and greedy decoding."""
    opt = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64}
    language = OPTForCausalLM(OPTConfig(**opt, num_attention_heads=4, word_embed_proj_dim=32))
    model = Blip2Stage2(Stage2Config(**SMALL, num_query_tokens=Q), language)
    images, ids = torch.randn(B, S, 24), torch.randint(5, 90, (B, T))
    _step(model, model(images, ids, torch.ones_like(ids), labels=ids).loss)
    written = model.eval().generate(images, ids, torch.ones_like(ids), max_new_tokens=2)
    if len(written) != B:
        raise SystemExit(f"generate: {len(written)} texts of {B} images")


def check_command() -> None:
    """The command is there, and of this version."""
    command = [sys.executable, "-m", "blip2fast", "--version"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    installed = importlib.metadata.version("blip2fast")
    if not told == blip2fast.__version__ == installed:
        raise SystemExit(f"versions differ: {told}, {blip2fast.__version__}, {installed}")


def main() -> None:
    """Run all checks; print a row of a markdown table."""
    torch.manual_seed(0)
    for check in (check_rooms, check_qformer, check_stage1, check_stage2, check_command):
        check()
    names = ("torch", "transformers", "deepspeed")
    versions = [importlib.metadata.version(name) for name in names]
    extension = "no: " + _extension.why_not() if _extension.why_not() else "loads"
    today = datetime.date.today().isoformat()
    print("| " + " | ".join([today, platform.python_version(), *versions, extension]) + " |")


if __name__ == "__main__":
    main()
