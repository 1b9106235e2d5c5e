"""The small language tower: an OPT trained on text alone, to paraphrase and to answer questions.

A training text is a description of a scene followed by a continuation: another description of the
same scene, or a question about it with its answer. The loss covers only the continuation, so the
model must learn to read. In stage 2, soft prompts take the place of the description.

    a red ring top left and a blue circle top right </s> question: what is the object top left ?
    answer: ring </s>

Several continuations share one description in a row of the batch: each attends to the description
and itself only, with the positions it would have in a row of its own. The losses equal those of
separate rows, but the description is processed once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from blip2fast.scenes.schedule import cosine_factor
from blip2fast.scenes.text import QUESTION_FORMAT, captions, questions
from blip2fast.scenes.wordlevel import language_tokenizer
from blip2fast.scenes.world import Scene

CONTINUATIONS = 4
QUESTION_SHARE = 0.5
IGNORED = -100


class LanguageTowerReport(NamedTuple):
    """Training results: loss per token (mean of the last tenth of the steps) and seconds."""

    steps: int
    loss: float
    seconds: float


class Row(NamedTuple):
    """A description concatenated with its continuations; every tensor is [L] int64.

    Attributes:
        ids: token ids.
        labels: the token id where the loss applies, -100 elsewhere.
        positions: positions as if each continuation directly followed the description.
        segments: 0 for the description, k for continuation k.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor


