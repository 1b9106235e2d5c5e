"""Stage-2 runs with several images a sample, instructions in the Q-Former, and LLM dropout."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import config, distance, weights, write_world

from blip2fast.checkpoints.trained import read_description
from blip2fast.data.batches import Batch
from blip2fast.data.images import FileImages
from blip2fast.data.records import SequenceRecord, read_captions, write_records
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.convert import stage1_names
from blip2fast.training.build import build_run
from blip2fast.training.config_files import parse_config
from blip2fast.training.log import read_metrics
from blip2fast.training.measuring import measure_trained
from blip2fast.training.trainer import train

INSTRUCTED = {"text_conditioned": True}


def _quiet(_):
    """Say nothing."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    for split in ("train", "eval"):
        records = read_captions(folder / f"{split}.jsonl")
        pairs = [
            SequenceRecord(
                (one.image, other.image), other.captions, f"<image> {one.captions[0]} <image>"
            )
            for one, other in pairwise(records)
        ]
        pairs[0] = SequenceRecord((), ("a red ring",))
        write_records(folder / f"{split}_pairs.jsonl", pairs)
    return folder


def run(world, output, **changes):
    train(config(world, output, 2, **changes), say=lambda _: None)
    return [line["loss"] for line in read_metrics(output) if "loss" in line]


def sequences(world, language_model="opt"):
    return {
        "data": {
            "task": "sequence",
            "records": str(world / "train_pairs.jsonl"),
            "eval_records": str(world / "eval_pairs.jsonl"),
        },
        "language_model": {"path": str(world / language_model)},
    }


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_several_images_a_sample(world, tmp_path, language_model):
    settings = sequences(world, language_model)
    optim = {"max_steps": 30, "lr": 3e-2}
    losses = run(world, tmp_path / "out", **settings, optim=optim, model={"dropout": 0.0})
    # so small a random language model can be steered a little; without training nothing falls
    assert sum(losses[-10:]) / 10 < 0.98 * sum(losses[:3]) / 3
    lines = read_metrics(tmp_path / "out")
    assert 0 < lines[-1]["eval_loss"] < losses[0]


def test_sequences_resume_bitwise(world, tmp_path):
    """Stopped at step 4 of 8: the other steps are those of the run that was not stopped."""
    settings = sequences(world)
    whole = run(world, tmp_path / "whole", **settings, optim={"max_steps": 8})
    settings |= {"save_every": 4}
    run(world, tmp_path / "parts", **settings, optim={"max_steps": 8})
    for newest in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
        newest.rename(tmp_path / newest.name)
    continued = run(world, tmp_path / "parts", **settings, optim={"max_steps": 8}, resume=True)
    assert continued == whole
    theirs = weights(tmp_path / "whole")
    assert all(torch.equal(theirs[n], v) for n, v in weights(tmp_path / "parts").items())


def test_instructions_from_stage1(world, tmp_path):
    """Stage 1 gives the text branch too; a vqa run trains it, and it starts the next run."""
    train(config(world, tmp_path / "one", 1), say=lambda _: None)
    questions = {
        name: str(
            world / f"{name.removesuffix('_records').replace('records', 'train')}_questions.jsonl"
        )
        for name in ("records", "eval_records")
    }
    settings = {
        "model": INSTRUCTED | {"tokenizer": str(world / "qformer_tokenizer")},
        "data": {"task": "vqa", **questions},
        "language_model": {"path": str(world / "opt"), "prompt": "{} :"},
    }
    start = {"init_from": str(tmp_path / "one")}
    losses = run(world, tmp_path / "two", **settings, **start, optim={"max_steps": 12})
    assert losses[-1] < losses[0]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    table = "embeddings.word_embeddings.weight"
    assert first[table].shape == second[f"qformer.{table}"].shape
    moved = (second[f"qformer.{table}"] - first[table]).abs().amax(1)
    # words of the questions; the others decay alone
    assert 3 < int((moved > 0.02).sum()) < len(moved) - 3

    parts = build_run(
        config(world, tmp_path / "three", 2, **settings, init_from=str(tmp_path / "two")), 0, 1
    )
    assert parts.model.config.text_conditioned
    kept = parts.model.trainable_state_dict()
    assert all(torch.equal(kept[name], value) for name, value in second.items())
    assert {"qformer_input_ids", "qformer_attention_mask"} <= parts.batches[0].keys()
    bare = config(
        world, tmp_path / "x", 2, **settings | {"model": {}}, init_from=str(tmp_path / "two")
    )
    with pytest.raises(ValueError, match=r"reads text: set model.tokenizer and model.text_cond"):
        build_run(bare, 0, 1)


