"""CapFilt: captions drawn by image, ranked with the web's, kept, gone on with, shared."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import SIZE, qformer_words, write_run
from retrieval_models import write_pictures, write_stage1
from stage2_models import spread_weights
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPModel,
)

from blip2fast.capfilt import run as work
from blip2fast.capfilt.captioners import Sampling, load_captioner
from blip2fast.capfilt.rankers import load_ranker
from blip2fast.capfilt.run import Bootstrapped, Processes, Settings, bootstrap_captions
from blip2fast.capfilt.sampling import SeededNucleus, image_draws
from blip2fast.command_line import main
from blip2fast.data.records import CaptionRecord, read_captions, write_records
from blip2fast.data.sources import open_records
from blip2fast.frozen.pictures import load_image
from blip2fast.search.retriever import Blip2Retriever

CPU = torch.device("cpu")
SHORT = Sampling(num_captions=4, max_new_tokens=6, min_new_tokens=2, seed=3)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage1(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 7)
    (folder / "4.png").write_bytes(b"no picture")
    records = [CaptionRecord(f"{i}.png", ("a red ring", "the dog")) for i in range(7)]
    write_records(folder / "web.jsonl", records)
    return folder


def _settings(captioner: Path, ranker: Path, photos: Path, **more: Any) -> Settings:
    values = {"sampling": SHORT, **more}
    return Settings(str(photos / "web.jsonl"), str(photos), str(captioner), str(ranker), **values)


@pytest.fixture(scope="module")
def alone(
    captioner: Path, ranker: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    told: list[str] = []
    done = bootstrap_captions(
        _settings(captioner, ranker, photos), out, batch_size=3, complain=told.append
    )
    assert (done.rows, done.written, done.captions) == (7, 7, out / "captions.jsonl")
    assert told == done.faults
    assert len(told) == 1
    assert "4.png: is not a picture" in told[0]
    return out


def _candidates(out: Path) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for path in out.glob("predictions-*.jsonl"):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if "captions" in result:
                found[result["row"]] = result["captions"]
    return found


def test_draws_are_of_the_nucleus_and_of_its_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.03]).log()
    draws = torch.from_numpy(np.random.default_rng(0).random((4000, 1)))
    scores = SeededNucleus(draws, 0.9)(torch.zeros(4000, 1), logits.expand(4000, 5))
    assert torch.equal(scores.isfinite().sum(1), torch.ones(4000, dtype=torch.long))
    counts = scores.argmax(1).bincount(minlength=5) / 4000
    # 0.5 and 0.3 and 0.12 make 0.92, the smallest set of 0.9
    want = torch.tensor([0.5, 0.3, 0.12, 0, 0]) / 0.92
    torch.testing.assert_close(counts, want, rtol=0, atol=0.03)
    top = SeededNucleus(draws, 0.4)(torch.zeros(4000, 1), logits.expand(4000, 5))
    assert (top.argmax(1) == 0).all()
    everything = SeededNucleus(torch.tensor([[0.0], [1 - 2**-53]]), 1.0)
    assert everything(torch.zeros(2, 1), logits.expand(2, 5)).argmax(1).tolist() == [0, 4]
    with pytest.raises(ValueError, match="3 rows to sample, but numbers of 4000"):
        SeededNucleus(draws, 0.9)(torch.zeros(3, 1), torch.zeros(3, 5))


def test_an_images_draws_are_its_own() -> None:
    assert torch.equal(image_draws(1, "a", 2, 5), image_draws(1, "a", 2, 5))
    assert not torch.equal(image_draws(1, "a", 2, 5), image_draws(2, "a", 2, 5))
    assert not torch.equal(image_draws(1, "a", 2, 5), image_draws(1, "b", 2, 5))
    assert torch.equal(image_draws(1, "a", 2, 5), image_draws(1, "a", 3, 5)[:2])


def test_the_best_are_kept_by_the_models_own_score(alone: Path, ranker: Path, photos: Path) -> None:
    retriever = Blip2Retriever.from_pretrained(ranker)
    candidates = _candidates(alone)
    assert candidates.keys() == {0, 1, 2, 3, 5, 6}
    records = read_captions(alone / "captions.jsonl")
    assert [record.image for record in records] == [f"{i}.png" for i in sorted(candidates)]
    written = set()
    for record, (row, found) in zip(records, sorted(candidates.items()), strict=True):
        texts = [each["text"] for each in found]
        assert {"a red ring", "the dog"} <= set(texts), "the web's captions compete"
        assert 3 <= len(texts) <= 6
        assert len({text.lower() for text in texts}) == len(texts)
        scores = retriever.similarity(photos / f"{row}.png", texts)[0]
        assert torch.equal(scores.argsort(descending=True), torch.arange(len(texts)))
        stated = torch.tensor([each["score"] for each in found])
        torch.testing.assert_close(stated, scores, rtol=0, atol=1e-5)
        assert list(record.captions) == texts[:2]
        written |= {each["text"] for each in found if each["from"] == "model"}
    assert len(written) > 8, "images and draws matter"
    assert len(open_records(str(alone / "captions.jsonl"), "caption")) == 6, "ready to train"
    (fault,) = (alone / "faults.jsonl").read_text().splitlines()
    assert json.loads(fault)["image"] == "4.png"


def test_processes_share_the_work_and_change_nothing(
    captioner: Path,
    ranker: Path,
    photos: Path,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, out = _settings(captioner, ranker, photos), tmp_path / "out"
    models = load_captioner(str(captioner), torch.float32, CPU)
    scorer = load_ranker(str(ranker), False, torch.float32, CPU)
    monkeypatch.setattr(work, "load_captioner", lambda *_: models)
    monkeypatch.setattr(work, "load_ranker", lambda *_: scorer)
    together = threading.Barrier(3, timeout=120)
    monkeypatch.setattr(Processes, "wait", lambda self: together.wait())

    def run(rank: int) -> Bootstrapped:
        return bootstrap_captions(settings, out, batch_size=2, processes=Processes(rank, 3))

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(run, range(3)))
    assert [each.written for each in done] == [3, 2, 2]
    assert [each.captions is None for each in done] == [False, True, True]
    assert len(list(out.glob("predictions-*.jsonl"))) == 3
    assert (out / "captions.jsonl").read_text() == (alone / "captions.jsonl").read_text()
    assert (out / "faults.jsonl").read_text() == (alone / "faults.jsonl").read_text()
    assert _candidates(out) == _candidates(alone)


def test_an_interrupted_run_goes_on_with_other_processes(
    captioner: Path,
    ranker: Path,
    photos: Path,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (out / "captions.jsonl").unlink()
    (out / "faults.jsonl").unlink()
    lines = (out / "predictions-0.jsonl").read_text().splitlines(keepends=True)
    # another process's file, with a line that was cut off, and one's own
    (out / "predictions-5.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    (out / "predictions-0.jsonl").write_text(lines[3] + lines[4][:10])
    tried: list[int] = []
    real = work._Work._ranked
    monkeypatch.setattr(
        work._Work,
        "_ranked",
        lambda self, rows, *more: tried.extend(rows) or real(self, rows, *more),
    )
    bootstrap_captions(_settings(captioner, ranker, photos), out)
    whole = {json.loads(line)["row"] for line in (*lines[:2], lines[3]) if "captions" in line}
    assert sorted(tried) == sorted({0, 1, 2, 3, 5, 6} - whole)
    assert (out / "captions.jsonl").read_text() == (alone / "captions.jsonl").read_text()
    assert (out / "faults.jsonl").read_text() == (alone / "faults.jsonl").read_text()


def test_what_it_refuses(
    captioner: Path,
    ranker: Path,
    photos: Path,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(work, "load_captioner", load)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(alone / "settings.json", begun)
    new = tmp_path / "new"
    other = {"num_captions": 4, "max_new_tokens": 6, "min_new_tokens": 2, "seed": 4}
    for out, settings, message in (
        (alone, _settings(captioner, ranker, photos), "exists: it is finished"),
        (photos, _settings(captioner, ranker, photos), "is not empty, and no capfilt began there"),
        (begun, _settings(captioner, ranker, photos, keep=3), "was begun with keep 2, not 3"),
        (
            begun,
            _settings(captioner, ranker, photos, sampling=Sampling(**other)),
            "was begun with sampling .*'seed': 3.*'seed': 4",
        ),
        (new, _settings(ranker, ranker, photos), "trained in stage 1 and cannot write text"),
        (new, _settings(captioner, captioner, photos), "trained in stage 2 and cannot compare"),
        (new, _settings(captioner, ranker, photos, keep=0), "keep=0: expected at least 1"),
        (
            new,
            _settings(captioner, ranker, photos, sampling=Sampling(top_p=0.0)),
            "top_p=0.0: expected above 0",
        ),
        (new, _settings(tmp_path / "none", ranker, photos), "captioner .*none': not found"),
        (new, _settings(captioner, tmp_path / "none", photos), "ranker .*none': not found"),
        (new, _settings(captioner, ranker, tmp_path / "none"), "no records at"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_captions(settings, out)
    assert not new.exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": 64, "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    spread_weights(model, 6)
    model.save_pretrained(folder)
    qformer_words().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def test_clip_ranks_as_clip_does(clip: Path, photos: Path) -> None:
    ranker = load_ranker(str(clip), False, torch.float32, CPU)
    pixels = torch.stack([ranker.transform(load_image(photos / f"{i}.png")) for i in range(2)])
    texts = [["a red ring", "the dog"], ["blue", "a cat", "what is it ?"]]
    found = ranker.scores(pixels, texts)
    model = CLIPModel.from_pretrained(clip).eval()
    words = qformer_words()
    for image, some, scores in zip(pixels, texts, found, strict=True):
        with torch.no_grad():
            out = model(
                pixel_values=image[None], **dict(words(some, padding=True, return_tensors="pt"))
            )
        want = out.logits_per_image[0] / model.logit_scale.exp().detach()
        torch.testing.assert_close(torch.tensor(scores), want, rtol=1e-4, atol=1e-5)


def test_itm_adds_to_the_score(ranker: Path, photos: Path) -> None:
    retriever = Blip2Retriever.from_pretrained(ranker)
    mine = load_ranker(str(ranker), True, torch.float32, CPU)
    paths = [photos / f"{i}.png" for i in range(2)]
    pixels = torch.stack([mine.transform(load_image(path)) for path in paths])
    texts = [["a red ring", "the dog"], ["blue cat"]]
    for path, some, scores in zip(paths, texts, mine.scores(pixels, texts), strict=True):
        want = retriever.similarity(path, some, match=True)[0]
        torch.testing.assert_close(torch.tensor(scores), want, rtol=1e-4, atol=1e-4)


def test_any_captioner_of_transformers(
    clip: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "blip"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    ids = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**sizes, **ids, "vocab_size": 48, "encoder_hidden_size": 16}
        | {"max_position_embeddings": 32, "is_decoder": True},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval()
    spread_weights(model, 7)
    model.save_pretrained(folder)
    qformer_words().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)

    captioner = load_captioner(str(folder), torch.float32, CPU)
    keys = [f"{i}.png" for i in range(3)]
    pixels = torch.stack([captioner.transform(load_image(photos / key)) for key in keys])
    together = captioner.write(pixels, keys, SHORT)
    assert [len(each) for each in together] == [4, 4, 4]
    apart = [captioner.write(p[None], [k], SHORT)[0] for p, k in zip(pixels, keys, strict=True)]
    assert together == apart
    assert len({text for each in together for text in each}) > 6

    out = tmp_path / "out"
    main(
        [
            *("capfilt", str(photos / "web.jsonl"), "--images", str(photos)),
            *("--captioner", str(folder), "--ranker", str(clip), "--out", str(out)),
            *("--num-captions", "3", "--max-new-tokens", "5", "--min-new-tokens", "1"),
        ]
    )
    said = capsys.readouterr()
    assert f"{out / 'captions.jsonl'}: of 7 records" in said.out
    assert "passed over: image" in said.err
    assert all(len(record.captions) == 2 for record in read_captions(out / "captions.jsonl"))


def test_the_environment_names_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.of_environment() == Processes(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Processes.of_environment() == Processes(5, 8, 1)
