"""Builds a run's tokenizer, model, batches and held-out data from its configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from blip2fast.checkpoints.trained import (
    Description,
    attach_encoder,
    check_frozen,
    load_parameters,
    read_description,
    read_parameters,
    trained_names,
)
from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages, FileImages, ImageStore
from blip2fast.data.records import IMAGE_MARKER, images_of
from blip2fast.data.sources import checked_keys, mixture, open_records
from blip2fast.data.texts import AnswerTexts, CaptionTexts, SequenceTexts, Stage1Texts
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.offload.loading import source_identity
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import initialise_from_bert
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.lora import NAME as ADAPTER_NAME
from blip2fast.stage2.lora import add_lora
from blip2fast.stage2.model import FROZEN, Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.training.config import DTYPE_OF, RunConfig
from blip2fast.training.data_identity import identify_data
from blip2fast.training.parameter_groups import check_scales, lr_scale
from blip2fast.training.placement import load_frozen

_log = logging.getLogger(__name__)
Records = Sequence[Any]  # CaptionRecord, or QuestionRecord for vqa


@dataclass
class _ImageSource:
    """The source of a run's image tokens.

    Attributes:
        encoder: runs in the training loop if images are files; else None.
        width: E.
        encoder_id: name of the encoder.
        identity: the encoder's identity, if known; of one that is trained, before its training.
        is_own: whether the encoder becomes part of the model and is stored with it.
    """

    store: ImageStore
    encoder: FrozenImageEncoder | None
    width: int
    encoder_id: str
    identity: FrozenIdentity | None
    is_own: bool = False


@dataclass
class HeldOut:
    """The held-out set: records and their images."""

    records: Records
    images: ImageStore

    def keys(self) -> list[str]:
        """The distinct image keys, in the order of their first record."""
        return list(dict.fromkeys(key for record in self.records for key in images_of(record)))


@dataclass
class Run:
    """All parts of a training run.

    Attributes:
        model: trained parameters in fp32, frozen ones in the run's precision.
        description: the contents of `model.json`.
        tokenizer: the Q-Former's (stage 1) or the language model's (stage 2).
        text: stage 2's text preparation.
        batches: item i is the batch of micro-step i.
        image_encoder: if images are files, the frozen encoder; it runs outside the engine. None if
            the model has its own, which is stored with it.
        held_out: the held-out set; None without evaluation.
        contents: digests of the data and the tokenizers, compared on resume.
        frozen: names of parameters that are stored with the trained ones, but not trained
            (`optim.lr_scales`, or an encoder that an earlier run has trained).
    """

    model: Blip2Stage1 | Blip2Stage2
    description: Description
    tokenizer: Any
    text: Stage2Text | None
    batches: PlannedBatches[Any]
    image_encoder: FrozenImageEncoder | None
    held_out: HeldOut | None
    contents: dict[str, str]
    frozen: frozenset[str] = frozenset()

    def own_encoder(self) -> FrozenImageEncoder | None:
        """The image encoder that is part of the model, if it has one."""
        encoder = self.model.image_encoder
        return encoder if isinstance(encoder, FrozenImageEncoder) else None


def build_run(config: RunConfig, rank: int, world_size: int) -> Run:
    """Load and build all parts; parameters are loaded from `init_from` or initialised at random.

    Raises:
        ValueError: parts that do not fit together, with the conflicting values.
    """
    torch.manual_seed(config.seed)
    start = None if config.init_from is None else read_description(config.init_from)
    source = _train_images(config, start)
    note = _log.warning if rank == 0 else None
    data = config.data
    records = open_records(data.records, data.task, _folder(data.images), note)
    keys = checked_keys(records)
    source.store.check(set(keys))
    held_out = None
    if data.eval_records is not None:
        read = open_records(data.eval_records, data.task, _folder(data.eval_images), note)
        held_out = HeldOut(read, _eval_images(config, source))
        held_out.images.check(set(held_out.keys()))
    model, tokenizer, description = _model(config, source, start)
    text, words = None, None
    if isinstance(model, Blip2Stage2):
        reads = model.config.text_conditioned
        words = qformer_tokenizer(str(config.model.tokenizer)) if reads else None
        text = model.text(tokenizer, config.seed, words)
    plan = BatchPlan(
        len(records),
        config.optim.batch_size,
        config.seed,
        rank,
        world_size,
        config.optim.accumulation,
        mixture(data.records, records),
    )
    texts = text_maker(config, tokenizer, text)
    batches = PlannedBatches(records, plan, source.store, texts)
    tokenizers = [each for each in (tokenizer, words) if each is not None]
    contents = identify_data(records, source.store, keys, tokenizers)
    outside = source.encoder if model.image_encoder is None else None
    frozen = _frozen_names(config, model)
    return Run(model, description, tokenizer, text, batches, outside, held_out, contents, frozen)


def _frozen_names(config: RunConfig, model: Blip2Stage1 | Blip2Stage2) -> frozenset[str]:
    """The parameters of the trained part that this run does not train.

    Raises:
        ValueError: as `check_scales`.
    """
    names = trained_names(model)
    if not config.image_encoder.train:
        held = {name for name in names if name.startswith("image_encoder.")}
        names = [name for name in names if name not in held]
    else:
        held = set()
    scales = config.optim.lr_scales
    check_scales(names, scales)
    return frozenset(held | {name for name in names if not lr_scale(name, scales)})


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _train_images(config: RunConfig, start: Description | None) -> _ImageSource:
    """The source of the training images.

    Raises:
        ValueError: a feature cache, where `init_from` has its own encoder.
    """
    data = config.data
    inherits = start is not None and start.trains_encoder
    if data.features is not None:
        if inherits:
            raise ValueError(
                f"init_from {config.init_from!r} has an image encoder that was trained with it, "
                f"and data.features {data.features!r} are the tokens of another: give data.images "
                "and data.image_encoder instead"
            )
        cache = FeatureCache(data.features)
        reader = CachedImages(cache)
        return _ImageSource(reader, None, cache.width, cache.encoder_id, cache.encoder)
    own = config.image_encoder.train or inherits
    if inherits and start is not None:
        encoder = _inherited_encoder(config, start)
    else:
        # one that is trained begins in fp32, from which the engine makes its copy
        dtype = torch.float32 if own else DTYPE_OF[config.precision]
        name, layer = str(data.image_encoder), data.image_encoder_layer
        encoder = load_image_encoder(name, layer, dtype, data.image_size)
    files = _image_files(config, data.images, data.augment, encoder.image_size)
    return _ImageSource(files, encoder, encoder.width, encoder.encoder_id, encoder.identity, own)


def _inherited_encoder(config: RunConfig, start: Description) -> FrozenImageEncoder:
    """The image encoder of `init_from`, for this run's image size.

    Raises:
        ValueError: the weights do not fit the encoder in `data.image_encoder`.
    """
    data, where = config.data, f"init_from {config.init_from!r}"
    state = {
        name.removeprefix("image_encoder."): value
        for name, value in read_parameters(str(config.init_from)).items()
        if name.startswith("image_encoder.")
    }
    # positions that are never trained are interpolated once, from those of the checkpoint
    trained_size = any("position_embedding" in name for name in state)
    size = start.image_size if trained_size or data.image_size is None else data.image_size
    name, layer = str(data.image_encoder), data.image_encoder_layer
    encoder = load_image_encoder(name, layer, torch.float32, size)
    encoder.unfreeze()
    load_parameters(encoder, state, where)
    encoder.requires_grad_(False)
    if data.image_size is not None:
        encoder.resize(data.image_size)
    return encoder


def _eval_images(config: RunConfig, source: _ImageSource) -> ImageStore:
    if config.data.eval_features is not None:
        return CachedImages(FeatureCache(config.data.eval_features))
    size = 0 if source.encoder is None else source.encoder.image_size
    return _image_files(config, config.data.eval_images, augment=False, size=size)


def _image_files(config: RunConfig, folder: str | None, augment: bool, size: int) -> FileImages:
    data = config.data
    if folder is None or data.image_encoder is None:
        raise ValueError("data: give features, or images and image_encoder")
    transform = transform_for(data.image_encoder, size, augment)
    return FileImages(Path(folder), transform, config.seed)


def _sizes(config: RunConfig, width: int, start: Description | None) -> dict[str, Any]:
    """The model's sizes, from the `model` section and the model of `init_from`."""
    names = [f.name for f in dataclasses.fields(config.model)]
    wanted = {n: getattr(config.model, n) for n in names if n not in ("tokenizer", "bert")}
    dropout = wanted.pop("dropout")
    wanted = {name: value for name, value in wanted.items() if value is not None}
    wanted["encoder_hidden_size"] = width
    if start is not None:
        differing = [
            f"model.{name} is {start.sizes[name]} there, {value} here"
            for name, value in wanted.items()
            if name in start.sizes and start.sizes[name] != value
        ]
        if differing:
            raise ValueError(
                f"init_from {config.init_from!r} differs in size: {'; '.join(differing)} "
                "(encoder_hidden_size comes from data.features)"
            )
        known = {f.name for f in dataclasses.fields(Stage1Config)} | {"text_conditioned"}
        wanted |= {n: v for n, v in start.sizes.items() if n in known}
    if dropout is not None:
        wanted |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return wanted


