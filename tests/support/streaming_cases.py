"""Small frozen language models, and what the tests of streamed blocks ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stage2_models import opt_config, t5_config
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

LAYERS = 5


def opt(**changes: Any) -> PreTrainedModel:
    return OPTForCausalLM(opt_config(num_hidden_layers=LAYERS, **changes))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(t5_config(num_layers=LAYERS))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=41, max_position_embeddings=32, **sizes, **heads)
    )


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 20, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, bos_token_id=0, eos_token_id=0, **sizes))


MODELS = {"opt": opt, "t5": t5, "llama": llama, "gpt2": gpt2}


def frozen(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():  # far from zero, so that every weight shows
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def inputs(model: PreTrainedModel, seed: int = 1) -> dict[str, Tensor]:
    """Embeddings [3, 7, 20] that need gradients, padded rows, and a decoder's tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
    given = {
        "inputs_embeds": torch.randn(3, 7, 20, generator=generator).requires_grad_(),
        "attention_mask": mask,
    }
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(2, 40, (3, 4), generator=generator)
    return given


def loss_and_gradient(model: PreTrainedModel, seed: int = 1) -> tuple[Tensor, Tensor]:
    given = inputs(model, seed)
    loss = model(**given, use_cache=False).logits.float().logsumexp(-1).square().mean()
    loss.backward()
    gradient = given["inputs_embeds"].grad
    assert gradient is not None
    return loss.detach(), gradient


def assert_gradients_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
