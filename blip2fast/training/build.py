"""Builds a run's tokenizer, model, batches and held-out data from its configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from blip2fast.checkpoints.trained import (
    Description,
    attach_encoder,
    check_frozen,
    load_parameters,
    read_parameters,
    trained_names,
)
from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages, FileImages, ImageStore, unusable_images
from blip2fast.data.records import IMAGE_MARKER, images_of
from blip2fast.data.skipping import LeftOut, check_skipped, most_skipped
from blip2fast.data.source_config import Given
from blip2fast.data.sources import checked_keys, mixture, open_records, whereabouts
from blip2fast.data.table import RecordTable
from blip2fast.data.texts import AnswerTexts, CaptionTexts, SequenceTexts, Stage1Texts
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.hub import lasting_name
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.image_encoders import (
    FrozenImageEncoder,
    load_image_encoder,
    parse_encoder_id,
)
from blip2fast.frozen.images import transform_for
from blip2fast.offload.loading import source_identity
from blip2fast.published.reading import open_weights
from blip2fast.published.weights import Weights, same_language_model
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
from blip2fast.training.skipped import LeftOutBefore

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
        left_out: what is left out of the data; None unless `data.on_error` is `skip`.
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
    frozen: frozenset[str] = frozenset()
    left_out: LeftOutBefore | None = None
    start: str = ""

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
    start = None if config.init_from is None else open_weights(config.init_from)
    source = _train_images(config, None if start is None else start.described)
    note = _log.warning if rank == 0 else None
    data = config.data
    images, skips = _folder(data.images), data.on_error == "skip"
    bad_rows: list[LeftOut] | None = [] if skips else None
    records = open_records(data.records, data.task, images, note, bad_rows)
    keys = checked_keys(records)
    if bad_rows is None:
        source.store.check(set(keys))
    else:
        _check_unusable(config, source.store, keys, bad_rows, len(records))
    held_out, held_out_left = _held_out(config, source, note)
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
    batches = PlannedBatches(records, plan, source.store, texts, skips)
    tokenizers = [each for each in (tokenizer, words) if each is not None]
    contents = identify_data(records, source.store, keys, tokenizers)
    outside = source.encoder if model.image_encoder is None else None
    frozen = _frozen_names(config, model)
    left_out = None
    if bad_rows is not None:
        find = partial(whereabouts, data.records, records, images)
        left_out = LeftOutBefore(bad_rows, held_out_left, find)
    taken = ""
    if start is not None and start.description is None:
        names = [n for n in trained_names(model) if not n.startswith((*FROZEN, "image_encoder."))]
        taken = str(start.report(names, config.stage, "init_from"))
    return Run(
        *(model, description, tokenizer, text, batches, outside, held_out, contents),
        frozen=frozen,
        left_out=left_out,
        start=taken,
    )


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


def _check_unusable(
    config: RunConfig, store: ImageStore, keys: Sequence[str], bad: Sequence[LeftOut], usable: int
) -> None:
    """Refuse training data that are plainly beyond `data.max_skipped` before anything is drawn."""
    most, total = config.data.max_skipped, usable + len(bad)
    check_skipped(bad, most, total, "records (data.on_error: skip)")
    missing = list(islice(store.missing(keys), most_skipped(most, total) + 1))
    check_skipped(missing, most, total, "images or more (data.on_error: skip)")


def _held_out(
    config: RunConfig, source: _ImageSource, note: Callable[[str], None] | None
) -> tuple[HeldOut | None, list[LeftOut]]:
    """The held-out set, and what is left out of it where `data.on_error` is `skip`."""
    data = config.data
    if data.eval_records is None:
        return None, []
    store, folder = _eval_images(config, source), _folder(data.eval_images)
    if data.on_error == "raise":
        held_out = HeldOut(open_records(data.eval_records, data.task, folder, note), store)
        held_out.images.check(set(held_out.keys()))
        return held_out, []
    left_out: list[LeftOut] = []
    table = open_records(data.eval_records, data.task, folder, note, left_out)
    total = len(table) + len(left_out)
    held_out, unusable = _without_unusable(data.eval_records, table, store, folder)
    left_out += unusable
    check_skipped(left_out, data.max_skipped, total, "held-out records (data.on_error: skip)")
    return held_out, left_out


def _without_unusable(
    given: Given | Sequence[Given], table: RecordTable, store: ImageStore, folder: Path | None
) -> tuple[HeldOut, list[LeftOut]]:
    """The held-out records whose images can all be used, and the others."""
    held_out = HeldOut(table, store)
    faults = unusable_images(store, held_out.keys())
    if not faults:
        return held_out, []
    rows = {n: key for n, record in enumerate(table) for key in images_of(record) if key in faults}
    found = [
        LeftOut(where, faults[rows[row]], rows[row])
        for row, where in whereabouts(given, table, folder, rows).items()
    ]
    held_out.records = [record for row, record in enumerate(table) if row not in rows]
    return held_out, found


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
    return FileImages(Path(folder), transform, config.seed, data.max_pixels)


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
    """The model, its tokenizer, and what `model.json` says of it; `start` is `init_from`."""
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
    encoder = source.encoder if source.is_own else None
    adapter = None
    if config.stage == 1:
        model, tokenizer = _stage1(config, sizes, start, encoder)
    else:
        model, tokenizer, frozen["language_model"] = _stage2(config, sizes, start, encoder)
        adapter = getattr(model.language_model, "peft_config", {}).get(ADAPTER_NAME)
    description = dataclasses.replace(
        _describe(config, model, source.encoder_id, frozen),
        image_size=None if source.encoder is None else source.encoder.image_size,
        trains_encoder=source.is_own,
        adapter=adapter,
    )
    return model, tokenizer, description


def _describe(
    config: RunConfig,
    model: Blip2Stage1 | Blip2Stage2,
    encoder_id: str,
    frozen: dict[str, FrozenIdentity],
) -> Description:
    """The run's `model.json`; folders by their absolute paths, models of the hub with revisions."""
    parsed = parse_encoder_id(encoder_id)
    encoder = encoder_id if parsed is None else parsed[0]
    given = {
        "image_encoder": encoder,
        "language_model": config.language_model.path if config.language_model else None,
        "tokenizer": config.model.tokenizer,
    }
    names = {part: lasting_name(name) for part, name in given.items() if name}
    tail = encoder_id.removeprefix(encoder)
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
    config: RunConfig,
    sizes: dict[str, Any],
    start: Weights | None,
    encoder: FrozenImageEncoder | None,
) -> tuple[Blip2Stage1, Any]:
    tokenizer, words = qformer_words(config, sizes)
    size = Stage1Config(**(sizes | words))
    check_positions(config, size.max_position_embeddings)
    model = Blip2Stage1(size, losses=config.optim.losses)
    if encoder is not None:
        attach_encoder(model, encoder)
    # transformers' retrieval models lack the generation head, which BERT has
    if config.model.bert is not None and (start is None or start.layout == "transformers"):
        initialise_from_bert(model, config.model.bert)
    if start is not None:
        _load_start(config, model, start.complete(model.state_dict()))
    return model, tokenizer


def _stage2(
    config: RunConfig,
    sizes: dict[str, Any],
    start: Weights | None,
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
    adapter = None if start is None else start.described.adapter
    if adapter is not None:
        _check_adapter(config, adapter, same)
    if start is None or same:
        model = Blip2Stage2(size, language_model)
    else:
        # the start's projection, if any, was trained for another language model
        model = Blip2Stage2.from_stage1(start.parameters(), language_model, size)
    if lora is not None:
        add_lora(language_model, **dataclasses.asdict(lora))
    if encoder is not None:
        attach_encoder(model, encoder)
    if start is not None and same:
        _load_start(config, model, start.parameters())
    return model.train(), tokenizer, identity


def _load_start(
    config: RunConfig, model: Blip2Stage1 | Blip2Stage2, state: Mapping[str, Tensor]
) -> None:
    """Load the parameters of `init_from`.

    The image encoder has them already, and adapters that `init_from` does not have are new.
    """
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