def _model(
    config: RunConfig, source: _ImageSource, start: Description | None
) -> tuple[Blip2Stage1 | Blip2Stage2, Any, Description]:
    """The model, its tokenizer, and what `model.json` says of it; `start` describes `init_from`."""
    if start is not None:
        if start.stage > config.stage:
            raise ValueError(
                f"init_from {config.init_from!r} holds a stage-{start.stage} model, but the "
                f"configuration says stage: {config.stage}; a Q-Former goes from stage 1 to 2"
            )
        if not config.allow_other_frozen:
            _refuse_other_tokens(config, start, source)
    sizes = _sizes(config, source.width, start)
    frozen = {} if source.identity is None else {"image_encoder": source.identity}
    model: Blip2Stage1 | Blip2Stage2
    encoder = source.encoder if source.is_own else None
    adapter = None
    if config.stage == 1:
        model, tokenizer = _stage1(config, sizes, start, encoder)
    else:
        model, tokenizer, frozen["language_model"] = _stage2(config, sizes, start, encoder)
        adapter = getattr(model.language_model, "peft_config", {}).get(ADAPTER_NAME)
    description = Description(
        stage=config.stage,
        sizes=dataclasses.asdict(model.config),
        image_encoder=source.encoder_id,
        language_model=config.language_model.path if config.language_model else None,
        tokenizer=config.model.tokenizer,
        frozen=frozen,
        image_size=None if source.encoder is None else source.encoder.image_size,
        trains_encoder=source.is_own,
        adapter=adapter,
    )
    return model, tokenizer, description


