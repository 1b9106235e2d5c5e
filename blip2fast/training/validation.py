"""Evaluation while training: held-out losses, retrieval (stage 1), captions or answers (stage 2).

Losses cover all samples, including those of a smaller last batch, and are computed over the global
batch: the processes split it where its size is divisible by their number. Each process generates
captions or answers for its share of the images. Retrieval is computed in full by every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip2fast.data.batches import Batch
from blip2fast.data.records import CaptionRecord, images_of
from blip2fast.data.texts import tokenize_captions
from blip2fast.evaluation.answer_accuracy import answer_accuracy, have_several
from blip2fast.evaluation.caption_metrics import score_captions, score_name
from blip2fast.evaluation.retrieval import (
    RERANK_K,
    TokenizedTexts,
    chunks,
    encode_all,
    rerank,
    retrieval_recall,
)
from blip2fast.evaluation.stage1 import caption_batch, held_out_means
from blip2fast.evaluation.stage2 import generate_texts
from blip2fast.stage1.losses import max_query_similarity
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.training.build import Run
from blip2fast.training.config import RunConfig
from blip2fast.training.run_data import HeldOut

ToTokens = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def validate(
    model: Blip2Stage1 | Blip2Stage2, parts: Run, config: RunConfig, to_tokens: ToTokens
) -> dict[str, float]:
    """Metrics of `model` on `parts.held_out`.

    Args:
        to_tokens: moves a batch to the device, images as tokens in the run's precision, unless
            the model has its own image encoder.

    Returns:
        Losses and accuracies; `i2t_r1`, `t2i_r1`, ... (stage 1); `exact`, the fraction of
        generated captions that match one of their image's captions, or of correct answers (stage
        2, one image per sample); and with `eval_scores` those named there.

    Raises:
        ValueError: no held-out set, or a single sample in stage 1.
    """
    if parts.held_out is None:
        raise ValueError("no held-out data: set data.eval_records")
    reader = _HeldOutImages(parts.held_out, to_tokens, model.image_encoder)
    if isinstance(model, Blip2Stage1):
        return _stage1(model, parts, reader, config)
    if parts.text is None:
        raise ValueError("stage 2 needs its text preparation")
    return _stage2(model, parts.text, reader, config)


class _HeldOutImages:
    """Image reader of the held-out set: number in `held_out.keys()` -> tokens on the device."""

    def __init__(
        self, held_out: HeldOut, to_tokens: ToTokens, encoder: nn.Module | None = None
    ) -> None:
        self.records, self._images, self._to_tokens = held_out.records, held_out.images, to_tokens
        self._encoder = encoder
        self.keys = held_out.keys()
        self.number = {key: n for n, key in enumerate(self.keys)}

    def __call__(self, numbers: Tensor) -> Tensor:
        indices = numbers.cpu().numpy()
        batch = self._images([self.keys[i] for i in indices], Batch(0, indices))
        moved = self._to_tokens(batch)
        if self._encoder is None or "images" not in moved:
            return moved["image_embeds"]
        training = self._encoder.training
        self._encoder.eval()
        with torch.no_grad():
            tokens: Tensor = self._encoder(moved["images"])
        self._encoder.train(training)
        return tokens


def _shards(count: int, global_batch: int, least: int) -> Iterator[tuple[Tensor, float]]:
    """The rows of each batch that this process computes, and the weight they count with here.

    A batch that divides evenly is split over the processes, each part with weight 1. One that does
    not (only the last can) is computed in full by every process, with weight 1 / world size.

    Args:
        least: minimum rows of a batch.

    Raises:
        ValueError: fewer than `least` held-out samples.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if count < least:
        raise ValueError(f"{count} held-out sample(s) are too few: losses need {least} or more")
    for rows in chunks(count, global_batch, least):
        if len(rows) % world:
            yield rows, 1 / world
        else:
            yield rows.chunk(world)[rank], 1.0


def _sum_over_processes(values: dict[str, float]) -> dict[str, float]:
    if dist.get_world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def _losses(
    model: Blip2Stage1 | Blip2Stage2, batches: Iterator[tuple[dict[str, Tensor], float]]
) -> dict[str, float]:
    """Held-out losses over the batches of all processes."""
    found = held_out_means(model, batches)
    found.totals = _sum_over_processes(found.totals)
    found.counts = _sum_over_processes(found.counts)
    return found.means()


