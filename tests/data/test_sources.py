"""Records of every layout: read as they are, imported into a table, refused with file and line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2fast.command_line import main
from blip2fast.data.batches import Batch
from blip2fast.data.checking import check_records
from blip2fast.data.images import FileImages, read_picture
from blip2fast.data.importing import import_records
from blip2fast.data.layouts import read_rows
from blip2fast.data.progress import RowBar
from blip2fast.data.records import CaptionRecord, QuestionRecord, SequenceRecord, write_records
from blip2fast.data.skipping import LeftOut
from blip2fast.data.source_config import RecordSource
from blip2fast.data.sources import open_records, source_keys
from blip2fast.data.table import RecordTable
from blip2fast.frozen.images import ImageTransform

RECORDS = [CaptionRecord("a.png", ("a red ring", "it is red")), CaptionRecord("b.png", ("a disc",))]
FLAT = [CaptionRecord("a.png", ("a red ring",)), CaptionRecord("b.png", ("a disc, blue",))]


def picture(shade: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (shade, 0, 0))


def png(shade: int) -> bytes:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_shard(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def jsonl(folder: Path) -> Path:
    write_records(folder / "r.jsonl", RECORDS)
    return folder / "r.jsonl"


def one_caption_json(folder: Path) -> Path:
    rows = [{"image": r.image, "caption": r.captions[0], "image_id": n} for n, r in enumerate(FLAT)]
    return write_json(folder / "r.json", rows)


def jsonl_named_json(folder: Path) -> Path:
    return jsonl(folder).rename(folder / "r.json")


def csv_file(folder: Path) -> Path:
    (folder / "r.csv").write_text('id,filepath,title\n1,a.png,a red ring\n2,b.png,"a disc, blue"\n')
    return folder / "r.csv"


def csv_of_tabs(folder: Path) -> Path:
    (folder / "r.csv").write_text("filepath\ttitle\r\na.png\ta red ring\r\nb.png\ta disc, blue\r\n")
    return folder / "r.csv"


def tsv_with_mark(folder: Path) -> Path:
    text = "\ufeffimage\ttext\na.png\ta red ring\nb.png\ta disc, blue\n"
    (folder / "r.tsv").write_text(text)
    return folder / "r.tsv"


def semicolons(folder: Path) -> Path:
    text = "image;text\na.png;a red ring\nb.png;a disc, blue\n"
    (folder / "r.csv").write_text(text)
    return folder / "r.csv"


def coco(folder: Path) -> Path:
    images = [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}]
    captions = [(9, "a disc"), (7, "a red ring"), (7, "it is red")]
    annotations = [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(captions)]
    return write_json(folder / "captions.json", {"images": images, "annotations": annotations})


def imagefolder(folder: Path) -> Path:
    (folder / "metadata.csv").write_text('file_name,text\na.png,a red ring\nb.png,"a disc, blue"\n')
    return folder


def imagefolder_jsonl(folder: Path) -> Path:
    rows = [{"file_name": r.image, "caption": r.captions[0]} for r in FLAT]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def imagefolder_parquet(folder: Path) -> Path:
    columns = {"file_name": [r.image for r in FLAT], "text": [r.captions[0] for r in FLAT]}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")
    return folder


def parquet(folder: Path) -> Path:
    columns = {"image": [r.image for r in RECORDS], "captions": [list(r.captions) for r in RECORDS]}
    pq.write_table(pa.table(columns), folder / "r.parquet")
    return folder / "r.parquet"


def dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [r.image for r in RECORDS], "captions": [list(r.captions) for r in RECORDS]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "d"))
    return folder / "d"


def sidecars(folder: Path) -> Path:
    for record, end in zip(FLAT, ("\n", "\r\n"), strict=True):
        picture(1).save(folder / record.image)
        (folder / record.image).with_suffix(".txt").write_bytes((record.captions[0] + end).encode())
    return folder


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (jsonl, RECORDS),
        (jsonl_named_json, RECORDS),
        (one_caption_json, FLAT),
        (csv_file, FLAT),
        (csv_of_tabs, FLAT),
        (tsv_with_mark, FLAT),
        (semicolons, FLAT),
        (coco, RECORDS),
        (imagefolder, FLAT),
        (imagefolder_jsonl, FLAT),
        (imagefolder_parquet, FLAT),
        (parquet, RECORDS),
        (dataset, RECORDS),
        (sidecars, FLAT),
    ],
)
def test_layouts(tmp_path: Path, write: Callable[[Path], Path], expected: list[Any]) -> None:
    """Each gives the same records in a run's configuration and through a table."""
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in")
    assert list(open_records(str(source), "caption")) == expected
    done = import_records(source, tmp_path / "out")
    assert done.counts.rows == len(expected)
    assert list(open_records(str(tmp_path / "out"), "caption")) == expected
    assert source_keys(source) == source_keys(tmp_path / "out") == ["a.png", "b.png"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "write", [jsonl, one_caption_json, csv_file, coco, imagefolder, parquet, dataset, sidecars]
)
def test_rows_say_how_much_was_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """So that a bar can tell the time left."""
    first, last = [row.share for row in read_rows(write(tmp_path))]
    assert 0.3 < first < 0.8
    assert last == pytest.approx(1, abs=0.02)
    bar = RowBar(2)
    for _ in range(100):
        bar.add(0, 0.5)
    assert bar.estimate(0, 0.5) == 400