def _refuse_other_tokens(config: RunConfig, start: Description, source: _ImageSource) -> None:
    """Refuse image tokens of an encoder other than that of `init_from`, by identity or name."""
    remedy = "Cache the images with that encoder, or set allow_other_frozen: true"
    if "image_encoder" in start.frozen and source.identity is not None:
        where = f"init_from {config.init_from!r}"
        check_frozen(start, "image_encoder", source.identity, where, remedy)
    elif source.encoder_id and start.image_encoder and source.encoder_id != start.image_encoder:
        raise ValueError(
            f"init_from {config.init_from!r} was trained on tokens of {start.image_encoder!r}, "
            f"but the data are of {source.encoder_id!r}. {remedy}"
        )


def _stage1(
    config: RunConfig,
    sizes: dict[str, Any],
    start: Description | None,
    encoder: FrozenImageEncoder | None,
) -> tuple[Blip2Stage1, Any]:
    tokenizer, words = qformer_words(config, sizes)
    size = Stage1Config(**(sizes | words))
    check_positions(config, size.max_position_embeddings)
    model = Blip2Stage1(size, losses=config.optim.losses)
    if encoder is not None:
        attach_encoder(model, encoder)
    if start is not None:
        _load_start(config, model)
    elif config.model.bert is not None:
        initialise_from_bert(model, config.model.bert)
    return model, tokenizer


def _stage2(
    config: RunConfig,
    sizes: dict[str, Any],
    start: Description | None,
    encoder: FrozenImageEncoder | None,
) -> tuple[Blip2Stage2, Any, FrozenIdentity]:
    if config.language_model is None:
        raise ValueError("language_model: stage 2 needs one")
    known = {f.name for f in dataclasses.fields(Stage2Config)}
    if sizes.get("text_conditioned"):
        _, words = qformer_words(config, sizes)
        sizes = sizes | words
    size = Stage2Config(
        **{name: value for name, value in sizes.items() if name in known},
        image_marker=IMAGE_MARKER if config.data.task == "sequence" else None,
        llm_activation=config.language_model.activation,
        llm_dropout=config.language_model.llm_dropout,
        pack_padding=config.language_model.pack_padding,
        max_txt_len=config.data.max_txt_len,
        prompt=config.language_model.prompt,
        end_text=config.language_model.end_text,
        match_embedding_scale=config.language_model.match_embedding_scale,
    )
    # identified from its files where possible, to refuse another model before loading it
    found = source_identity(config.language_model.path)
    if found is not None:
        _same_language_model(config, start, found)
    language_model = load_frozen(config)
    identity = found or identify_model(language_model)
    tokenizer = AutoTokenizer.from_pretrained(config.language_model.path, trust_remote_code=False)
    same = start is not None and _same_language_model(config, start, identity)
    lora = config.language_model.lora
    if start is not None and start.adapter is not None:
        _check_adapter(config, start.adapter, same)
    if start is None or same:
        model = Blip2Stage2(size, language_model)
    else:
        # the start's projection, if any, was trained for another language model
        state = read_parameters(str(config.init_from))
        model = Blip2Stage2.from_stage1(state, language_model, size)
    if lora is not None:
        add_lora(language_model, **dataclasses.asdict(lora))
    if encoder is not None:
        attach_encoder(model, encoder)
    if same:
        _load_start(config, model)
    return model.train(), tokenizer, identity