def train_language_tower(
    scenes: Sequence[Scene],
    out_dir: Path | str,
    *,
    width: int = 96,
    layers: int = 3,
    steps: int = 3000,
    batch_size: int = 32,
    seed: int = 0,
) -> LanguageTowerReport:
    """Train an OPT on texts about scenes and save it with its tokenizer as a transformers folder.

    Args:
        scenes: the scenes that the texts describe; their images are not used.
        out_dir: output folder, for `AutoModelForCausalLM` and `AutoTokenizer`.
        width: width of the hidden states; a multiple of 16, the head width.
        layers: number of transformer blocks.
        steps: optimizer steps.
        batch_size: descriptions per step, each with `CONTINUATIONS` continuations.
        seed: seed of the weights and the texts.

    Raises:
        ValueError: no scenes, or a width not divisible by the head width.
    """
    if not scenes:
        raise ValueError("scenes is empty; give at least one scene to write about")
    if width < 16 or width % 16:
        raise ValueError(f"width is {width}; use a multiple of 16, the width of a head")
    tokenizer = language_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(tokenizer, width, layers)
        started = time.perf_counter()
        losses = _train(model, _batches(tokenizer, scenes, batch_size, seed), steps)
        seconds = time.perf_counter() - started
    model.eval().half().save_pretrained(out_dir)  # half the bytes to ship
    tokenizer.save_pretrained(out_dir)
    tail = losses[-max(1, steps // 10) :]
    return LanguageTowerReport(steps, sum(tail) / len(tail), seconds)


@torch.no_grad()
def reading_accuracy(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[Scene],
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Accuracy on questions that follow a true description, by type and over `"all"`.

    An answer is correct if each of its tokens is the model's top prediction.
    """
    rng = random.Random(seed)
    asked = [(captions(s, 1, rng)[0], q) for s in scenes for q in questions(s, rng)]
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts = [[d, QUESTION_FORMAT.format(q.question), q.answer] for d, q in part]
        rows = [_joined(tokenizer, *row) for row in texts]
        ids = pad_sequence([ids for ids, _ in rows], True, tokenizer.pad_token_id)
        labels = pad_sequence([labels for _, labels in rows], True, IGNORED)[:, 1:]
        mask = (ids != tokenizer.pad_token_id).long()
        chosen = model(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1)
        correct = ((chosen == labels) | (labels == IGNORED)).all(1).tolist()
        for (_, question), hit in zip(part, correct, strict=True):
            right.setdefault(question.type, []).append(hit)
            right.setdefault("all", []).append(hit)
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def _joined(
    tokenizer: PreTrainedTokenizerBase, description: str, question: str, answer: str
) -> tuple[Tensor, Tensor]:
    """Ids and labels [L] of one description, question and answer; only the answer has labels."""
    read = [*_ids(tokenizer, description), tokenizer.eos_token_id, *_ids(tokenizer, question)]
    said = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
    return torch.tensor(read + said), torch.tensor([IGNORED] * len(read) + said)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _batches(
    tokenizer: PreTrainedTokenizerBase, scenes: Sequence[Scene], batch_size: int, seed: int
) -> Iterator[Row]:
    """Infinite stream of batches; every field of a batch is [batch_size, L]."""
    rng = random.Random(seed)
    known: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in known:
            known[text] = _ids(tokenizer, text)
        return known[text]

    padding = Row(tokenizer.pad_token_id, IGNORED, 0, -1)  # type: ignore[arg-type]
    while True:
        # batches of rows of similar length, which halves the padding
        pool = [
            _row(rng.choice(scenes), rng, ids, tokenizer.eos_token_id)
            for _ in range(8 * batch_size)
        ]
        pool.sort(key=lambda row: len(row.ids))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            rows = pool[start : start + batch_size]
            yield Row(
                *(
                    pad_sequence(list(field), True, float(fill))
                    for field, fill in zip(zip(*rows, strict=True), padding, strict=True)
                )
            )


def _row(scene: Scene, rng: random.Random, ids: Callable[[str], list[int]], end: int) -> Row:
    wordings = captions(scene, 8, rng)
    asked = questions(scene, rng)
    description = ids(rng.choice(wordings))
    start = len(description)
    row = Row(
        torch.tensor(description),
        torch.full((start,), IGNORED),
        torch.arange(start),
        torch.zeros(start, dtype=torch.long),
    )
    parts = [row]
    for segment in range(1, CONTINUATIONS + 1):
        if rng.random() < QUESTION_SHARE:
            question = rng.choice(asked)
            read = ids(QUESTION_FORMAT.format(question.question))
            said = ids(question.answer)
        else:
            read, said = [], ids(rng.choice(wordings))
        tokens = [end, *read, *said, end]
        labels = [IGNORED] * (1 + len(read)) + [*said, end]
        parts.append(
            Row(
                torch.tensor(tokens),
                torch.tensor(labels),
                torch.arange(start, start + len(tokens)),
                torch.full((len(tokens),), segment),
            )
        )
    return Row(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _model(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        ffn_dim=4 * width,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        init_std=width**-0.5,  # OPT's 0.02 suits widths of 768 and more
    )
    model = OPTForCausalLM(config)
    # sinusoidal initial positions: attention by distance is learned sooner than from noise
    table = model.model.decoder.embed_positions.weight
    angles = torch.arange(len(table))[:, None] / 100 ** torch.linspace(0, 1, width // 2)
    with torch.no_grad():
        table.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def _train(model: OPTForCausalLM, batches: Iterator[Row], steps: int) -> list[float]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, steps, warmup=min(100, steps // 10))
    )
    losses = []
    model.train()
    for _ in (bar := tqdm(range(steps), desc="language tower", unit="step", mininterval=5)):
        loss = _loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return losses


def _loss(model: OPTForCausalLM, batch: Row) -> Tensor:
    """Mean loss over the continuations' tokens."""
    column = torch.arange(batch.ids.shape[1])
    earlier = column[:, None] >= column[None, :]
    asking, asked = batch.segments[:, :, None], batch.segments[:, None, :]
    visible = earlier & ((asked == 0) | (asked == asking))
    states = model.model.decoder(
        input_ids=batch.ids, attention_mask=visible[:, None], position_ids=batch.positions
    ).last_hidden_state
    labels = batch.labels[:, 1:]
    learned = labels != IGNORED
    return F.cross_entropy(model.lm_head(states[:, :-1][learned]), labels[learned])
