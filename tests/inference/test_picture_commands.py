"""`blip2fast caption`, `vqa` and `chat`: many files, one bad file, going on, what they refuse."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import pytest
from blip2_models import write_run
from retrieval_models import write_pictures, write_stage1

from blip2fast import Blip2
from blip2fast.command_line import main
from blip2fast.data.records import read_captions
from blip2fast.inference import model as inference_model
from blip2fast.inference.picture_files import find_pictures, read_ahead
from blip2fast.inference.results import ResultFile

GREEDY = ("--num-beams", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def blip2(run: Path) -> Blip2:
    return Blip2.from_pretrained(run)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_pictures(folder, 3)
    write_pictures(folder / "below", 2, seed=1)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def _loaded_once(monkeypatch: pytest.MonkeyPatch, blip2: Blip2) -> None:
    """Commands get the model of this module, instead of loading it again."""
    monkeypatch.setattr(inference_model.Blip2, "from_pretrained", lambda *a, **k: blip2)


def test_pictures_are_found_in_order_and_once(photos: Path) -> None:
    (photos / ".hidden").mkdir()
    write_pictures(photos / ".hidden", 1)
    (photos / ".1.png").write_bytes(b"")
    here = [photos / f"{i}.png" for i in range(3)]
    assert find_pictures([photos]) == here
    below = [photos / "below" / f"{i}.png" for i in range(2)]
    assert sorted(find_pictures([photos], recursive=True)) == sorted([*here, *below])
    assert find_pictures([here[2], photos, photos / "notes.txt"]) == [
        *(here[2], here[0], here[1]),
        photos / "notes.txt",
    ]


def test_reading_ahead_keeps_order_and_names_faults() -> None:
    def load(number: int) -> int:
        if number == 3:
            raise ValueError("three\nis bad")
        return number * number

    batches = list(read_ahead(range(5), load, 2, workers=2))
    assert [[each.item for each in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [each.pixels for batch in batches for each in batch] == [0, 1, 4, None, 16]
    assert batches[1][1].fault == "three is bad"


@pytest.mark.usefixtures("_loaded_once")
def test_a_bad_file_does_not_end_a_folder(
    run: Path, blip2: Blip2, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main(["caption", str(photos), "--model", str(run), "--batch-size", "2", *GREEDY])
    assert ended.value.code == 1
    said = capsys.readouterr()
    good = [photos / "0.png", photos / "2.png"]
    texts = blip2.caption(good, num_beams=1)
    assert said.out == "".join(f"{p}\t{t}\n" for p, t in zip(good, texts, strict=True))
    assert f"passed over: image {photos / '1.png'}: is not a picture" in said.err


@pytest.mark.usefixtures("_loaded_once")
def test_side_cars_and_records_go_on(
    run: Path, blip2: Blip2, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.jsonl"
    call = ["caption", str(photos), "--model", str(run), "--recursive", "--ext", ".cap"]
    call += ["--out", str(out), "--num-captions", "2", "--num-beams", "2"]
    main(call)
    assert "5 captioned, 0 there, 0 unreadable" in capsys.readouterr().err
    pictures = find_pictures([photos], recursive=True)
    want = blip2.caption(pictures, num_captions=2, num_beams=2)
    records = read_captions(out)
    assert [record.image for record in records] == [str(path) for path in pictures]
    assert [list(record.captions) for record in records] == want
    for path, captions in zip(pictures, want, strict=True):
        assert path.with_suffix(".cap").read_text() == "".join(f"{text}\n" for text in captions)

    with pytest.raises(SystemExit, match=r"all\.jsonl exists; go on with it by --resume"):
        main(call)
    # a killed command: half a line, and a picture whose side-car is missing
    whole = out.read_text()
    out.write_text(whole[: whole.rindex("\n", 0, -1) + 20])
    pictures[0].with_suffix(".cap").unlink()
    main([*call, "--resume"])
    assert "2 captioned, 3 there, 0 unreadable" in capsys.readouterr().err
    found = {record.image: list(record.captions) for record in read_captions(out)}
    assert found == {str(p): c for p, c in zip(pictures, want, strict=True)}
    assert pictures[0].with_suffix(".cap").exists()


@pytest.mark.usefixtures("_loaded_once")
def test_a_csv_has_a_row_for_each_caption(
    run: Path, blip2: Blip2, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all.csv"
    call = ["caption", str(photos / "0.png"), str(photos / "1.png"), "--model", str(run)]
    call += ["--out", str(out), "--num-captions", "2", "--sample", "--seed", "4"]
    main(call)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    paths = [photos / "0.png", photos / "1.png"]
    texts = blip2.caption(paths, num_captions=2, do_sample=True, seed=4)
    want = [(str(p), " ".join(t.split())) for p, two in zip(paths, texts, strict=True) for t in two]
    assert [(row["image"], row["caption"]) for row in rows] == want


def test_results_refuse_what_they_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"its columns are \['a', 'b'\], not \['image'\]"):
        ResultFile(path, ["image"], resume=True)
    assert path.read_text() == "a,b\n1,2\n"
    (tmp_path / "r.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"r\.jsonl was not written by this command"):
        ResultFile(tmp_path / "r.jsonl", [], resume=True)
    with pytest.raises(ValueError, match=r"r\.txt: results are written to a \.jsonl or a \.csv"):
        ResultFile(tmp_path / "r.txt", [])
    with pytest.raises(ValueError, match="is not a folder"):
        ResultFile(tmp_path / "r.csv" / "below.csv", [])


@pytest.mark.usefixtures("_loaded_once")
def test_questions_are_answered_one_a_line(
    run: Path, blip2: Blip2, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asked.txt"
    file.write_text("colour ?\n\nwhere is the dog ?\n")
    image = str(photos / "0.png")
    main(["vqa", image, "what is it ?", "--questions", str(file), "--model", str(run), *GREEDY])
    asked = ["what is it ?", "colour ?", "where is the dog ?"]
    want = [f"{q}\t{blip2.answer(image, q, num_beams=1)}" for q in asked]
    assert capsys.readouterr().out.splitlines() == want


@pytest.mark.usefixtures("_loaded_once")
def test_a_conversation_ends_at_an_empty_line(
    run: Path,
    blip2: Blip2,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = str(photos / "0.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it ?\ncolour ?\n\nwhere ?\n"))
    main(["chat", image, "--model", str(run), *GREEDY])
    chat = blip2.chat(image, num_beams=1)
    want = [chat("what is it ?"), chat("colour ?")]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in want)
    main(["chat", image, "--once", "what is it ?", "--model", str(run), *GREEDY])
    assert capsys.readouterr().out == want[0] + "\n"
    # a refused question is told, and does not end it
    monkeypatch.setattr(sys, "stdin", io.StringIO("<image> ?\nwhat is it ?\n"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", image, "--model", str(run), *GREEDY])
    assert ended.value.code == 1
    refused, answered = capsys.readouterr().out.splitlines()
    assert refused.startswith("(")
    assert answered == want[0]


def test_everything_is_checked_before_a_model_is_loaded(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(inference_model.Blip2, "from_pretrained", load)
    image, model = str(photos / "0.png"), ("--model", str(run))
    stage1 = write_stage1(tmp_path / "stage1")
    (photos / "0.jpg").write_bytes((photos / "0.png").read_bytes())
    (photos / "bad.png").write_bytes(b"no picture")
    (photos / "2.txt").write_text("mine\n")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints" / "step-7").mkdir(parents=True)
    for arguments, message in (
        (["caption", str(tmp_path / "none"), *model], "none: no such file or folder"),
        (["caption", str(stage1), *model], "no pictures in this folder; --recursive looks"),
        (["caption", image, "--model", str(stage1)], "trained in stage 1 and cannot write text"),
        (["caption", image, "--model", "./no"], "model './no': not found"),
        (["caption", image, "--model", str(unfinished)], "not ended; give a checkpoint of it, .*7"),
        (["caption", image, *model, "--out", "x.txt"], r"written to a \.jsonl or a \.csv"),
        (["caption", str(photos), *model, "--ext", ".txt"], "0.txt would be that of"),
        (["caption", str(photos / "2.png"), *model, "--ext", ".txt"], "2.txt exists; pass over"),
        (["caption", image, *model, "--ext", "txt"], "give a suffix such as .txt"),
        (["caption", image, *model, "--num-captions", "9"], "raise --num-beams, or give --sample"),
        (["caption", image, *model, "--question", "?", "--num-captions", "2"], "has one answer"),
        (["vqa", image, *model], "no question: give some after the image"),
        (["vqa", image, "--questions", "none.txt", *model], "none.txt: no such file"),
        (["vqa", str(photos / "bad.png"), "what ?", *model], "bad.png: is not a picture"),
        (["chat", str(tmp_path / "none.png"), *model], "none.png: no such file"),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            main(arguments)
        assert "\n" not in str(ended.value.code)
    assert (photos / "2.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("device", "fault"),
    [("gpu", "device 'gpu': give cpu, cuda or cuda:NUMBER"), ("cuda:9", r"finds \d CUDA devices")],
)
def test_a_device_that_is_not_here_is_one_line(
    run: Path, photos: Path, tmp_path: Path, device: str, fault: str
) -> None:
    """It was a traceback of PyTorch's: `--device cuda` beside a build for the CPU."""
    stage1, image = str(write_stage1(tmp_path / "stage1")), str(photos / "0.png")
    for words in (
        ["caption", image, "--model", str(run)],
        ["attention", image, "--text", "a", "--model", stage1, "--out", str(tmp_path / "a.png")],
    ):
        with pytest.raises(SystemExit, match=f"error: device {device!r}: |{fault}") as ended:
            main([*words, "--device", device])
        assert re.search(fault, str(ended.value.code))
