"""The configuration of a training run: sections, keys, types and ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from blip2fast._choices import LOSSES, Kernels, LossName, Quantization, Storage
from blip2fast._imports import needs
from blip2fast.data.skipping import OnError
from blip2fast.data.source_config import RecordSource
from blip2fast.frozen.unusable import MAX_PIXELS

with needs("configure a run", "pydantic"):
    from pydantic import ConfigDict, Discriminator, Field, Tag

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "cpu", "nvme"]
# placement of the frozen language model; see `RunConfig.offload`
OffloadChoice = Literal["none", "stream", "zero3", "auto"]

_STRICT = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(ge=1)]
_NonNegative = Annotated[int, Field(ge=0)]
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _shape(value: object) -> str:
    """By which of its forms an entry of `data.records` is judged, so that a fault is told once."""
    if isinstance(value, list):
        return "list"
    return "path" if isinstance(value, str | int | float | None) else "source"


_Path = Annotated[str, Tag("path")]
_Source = Annotated[RecordSource, Tag("source")]
_OneSource = Annotated[_Path | _Source, Discriminator(_shape)]
_Records = Annotated[
    _Path | _Source | Annotated[list[_OneSource], Tag("list")], Discriminator(_shape)
]


@dataclass
class ModelSection:
    """Sizes of the Q-Former. None means BLIP-2's size, or in stage 2 that of `init_from`.

    The image token width and the vocabulary size are taken from the data and the tokenizer.

    Attributes:
        tokenizer: folder or hub name of the Q-Former's tokenizer, if it has text input. A missing
            [DEC] token is added, as BLIP-2 does to bert-base-uncased.
        bert: folder or hub name of a BERT that initialises the Q-Former (stage 1; paper, section
            3.1); the cross-attention and the queries stay randomly initialised.
        embed_dim: width of the contrastive features (stage 1).
        dropout: dropout rate of hidden states and attention probabilities.
        text_conditioned: the Q-Former also reads the prompt, as in InstructBLIP (stage 2; needs
            `tokenizer`).
        initializer_range: standard deviation of new weights. 0.02 suits BLIP-2's width; small
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
    initializer_range: _Positive | None = None


@dataclass
class LoraSection:
    """Low-rank adapters of the language model, by peft (docs/fine_tuning.md).

    Attributes:
        r: rank of the update of a weight.
        alpha: the update is scaled by alpha / r.
        dropout: dropout rate of the adapters' inputs.
        target_modules: names of linear layers, or `all-linear`; None: peft's choice for the model
            type, which is the query and value projections.
    """

    __pydantic_config__ = _STRICT

    r: _Count = 8
    alpha: _Count = 16
    dropout: _Share = 0.0
    target_modules: list[str] | Literal["all-linear"] | None = None


@dataclass
class LanguageModelSection:
    """The frozen language model of stage 2.

    Attributes:
        path: local folder or hub name.
        prompt: text before every caption; for vqa a template with `{}` for the question.
        end_text: text that ends a decoder-only target; None: the tokenizer's end token.
        match_embedding_scale: initialise soft prompts at the scale of the token embeddings, with
            which small models learn sooner; False: PyTorch's default, as in LAVIS.
        activation: replaces the activation of T5 feed-forward layers; LAVIS uses `gelu` in FlanT5.
        llm_dropout, pack_padding: as in `Stage2Config`.
        lora: train adapters in it; its own weights stay frozen.
    """

    __pydantic_config__ = _STRICT

    path: str
    prompt: str = ""
    end_text: str | None = None
    match_embedding_scale: bool = False
    activation: str | None = None
    llm_dropout: bool = False
    pack_padding: bool = False
    lora: LoraSection | None = None


@dataclass
class ImageEncoderSection:
    """How the image encoder that `data.image_encoder` names runs, and whether it is trained.

    Attributes:
        quantization: `int8`: a frozen encoder computes with 8-bit integers, by torchao, which
            changes its tokens (docs/encoders.md).
        compile: compile the blocks of a frozen encoder by `torch.compile`.
        train: train it with the rest, instead of leaving it frozen (paper, sections 4.2 to 4.4);
            `data.images` are then encoded with gradients.
        layer_decay: the learning rate of each block is that of the next one times this; the last
            block has it once (LAVIS: `lr_layer_decay`).
        gradient_checkpointing: recompute its blocks in the backward pass, as the key of the run
            does for all parts.
    """

    __pydantic_config__ = _STRICT

    quantization: Quantization = "none"
    compile: bool = False
    train: bool = False
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    gradient_checkpointing: bool = False


