"""Builds a run's tokenizer, model, batches and held-out data from its configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blip2fast.checkpoints.trained import Description, trained_names
from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.skipping import LeftOut
from blip2fast.data.sources import checked_keys, mixture, open_records, whereabouts
from blip2fast.data.texts import AnswerTexts, CaptionTexts, SequenceTexts, Stage1Texts
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import FROZEN, Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.training.config import RunConfig
from blip2fast.training.data_identity import identify_data
from blip2fast.training.parameter_groups import check_scales, lr_scale
from blip2fast.training.run_data import (
    HeldOut,
    check_unusable,
    held_out_data,
    image_folder,
    train_images,
)
from blip2fast.training.run_model import build_model, open_start
from blip2fast.training.skipped import LeftOutBefore

_log = logging.getLogger(__name__)


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
    start = open_start(config)
    source = train_images(config, None if start is None else start.described)
    note = _log.warning if rank == 0 else None
    data = config.data
    images, skips = image_folder(data.images), data.on_error == "skip"
    bad_rows: list[LeftOut] | None = [] if skips else None
    records = open_records(data.records, data.task, images, note, bad_rows)
    keys = checked_keys(records)
    if bad_rows is None:
        source.store.check(set(keys))
    else:
        check_unusable(config, source.store, keys, bad_rows, len(records))
    held_out, held_out_left = held_out_data(config, source, note)
    model, tokenizer, description = build_model(config, source, start)
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


def text_maker(config: RunConfig, tokenizer: Any, text: Stage2Text | None) -> Any:
    """The callable that makes a batch's text tensors, for stage 1 or the stage-2 task."""
    if text is None:
        return Stage1Texts(tokenizer, config.data.max_txt_len, config.seed, config.data.positives)
    if config.data.task == "sequence":
        return SequenceTexts(text, config.seed)
    if config.data.task == "caption":
        return CaptionTexts(text, config.seed)
    return AnswerTexts(text, config.seed)
