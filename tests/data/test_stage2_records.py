"""Training data with several images a sequence, and several texts an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import word_tokenizer, write_world
from stage2_models import Q, opt_config, stage2_config
from transformers import OPTForCausalLM

from blip2fast.data.batches import Batch, BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages
from blip2fast.data.records import (
    CaptionRecord,
    QuestionRecord,
    SequenceRecord,
    images_of,
    read_captions,
    read_sequences,
    write_records,
)
from blip2fast.data.sources import source_keys
from blip2fast.data.texts import AnswerTexts, SequenceTexts
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.stage2.token_rows import IMAGE_PLACE

RECORDS = [
    SequenceRecord(("a", "b"), ("a red ring",), "<image> a disc <image>"),
    SequenceRecord((), ("what is it", "a disc")),
    SequenceRecord(("c",), ("<image> a ring",)),
]


def language_tokenizer():
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>"}
    return word_tokenizer(special, "</s> $A")


def test_sequences_are_read_as_written(tmp_path: Path):
    write_records(tmp_path / "s.jsonl", RECORDS)
    assert read_sequences(tmp_path / "s.jsonl") == RECORDS
    assert source_keys(tmp_path / "s.jsonl") == ["a", "b", "c"]
    assert images_of(RECORDS[0]) == ("a", "b")
    assert images_of(CaptionRecord("x", ("a disc",))) == ("x",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"images": ["a"], "captions": ["x"]}',
            "record 1: 0 markers <image> in the prompt and the caption 'x', but 1 images",
        ),
        (
            '{"images": ["a"], "prompt": "<image>", "captions": ["x", "<image> y"]}',
            "record 1: 2 markers <image> .* '<image> y', but 1 images",
        ),
        ('{"images": ["a"], "captions": ["<image> "]}', "record 1: an empty caption '<image> '"),
        ('{"images": [], "captions": []}', "record 1: no captions, so nothing to write"),
        ('{"images": "a", "captions": ["x"]}', "line 1: images: "),
        ('{"image": "a", "captions": ["x"]}', "line 1: image"),
    ],
)
def test_bad_sequences_are_refused(tmp_path: Path, text, message):
    (tmp_path / "s.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_sequences(tmp_path / "s.jsonl")


@pytest.fixture
def world(tmp_path: Path):
    folder = write_world(tmp_path)
    return FeatureCache(folder / "train_features"), read_captions(folder / "train.jsonl")


def test_batches_hold_the_images_of_all_samples_in_order(world):
    cache, captions = world
    keys = [record.image for record in captions]
    records = [
        SequenceRecord((keys[i], keys[i + 1])[: i % 3], ("a disc",), "<image> " * (i % 3))
        for i in range(12)
    ]
    text = Stage2Text(
        language_tokenizer(), False, image_marker="<image>", num_query_tokens=Q, max_txt_len=16
    )
    batches = PlannedBatches(
        records, BatchPlan(12, 4, 0), CachedImages(cache), SequenceTexts(text, 0)
    )
    counted = set()
    for micro_step in range(3):
        batch = batches[micro_step]
        rows = batches.plan.batch(micro_step).indices.tolist()
        wanted = [cache.row(key) for i in rows for key in records[i].images]
        assert torch.equal(batch["image_embeds"], cache.read(wanted))
        assert batch["image_counts"].tolist() == [i % 3 for i in rows]
        places = (batch["input_ids"] == IMAGE_PLACE).sum(1)
        assert torch.equal(places, batch["image_counts"] * Q)
        counted |= set(batch["image_counts"].tolist())
    assert counted == {0, 1, 2}


def test_a_step_without_any_image(world):
    cache, _ = world
    text = Stage2Text(language_tokenizer(), False, image_marker="<image>", num_query_tokens=Q)
    records = [SequenceRecord((), ("a red ring",))] * 2
    make = SequenceTexts(text, 0)
    batch = PlannedBatches(records, BatchPlan(2, 2, 0), CachedImages(cache), make)[0]
    assert batch["image_embeds"].shape == (0, *cache.read([0]).shape[1:])
    language_model = OPTForCausalLM(opt_config(vocab_size=len(text.tokenizer)))
    config = stage2_config(encoder_hidden_size=cache.width)
    model = Blip2Stage2(config, language_model)
    assert model(**batch).loss.isfinite()


def test_examples_before_a_question_teach_which_image_is_meant(world):
    """Two images a sample, the answer is about the first or the second as the prompt says."""
    torch.manual_seed(0)
    tokenizer = language_tokenizer()
    records = [
        SequenceRecord(pair, (word,), f"<image> <image> {asked}")
        for pair, first, second in ((("a", "b"), "red", "blue"), (("b", "a"), "blue", "red"))
        for asked, word in (("it", first), ("what", second))
    ]
    language_model = OPTForCausalLM(opt_config(vocab_size=len(tokenizer)))
    for parameter in language_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = stage2_config(
        image_marker="<image>", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = Blip2Stage2(config, language_model)
    text = model.text(tokenizer)
    shown = {"a": torch.randn(5, 24), "b": torch.randn(5, 24)}
    batch = SequenceTexts(text, 0)(records, Batch(0, np.arange(4)))
    embeds = torch.stack([shown[key] for record in records for key in record.images])
    optimiser = torch.optim.Adam(model.trainable_parameters(), lr=5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        model(embeds, **batch).loss.backward()
        optimiser.step()
    model.eval()
    asked = text.prompt_batch([r.prompt for r in records], image_counts=[2] * 4)
    written = model.generate(embeds, **asked, max_new_tokens=1, eos_token_id=text.end_token_id)
    assert text.decode(written) == [r.captions[0] for r in records]


def test_several_questions_about_one_image(world):
    """One record each: the image is read for every one, with its own question and answer."""
    cache, captions = world
    key = captions[0].image
    records = [
        QuestionRecord(key, "what is it", "a ring"),
        QuestionRecord(key, "is it red", "a red ring"),
    ]
    text = Stage2Text(language_tokenizer(), False, prompt="{} :")
    batches = PlannedBatches(records, BatchPlan(2, 2, 0), CachedImages(cache), AnswerTexts(text))
    batch, order = batches[0], batches.plan.batch(0).indices.tolist()
    assert torch.equal(batch["image_embeds"][0], batch["image_embeds"][1])
    for row, i in enumerate(order):
        kept = batch["labels"][row][batch["labels"][row] != -100]
        assert text.decode(kept[None]) == [records[i].answer]
