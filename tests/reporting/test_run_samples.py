"""Pictures in `report.html`: what the model says of them is what the library says, and faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from blip2_models import write_run
from finished_runs import CAPTIONS, as_run
from PIL import Image
from retrieval_models import write_pictures, write_stage1
from safetensors.torch import load_file

from blip2fast import Blip2, Blip2Retriever
from blip2fast import train as train_module
from blip2fast.command_line import main
from blip2fast.reporting import draw_samples, samples
from blip2fast.search.attention import over_picture
from blip2fast.training import trainer
from blip2fast.training.memory_plan import Memory
from blip2fast.training.stopping import RunStopped


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 5)
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return as_run(write_stage1(tmp_path_factory.mktemp("stage1")), 1, pictures)


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return as_run(write_run(tmp_path_factory.mktemp("stage2"), "opt"), 2, pictures)


def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_stage1_shows_the_captions_that_it_finds(stage1: Path, pictures: Path) -> None:
    drawn = draw_samples(stage1, 3, device="cpu")
    assert drawn.notes == []
    assert [sample.name for sample in drawn.samples] == ["0.png", "1.png", "3.png"]
    model = Blip2Retriever.from_pretrained(stage1, device="cpu")
    paths = [pictures / sample.name for sample in drawn.samples]
    scores = model.similarity(paths, CAPTIONS)
    for sample, path, each in zip(drawn.samples, paths, scores, strict=True):
        own = CAPTIONS[int(path.stem)]
        best = sorted(zip(each.tolist(), CAPTIONS, strict=True), reverse=True)[:3]
        want = [f"{score:.2f} {text}{' ✓' if text == own else ''}" for score, text in best]
        assert sample.lines["nearest of 5 captions (✓ its own)"].split("\n") == want
        assert sample.lines["its captions"] == f"{own}\nit is {own}"
        weights = model.attention(path, own)
        assert list(sample.overlays)[:2] == ["mean", "query 1"]
        assert len(sample.overlays) == 1 + len(weights)
        square = Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
        last = over_picture(square, weights[-1])
        assert sample.overlays[f"query {len(weights)}"].tobytes() == last.tobytes()


def test_stage2_shows_what_it_writes(stage2: Path, pictures: Path) -> None:
    drawn = draw_samples(stage2, 2, device="cpu")
    assert drawn.notes == []
    model = Blip2.from_pretrained(stage2, device="cpu")
    for sample in drawn.samples:
        path = pictures / sample.name
        said = " ".join(str(model.caption(path)).split())
        assert sample.lines["the model's caption"] == (said or "(nothing)")
        assert len(sample.overlays) == 1 + len(model.attention(path))


def test_questions_are_answered(stage2: Path, pictures: Path) -> None:
    kept = (stage2 / "config.yaml").read_text()
    as_run(stage2, 2, pictures, task="vqa", records=str(pictures / "q.jsonl"))
    drawn = draw_samples(stage2, 1, device="cpu")
    (stage2 / "config.yaml").write_text(kept)
    (sample,) = drawn.samples
    said = Blip2.from_pretrained(stage2, device="cpu").answer(pictures / "0.png", "what is it ?")
    assert sample.lines["question"] == "what is it ?"
    assert sample.lines["the model's answer"] == (" ".join(str(said).split()) or "(nothing)")
    assert sample.lines["right answer"] == "a cat"


def test_pictures_of_a_run_on_features(
    stage1: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (stage1 / "config.yaml").read_text()
    values = yaml.safe_load(kept)
    values["data"] |= {"features": "cache", "eval_features": "cache"}
    values["data"] |= {"eval_records": values["data"]["records"]}
    del values["data"]["images"], values["data"]["image_encoder"]
    (stage1 / "config.yaml").write_text(yaml.safe_dump(values))
    main(["report", str(stage1), "--device", "cpu"])
    said = f"which holds none. If you have them: blip2fast report {stage1} --images DIR"
    assert said in capsys.readouterr().err
    assert said in page(stage1)
    main(["report", str(stage1), "--images", str(pictures), "--samples", "2", "--device", "cpu"])
    assert capsys.readouterr() == (f"{stage1 / 'report.html'}\n", "")
    assert page(stage1).count('class="card sample"') == 2
    with pytest.raises(SystemExit, match=r"--images .*none: not a folder; give the one that"):
        main(["report", str(stage1), "--images", str(tmp_path / "none")])
    (stage1 / "config.yaml").write_text(kept)


def test_a_run_that_has_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    main(["report", str(tmp_path)])
    assert capsys.readouterr().err == "No sample pictures: the run has not ended.\n"
    assert "the run has not ended." in page(tmp_path)
    main(["report", str(tmp_path), "--samples", "0"])
    assert capsys.readouterr().err == ""
    assert "Samples" not in page(tmp_path)


def test_unreadable_pictures_are_named_and_passed_over(
    stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    main(["report", str(stage1), "--images", str(tmp_path), "--samples", "3", "--device", "cpu"])
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Passed over: image .*1\.png: is not a picture.*", first)
    assert re.fullmatch(r"Passed over: image .*3\.png: no such file", second)
    assert page(stage1).count('class="card sample"') == 1
    assert "3.png: no such file" in page(stage1)


class Loaded:
    """In place of a model: what is raised where it is loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> None:
        raise self.error


