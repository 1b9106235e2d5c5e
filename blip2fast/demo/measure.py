"""Computes the demo's table: the trained models and their controls on held-out scenes.

Columns: the trained model; chance; the blind language model; the trained model with shuffled
images; models with an untrained Q-Former; the language model that reads true captions; scenes with
unseen colour-kind pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.demo.table import SECTIONS
from blip2fast.evaluation.retrieval import ImageReader, TokenizedTexts
from blip2fast.evaluation.stage1 import evaluate_stage1, held_out_losses
from blip2fast.evaluation.stage2 import (
    accuracy_by_type,
    continue_texts,
    exact_match,
    generate_texts,
)
from blip2fast.scenes import QUESTION_FORMAT, SceneSplit, is_exact
from blip2fast.scenes.world import SPLITS
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text

Rows = dict[str, dict[str, float]]
BATCH = 64
MAX_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class EvalSet:
    """A held-out split with its features, captions and questions, all indexed by scene number.

    Attributes:
        tokenizer: the Q-Former's.
        images: reads frozen features by scene number.
        captions, swapped: one true caption per scene, and its hard negative.
        questions: records of `SceneSplit.question_records`.
        asked_of: [P] the scene number of each question.
    """

    split: SceneSplit
    tokenizer: PreTrainedTokenizerBase
    images: ImageReader
    caption_texts: list[str]
    captions: TokenizedTexts
    swapped: TokenizedTexts
    questions: list[dict[str, str]]
    asked_of: Tensor

    @classmethod
    def build(
        cls,
        split: SceneSplit,
        cache: FeatureCache,
        tokenizer: PreTrainedTokenizerBase,
        questions_per_scene: int,
    ) -> EvalSet:
        """Tokenize captions and draw questions of `split`, whose features are in `cache`."""
        rows = torch.tensor([cache.row(key) for key in split.keys])
        true, swapped = zip(*split.caption_pairs(), strict=True)
        number = {key: i for i, key in enumerate(split.keys)}
        questions = split.question_records(rounds=questions_per_scene)
        return cls(
            split=split,
            tokenizer=tokenizer,
            images=lambda numbers: cache.read(rows[numbers]),
            caption_texts=list(true),
            captions=tokenize(tokenizer, true),
            swapped=tokenize(tokenizer, swapped),
            questions=questions,
            asked_of=torch.tensor([number[q["image"]] for q in questions]),
        )

    def __len__(self) -> int:
        return len(self.split.scenes)

    def shuffled_numbers(self) -> Tensor:
        """[I] the number of another scene for each scene: a rotation, so none keeps its image."""
        return torch.arange(len(self)).roll(len(self) // 2)

    def answers_right(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy of answers to all questions, in total and by type."""
        return accuracy_by_type(
            answers, [q["answer"] for q in self.questions], [q["type"] for q in self.questions]
        )

    def asked(self) -> list[str]:
        return [q["question"] for q in self.questions]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TokenizedTexts:
    """Tokenize one text per image, in order, for the Q-Former."""
    tokens = tokenizer(list(texts), return_tensors="pt", padding=True)
    return TokenizedTexts(tokens["input_ids"], tokens["attention_mask"], torch.arange(len(texts)))


def stage1_rows(
    trained: Blip2Stage1, untrained: Blip2Stage1, held_out: EvalSet, unseen: EvalSet, rerank_k: int
) -> Rows:
    """Losses, retrieval and matching."""
    shuffled = held_out.shuffled_numbers()
    columns = {
        "model": (trained, held_out, held_out.images, rerank_k),
        "shuffled": (trained, held_out, lambda n: held_out.images(shuffled[n]), 0),
        "untrained": (untrained, held_out, held_out.images, 0),
        "unseen_pairs": (trained, unseen, unseen.images, rerank_k),
    }
    rows: Rows = {}
    for column, (model, data, images, k) in columns.items():
        results = evaluate_stage1(
            model,
            images,
            len(data),
            data.captions,
            swapped=data.swapped,
            rerank_k=k,
            batch_size=BATCH,
        )
        for name, key in _STAGE1_ROWS.items():
            if key in results:
                rows.setdefault(name, {})[column] = results[key]
    count = len(held_out)
    batch = min(BATCH, count)
    chance = {
        "loss/itc": math.log(batch),
        "loss/itm": math.log(3) - 2 / 3 * math.log(2),  # one pair in three matches
        "loss/itg": math.log(trained.config.vocab_size),
        "itm/accuracy": 0.5,
        "itm/ranked": 0.5,
    }
    for name in rows:
        k = int(name.rpartition("_r")[2]) if "_r" in name else 0
        rows[name]["chance"] = k / count if k else chance[name]
    return rows


