"""Sizes and outputs of the stage-2 model.

Shapes: B images, Q queries, T text tokens, S image tokens, E image token width, C hidden width,
L language model width, V words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.utils import ModelOutput

from blip2fast.stage1.config import Stage1Config, TrainerConfig, check_sizes


@dataclass
class Stage2Config(TrainerConfig):
    """Sizes of the trained part and the text settings; the defaults are BLIP-2's with ViT-g/14.

    Not frozen, because Hugging Face's `Trainer` sets attributes such as `use_cache`.

    Attributes:
        hidden_size: C.
        encoder_hidden_size: E, width of the image tokens (1408 for ViT-g/14, 1024 for ViT-L/14).
        num_query_tokens: Q, which is also the number of soft prompts an image gives.
        ln_vision_eps: 1e-5 in LAVIS; transformers' checkpoints say 1e-6.
        max_txt_len: maximum number of text tokens in a sequence, soft prompts excluded.
        prompt: text before every caption; a `{}` in it is replaced by the question.
        end_text: ends a decoder-only target; None: the tokenizer's eos token. LAVIS trained its
            OPT models with `"\\n"`.
        image_marker: placeholder for an image in texts with any number of images, such as
            `"<image>"`; None: one image per text, in front.
        text_conditioned: the Q-Former also reads an instruction, as in InstructBLIP
            (arXiv 2305.06500); False: images only, as in BLIP-2.
        vocab_size, max_position_embeddings, pad_token_id: for the instruction tokens; as stage 1.
        llm_dropout: enable the frozen language model's dropout in training. LAVIS does, because its
            `train()` reaches the frozen model. False: no dropout.
        llm_activation: replaces the activation of a T5's feed-forward layers. LAVIS trained its
            checkpoints with `"gelu"` in FlanT5, whose own activation is `"gelu_new"`; transformers'
            BLIP-2 configurations record it. None: the model's own.
        pack_padding: in training, pack the samples of a batch into fewer rows, so that a
            decoder-only language model computes no padding (`blip2fast.stage2.packing`).
        match_embedding_scale: initialise the projection so that soft prompts have the scale of the
            language model's token embeddings. Much larger prompts dominate the position embeddings,
            which slows early training of a small language model. False: PyTorch's default, as in
            LAVIS.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    num_query_tokens: int = 32
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    ln_vision_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    max_txt_len: int = 32
    prompt: str = ""
    end_text: str | None = None
    image_marker: str | None = None
    text_conditioned: bool = False
    vocab_size: int = 30523
    max_position_embeddings: int = 512
    pad_token_id: int = 0
    llm_dropout: bool = False
    llm_activation: str | None = None
    pack_padding: bool = False
    match_embedding_scale: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)

    @classmethod
    def from_stage1(cls, config: Stage1Config, **settings: Any) -> Stage2Config:
        """Take the sizes of a stage-1 config; `settings` set the other fields."""
        own = {field.name for field in dataclasses.fields(cls)}
        shared = {f.name for f in dataclasses.fields(config)} & own
        return cls(**({name: getattr(config, name) for name in shared} | settings))

    def qformer_config(self) -> Blip2QFormerConfig | InstructBlipQFormerConfig:
        """The transformers configuration of the Q-Former."""
        names = [
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("encoder_hidden_size", "cross_attention_frequency", "layer_norm_eps"),
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
        ]
        sizes = {name: getattr(self, name) for name in names}
        if not self.text_conditioned:
            return Blip2QFormerConfig(**sizes, use_qformer_text_input=False)
        words = ("vocab_size", "max_position_embeddings", "pad_token_id")
        return InstructBlipQFormerConfig(**sizes, **{name: getattr(self, name) for name in words})


@dataclass
class Stage2Output(ModelOutput):
    """Outputs of a stage-2 step.

    Attributes:
        loss: Mean cross-entropy of the targets; None without labels.
        logits: With `return_logits`, logits of every position: decoder-only [B, Q + T, V]
            ([B, T, V] with `image_counts`), encoder-decoder [B, T, V] of the decoder.
        query_output: [B, Q, C], last hidden states of the queries; [N, Q, C] with `image_counts`.
        prompts: [B, Q, L], the soft prompts; [N, Q, L] with `image_counts`.
        counts: Under the key "loss", the number of target tokens that the loss is averaged over, a
            scalar.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    query_output: Tensor | None = None
    prompts: Tensor | None = None

    def set_counts(self, counts: Mapping[str, Tensor | int]) -> Stage2Output:
        """Set the number of target tokens that the loss is averaged over."""
        self.__dict__["_counts"] = dict(counts)
        return self

    @property
    def counts(self) -> dict[str, Tensor | int]:
        counts: dict[str, Tensor | int] = self.__dict__["_counts"]
        return counts