def _stage1(
    model: Blip2Stage1, parts: Run, reader: _HeldOutImages, config: RunConfig
) -> dict[str, float]:
    records: list[CaptionRecord] = list(reader.records)
    captions = [caption for record in records for caption in record.captions]
    owner = [reader.number[record.image] for record in records for _ in record.captions]
    tokens = tokenize_captions(parts.tokenizer, captions, config.data.max_txt_len)
    texts = TokenizedTexts(tokens["input_ids"], tokens["attention_mask"], torch.tensor(owner))
    first = torch.tensor([owner.index(n) for n in range(len(reader.keys))])
    batches = (
        (caption_batch(reader, texts, first[rows]), share)
        for rows, share in _shards(len(first), config.eval_batch_size, least=2)
    )
    results = _losses(model, batches)
    features = encode_all(model, reader, len(reader.keys), texts, config.eval_batch_size)
    similarity = max_query_similarity(*features, batch_size=config.eval_batch_size)
    results |= retrieval_recall(similarity, similarity, texts.image)
    if config.eval_scores and "itm" in config.optim.losses:
        scores = rerank(model, reader, texts, similarity, RERANK_K, config.eval_batch_size)
        reranked = retrieval_recall(*scores, texts.image)
        results |= {f"rerank_{name}": value for name, value in reranked.items()}
    return results


def _stage2(
    model: Blip2Stage2, text: Stage2Text, reader: _HeldOutImages, config: RunConfig
) -> dict[str, float]:
    records: list[Any] = list(reader.records)
    on_questions = config.data.task == "vqa"
    if config.data.task == "sequence":
        return _sequences(model, text, reader, config)

    def batches() -> Iterator[tuple[dict[str, Tensor], float]]:
        for rows, share in _shards(len(records), config.eval_batch_size, least=1):
            chosen = [records[i] for i in rows.tolist()]
            if on_questions:
                tensors = text.train_batch([r.answer for r in chosen], [r.question for r in chosen])
            else:
                tensors = text.train_batch([r.captions[0] for r in chosen], indices=rows.tolist())
            yield {"image_embeds": reader(_numbers(reader, chosen)), **tensors}, share

    results = _losses(model, batches())
    mine = _share(records, config)
    written = generate_texts(
        model,
        text,
        reader,
        _numbers(reader, mine),
        [r.question for r in mine] if on_questions else None,
        max_new_tokens=config.data.max_txt_len,
        batch_size=config.eval_batch_size,
    )
    right = float(sum(map(_is_right, written, mine)))
    if len(mine) < len(records):
        right = _sum_over_processes({"right": right})["right"]
    results["exact"] = right / len(records)
    if config.eval_scores:
        results |= _scores(_of_all(written, len(records)), records, on_questions)
    return results


def _of_all(written: list[str], count: int) -> list[str]:
    """The texts of all processes, each of which has its `_share`, in the order of the records."""
    if len(written) == count:
        return written
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, written)
    return [parts[n % len(parts)][n // len(parts)] for n in range(count)]


def _scores(written: list[str], records: list[Any], on_questions: bool) -> dict[str, float]:
    if not on_questions:
        scores = score_captions(written, [record.captions for record in records])
        return {score_name(metric): value for metric, value in scores.corpus.items()}
    answers = [record.answers or (record.answer,) for record in records]
    several = have_several(answers)
    found = [
        answer_accuracy(text, true, several) for text, true in zip(written, answers, strict=True)
    ]
    return {"vqa_accuracy": sum(found) / len(found)}


def _sequences(
    model: Blip2Stage2, text: Stage2Text, reader: _HeldOutImages, config: RunConfig
) -> dict[str, float]:
    """The loss only: a text about several images has no single correct answer."""

    def batches() -> Iterator[tuple[dict[str, Tensor], float]]:
        for rows, share in _shards(len(reader.records), config.eval_batch_size, least=1):
            chosen = [reader.records[i] for i in rows.tolist()]
            tensors = text.train_batch(
                [r.captions[0] for r in chosen],
                [r.prompt for r in chosen],
                indices=rows.tolist(),
                image_counts=[len(r.images) for r in chosen],
            )
            yield {**tensors, "image_embeds": reader(_numbers(reader, chosen))}, share

    return _losses(model, batches())


def _share(records: list[Any], config: RunConfig) -> list[Any]:
    """The records that this process generates text for.

    Under ZeRO-3 these are all records: gathering the language model's layers is a collective, so
    no process may finish generating before the others.
    """
    if config.zero_stage == 3 or len(records) < dist.get_world_size():
        return records
    return records[dist.get_rank() :: dist.get_world_size()]


def _numbers(reader: _HeldOutImages, records: list[Any]) -> Tensor:
    numbers = [reader.number[key] for record in records for key in images_of(record)]
    return torch.tensor(numbers, dtype=torch.long)


def _is_right(written: str, record: Any) -> bool:
    """Whether the text matches one of the record's texts, ignoring case and spaces."""
    accepted = record.captions if isinstance(record, CaptionRecord) else (record.answer,)
    return _plain(written) in {_plain(text) for text in accepted}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