def test_a_text_branch_from_stage1_after_stage_2(world, tmp_path):
    """`init_text_from`: the paper's VQA fine-tuning, whose Q-Former also reads the question."""
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    train(config(world, one, 1), say=_quiet)
    train(config(world, two, 2, init_from=str(one)), say=_quiet)
    settings = {
        "model": INSTRUCTED | {"tokenizer": str(world / "qformer_tokenizer")},
        "data": {
            "task": "vqa",
            "records": str(world / "train_questions.jsonl"),
            "eval_records": str(world / "eval_questions.jsonl"),
        },
        "language_model": {"path": str(world / "opt"), "prompt": "{} :"},
        "init_from": str(two),
        "init_text_from": str(one),
    }
    start = build_run(config(world, out, 2, **settings), 0, 1).model.trainable_state_dict()
    of_images, of_texts = weights(two), weights(one)
    assert start.pop("qformer.embeddings.layernorm.bias").equal(of_images["qformer.layernorm.bias"])
    start.pop("qformer.embeddings.layernorm.weight")
    taken = {n: of_images[n] if n in of_images else of_texts[stage1_names(n)] for n in start}
    assert all(torch.equal(start[name], value) for name, value in taken.items())
    read = [n for n in start if n not in of_images]
    assert {n.split(".")[1] for n in read} == {"embeddings", "encoder"}

    train(config(world, out, 2, **settings, save_every=3), say=_quiet)
    assert read_description(out).sizes["text_conditioned"]
    # a model that reads texts already needs no other, and a run goes on from its own checkpoint
    again = {**settings, "init_from": str(out), "init_text_from": str(tmp_path / "nowhere")}
    assert build_run(config(world, tmp_path / "x", 2, **again), 0, 1).model.config.text_conditioned
    shutil.rmtree(one)
    optim = {"max_steps": 8}
    train(config(world, out, 2, **settings, resume=True, optim=optim), say=_quiet)
    assert read_metrics(out)[-1]["step"] == 8


def test_a_text_branch_that_does_not_fit(world, tmp_path):
    one, two, wide = tmp_path / "one", tmp_path / "two", tmp_path / "wide"
    train(config(world, one, 1), say=_quiet)
    train(config(world, wide, 1, model={"intermediate_size": 24}), say=_quiet)
    train(config(world, two, 2, init_from=str(one)), say=_quiet)
    words = {"model": INSTRUCTED | {"tokenizer": str(world / "qformer_tokenizer")}}
    for init_from, text_from, message in (
        (two, wide, r"wide.*: its Q-Former differs in size: intermediate_size is 24 there, \d+ in"),
        (two, two, r"init_text_from .*two': a run of blip2fast, stage 2: its Q-Former reads no te"),
        (one, one, r"is of stage 1 and reads texts itself: leave init_text_from out"),
    ):
        start = {"init_from": str(init_from), "init_text_from": str(text_from)}
        with pytest.raises(ValueError, match=message):
            build_run(config(world, tmp_path / "x", 2, **words, **start), 0, 1)
    with pytest.raises(
        ValueError, match=r"reads images alone, and .* set init_text_from to the run"
    ):
        build_run(config(world, tmp_path / "x", 2, **words, init_from=str(two)), 0, 1)
    with pytest.raises(ValueError, match=r"init_text_from completes init_from, which is not set"):
        config(world, tmp_path / "x", 2, **words, init_text_from=str(one))
    with pytest.raises(ValueError, match=r"init_text_from is for model.text_conditioned: true"):
        config(world, tmp_path / "x", 2, init_from=str(two), init_text_from=str(one))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_train_alike(world, tmp_path, zero_stage):
    """Instructions leave the text half of the last layer without gradient, images at times none."""
    settings = sequences(world) | {
        "model": INSTRUCTED | {"tokenizer": str(world / "qformer_tokenizer"), "dropout": 0.0},
        "optim": {"max_steps": 4},
    }
    want = run(world, tmp_path / "whole", **settings)
    got = run(world, tmp_path / "spread", **settings, zero_stage=zero_stage)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=0)
    assert distance(tmp_path / "spread", tmp_path / "whole") < 3e-4