_STAGE1_ROWS = {
    "loss/itc": "loss_itc",
    "loss/itm": "loss_itm",
    "loss/itg": "loss_itg",
    **{f"retrieval/{way}_r{k}": f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5)},
    **{f"rerank/{way}_r{k}": f"rerank_{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5)},
    "itm/accuracy": "itm_accuracy",
    "itm/ranked": "itm_ranked",
}


@dataclass(frozen=True)
class FrozenModel:
    """The frozen language model and its text preparation.

    Attributes:
        model: the language model.
        plain: text preparation without a prompt, for captions.
        questions: text preparation with the question prompt.
    """

    model: PreTrainedModel
    plain: Stage2Text
    questions: Stage2Text

    @classmethod
    def build(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FrozenModel:
        encoder_decoder = bool(model.config.is_encoder_decoder)
        return cls(
            model,
            Stage2Text(tokenizer, encoder_decoder),
            Stage2Text(tokenizer, encoder_decoder, prompt=QUESTION_FORMAT),
        )

    def blind_captions(self, count: int) -> list[str]:
        """The caption that the language model generates without any input, `count` times."""
        start = self.plain.prompt_batch(batch_size=1)["input_ids"][0].tolist()
        return continue_texts(self.model, self.plain, [start]) * count

    def answers(self, questions: Sequence[str], descriptions: Sequence[str]) -> list[str]:
        """Answer from text: description, then question, in the language model's training format.

        An empty description gives the blind control.
        """
        tokenizer: Any = self.plain.tokenizer
        asked = self.questions.prompt_batch(questions)
        prompts = []
        for description, ids, mask in zip(
            descriptions, asked["input_ids"], asked["attention_mask"], strict=True
        ):
            read = tokenizer(description, add_special_tokens=False)["input_ids"]
            prompts.append([*read, *ids[mask.bool()].tolist()])
        return continue_texts(self.model, self.plain, prompts, max_new_tokens=MAX_ANSWER_TOKENS)


def stage2_rows(
    trained: Blip2Stage2,
    untrained: Blip2Stage2,
    frozen: FrozenModel,
    held_out: EvalSet,
    unseen: EvalSet,
) -> tuple[Rows, list[str]]:
    """Captions, and zero-shot VQA directly and by reading the caption.

    Returns:
        The rows, and the trained model's captions of `held_out`.
    """
    shuffled = held_out.shuffled_numbers()
    columns = {
        "model": (trained, held_out, torch.arange(len(held_out))),
        "shuffled": (trained, held_out, shuffled),
        "untrained": (untrained, held_out, torch.arange(len(held_out))),
        "unseen_pairs": (trained, unseen, torch.arange(len(unseen))),
    }
    rows: Rows = {"loss/stage2": {}, "caption/exact": {}}
    written: dict[str, list[str]] = {}
    for column, (model, data, numbers) in columns.items():
        # Captions of shuffled images have already been generated, for the other scenes.
        written[column] = (
            [written["model"][i] for i in numbers.tolist()]
            if column == "shuffled"
            else generate_texts(model, frozen.plain, data.images, numbers)
        )
        rows["caption/exact"][column] = exact_match(written[column], data.split.scenes, is_exact)
        batches = (
            {
                "image_embeds": data.images(numbers[part]),
                **frozen.plain.train_batch([data.caption_texts[i] for i in part.tolist()]),
            }
            for part in torch.arange(len(data)).split(BATCH)
        )
        rows["loss/stage2"][column] = held_out_losses(model, batches)["loss"]
        direct = answers_from_images(model, frozen.questions, data, numbers)
        _add(rows, "vqa_direct", column, data.answers_right(direct))
        descriptions = [written[column][i] for i in data.asked_of.tolist()]
        _add(
            rows,
            "vqa_read",
            column,
            data.answers_right(frozen.answers(data.asked(), descriptions)),
        )
    rows["caption/exact"]["blind"] = exact_match(
        frozen.blind_captions(len(held_out)), held_out.split.scenes, is_exact
    )
    rows["caption/exact"]["chance"] = 1 / number_of_contents(held_out.split)
    rows["loss/stage2"]["chance"] = math.log(frozen.model.config.vocab_size)
    true = [held_out.caption_texts[i] for i in held_out.asked_of.tolist()]
    _add(
        rows,
        "vqa_read",
        "true_caption",
        held_out.answers_right(frozen.answers(held_out.asked(), true)),
    )
    return rows, written["model"]


def tuned_rows(
    trained: Blip2Stage2, frozen: FrozenModel, held_out: EvalSet, unseen: EvalSet
) -> Rows:
    """VQA after fine-tuning on questions, which the Q-Former reads too (paper section 4.3)."""
    rows: Rows = {}
    texts = trained.text(frozen.plain.tokenizer, qformer_tokenizer=held_out.tokenizer)
    numbers = torch.arange(len(held_out))
    for column, data, shown in (
        ("model", held_out, numbers),
        ("shuffled", held_out, held_out.shuffled_numbers()),
        ("unseen_pairs", unseen, torch.arange(len(unseen))),
    ):
        answers = answers_from_images(trained, texts, data, shown)
        _add(rows, "vqa_tuned", column, data.answers_right(answers))
    return rows


def blind_vqa(
    frozen: FrozenModel, held_out: EvalSet, train_questions: list[dict[str, str]]
) -> Rows:
    """Accuracy from questions alone, by type: the `chance` and `blind` columns of all VQA rows.

    Chance predicts the most frequent training answer to the same question, or to its type if the
    question is new. The blind language model gets the question without a description.
    """
    counts: dict[str, Counter[str]] = {}
    for question in train_questions:
        for key in (question["type"], question["question"]):
            counts.setdefault(key, Counter())[question["answer"]] += 1
    asked = [q["question"] if q["question"] in counts else q["type"] for q in held_out.questions]
    guesses = [counts[key].most_common(1)[0][0] for key in asked]
    blind = frozen.answers(held_out.asked(), [""] * len(held_out.questions))
    rows: Rows = {}
    for kind in ("vqa_direct", "vqa_read", "vqa_tuned"):
        _add(rows, kind, "chance", held_out.answers_right(guesses))
        _add(rows, kind, "blind", held_out.answers_right(blind))
    return rows


def answers_from_images(
    model: Blip2Stage2, texts: Stage2Text, data: EvalSet, numbers: Tensor
) -> list[str]:
    """Answers to every question of `data`; scene i is shown image `numbers[i]`."""
    return generate_texts(
        model,
        texts,
        data.images,
        numbers[data.asked_of],
        data.asked(),
        max_new_tokens=MAX_ANSWER_TOKENS,
    )


def number_of_contents(split: SceneSplit) -> int:
    """How many different scenes the world of `split` has."""
    return sum(len(split.spec.contents(name).place) for name in SPLITS)


def merge(*parts: Rows) -> Rows:
    """Merge all rows with all their columns, in the order of the table's sections."""
    merged: Rows = {}
    for part in parts:
        for name, row in part.items():
            merged.setdefault(name, {}).update(row)
    order = list(SECTIONS)
    return dict(sorted(merged.items(), key=lambda item: order.index(item[0].partition("/")[0])))


def _add(rows: Rows, section: str, column: str, accuracies: dict[str, float]) -> None:
    for kind, value in accuracies.items():
        rows.setdefault(f"{section}/{kind}", {})[column] = value
