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
    check_frozen,
    load_parameters,
    trained_names,
)
from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages, FileImages, ImageStore
from blip2fast.data.records import IMAGE_MARKER, images_of
from blip2fast.data.sources import checked_keys, mixture, open_records
from blip2fast.data.texts import AnswerTexts, CaptionTexts, SequenceTexts, Stage1Texts
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.hub import lasting_name
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.offload.loading import source_identity
from blip2fast.published.reading import open_weights
from blip2fast.published.weights import Weights, same_language_model
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import initialise_from_bert
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.training.config import DTYPE_OF, RunConfig
from blip2fast.training.data_identity import identify_data
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
        identity: the encoder's identity, if known.
    """

    store: ImageStore
    encoder: FrozenImageEncoder | None
    width: int
    encoder_id: str
    identity: FrozenIdentity | None


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
        image_encoder: if images are files, the frozen encoder; it runs outside the engine.
        held_out: the held-out set; None without evaluation.
        contents: digests of the data and the tokenizers, compared on resume.
        start: what was taken from a published `init_from`, as lines of text.
    """

    model: Blip2Stage1 | Blip2Stage2
    description: Description
    tokenizer: Any
    text: Stage2Text | None
    batches: PlannedBatches[Any]
    image_encoder: FrozenImageEncoder | None
    held_out: HeldOut | None
    contents: dict[str, str]
    start: str = ""


def build_run(config: RunConfig, rank: int, world_size: int) -> Run:
    """Load and build all parts; parameters are loaded from `init_from` or initialised at random.

    Raises:
        ValueError: parts that do not fit together, with the conflicting values.
    """
    torch.manual_seed(config.seed)
    source = _train_images(config)
    note = _log.warning if rank == 0 else None
    data = config.data
    records = open_records(data.records, data.task, _folder(data.images), note)
    keys = checked_keys(records)
    source.store.check(set(keys))
    held_out = None
    if data.eval_records is not None:
        read = open_records(data.eval_records, data.task, _folder(data.eval_images), note)
        held_out = HeldOut(read, _eval_images(config))
        held_out.images.check(set(held_out.keys()))
    start = None if config.init_from is None else open_weights(config.init_from)
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
    taken = ""
    if start is not None and start.description is None:
        taken = str(start.report(trained_names(model), config.stage, "init_from"))
    return Run(
        model, description, tokenizer, text, batches, source.encoder, held_out, contents, taken
    )


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _train_images(config: RunConfig) -> _ImageSource:
    data = config.data
    if data.features is not None:
        cache = FeatureCache(data.features)
        reader = CachedImages(cache)
        return _ImageSource(reader, None, cache.width, cache.encoder_id, cache.encoder)
    files = _image_files(config, data.images, data.augment)
    encoder = load_image_encoder(
        str(data.image_encoder), data.image_encoder_layer, DTYPE_OF[config.precision]
    )
    if encoder.image_size != data.image_size:
        raise ValueError(
            f"data.image_size is {data.image_size}, but {data.image_encoder} takes images of "
            f"{encoder.image_size}"
        )
    return _ImageSource(files, encoder, encoder.width, encoder.encoder_id, encoder.identity)


def _eval_images(config: RunConfig) -> ImageStore:
    if config.data.eval_features is not None:
        return CachedImages(FeatureCache(config.data.eval_features))
    return _image_files(config, config.data.eval_images, augment=False)


def _image_files(config: RunConfig, folder: str | None, augment: bool) -> FileImages:
    data = config.data
    if folder is None or data.image_encoder is None:
        raise ValueError("data: give features, or images and image_encoder")
    transform = transform_for(data.image_encoder, data.image_size, augment)
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
    config: RunConfig, source: _ImageSource, start: Weights | None
) -> tuple[Blip2Stage1 | Blip2Stage2, Any, Description]:
    if start is not None:
        if start.stage > config.stage:
            raise ValueError(
                f"init_from {config.init_from!r} holds a stage-{start.stage} model, but the "
                f"configuration says stage: {config.stage}; a Q-Former goes from stage 1 to 2"
            )
        if not config.allow_other_frozen:
            _refuse_other_tokens(config, start.described, source)
    sizes = _sizes(config, source.width, None if start is None else start.described)
    frozen = {} if source.identity is None else {"image_encoder": source.identity}
    model: Blip2Stage1 | Blip2Stage2
    if config.stage == 1:
        model, tokenizer = _stage1(config, sizes, start)
    else:
        model, tokenizer, frozen["language_model"] = _stage2(config, sizes, start)
    return model, tokenizer, _describe(config, model, source.encoder_id, frozen)


def _describe(
    config: RunConfig,
    model: Blip2Stage1 | Blip2Stage2,
    encoder_id: str,
    frozen: dict[str, FrozenIdentity],
) -> Description:
    """The run's `model.json`; folders by their absolute paths, models of the hub with revisions."""
    encoder, comma, block = encoder_id.rpartition(", block ")
    given = {
        "image_encoder": encoder or encoder_id,
        "language_model": config.language_model.path if config.language_model else None,
        "tokenizer": config.model.tokenizer,
    }
    names = {part: lasting_name(name) for part, name in given.items() if name}
    tail = f"{comma}{block}" if encoder else ""
    return Description(
        stage=config.stage,
        sizes=dataclasses.asdict(model.config),
        image_encoder=names["image_encoder"][0] + tail if "image_encoder" in names else "",
        language_model=names["language_model"][0] if "language_model" in names else None,
        tokenizer=names["tokenizer"][0] if "tokenizer" in names else None,
        frozen=frozen,
        revisions={part: revision for part, (_, revision) in names.items() if revision},
    )


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
    config: RunConfig, sizes: dict[str, Any], start: Weights | None
) -> tuple[Blip2Stage1, Any]:
    tokenizer, words = qformer_words(config, sizes)
    size = Stage1Config(**(sizes | words))
    check_positions(config, size.max_position_embeddings)
    model = Blip2Stage1(size, losses=config.optim.losses)
    # transformers' retrieval models lack the generation head, which BERT has
    if config.model.bert is not None and (start is None or start.layout == "transformers"):
        initialise_from_bert(model, config.model.bert)
    if start is not None:
        load_parameters(
            model, start.complete(model.state_dict()), f"init_from {config.init_from!r}"
        )
    return model, tokenizer


def _stage2(
    config: RunConfig, sizes: dict[str, Any], start: Weights | None
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
    if start is None:
        return Blip2Stage2(size, language_model), tokenizer, identity
    state = start.parameters()
    if not _same_language_model(config, start, identity):
        # the start's projection, if any, was trained for another language model
        model = Blip2Stage2.from_stage1(state, language_model, size)
    else:
        model = Blip2Stage2(size, language_model)
        load_parameters(model, state, f"init_from {config.init_from!r}")
    return model, tokenizer, identity


def _same_language_model(
    config: RunConfig, start: Weights | None, identity: FrozenIdentity
) -> bool:
    """Whether the model of `init_from` was trained with this language model.

    Raises:
        ValueError: it was trained with another one, and `allow_other_frozen` is not set.
    """
    if start is None or start.stage == 1:
        return False
    where = f"init_from {config.init_from!r}"
    if start.description is None:
        remedy = ", or set allow_other_frozen: true for a new projection"
        return same_language_model(start, identity, where, config.allow_other_frozen, remedy)
    if not config.allow_other_frozen:
        remedy = "Give that one, or set allow_other_frozen: true for a new projection"
        check_frozen(start.description, "language_model", identity, where, remedy)
        return True
    there = start.description.frozen.get("language_model")
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