def test_vqa_has_the_answers_of_all_annotators(tmp_path: Path) -> None:
    questions = [
        {"question_id": 1, "image_id": 42, "question": "What colour is it?"},
        {"question_id": 2, "image_id": 43, "question": "Is it red?"},
    ]
    said = {1: ["red"] * 6 + ["dark red"] * 4, 2: ["no"] * 10}
    annotations = [
        {
            "question_id": number,
            "image_id": 41 + number,
            "multiple_choice_answer": answers[0],
            "answer_type": "other",
            "question_type": "what",
            "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)],
        }
        for number, answers in said.items()
    ]
    path = write_json(tmp_path / "q.json", {"data_subtype": "train2014", "questions": questions})
    other = write_json(tmp_path / "a.json", {"annotations": annotations})
    source = RecordSource(source=str(path), annotations=str(other))
    records = list(open_records(source, "vqa"))
    assert records[0] == QuestionRecord(
        "COCO_train2014_000000000042.jpg", "What colour is it?", "red", "other", tuple(said[1])
    )
    source.image_name = "{}.png"
    import_records(source, tmp_path / "out")
    again = open_records(str(tmp_path / "out"), "vqa")
    assert [r.image for r in again] == ["42.png", "43.png"]
    assert again[1].answers == tuple(said[2])
    with pytest.raises(ValueError, match=r"q.json: questions without answers: give the annot"):
        open_records(str(path), "vqa")
    annotations.pop()
    write_json(other, {"annotations": annotations})
    with pytest.raises(ValueError, match=r"q.json, questions entry 2: question_id 2 has no annot"):
        open_records(source, "vqa")


def test_lavis_questions(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": "what", "answer": ["ring", "disc", "ring"]}]
    path = write_json(tmp_path / "vqa.json", [{**rows[0], "dataset": "vqa", "question_id": 3}])
    (record,) = open_records(str(path), "vqa")
    assert record == QuestionRecord("a.png", "what", "ring", "", ("ring", "disc", "ring"))


def test_sequences(tmp_path: Path) -> None:
    records = [SequenceRecord(("a", "b"), ("a ring",), "<image> <image>")]
    write_records(tmp_path / "s.jsonl", records)
    assert import_records(tmp_path / "s.jsonl", tmp_path / "out").task == "sequence"
    assert list(open_records(str(tmp_path / "out"), "sequence")) == records
    with pytest.raises(ValueError, match="task sequence, not caption"):
        open_records(str(tmp_path / "out"), "caption")


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    """Keys say where the bytes lie, whatever the tar format and the length of the names."""
    folder = tmp_path / "shards" / "train"
    folder.mkdir(parents=True)
    long = "n" * 120
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = {
            "000.png": png(10),
            "000.txt": b"a red ring",
            "000.json": b'{"caption": "other", "width": 4, "uid": 3}',
            f"{long}.json": b'{"caption": "a disc"}',
            f"{long}.png": png(20),
        }
        write_shard(folder / f"{form}.tar", members, form)
    top = tmp_path / "shards"
    records = list(open_records(str(top), "caption", top))
    assert [r.captions for r in records] == [("a red ring",), ("a disc",)] * 2
    shades = [read_picture(top, record.image).getpixel((0, 0))[0] for record in records]
    assert shades == [10, 20, 10, 20]
    store = FileImages(top, ImageTransform(4), seed=0)
    keys = [record.image for record in records]
    store.check(keys)
    pixels = store(keys, Batch(0, np.arange(4)))["images"]
    assert torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])
    import_records(f"{folder}/*.tar", tmp_path / "out")
    named = list(open_records(str(tmp_path / "out"), "caption"))
    assert read_picture(folder, named[3].image).getpixel((0, 0)) == (20, 0, 0)
    write_shard(folder / f"{tarfile.PAX_FORMAT}.tar", {"0.txt": b"x" * 5000, "000.png": png(1)})
    with pytest.raises(ValueError, match=r"image n+\.png of .*tar: the shard has changed; import"):
        read_picture(top, records[3].image)