def test_llm_dropout_reaches_the_run(world, tmp_path):
    settings = {"optim": {"max_steps": 3}, "model": {"dropout": 0.0}}
    path = {"path": str(world / "opt")}
    without = run(world, tmp_path / "without", **settings, language_model=path)
    dropping = path | {"llm_dropout": True}
    with_it = run(world, tmp_path / "with", **settings, language_model=dropping)
    assert with_it[0] != without[0]
    assert run(world, tmp_path / "again", **settings, language_model=dropping) == with_it


@pytest.mark.parametrize(
    "place", [{}, {"zero_stage": 3}, {"offload": "stream"}], ids=["whole", "zero3", "stream"]
)
def test_runs_without_padding(world, tmp_path, place):
    """The losses of the run with it, but for rounding, wherever the language model is."""
    settings = {"optim": {"max_steps": 3}, "model": {"dropout": 0.0}}
    path = {"path": str(world / "opt")}
    packed = path | {"pack_padding": True}
    parts = build_run(config(world, tmp_path / "x", 2, language_model=packed), 0, 1)
    assert parts.model.config.pack_padding
    want = run(world, tmp_path / "padded", **settings, language_model=path)
    got = run(world, tmp_path / "packed", **settings, **place, language_model=packed)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=0)


def test_memory_of_a_qformer_with_instructions():
    """Its text branch counts, whatever else is set."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "encoder_hidden_size": 24, "vocab_size": 50}
    plain, packed, reading = (
        measure_trained(Stage2Config(**sizes, **more), 20, torch.float32, 2, 5)
        for more in ({}, {"pack_padding": True, "llm_dropout": True}, {"text_conditioned": True})
    )
    assert packed == plain
    tables = 16 * (50 + 512)
    feed_forward = 2 * (2 * 16 * 32 + 16 + 32 + 2 * 16)
    assert reading.parameters == plain.parameters + tables + feed_forward
    assert reading.kept > plain.kept


def test_no_image_files_to_read():
    reader = FileImages(Path("nowhere"), None, 0)
    assert len(reader([], Batch(0, np.array([], dtype=np.int64)))["image_embeds"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": INSTRUCTED},
            "model.tokenizer belongs to stage 1 or text_conditioned, which needs it",
        ),
        (
            {"model": {"tokenizer": "words"}},
            "model.tokenizer belongs to stage 1 or text_conditioned, which",
        ),
        (
            {"data": {"records": "r", "features": "f", "task": "sequence"}, "prompt": "a photo of"},
            "language_model.prompt has no {} for the records' prompts",
        ),
        ({"stage": 1, "model": INSTRUCTED}, "model.text_conditioned belongs to stage 2"),
    ],
)
def test_contradictions(changes, message):
    values = {
        "stage": 2,
        "output_dir": "out",
        "data": {"records": "r", "features": "f"},
        "language_model": {"path": "opt", "prompt": changes.pop("prompt", "")},
        "optim": {"max_steps": 10, "batch_size": 4, "warmup_steps": 2},
    }
    with pytest.raises(ValueError, match=message):
        parse_config(values | changes)
