"""Sizes and outputs of the stage-1 model.

Shapes: B images, Q queries, T text tokens, S image tokens, E image token width, C hidden width,
D feature width, N images on all ranks, V words.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import Blip2QFormerConfig
from transformers.utils import ModelOutput

from blip2fast._choices import LOSSES
from blip2fast.ops.collectives import GradMode


class TrainerConfig:
    """What Hugging Face's `Trainer` and its loggers call on a model's configuration."""

    def get_text_config(self, **_: Any) -> TrainerConfig:
        """This configuration itself; `Trainer` sets token ids of its tokenizer on it."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json_string(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass
class Stage1Config(TrainerConfig):
    """Sizes of the stage-1 model; the defaults are BLIP-2's with ViT-g/14.

    Not frozen, because Hugging Face's `Trainer` sets attributes such as `use_cache`.

    Attributes:
        hidden_size: C.
        encoder_hidden_size: E, width of the image tokens (1408 for ViT-g/14, 1024 for ViT-L/14).
        num_query_tokens: Q.
        vocab_size: V; bert-base-uncased plus [DEC].
        bos_token_id: [DEC], which replaces [CLS] in text generation.
        embed_dim: D, width of the contrastive features.
        cross_attention_frequency: Layers 0, k, 2k, ... attend to the image.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    num_query_tokens: int = 32
    vocab_size: int = 30523
    max_position_embeddings: int = 512
    bos_token_id: int = 30522
    pad_token_id: int = 0
    embed_dim: int = 256
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    ln_vision_eps: float = 1e-5
    label_smoothing: float = 0.1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    initial_temp: float = 0.07
    grad_mode: GradMode = "local"

    def __post_init__(self) -> None:
        check_sizes(self)
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} is {value}, vocab_size {self.vocab_size}: the token is not in the "
                    "table; give the tokenizer's own ids"
                )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected 0 to below 1")
        if self.grad_mode not in ("local", "full"):
            raise ValueError(f"grad_mode: expected 'local' or 'full', got {self.grad_mode!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stage1Config:
        """Build from a mapping of field names; missing ones keep their defaults.

        Raises:
            ValueError: a key is not a field.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"stage-1 config: unknown key {key!r}{hint}")
        return cls(**values)

    def qformer_config(self) -> Blip2QFormerConfig:
        """The transformers configuration of the Q-Former."""
        shared = {f.name for f in dataclasses.fields(self)} - {
            "num_query_tokens",
            "bos_token_id",
            "embed_dim",
            "ln_vision_eps",
            "label_smoothing",
            "initial_temp",
            "grad_mode",
        }
        sizes = {name: getattr(self, name) for name in shared}
        return Blip2QFormerConfig(**sizes, use_qformer_text_input=True)


def check_sizes(config: Any) -> None:
    """Validate the integer fields of a sizes dataclass.

    Token ids may be 0. The hidden width must be a multiple of the number of heads.

    Raises:
        ValueError: names the field and its value.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type != "int":
            continue
        least = 0 if field.name.endswith("_id") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{field.name}: expected an integer from {least} on, got {value!r}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )


def check_losses(names: Sequence[str]) -> tuple[str, ...]:
    """Validate loss names; returns them in the order of `LOSSES`.

    Raises:
        ValueError: an unknown name, or ITC is missing.
    """
    unknown = [name for name in names if name not in LOSSES]
    if unknown or "itc" not in names:
        raise ValueError(
            f"losses: expected itc, with or without itm and itg, got {list(names)}: ITM's "
            "negatives are drawn from ITC's similarities"
        )
    return tuple(name for name in LOSSES if name in names)


@dataclass
class Stage1Output(ModelOutput):
    """Outputs of a stage-1 step.

    Attributes:
        loss: Sum of the enabled losses, a scalar with gradient.
        loss_itc, loss_itm, loss_itg: The individual losses. A loss that is not in the model's
            `losses` is None, as are its logits and accuracy.
        itm_logits: `[3B, 2]`; B matching pairs, B with a negative image, B with a negative text.
        image_features: `[B, Q, D]`, normalised.
        text_features: `[B, D]`, normalised.
        query_output: `[B, Q, C]`, last hidden states of the queries, without text.
        accuracy_i2t, accuracy_t2i: Fraction of rows whose top-scoring column is a positive.
        accuracy_itm: Fraction classified correctly, among the counted ones of the 3B pairs
            (`losses.counted_pairs`); 0 if no pair is counted.
        accuracy_itg: Fraction of next tokens predicted correctly.
        negative_image, negative_text: `[B]`, indices into the global batch; -1 if every pair in it
            has the row's image id, in which case ITM skips the row.
        sim_i2t, sim_t2i: `[B, N]` similarities over temperature. Not materialised in a step: they
            are computed on first access, which must happen on all ranks or none.
        itg_logits: `[B, T, V]`; position t predicts token t+1, the last position predicts nothing.
            Computed on first access, in a separate padded pass (which draws its own dropout).
        counts: Number of items that each loss and accuracy is averaged over, as scalars by the
            names above: pairs for ITC, counted pairs for ITM, words for ITG. `loss` is a sum of
            means and has none.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_itg: Tensor | None = None
    itm_logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    query_output: Tensor | None = None
    accuracy_i2t: Tensor | None = None
    accuracy_t2i: Tensor | None = None
    accuracy_itm: Tensor | None = None
    accuracy_itg: Tensor | None = None
    negative_image: Tensor | None = None
    negative_text: Tensor | None = None

    def set_lazy(
        self,
        similarities: Callable[[], tuple[Tensor, Tensor]],
        itg_logits: Callable[[], Tensor],
    ) -> Stage1Output:
        """Set the functions that compute similarities and ITG logits on first access."""
        self.__dict__["_similarities"] = functools.cache(similarities)
        self.__dict__["_itg_logits"] = functools.cache(itg_logits)
        return self

    def set_counts(self, counts: Mapping[str, Tensor | int]) -> Stage1Output:
        """Set the number of items that each loss and accuracy is averaged over."""
        self.__dict__["_counts"] = dict(counts)
        return self

    @property
    def counts(self) -> dict[str, Tensor | int]:
        counts: dict[str, Tensor | int] = self.__dict__["_counts"]
        return counts

    @property
    def sim_i2t(self) -> Tensor:
        sim: Tensor = self._computed("_similarities")[0]
        return sim

    @property
    def sim_t2i(self) -> Tensor:
        sim: Tensor = self._computed("_similarities")[1]
        return sim

    @property
    def itg_logits(self) -> Tensor:
        logits: Tensor = self._computed("_itg_logits")
        return logits

    def _computed(self, name: str) -> Any:
        if name not in self.__dict__:
            raise AttributeError(
                "similarities and ITG logits are not kept by a compiled or transformed call, nor "
                "in a pickled output; call the model itself for them"
            )
        return self.__dict__[name]()

    def __reduce__(self) -> Any:
        """Without the functions that would compute more, which hold the model."""
        make, given, state, *rest = cast(tuple[Any, ...], super().__reduce__())
        kept = {k: v for k, v in state.items() if k not in ("_similarities", "_itg_logits")}
        return (make, given, kept, *rest)

    def __getitem__(self, key: Any) -> Any:
        if key in ("sim_i2t", "sim_t2i", "itg_logits"):
            return getattr(self, key)
        return super().__getitem__(key)