@pytest.mark.parametrize("change", ["cut", "gone", "text"])
def test_damaged_shards(tmp_path: Path, change: str) -> None:
    path = write_shard(tmp_path / "s.tar", {"0.txt": b"a ring", "0.png": png(1) * 50})
    (record,) = open_records(str(path), "caption")
    if change == "gone":
        path.unlink()
        with pytest.raises(ValueError, match="no such file in"):
            FileImages(tmp_path, ImageTransform(4), seed=0).check([record.image])
        with pytest.raises(ValueError, match="no such shard"):
            read_picture(tmp_path, record.image)
        return
    path.write_bytes(path.read_bytes()[:2000] if change == "cut" else b"no tar")
    with pytest.raises(ValueError, match=r"s.tar: not a whole, uncompressed tar file"):
        open_records(str(path), "caption")
    with pytest.raises(ValueError, match="shorter than it was; import its records again"):
        read_picture(tmp_path, record.image)


def test_images_within_rows_are_packed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [picture(5), picture(6)], "text": ["a ring", "a disc"]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(str(tmp_path / "d"))
    made.to_parquet(str(tmp_path / "d.parquet"))
    for name in ("d", "d.parquet"):
        with pytest.raises(ValueError, match="row 1: the image is in the row itself; take it out"):
            open_records(str(tmp_path / name), "caption")
        out = tmp_path / f"out-{name}"
        assert import_records(tmp_path / name, out).packed == 2
        records = list(open_records(str(out), "caption"))
        assert [read_picture(out, r.image).getpixel((1, 1))[0] for r in records] == [5, 6]


def test_splits_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a ring"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"has the splits test, train; give one: .*d/NAME"):
        open_records(str(tmp_path / "d"), "caption")
    assert len(open_records(str(tmp_path / "d" / "train"), "caption")) == 1


