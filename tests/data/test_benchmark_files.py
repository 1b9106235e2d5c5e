"""Samples of the benchmarks' own annotation files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_files as files
import pytest

from blip2fast.command_line import main
from blip2fast.data.benchmarks import Sample, read_samples, samples_digest
from blip2fast.data.records import CaptionRecord, QuestionRecord, write_records
from blip2fast.data.source_config import RecordSource
from blip2fast.data.sources import open_records

IMAGES = [
    ("a.jpg", "train", ["a red dog", "a dog"]),
    ("b.jpg", "test", ["a blue cat", "one cat", "it is a cat"]),
    ("c.jpg", "restval", ["a tree"]),
    ("d.jpg", "test", ["a house"]),
]


def test_karpathy_coco(tmp_path: Path) -> None:
    source = str(files.karpathy(tmp_path / "dataset_coco.json", IMAGES))
    assert read_samples(RecordSource(source=source, split="test"), "caption") == [
        Sample("1001", "val2014/b.jpg", ("a blue cat", "one cat", "it is a cat")),
        Sample("1003", "val2014/d.jpg", ("a house",)),
    ]
    both = RecordSource(source=source, split="train+restval")
    assert [sample.id for sample in read_samples(both, "caption")] == ["1000", "1002"]
    assert [record.image for record in open_records(both, "caption")] == [
        "val2014/a.jpg",
        "val2014/c.jpg",
    ]
    (first,) = read_samples(RecordSource(source=source, split="test"), "caption", None, 1, 2)
    assert first.references == ("a blue cat", "one cat")


@pytest.mark.parametrize("split", [None, "val", "test+val"])
def test_a_split_that_is_not_there(tmp_path: Path, split: str | None) -> None:
    source = str(files.karpathy(tmp_path / "dataset_coco.json", IMAGES))
    message = "has the splits restval, test, train; state which, not "
    with pytest.raises(ValueError, match=message + repr(split).replace("+", r"\+")):
        read_samples(RecordSource(source=source, split=split), "caption")


def test_karpathy_flickr30k_has_no_folders(tmp_path: Path) -> None:
    source = str(files.karpathy(tmp_path / "dataset_flickr30k.json", IMAGES, coco=False))
    samples = read_samples(RecordSource(source=source, split="test"), "caption")
    assert [(sample.id, sample.image) for sample in samples] == [("1", "b.jpg"), ("3", "d.jpg")]


def test_a_split_is_imported(tmp_path: Path) -> None:
    source = str(files.karpathy(tmp_path / "dataset_coco.json", IMAGES))
    main(["data", "import", source, "--split", "test", "--out", str(tmp_path / "table")])
    samples = read_samples(RecordSource(source=str(tmp_path / "table")), "caption")
    assert [sample.id for sample in samples] == ["val2014/b.jpg", "val2014/d.jpg"]


def test_coco_and_lavis(tmp_path: Path) -> None:
    coco = files.coco_captions(tmp_path / "captions.json", [(n, "", c) for n, _, c in IMAGES])
    lavis = files.write_json(
        tmp_path / "coco_karpathy_test.json", [{"image": n, "caption": c} for n, _, c in IMAGES]
    )
    (of_coco, of_lavis) = (
        read_samples(RecordSource(source=str(path)), "caption") for path in (coco, lavis)
    )
    assert [sample.id for sample in of_coco] == ["0", "1", "2", "3"]
    assert [sample.id for sample in of_lavis] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    for samples in (of_coco, of_lavis):
        assert [(s.image, list(s.references)) for s in samples] == [(n, c) for n, _, c in IMAGES]


def test_captions_of_one_image_in_several_rows(tmp_path: Path) -> None:
    write_records(
        tmp_path / "r.jsonl",
        [
            CaptionRecord("a.jpg", ("x",)),
            CaptionRecord("b.jpg", ("y",)),
            CaptionRecord("a.jpg", ("z",)),
        ],
    )
    samples = read_samples(RecordSource(source=str(tmp_path / "r.jsonl")), "caption", limit=1)
    assert samples == [Sample("a.jpg", "a.jpg", ("x", "z"))]


def test_nocaps_has_domains(tmp_path: Path) -> None:
    images = [("a.jpg", "in-domain", ["a dog"]), ("b.jpg", "out-domain", ["an axolotl"])]
    source = str(files.coco_captions(tmp_path / "nocaps_val_4500_captions.json", images))
    samples = read_samples(RecordSource(source=source), "caption")
    assert [sample.kinds for sample in samples] == [
        {"domain": "in-domain"},
        {"domain": "out-domain"},
    ]


@pytest.mark.parametrize("stemmed", [False, True])
def test_vqav2_and_ok_vqa(tmp_path: Path, stemmed: bool) -> None:
    rows = [(7, "what is it", ["ride"] * 3 + ["jump"] * 7), (7, "how many", ["2"] * 10)]
    paths = files.vqa(tmp_path / "questions.json", tmp_path / "annotations.json", rows, stemmed)
    source = RecordSource(source=str(paths[0]), annotations=str(paths[1]))
    first, second = read_samples(source, "vqa")
    assert (first.id, first.image) == ("100", "COCO_val2014_000000000007.jpg")
    assert (first.question, len(first.references)) == ("what is it", 10)
    assert first.kinds == {"question_type": "what", "answer_type": "other"}
    assert second.kinds == {"question_type": "how", "answer_type": "number"}
    assert first.raw_references == (("rideing",) * 3 + ("jumping",) * 7 if stemmed else ())


def test_gqa(tmp_path: Path) -> None:
    rows = [("n161313", "Is it overcast?", "no"), ("n235859", "Who is wearing the dress?", "women")]
    source = str(files.gqa(tmp_path / "testdev_balanced_questions.json", rows))
    first, second = read_samples(RecordSource(source=source), "vqa")
    assert first == Sample(
        "201300",
        "n161313.jpg",
        ("no",),
        "Is it overcast?",
        kinds={"detailed_type": "existC", "semantic_type": "obj", "structural_type": "verify"},
    )
    assert second.references == ("women",)
    named = RecordSource(source=source, image_name="images/{}.png")
    assert read_samples(named, "vqa")[0].image == "images/n161313.png"
    # training reads them too
    assert open_records(named, "vqa")[1] == QuestionRecord(
        "images/n235859.png", "Who is wearing the dress?", "women"
    )


def gqa_without_answers(folder: Path) -> Path:
    path = files.gqa(folder / "gqa.json", [("n1", "Is it?", "no")])
    content = json.loads(path.read_text())
    del content["201300"]["answer"]
    return files.write_json(path, content)


def a_bad_template(folder: Path) -> RecordSource:
    path = files.gqa(folder / "gqa.json", [("n1", "Is it?", "no")])
    return RecordSource(source=str(path), image_name="{x}")


def twice(folder: Path) -> Path:
    content = json.loads(files.karpathy(folder / "k.json", IMAGES[:2]).read_text())
    for image in content["images"]:
        image |= {"cocoid": 5, "split": "test"}
    return files.write_json(folder / "k.json", content)


@pytest.mark.parametrize(
    ("make", "subject", "message"),
    [
        (gqa_without_answers, "vqa", "question 201300: lacks answer; GQA's test files have no an"),
        (a_bad_template, "vqa", "image name '{x}' of image 'n1'"),
        (twice, "caption", "images entry 2: a second sample with the id 5; drop one"),
        (
            lambda f: files.write_json(f / "x.json", {"a": 1}),
            "vqa",
            "keys a: neither a list of records, nor .* nor GQA",
        ),
        (lambda f: f / "none.json", "vqa", "no records at .*none.json"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    make: Callable[[Path], Path | RecordSource],
    subject: str,
    message: str,
) -> None:
    made = make(tmp_path)
    source = (
        made if isinstance(made, RecordSource) else RecordSource(source=str(made), split="test")
    )
    with pytest.raises(ValueError, match=message) as error:
        read_samples(source, subject)
    assert "\n" not in str(error.value)


def test_the_digest_says_whether_samples_are_the_same() -> None:
    sample = Sample("1", "a.jpg", ("x",))
    assert samples_digest([sample]) == samples_digest([Sample("1", "a.jpg", ("x",))])
    others = ([Sample("1", "a.jpg", ("y",))], [sample, sample], [Sample("1", "a.jpg", ("x",), "q")])
    assert len({samples_digest([sample]), *map(samples_digest, others)}) == 4
