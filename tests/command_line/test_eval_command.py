"""`blip2fast eval`: what reaches the evaluations, what is shown, and faults in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blip2fast.command_line import main
from blip2fast.scoring import retrieving, writing
from blip2fast.scoring.setup import Setup

COMMON = ["--model", "run", "--data", "file.json", "--images", "pictures", "--out", "results"]


def write_files(folder: Path) -> None:
    """What `COMMON` and `--annotations` name."""
    (folder / "pictures").mkdir()
    for name in ("file.json", "a.json"):
        (folder / name).write_text("[]")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the evaluations were called with."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[Any, ...]] = []
    result = {
        "metrics": {"accuracy": 0.25},
        "by": {"answer_type": {"number": 0.5}, "domain": {"near": {"CIDEr-D": 1.5}}},
        "failed": [{"id": "7", "image": "a.png", "error": "image a.png: no such file"}],
        "samples": 3,
    }

    def record(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return result

    monkeypatch.setattr(retrieving, "evaluate_retrieval", record)
    monkeypatch.setattr(writing, "evaluate_captions", record)
    monkeypatch.setattr(writing, "evaluate_answers", record)
    return calls


def test_options_arrive(given: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--prompt", "Q: {}", "--dtype", "bf16", "--overwrite"]
    for task, *options in (
        ["retrieval", *COMMON, "--rerank-k", "16", "--captions-per-image", "5"],
        ["caption", *COMMON, "--split", "val", "--min-new-tokens", "8", "--limit", "9"],
        ["vqa", *COMMON, "--annotations", "a.json", "--image-name", "{}.jpg", *more],
    ):
        with pytest.raises(SystemExit) as end:
            main(["eval", task, *options])
        assert end.value.code == 1, "one sample could not be evaluated"
    (first, *how), (second, prefix, captions), (third, prompt, answers) = given
    assert isinstance(first, Setup)
    assert (first.model.path, first.images, first.out) == ("run", Path("pictures"), Path("results"))
    assert (how, first.data.split, first.batch_size) == ([16, 5, 35], "test", 64)
    assert (second.data.split, second.limit, prefix) == ("val", 9, None)
    assert captions == {
        "num_beams": 5,
        "length_penalty": 1.0,
        "max_new_tokens": 30,
        "min_new_tokens": 8,
    }
    assert (third.data.annotations, third.data.image_name) == ("a.json", "{}.jpg")
    assert (third.overwrite, third.model.dtype, prompt) == (True, "bf16", "Q: {}")
    assert answers == {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        f"{'accuracy':28} 0.2500",
        f"{'answer_type: number':28} 0.5000",
        f"{'domain: near':28} 1.5000",
        "not evaluated: 7: image a.png: no such file",
        "2 of 3 samples; results/result.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", *COMMON], "error: --images pictures: not a folder"),
        (["caption", *COMMON, "--features", "x"], "error: give --images, a folder of pictures, or"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["eval", *arguments])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    write_files(tmp_path)
    with pytest.raises(SystemExit, match="error: device 'tpu9': "):
        main(["eval", "retrieval", *COMMON, "--device", "tpu9"])
    assert not (tmp_path / "results").exists()