def test_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf:NAME` is what `datasets.load_dataset` takes, here a folder without a script."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        rows = [{"image": r.image, "caption": f"{split} {r.captions[0]}"} for r in FLAT]
        (tmp_path / "d" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"hf:{tmp_path / 'd'}"
    records = list(open_records(f"{name}:train", "caption"))
    assert [r.captions[0] for r in records] == [f"train {r.captions[0]}" for r in FLAT]
    with pytest.raises(ValueError, match=r"has the splits test, train; give one: hf:.*d:SPLIT"):
        open_records(name, "caption")
    with pytest.raises(ValueError, match=r"d:valid: datasets cannot load it .Unknown split"):
        open_records(f"{name}:valid", "caption")
    with pytest.raises(ValueError, match=r"give hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or"):
        open_records("hf:a/b:c:d:e", "caption")
    with pytest.raises(ValueError, match=r"no records at a/b: .*hub: hf:OWNER/NAME"):
        open_records("a/b", "caption")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hf:nobody/nothing: datasets cannot load it") as caught:
        open_records("hf:nobody/nothing", "caption")
    assert "without a connection give a local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.csv.gz", "r.tsv.GZ", "r.json.gz"])
def test_compressed_texts(tmp_path: Path, name: str) -> None:
    between = "\t" if "tsv" in name else ","
    text = f"image{between}caption\na.png{between}a ring\nb.png{between}a café\n"
    rows = [{"image": "a.png", "caption": "a ring"}, {"image": "b.png", "caption": "a café"}]
    if "jsonl" in name:
        text = "\n".join(map(json.dumps, rows))
    elif "json" in name:
        text = json.dumps(rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    found = list(read_rows(tmp_path / name))
    assert [row.values for row in found] == rows
    assert found[-1].share <= 1
    records = open_records(str(tmp_path / name), "caption")
    assert [(r.image, r.captions) for r in records] == [
        ("a.png", ("a ring",)),
        ("b.png", ("a café",)),
    ]
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-12])
    with pytest.raises(ValueError, match=r"r\..*: not a whole gzip file .*; fetch or compress"):
        open_records(str(tmp_path / name), "caption")
    (tmp_path / name).write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"not a whole gzip file .Not a gzipped file"):
        open_records(str(tmp_path / name), "caption")


@pytest.mark.parametrize(
    ("encoding", "stated"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", "utf-16"), ("latin-1", "latin-1")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings(tmp_path: Path, encoding: str, stated: str | None, end: str) -> None:
    text = end.join(["image,caption", "a.png,un café", "b.png,übrig", ""])
    (tmp_path / "r.csv").write_bytes(text.encode(encoding))
    options = {} if stated is None else {"encoding": stated}
    records = open_records(RecordSource(source=str(tmp_path / "r.csv"), **options), "caption")
    assert [r.captions[0] for r in records] == ["un café", "übrig"]


FAULTS: list[tuple[str, bytes, dict[str, Any], str]] = [
    (
        "r.csv",
        "image,caption\na.png,café\n".encode("latin-1"),
        {},
        "line 2: byte 0xe9 at column 10 is not utf-8; save the file as UTF-8, or state its",
    ),
    (
        "r.csv",
        "image,caption\n".encode("utf-16"),
        {},
        "line 1: starts with the mark of UTF-16: state encoding utf-16",
    ),
    ("r.csv", b"a", {"encoding": "klingon"}, "encoding 'klingon': not one that Python knows"),
    ("r.csv", b"image,caption\n", {"encoding": "utf-16"}, "not utf-16"),
    ("r.csv", b"", {}, "line 1: empty, where the names of the columns are expected"),
    ("r.csv", b"image,caption\n", {}, "holds no records"),
    (
        "r.csv",
        b"image,caption\na.png,a ring, red\n",
        {},
        "line 2: 3 columns, but the header has 2 .image, caption.; quote texts that hold ','",
    ),
    ("r.csv", b'image,caption\na.png,"a ring\n', {}, "line 2: unexpected end of data; correct"),
    (
        "r.csv",
        b'image,caption\na.png,"a\nring"\nb.png,\n',
        {},
        "line 4: image 'b.png' has an empty caption; correct or drop it",
    ),
    ("r.csv", b"image,caption\n,a ring\n", {}, 'line 2: image: "", where the name of a file'),
    (
        "r.csv",
        b"picture,caption\na.png,a ring\n",
        {},
        "line 2: no 'image' or 'filepath' .*image_key.*; the row has caption, picture",
    ),
    (
        "r.csv",
        b"image,caption\na.png,a ring\n",
        {"caption_key": "english"},
        "line 2: no 'english', which the source was said to have; the row has caption, image",
    ),
    (
        "r.csv",
        b"image,caption,text\na.png,a ring,b\n",
        {},
        "line 2: has both 'caption' and 'text'; state which .caption_key",
    ),
    (
        "r.csv",
        b"image,caption,caption \na.png,a ring,a disc\n",
        {},
        "line 1: two columns named 'caption'; rename one",
    ),
    ("r.csv", b"image,caption\na.png,\x01\x7f\n", {}, "line 2: image 'a.png' has an empty caption"),
    ("r.csv", b"image,caption\na,b\n", {"separator": "||"}, r"separator '\|\|': not one character"),
    ("r.jsonl", b'{"image": "a.png", "caption": "x"}\n{"im', {}, "line 2: not valid JSON"),
    ("r.jsonl", b"[1]\n", {}, "line 1: a list, where an object such as"),
    ("r.jsonl", b'{"image": 3, "caption": "x"}\n', {}, "line 1: image: 3, where the name of a"),
    ("r.jsonl", b'{"image": "a", "caption": 3}\n', {}, "line 1: captions: 3, where a text or"),
    ("r.jsonl", b'{"image": "a", "caption": ["x", 3]}\n', {}, "captions: 3, where a text is"),
    (
        "r.jsonl",
        b'{"image": "a", "caption": "\\u200b \\n"}\n',
        {},
        "line 1: image 'a' has an empty caption",
    ),
    ("r.jsonl", b'{"image": "a", "caption": "\\ud83d"}\n', {}, "holds half a character"),
    (
        "r.jsonl",
        b'{"image": "a", "caption": "x", "Caption": "y"}\n',
        {},
        "line 1: two names 'caption' that differ in case or white space alone; rename one",
    ),
    ("r.json", b'[{"image": "a", "caption": "x"},\n', {}, "line 2: not valid JSON"),
    ("r.json", b"[" * 10**5, {}, "r.json: nested too deeply for records"),
    ("r.jsonl", b"[" * 10**5, {}, "line 1: nested too deeply for a record"),
    ("r.json", b'{"image": 3}{"image": 4}', {}, "line 1: not valid JSON .Extra data at column 13"),
    ("r.csv", b"image,caption\ra.png,a ring\r", {}, "line 1: new-line .*; end lines with"),
    ("r.csv", b"image,caption\na.png," + b"x" * 200000, {}, "line 2: field larger than"),
    ("r.jsonl", b'{"image": "\\ud83d", "caption": "x"}\n', {}, "image: .* half a character"),
    ("r.json", b'{"a": 1}', {}, "keys a: neither a list of records, nor COCO captions"),
    ("r.json", b'{"images": [{"id": 1}], "annotations": []}', {}, "images entry 1: lacks file_na"),
    (
        "r.json",
        b'{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}',
        {},
        "annotations entry 1: image_id 3 is not among the images",
    ),
    (
        "r.json",
        b'{"images": [], "annotations": [{"image_id": 3, "bbox": []}]}',
        {},
        "annotations entry 1: no caption; of COCO's files, take those named captions_",
    ),
    (
        "r.json",
        b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}',
        {},
        "images entry 1: image 'a.png' has an empty caption",
    ),
    ("r.parquet", b"no table", {}, "after row 0: not readable as Parquet"),
    ("r.xml", b"", {}, ".xml is none of the layouts of records; give .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), FAULTS)
def test_faults(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    source = RecordSource(source=str(tmp_path / name), **options)
    for act in (
        lambda: open_records(source, "caption"),
        lambda: import_records(source, tmp_path / "out", "caption"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or "encoding" in str(caught.value) or options
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_folders_without_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no records in this folder: no metadata.csv"):
        open_records(str(tmp_path), "caption")
    with pytest.raises(ValueError, match=r"no records at .*nowhere: not a file, a folder or a pat"):
        open_records(str(tmp_path / "nowhere"), "caption")
    picture(1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: no caption: a.txt is missing beside it"):
        open_records(str(tmp_path), "caption")
    (tmp_path / "metadata.csv").write_text("name,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: no file_name"):
        open_records(str(tmp_path), "caption")


def test_absolute_paths_are_shortened(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"image,caption\n{tmp_path}/in/a.png,a ring\n")
    (record,) = open_records(str(tmp_path / "r.csv"), "caption", tmp_path)
    assert record.image == "in/a.png"
    with pytest.raises(ValueError, match=r"line 2: image .* lies outside .*other; give the folder"):
        open_records(str(tmp_path / "r.csv"), "caption", tmp_path / "other")


def test_names_that_are_passed_over_are_noted(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("id,image,caption,score\n1,a.png,a ring,3\n")
    notes: list[str] = []
    open_records(str(tmp_path / "r.csv"), "caption", note=notes.append)
    assert notes == [f"{tmp_path}/r.csv: ignored 'id', 'score' (1 rows)"]
    assert "ignored 'id', 'score'" in str(import_records(tmp_path / "r.csv", tmp_path / "out"))
    (tmp_path / "s.jsonl").write_text('{"images": [], "promt": "b", "captions": ["a"]}\n')
    with pytest.raises(ValueError, match="line 1: 'promt': no such name; 'prompt' is meant"):
        open_records(str(tmp_path / "s.jsonl"), "sequence")


def test_texts_that_come_again_are_counted(tmp_path: Path) -> None:
    records = [
        CaptionRecord("a", ("a ring", "A  ring", "a disc")),
        CaptionRecord("b", ("a disc",)),
        CaptionRecord("a", ("a star",)),
    ]
    write_records(tmp_path / "r.jsonl", records)
    counts = import_records(tmp_path / "r.jsonl", tmp_path / "out").counts
    assert (counts.rows, counts.images, counts.texts) == (3, 2, 5)
    assert (counts.repeated, counts.shared) == (1, 1)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at any place, over several batches and parts, here and in a process that gets it."""
    monkeypatch.setattr("blip2fast.data.table._BATCH_ROWS", 7)
    records = [CaptionRecord(f"{i}.png", tuple(map(str, range(i % 3 + 1)))) for i in range(40)]
    write_records(tmp_path / "r.jsonl", records)
    import_records(tmp_path / "r.jsonl", tmp_path / "out")
    table = open_records([str(tmp_path / "out"), str(tmp_path / "r.jsonl")], "caption")
    assert table.sizes == [40, 40]
    for each in (table, pickle.loads(pickle.dumps(table))):
        assert isinstance(each, RecordTable)
        assert list(each) == records * 2
        order = np.random.default_rng(0).permutation(80)
        assert [each[i] for i in order] == [(records * 2)[i] for i in order]
        assert each[-1] == records[-1]
        assert each[38:42] == (records * 2)[38:42]
        with pytest.raises(IndexError):
            _ = each[80]


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", RECORDS)
    out = tmp_path / "out"
    import_records(tmp_path / "r.jsonl", out)
    with pytest.raises(ValueError, match="out exists; delete it or give another folder"):
        import_records(tmp_path / "r.jsonl", out)
    whole = (out / "records.arrow").read_bytes()
    (out / "records.arrow").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"records.json states \d+; import it again"):
        open_records(str(out), "caption")
    (out / "records.arrow").write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"records.arrow: damaged .*; import it again"):
        open_records(str(out), "caption")
    place = len(whole) // 2  # in what says where the columns lie
    changed = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
    (out / "records.arrow").write_bytes(changed)
    with pytest.raises(ValueError, match=r"records.arrow: damaged .*; import it again"):
        open_records(str(out), "caption")
    # another letter, which only the sum of the import can tell
    (out / "records.arrow").write_bytes(whole.replace(b"a red ring", b"a rod ring"))
    fault = f"{out}: records.arrow has changed since its import"
    assert [each.partition(" (")[0] for each in check_records(str(out)).faults] == [fault]
    (out / "records.json").write_text('{"format": 1, "task": "caption"}')
    with pytest.raises(ValueError, match=r"records.json: damaged; import the records again"):
        open_records(str(out), "caption")
    (out / "records.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, but this version reads 1"):
        open_records(str(out), "caption")


def test_weights(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path))
    with pytest.raises(ValueError, match="has no weight, others have; give all or none"):
        open_records([RecordSource(source=path, weight=2.0), path], "caption")
    with pytest.raises(ValueError, match="must be positive"):
        open_records(RecordSource(source=path, weight=0.0), "caption")
    with pytest.raises(ValueError, match="the list of sources is empty"):
        open_records([], "caption")


def test_the_command_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_file(tmp_path)
    main(["data", "import", str(path), "--out", str(tmp_path / "out")])
    assert "2 records (caption) of 2 images, 2 texts" in capsys.readouterr().out
    (tmp_path / "r.csv").write_text("pic;words\na.png;a ring\n")
    arguments = ["data", "import", str(path), "--out", str(tmp_path / "other"), "--separator", ";"]
    with pytest.raises(SystemExit, match=r"^error: .*r.csv, line 2: no 'image' or"):
        main(arguments)
    assert not (tmp_path / "other").exists()
    main([*arguments, "--image-key", "pic", "--caption-key", "words"])
    assert open_records(str(tmp_path / "other"), "caption")[0].captions == ("a ring",)


def test_an_import_that_is_stopped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("blip2fast.data.importing.TextCounts.add", stop)
        with pytest.raises(KeyboardInterrupt):
            import_records(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
    # a killed one cannot clean up: what it left is not taken for a table, and is written anew
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "records.arrow").write_text("half")
    import_records(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["records.arrow", "records.json"]


def test_suffixes_in_shards_begin_at_the_first_dot(tmp_path: Path) -> None:
    members = {"0.png": png(9), "0.seg.png": png(8), "._0.png": b"x", "0.txt": b"a ring"}
    path = write_shard(tmp_path / "s.tar", members)
    (record,) = open_records(str(path), "caption")
    assert read_picture(tmp_path, record.image).getpixel((0, 0)) == (9, 0, 0)


def test_keys_that_climb_out_are_refused_as_a_run_starts(tmp_path: Path) -> None:
    """Though the file is there."""
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "a.png")
    store = FileImages(tmp_path / "images", ImageTransform(4), seed=0)
    for key in ("../a.png", str(tmp_path / "a.png"), "../s.tar/a.png@512+100"):
        with pytest.raises(ValueError, match=rf"image '{re.escape(key)}' lies outside .*images"):
            store.check([key])
    with pytest.raises(ValueError, match="images; import its records again with --images"):
        store.check([str(tmp_path / "images" / "a.png")])


def test_a_stated_caption_within_shards(tmp_path: Path) -> None:
    """Of the .json, beside which there may be a .txt."""
    members = {"0.png": png(9), "0.txt": b"a ring", "0.json": b'{"recaption": "a red ring"}'}
    path = write_shard(tmp_path / "s.tar", members)
    (record,) = open_records(RecordSource(source=str(path), caption_key="recaption"), "caption")
    assert record.captions == ("a red ring",)


def test_a_text_of_another_encoding_is_one_bad_row(tmp_path: Path) -> None:
    """Of images with a .txt each: the others come in, and `data check` looks at them."""
    for name, text in {"a": b"a ring", "b": b"caf\xe9", "c": b"a disc"}.items():
        picture(1).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    fault = r"b\.txt: line 1: byte 0xe9 at column 4 is not utf-8; save the file as UTF-8"
    with pytest.raises(ValueError, match=fault):
        open_records(str(tmp_path), "caption")
    left_out: list[LeftOut] = []
    records = open_records(str(tmp_path), "caption", left_out=left_out)
    assert [record.captions for record in records] == [("a ring",), ("a disc",)]
    assert len(left_out) == 1
    found = check_records(str(tmp_path))
    assert (found.texts.rows, found.bad_rows, found.bad_sources) == (2, 1, 0)


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*Not a directory: .*file"):
        main(["data", "import", str(path), "--out", str(tmp_path / "file" / "out")])


def _tar(folder: Path) -> Path:
    return write_shard(folder / "s.tar", {"0.png": png(1), "0.txt": b"a ring", "0.json": b"{}"})


@settings(max_examples=40, deadline=None)
@given(
    write=st.sampled_from([jsonl, one_caption_json, csv_file, coco, parquet, _tar]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), max_size=4),
)
def test_damage_of_any_kind_is_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    write: Callable[[Path], Path],
    cut: float,
    flips: list[tuple[float, int]],
) -> None:
    """A file that is cut and has other bytes is read, or refused by name."""
    path = write(tmp_path_factory.mktemp("damaged"))
    content = bytearray(path.read_bytes())
    for place, value in flips:
        content[int(place * len(content))] = value
    path.write_bytes(content[: max(1, int(len(content) * cut))])
    said, records = None, []
    try:
        records = list(open_records(str(path), "caption"))
    except ValueError as error:
        said = str(error)
    if said is None:
        assert 0 < len(records) <= 2
    else:
        assert str(path) in said
        assert "\n" not in said