def test_the_end_of_a_run_draws_them_and_survives_it(
    stage2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "train", lambda config: {})
    train_module.main(["--config", str(stage2 / "config.yaml")])
    assert capsys.readouterr().err == f"report: {stage2 / 'report.html'}\n"
    assert page(stage2).count('class="card sample"') == 5
    with monkeypatch.context() as broken:
        broken.setattr(Blip2, "from_pretrained", Loaded(RuntimeError("CUDA out of\nmemory")))
        train_module.main(["--config", str(stage2 / "config.yaml")])
    fault = "No sample pictures: drawing them failed: RuntimeError: CUDA out of memory"
    assert capsys.readouterr().err == f"{fault}\nreport: {stage2 / 'report.html'}\n"
    assert fault in page(stage2)
    # a run that was stopped has no time to draw, and ZeRO-3 leaves parts of models elsewhere
    monkeypatch.setattr(trainer, "train", Loaded(RunStopped("stopped", 143)))
    monkeypatch.setattr(Blip2, "from_pretrained", Loaded(AssertionError("loaded")))
    with pytest.raises(SystemExit, match="143"):
        train_module.main(["--config", str(stage2 / "config.yaml")])
    assert f"No sample pictures: blip2fast report {stage2}" in page(stage2)


def test_tokens_that_are_no_square_are_said_once(
    stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = ValueError("6 image tokens are no square of patches")
    monkeypatch.setattr(Blip2, "attention", Loaded(fault))
    drawn = draw_samples(stage2, 2, device="cpu")
    assert drawn.notes == [f"No attention: {fault}"]
    assert [dict(sample.overlays) for sample in drawn.samples] == [{}, {}]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_that_does_not_fit_is_not_loaded(
    stage1: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """A run that ends on a full machine was killed for the pictures of its report."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    run = (stage1, stage2)[stage - 1]
    trained = sum(t.nbytes for t in load_file(run / "model.safetensors").values())
    monkeypatch.setattr(Blip2, "from_pretrained", load)
    monkeypatch.setattr(Blip2Retriever, "from_pretrained", load)
    monkeypatch.setattr(samples, "machine_memory", lambda: Memory(trained, trained, True))
    drawn = draw_samples(run, 2, device="cpu")
    assert drawn.samples == []
    (note,) = drawn.notes
    assert re.match("No sample pictures: to load the model takes .* of this device, where", note)
    assert note.endswith(f"blip2fast report {run}")
    # with what it takes, it is
    enough = 100 * trained
    monkeypatch.setattr(samples, "machine_memory", lambda: Memory(enough, enough, True))
    assert draw_samples(run, 2, device="cpu").notes == [
        "No sample pictures: drawing them failed: AssertionError: loaded"
    ]