def _load_start(config: RunConfig, model: Blip2Stage1 | Blip2Stage2) -> None:
    """Load the parameters of `init_from`.

    The image encoder has them already, and adapters that `init_from` does not have are new.
    """
    state = read_parameters(str(config.init_from))
    given = {n: v for n, v in state.items() if not n.startswith("image_encoder.")}
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    new = {n: v for n, v in own.items() if n.startswith(FROZEN) and n not in given}
    load_parameters(model, {**given, **new}, f"init_from {config.init_from!r}")


def _check_adapter(config: RunConfig, adapter: Any, same: bool) -> None:
    """Refuse to leave out, or to change the form of, the adapters of `init_from`."""
    targets = adapter.target_modules
    there = {
        "r": adapter.r,
        "alpha": adapter.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
    where = f"init_from {config.init_from!r} has LoRA adapters ({there})"
    if not same:
        raise ValueError(f"{where} of another language model: give its language model")
    lora = config.language_model.lora if config.language_model is not None else None
    if lora is None:
        raise ValueError(
            f"{where}: train on with the same language_model.lora, or merge them into the language "
            "model first (docs/fine_tuning.md)"
        )
    here: dict[str, Any] = {"r": lora.r, "alpha": lora.alpha}
    if isinstance(lora.target_modules, list):
        here["target_modules"] = sorted(lora.target_modules)
    differing = [
        f"{n} is {there[n]} there, {value} here" for n, value in here.items() if there[n] != value
    ]
    if differing:
        raise ValueError(f"{where}: {'; '.join(differing)}: set the same language_model.lora")


def _same_language_model(
    config: RunConfig, start: Description | None, identity: FrozenIdentity
) -> bool:
    """Whether the model of `init_from` was trained with this language model.

    Raises:
        ValueError: it was trained with another one, and `allow_other_frozen` is not set.
    """
    if start is None or start.stage == 1:
        return False
    if not config.allow_other_frozen:
        remedy = "Give that one, or set allow_other_frozen: true for a new projection"
        where = f"init_from {config.init_from!r}"
        check_frozen(start, "language_model", identity, where, remedy)
        return True
    there = start.frozen.get("language_model")
    return there is not None and not there.differences(identity)


def qformer_words(config: RunConfig, sizes: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The Q-Former's tokenizer, and the vocabulary size and special token ids that it implies.

    Args:
        sizes: the sizes of the model to start from, which must agree with the tokenizer.

    Raises:
        ValueError: they disagree, or no tokenizer is configured.
    """
    if config.model.tokenizer is None:
        raise ValueError(
            f"init_from {config.init_from!r} has a Q-Former that reads text: set model.tokenizer "
            "and model.text_conditioned: true"
        )
    tokenizer = qformer_tokenizer(str(config.model.tokenizer))
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in words.items():
        if sizes.get(name, value) != value:
            raise ValueError(
                f"init_from {config.init_from!r} has {name} {sizes[name]}, but the tokenizer "
                f"{config.model.tokenizer!r} has {value}"
            )
    return tokenizer, words


def check_positions(config: RunConfig, positions: int) -> None:
    """Refuse texts that may be longer than the Q-Former's position table."""
    if config.data.max_txt_len > positions:
        raise ValueError(
            f"data.max_txt_len {config.data.max_txt_len} is longer than the position table, "
            f"model.max_position_embeddings {positions}"
        )


def text_maker(config: RunConfig, tokenizer: Any, text: Stage2Text | None) -> Any:
    """The callable that makes a batch's text tensors, for stage 1 or the stage-2 task."""
    if text is None:
        return Stage1Texts(tokenizer, config.data.max_txt_len, config.seed, config.data.positives)
    if config.data.task == "sequence":
        return SequenceTexts(text, config.seed)
    if config.data.task == "caption":
        return CaptionTexts(text, config.seed)
    return AnswerTexts(text, config.seed)
