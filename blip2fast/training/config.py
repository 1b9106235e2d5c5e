"""The configuration of a training run: its sections, with the type and range of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from blip2fast._imports import needs
from blip2fast.offload.quantised import Storage
from blip2fast.ops.dispatch import Kernels
from blip2fast.stage1.config import LOSSES, LossName

with needs("configure a run", "pydantic"):
    from pydantic import ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]
DTYPE_OF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Offload = Literal["none", "cpu", "nvme"]
# where the frozen language model is; see `RunConfig.offload`
OffloadChoice = Literal["none", "stream", "zero3", "auto"]

_STRICT = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(ge=1)]
_NonNegative = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class ModelSection:
    """Sizes of the Q-Former. None: BLIP-2's, or in stage 2 those of `init_from`.

    The width of the image tokens and the vocabulary come from the data and the tokenizer.

    Attributes:
        tokenizer: folder or hub name of the Q-Former's tokenizer, where it reads text. If it has no
            [DEC] token one is added, as BLIP-2 does to bert-base-uncased.
        bert: folder or hub name of a BERT whose weights the Q-Former starts from (stage 1; paper,
            section 3.1); the cross-attention and the queries stay random.
        embed_dim: width of the contrastive features (stage 1).
        dropout: of hidden states and attention probabilities.
        text_conditioned: the Q-Former reads the prompt too, as InstructBLIP (stage 2; `tokenizer`).
        initializer_range: standard deviation of new weights; 0.02 suits BLIP-2's width, small
            models learn several times faster with 1 / sqrt(hidden_size).
    """

    __pydantic_config__ = _STRICT

    tokenizer: str | None = None
    bert: str | None = None
    hidden_size: _Count | None = None
    num_hidden_layers: _Count | None = None
    num_attention_heads: _Count | None = None
    intermediate_size: _Count | None = None
    num_query_tokens: _Count | None = None
    max_position_embeddings: _Count | None = None
    embed_dim: _Count | None = None
    cross_attention_frequency: _Count | None = None
    dropout: _Share | None = None
    text_conditioned: bool | None = None
    initializer_range: Annotated[float, Field(gt=0)] | None = None


@dataclass
class LanguageModelSection:
    """The frozen language model of stage 2.

    Attributes:
        path: local folder or hub name.
        prompt: text before every caption; with `{}` in it, where the question goes (vqa).
        end_text: what ends a decoder-only target; None: the tokenizer's end token.
        match_embedding_scale: initialise soft prompts at the scale of its token embeddings (small
            models learn sooner); False: PyTorch's default, as LAVIS.
        activation: replaces that of a T5's feed-forward layers; LAVIS uses `gelu` in FlanT5.
        llm_dropout, pack_padding: as in `Stage2Config`.
    """

    __pydantic_config__ = _STRICT

    path: str
    prompt: str = ""
    end_text: str | None = None
    match_embedding_scale: bool = False
    activation: str | None = None
    llm_dropout: bool = False
    pack_padding: bool = False


@dataclass
class DataSection:
    """Images and texts. Give either `features` or `images` and `image_encoder`.

    Attributes:
        records: JSON lines, as in `blip2fast.data.records`.
        task: `caption`, or in stage 2 `vqa`, or `sequence`: any number of images per sample.
        features: folder of a feature cache.
        images: folder of image files; the frozen encoder then runs in the loop.
        image_encoder: folder or hub name of a transformers vision model, for `images`.
        image_encoder_layer: how many of its blocks to run; None: BLIP-2's choice for its kind.
        augment: random crops and flips (`images` only).
        eval_records, eval_features, eval_images: held-out data; None: no evaluation.
        max_txt_len: longer texts are truncated.
        workers: processes that prefetch batches; 0: the training process reads them itself.
    """

    __pydantic_config__ = _STRICT

    records: str
    task: Literal["caption", "vqa", "sequence"] = "caption"
    features: str | None = None
    images: str | None = None
    image_encoder: str | None = None
    image_encoder_layer: _Count | None = None
    image_size: _Count = 224
    augment: bool = True
    eval_records: str | None = None
    eval_features: str | None = None
    eval_images: str | None = None
    max_txt_len: Annotated[int, Field(ge=2)] = 32
    workers: _NonNegative = 0


@dataclass
class OptimSection:
    """AdamW, and its learning rate over the steps (paper, section 3.4).

    Attributes:
        lr: peak learning rate, after `warmup_steps` of linear warm-up.
        min_lr: end of the cosine decay, at `max_steps`.
        weight_decay: of matrices; not of biases, norms, the temperature and the queries.
        max_steps: optimizer steps; one takes batch_size x accumulation samples per process.
        clip_norm: gradient clipping by norm; 0: none.
        batch_size: samples per process and micro-step.
        accumulation: micro-steps per optimizer step.
        losses: of stage 1: itc, with or without itm and itg.
        grad_cache: in stage 1, ITC compares all samples of a step instead of those of a forward
            pass; features are computed twice (`blip2fast.stage1.contrast`).
    """

    __pydantic_config__ = _STRICT

    max_steps: _Count
    batch_size: _Count
    lr: Annotated[float, Field(gt=0)] = 1e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    warmup_steps: _NonNegative = 2000
    betas: tuple[_Share, _Share] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    accumulation: _Count = 1
    losses: tuple[LossName, ...] = LOSSES
    grad_cache: bool = False


@dataclass
class RunConfig:
    """The configuration of a training run.

    Attributes:
        stage: 1 (ITC, ITM, ITG on the Q-Former) or 2 (soft prompts into the language model).
        output_dir: folder of everything that the run writes.
        init_from: output folder or checkpoint of an earlier run, whose parameters this one starts
            from.
        allow_other_frozen: allow an `init_from` that was trained with another image encoder or
            language model. With another language model the projection is re-initialised.
        zero_stage: what DeepSpeed ZeRO partitions over the processes: 0 nothing, 1 the optimizer's
            states, 2 gradients too, 3 parameters too (the language model's).
        offload_param, offload_optimizer: where ZeRO keeps them (parameters: stage 3 only).
        nvme_path: folder for offloading to `nvme`.
        offload: placement of the frozen language model (stage 2). `none`: as zero_stage and
            offload_param say. `stream`: its blocks in host memory, streamed to the device.
            `zero3`: zero_stage 3 with offload_param. `auto`: the first of these that fits.
        stream_buffers: device buffers for streamed blocks.
        stream_storage: of streamed weights: `as_is`, or `int8` or `int4`, which changes the loss.
        gradient_checkpointing: recompute activations in the backward pass.
        kernels: this library's own, on a GPU: `check`, those that a check there finds right and
            quicker (docs/kernels.md); `never`; or `trust`, unchecked.
        eval_every, save_every: in steps; 0: only at the end (evaluation), never (checkpoints).
        keep_last: number of checkpoints to keep.
        eval_batch_size: samples per evaluation batch, over all processes; the last may be smaller.
        resume: continue from the last checkpoint in `output_dir`, if there is one.
    """

    __pydantic_config__ = _STRICT

    stage: Literal[1, 2]
    output_dir: str
    data: DataSection
    optim: OptimSection
    model: ModelSection = field(default_factory=ModelSection)
    language_model: LanguageModelSection | None = None
    init_from: str | None = None
    allow_other_frozen: bool = False
    seed: _NonNegative = 0
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_param: Offload = "none"
    offload_optimizer: Offload = "none"
    nvme_path: str | None = None
    offload: OffloadChoice = "none"
    stream_buffers: Annotated[int, Field(ge=2)] = 2
    stream_storage: Storage = "as_is"
    gradient_checkpointing: bool = False
    kernels: Kernels = "check"
    eval_every: _NonNegative = 0
    eval_batch_size: Annotated[int, Field(ge=2)] = 64
    save_every: _NonNegative = 0
    keep_last: _Count = 2
    log_every: _Count = 50
    resume: bool = False