@dataclass
class DataSection:
    """Images and texts. Set either `features`, or `images` and `image_encoder`.

    Attributes:
        records: a table of `blip2fast data import`, or a source of any layout (docs/data.md), or a
            list of them, each with its options and perhaps a weight (`RecordSource`).
        task: `caption`, or in stage 2 `vqa`, or `sequence` (any number of images per sample).
        features: folder of a feature cache.
        images: folder of image files; the image encoder then runs in the training loop.
        image_encoder: folder or hub name of a vision model of transformers, or `timm:NAME`, for
            `images` (docs/encoders.md).
        image_encoder_layer: number of its blocks to run, or -1, -2, ... counted from the last;
            None: BLIP-2's choice for its model type.
        image_size: h = w of the images, in pixels; None: the encoder's own. For another size its
            position embeddings are interpolated.
        augment: random crops and flips (`images` only).
        max_pixels: most pixels of a picture; a larger one cannot be used. At most PIL's limit, the
            default.
        eval_records, eval_features, eval_images: the held-out set; None: no evaluation.
        max_txt_len: maximum text length in tokens; longer texts are truncated.
        positives: which pairs of a batch are positives of each other (stage 1): those of one
            `image`, or those of one caption `text`.
        workers: DataLoader workers; 0: batches are loaded in the training process.
        on_error: what to do about a sample that cannot be used (an unreadable image, an empty
            caption, a feature that the cache lacks). `raise`: refuse it. `skip`: put another in its
            place, always the same one, and list it in `skipped.jsonl` (docs/data.md).
        max_skipped: with `skip`, how many records may be unusable: a count, or below 1 a share of
            them; None: 0.01. More end the run.
    """

    __pydantic_config__ = _STRICT

    records: _Records
    task: Literal["caption", "vqa", "sequence"] = "caption"
    features: str | None = None
    images: str | None = None
    image_encoder: str | None = None
    image_encoder_layer: int | None = None
    image_size: _Count | None = None
    augment: bool = True
    max_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS)] = MAX_PIXELS
    eval_records: _Records | None = None
    eval_features: str | None = None
    eval_images: str | None = None
    max_txt_len: Annotated[int, Field(ge=2)] = 32
    positives: Literal["image", "text"] = "image"
    workers: _NonNegative = 0
    on_error: OnError = "raise"
    max_skipped: _NonNegative | _Fraction | None = None


@dataclass
class OptimSection:
    """AdamW and its learning-rate schedule (paper, section 3.4).

    Attributes:
        lr: peak learning rate, after `warmup_steps` of linear warm-up.
        min_lr: end of the cosine decay, at `max_steps`.
        weight_decay: applied to matrices, not to biases, norms, the temperature and the queries.
        max_steps: optimizer steps; each uses batch_size x accumulation samples per process.
        clip_norm: maximum gradient norm; 0: no clipping.
        batch_size: samples per process and micro-step.
        accumulation: micro-steps per optimizer step.
        losses: stage-1 losses: itc, optionally with itm and itg.
        grad_cache: in stage 1, ITC contrasts all samples of an optimizer step instead of those of
            one forward pass; features are computed twice (`blip2fast.stage1.contrast`).
        word_mean: what ITG and the language-modelling loss average over. `step`: the words of the
            optimizer step, whatever its passes and processes. `per_pass`: the words of each forward
            pass, and then the passes, as in LAVIS; words of short texts count more.
        lr_scales: factors of the learning rate, by patterns of parameter names such as
            `qformer.*` or `*.bias` (`*` matches dots too). The last pattern that matches counts;
            0 freezes.
    """

    __pydantic_config__ = _STRICT

    max_steps: _Count
    batch_size: _Count
    lr: _Positive = 1e-4
    min_lr: _AtLeast0 = 1e-5
    warmup_steps: _NonNegative = 2000
    betas: tuple[_Share, _Share] = (0.9, 0.98)
    eps: _Positive = 1e-8
    weight_decay: _AtLeast0 = 0.05
    clip_norm: _AtLeast0 = 1.0
    accumulation: _Count = 1
    losses: tuple[LossName, ...] = LOSSES
    grad_cache: bool = False
    word_mean: Literal["step", "per_pass"] = "step"
    lr_scales: dict[str, _AtLeast0] = field(default_factory=dict)


