"""Parts of stage 1: input embeddings, the generation head, the temperature in files.

Shapes: B images, T text tokens, C hidden width, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2fast.qformer.checks import check_whole, is_sharded
from blip2fast.qformer.plain import is_ordinary, is_untouched
from blip2fast.stage1.config import Stage1Config


class TextEmbeddings(nn.Module):
    """Word plus position embeddings; the Q-Former normalises them together with the queries."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        for table in (self.word_embeddings, self.position_embeddings):
            nn.init.normal_(table.weight, std=config.initializer_range)
        with torch.no_grad():
            self.word_embeddings.weight[config.pad_token_id].zero_()

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids `[..., T]` to `[..., T, C]`; `positions` `[..., T]`, by default 0 to T-1."""
        if positions is None:
            positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)


class LMHeadTransform(nn.Module):
    """The transform before the decoder: dense, GELU, LayerNorm."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(states)))


class LMHead(nn.Module):
    """The language-modelling head; its decoder is tied to the word embeddings."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.transform = LMHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits `[..., V]` from hidden states `[..., C]` and word embeddings `[V, C]`."""
        return F.linear(self.transform(states), word_embeddings, self.bias)


_HEAD = LMHead.forward


def is_called_head(head: nn.Module, word_embeddings: Any) -> bool:
    """Whether the loss must call a generation head: it does more than its class and weights say.

    Args:
        head: The head.
        word_embeddings: `[V, C]`, from `tied_words`.
    """
    if type(head) is not LMHead or not is_untouched(head, _HEAD):
        return True
    return not (is_ordinary(word_embeddings) and is_ordinary(head.bias))


def tied_words(embeddings: TextEmbeddings) -> Tensor:
    """The word embeddings `[V, C]`, which the generation head shares.

    Raises:
        RuntimeError: their module has no weight, FSDP holds it in parts, or a device map elsewhere.
    """
    table = embeddings.word_embeddings
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor):
        raise RuntimeError(
            f"embeddings.word_embeddings is a {type(table).__name__} without a weight, but the "
            "generation head shares the word embeddings; leave it out, or train without 'itg'"
        )
    check_whole("embeddings.word_embeddings.weight", weight)
    if weight.is_meta and hasattr(table, "_hf_hook"):
        raise RuntimeError(
            "embeddings.word_embeddings.weight is on the meta device but while its module runs, "
            "and the generation head shares it; leave the embeddings out of the device map"
        )
    return weight


def copy_text_ffn_to_queries(qformer: nn.Module) -> None:
    """Initialise the query feed-forward layers from the text ones, as BLIP-2 does."""
    state = qformer.state_dict()
    with torch.no_grad():
        for name, parameter in qformer.named_parameters():
            if "_query." in name:
                parameter.copy_(state[name.replace("_query.", ".")])


def with_scalar_temp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose temperature is a scalar, as in LAVIS and in files; a model holds [1]."""
    return {
        name: value.detach().reshape(()) if name.rpartition("/")[2] == "temp" else value
        for name, value in state.items()
    }


def temp_as_it_is(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: the temperature, saved as a scalar or [1], as it is held."""
    value, own = state.get(f"{prefix}temp"), cast(Any, module.get_parameter("temp"))
    if isinstance(value, Tensor) and value.shape in ((), (1,)):
        value = value.reshape(own.shape)
        if is_sharded(own) and not is_sharded(value):
            # torch's distributed state dicts hand scalars over as they are
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, own.device_mesh, own.placements)
        state[f"{prefix}temp"] = value
