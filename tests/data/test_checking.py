"""`blip2fast data check`: what is counted, and what makes data unusable."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_run import word_tokenizer

from blip2fast.command_line import main
from blip2fast.data.checking import check_records
from blip2fast.data.importing import import_records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five records of four images: one twice, one tiny, one grey, two of the same bytes."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 48), "red").save(images / "a.png")
    Image.new("RGB", (64, 48), "red").save(images / "b.png")
    Image.new("L", (40, 90)).save(images / "grey.png")
    Image.new("RGB", (8, 50)).save(images / "tiny.png")
    lines = ["image,caption,id", "a.png,a red ring,1", "b.png,a red ring,2", "a.png,a  red ring,3"]
    lines += ["grey.png,a walrus ring is a blue ring,4", "tiny.png,a star,5", ""]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    return tmp_path


def run(*arguments: str) -> int:
    try:
        main(["data", "check", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tokenizer() -> Any:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return word_tokenizer(special, "[CLS] $A [SEP]")


def test_counts(data: Path) -> None:
    found = check_records(data / "r.csv", None, data / "images", tokenizer(), max_txt_len=6)
    assert found.usable
    assert (found.texts.rows, found.texts.images, found.texts.texts) == (5, 4, 5)
    assert (found.texts.repeated, found.texts.shared) == (1, 1)
    assert found.images is not None
    assert (found.images.readable, found.images.duplicates, found.images.tiny) == (4, 1, 1)
    assert found.images.modes == {"RGB": 3, "L": 1}
    assert found.images.width == (8, 52, 64)
    assert found.images.height == (48, 49, 90)
    assert found.tokens is not None
    assert (found.tokens.texts, found.tokens.longest) == (5, 9)
    assert found.tokens.cut == pytest.approx(1 / 5)
    assert found.tokens.unknown == pytest.approx(1 / 28)
    assert found.ignored == {"id": 5}
    assert found.remarks == [
        f"{data}/r.csv, line 3: image 'b.png' is 'a.png' again",
        f"{data}/r.csv, line 6: image 'tiny.png' is 8 x 50 pixels",
    ]


def test_the_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer().save_pretrained(data / "tokenizer")
    given = [str(data / "r.csv"), "--images", str(data / "images")]
    assert run(*given, "--tokenizer", str(data / "tokenizer"), "--max-txt-len", "6") == 0
    said = capsys.readouterr().out
    assert "5 records of 4 images, 5 texts; 0 rows unusable" in said
    assert "20.00% of the texts cut, 3.57% of the tokens unknown" in said
    assert "4 readable, 0 missing, 0 unreadable, 1 duplicates, 1 tiny" in said
    assert said.endswith("usable\n")
    assert run(*given, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["usable"] is True
    assert values["images_checked"]["width"] == [8, 52, 64]
    assert values["tokens"] is None
    with pytest.raises(SystemExit, match=r"error: tokenizer .*nothing': not found"):
        main(["data", "check", *given, "--tokenizer", str(data / "nothing")])
    with pytest.raises(SystemExit, match=r"error: --images .*nowhere: not a folder"):
        main(["data", "check", str(data / "r.csv"), "--images", str(data / "nowhere")])
    assert run("nowhere.csv", str(data / "r.csv")) == 1
    said = capsys.readouterr().out
    assert "5 records" in said
    assert "fault: no records at nowhere.csv: not a file, a folder or a pattern" in said


def test_unusable_images_are_named_by_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = data / "images"
    (images / "a.png").unlink()
    whole = (images / "grey.png").read_bytes()
    (images / "grey.png").write_bytes(whole[: len(whole) // 2])
    (images / "tiny.png").write_text("no picture")
    with (data / "r.csv").open("a") as file:
        file.write("../r.csv,a ring,6\n")
    assert run(str(data / "r.csv"), "--images", str(images)) == 1
    said = capsys.readouterr().out
    assert f"fault: {data}/r.csv, line 2: image {images}/a.png: no such file" in said
    assert f"fault: {data}/r.csv, line 5: image {images}/grey.png: is cut off or damaged" in said
    assert f"{data}/r.csv, line 6: image {images}/tiny.png: is not a picture" in said
    assert f"line 7: image '../r.csv' lies outside {images}" in said
    assert "1 readable, 1 missing, 3 unreadable" in said
    assert said.endswith("not usable as it is\n")


def test_all_bad_rows_are_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (data / "r.csv").open("a") as file:
        file.writelines(f"{n}.png,,\n" for n in range(15))
    assert run(str(data / "r.csv"), "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["rows"], values["bad_rows"], values["usable"]) == (5, 15, False)
    assert len(values["faults"]) == 11
    assert "line 7: image '0.png' has an empty caption" in values["faults"][0]
    assert values["faults"][-1] == "5 more of the kind: row"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(data: Path) -> None:
    (data / "images" / "a.png").chmod(0)
    found = check_records(data / "r.csv", None, data / "images")
    assert "Permission denied" in found.faults[0]


def test_tables_and_shards(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_records(data / "r.csv", data / "table")
    assert run(str(data / "table"), "--images", str(data / "images")) == 0
    assert (
        f"note: {data}/table, record 2: image 'b.png' is 'a.png' again" in capsys.readouterr().out
    )


def test_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.csv").write_text("image,caption\n")
    assert run(str(tmp_path / "r.csv")) == 1
    assert "fault: no records at all" in capsys.readouterr().out


def test_a_shard_that_is_cut_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in (("0.png", file.getvalue()), ("0.txt", b"a ring")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    assert run(str(tmp_path), "--images", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "2 records" in said
    assert "images: 2 readable, 0 missing, 0 unreadable, 1 duplicates" in said
    assert f"fault: {tmp_path}/1.tar: not a whole, uncompressed tar file" in said
    with pytest.raises(SystemExit, match=r"error: .*1.tar: not a whole, uncompressed tar file"):
        main(["data", "import", str(tmp_path), "--out", str(tmp_path / "out")])


def test_images_within_rows(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (40, 40)).save(file, "PNG")
    whole = file.getvalue()
    cells = [{"bytes": content, "path": None} for content in (whole, whole[:50], whole)]
    table = pa.table({"image": cells, "text": ["a ring", "a disc", "a star"]})
    pq.write_table(table, tmp_path / "r.parquet")
    for images in (None, tmp_path):
        found = check_records(tmp_path / "r.parquet", None, images)
        assert found.images is not None
        counts = (found.images.readable, found.images.unreadable, found.images.duplicates)
        assert counts == (2, 1, 1)
        assert found.images.missing == 0
        (fault,) = found.faults
        assert fault.startswith(f"{tmp_path}/r.parquet, row 2: image in the row: is cut off")


def test_the_first_good_row_tells_the_task(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(
        '{"ima\n{"image": "a.png", "question": "what", "answer": "a ring"}\n'
    )
    found = check_records(tmp_path / "r.jsonl")
    assert (found.texts.rows, found.bad_rows) == (1, 1)


def test_a_damaged_table_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_records(data / "r.csv", data / "table")
    path = data / "table" / "records.arrow"
    path.write_bytes(path.read_bytes().replace(b"a walrus ring", b"a walrus \xff\xff\xff\xff"))
    assert run(str(data / "table")) == 1
    said = capsys.readouterr().out
    assert f"fault: {data}/table: records 1 to 5 are damaged" in said