@dataclass
class LogSection:
    """Where a run's metrics go besides `metrics.jsonl` and TensorBoard (docs/logs.md).

    Attributes:
        wandb: Weights & Biases: the name of a project, or true for the project `blip2fast`.
    """

    __pydantic_config__ = _STRICT

    wandb: bool | Annotated[str, Field(min_length=1)] = False


@dataclass
class RunConfig:
    """The configuration of a training run.

    Attributes:
        stage: 1 (ITC, ITM, ITG on the Q-Former) or 2 (soft prompts into the language model).
        output_dir: output folder of the run.
        init_from: where parameters are taken from: output folder or checkpoint of an earlier run,
            a BLIP-2 or InstructBLIP of transformers (folder or hub name), or a `.pth` file of LAVIS
            (docs/published_weights.md).
        init_text_from: likewise, where a Q-Former that reads the prompt takes the weights that read
            it, if those of `init_from` read images alone (`model.text_conditioned`): the run of
            stage 1, after a stage 2 without it.
        allow_other_frozen: allow an `init_from` that was trained with another image encoder or
            language model. With another language model the projection is re-initialised.
        zero_stage: what DeepSpeed ZeRO partitions over the processes: 0 nothing, 1 optimizer
            states, 2 also gradients, 3 also parameters (the language model's).
        offload_param, offload_optimizer: where ZeRO keeps them (parameters: stage 3 only).
        nvme_path: folder for offloading to `nvme`.
        offload: placement of the frozen language model (stage 2). `none`: determined by
            zero_stage and offload_param. `stream`: blocks in host memory, streamed to the device.
            `zero3`: zero_stage 3 with offload_param. `auto`: the first of these that fits.
        stream_buffers: number of device buffers for streamed blocks.
        stream_storage: storage of streamed weights: `as_is`, or `int8` or `int4`, which change
            the loss.
        gradient_checkpointing: recompute activations in the backward pass.
        kernels: use of this library's GPU kernels: `check` uses those that a check on this GPU
            finds correct and faster (docs/kernels.md); `never`; or `trust`, without a check.
        eval_every, save_every: interval in optimizer steps; 0: evaluate only at the end, save no
            checkpoints.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of it; 0: none.
        keep_best: also keep the best checkpoint by this held-out metric, without its `eval_`:
            the lowest `loss` or `loss_*`, the highest of others, such as `t2i_r1` (stage 1) or
            `exact` (stage 2). It is saved when it is evaluated.
        eval_scores: also evaluate with the metrics of `blip2fast eval` (docs/evaluation.md): recall
            re-ranked by ITM, `rerank_*` (stage 1); of the greedily written texts `cider_d`,
            `bleu_1` to `bleu_4` and `rouge_l`, or `vqa_accuracy` (stage 2).
        eval_batch_size: samples per evaluation batch, over all processes; the last may be smaller.
        resume: continue from the last checkpoint in `output_dir`, if there is one. What may differ
            from the earlier start: `blip2fast.training.restart`.
        overwrite: delete an earlier run in `output_dir` and start anew.
        on_nonfinite: what to do about a step whose losses or gradients are not finite. It never
            changes the parameters. `raise`: stop the run with an error. `skip`: go on, and stop
            after `skip_limit` such steps. Overflows that fp16's loss scale answers are not counted.
    """

    __pydantic_config__ = _STRICT

    stage: Literal[1, 2]
    output_dir: str
    data: DataSection
    optim: OptimSection
    model: ModelSection = field(default_factory=ModelSection)
    language_model: LanguageModelSection | None = None
    image_encoder: ImageEncoderSection = field(default_factory=ImageEncoderSection)
    init_from: str | None = None
    init_text_from: str | None = None
    allow_other_frozen: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
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
    eval_scores: bool = False
    eval_batch_size: Annotated[int, Field(ge=2)] = 64
    save_every: _NonNegative = 0
    keep_last: _Count = 2
    keep_every: _NonNegative = 0
    keep_best: str | None = None
    log_every: _Count = 50
    log: LogSection = field(default_factory=LogSection)
    resume: bool = False
    overwrite: bool = False
    on_nonfinite: Literal["raise", "skip"] = "raise"
    skip_limit: _Count = 10
