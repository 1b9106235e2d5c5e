"""Annotation files as the benchmarks publish them, cut down to a few entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def karpathy(path: Path, images: list[tuple[str, str, list[str]]], coco: bool = True) -> Path:
    """dataset_coco.json or dataset_flickr30k.json; `images`: file name, split, captions."""
    entries: list[dict[str, Any]] = []
    for number, (name, split, captions) in enumerate(images):
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 9 * number + n}
            for n, text in enumerate(captions)
        ]
        entry = {"filename": name, "imgid": number, "split": split, "sentences": sentences}
        entry["sentids"] = [sentence["sentid"] for sentence in sentences]
        if coco:
            entry |= {"filepath": "val2014", "cocoid": 1000 + number}
        entries.append(entry)
    return write_json(path, {"images": entries, "dataset": "coco" if coco else "flickr30k"})


def coco_captions(path: Path, images: list[tuple[str, str, list[str]]]) -> Path:
    """captions_val2014.json, or NoCaps' where `images` have a domain: name, domain, captions."""
    entries = [
        {"id": n, "file_name": name, "width": 4, "height": 4}
        | ({"domain": domain} if domain else {})
        for n, (name, domain, _) in enumerate(images)
    ]
    annotations = [
        {"image_id": n, "id": 10 * n + k, "caption": text}
        for n, (_, _, captions) in enumerate(images)
        for k, text in enumerate(captions)
    ]
    content = {"info": {}, "licenses": [], "images": entries, "annotations": annotations}
    return write_json(path, content)


def vqa(
    questions: Path,
    annotations: Path,
    rows: list[tuple[int, str, list[str]]],
    stemmed: bool = False,
) -> tuple[Path, Path]:
    """VQAv2's two files, or OK-VQA's with `stemmed` answers; `rows`: image, question, answers."""
    write_json(
        questions,
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": "val2014",
            "questions": [
                {"image_id": image, "question": question, "question_id": 100 + n}
                for n, (image, question, _) in enumerate(rows)
            ],
        },
    )
    entries = []
    for n, (image, question, answers) in enumerate(rows):
        several = [
            {"answer": text, "answer_id": k + 1, "answer_confidence": "yes"}
            for k, text in enumerate(answers)
        ]
        if stemmed:
            for each in several:
                each |= {"raw_answer": f"{each['answer']}ing"}
        kind = "number" if answers[0].isdigit() else "other"
        entries.append(
            {
                "question_id": 100 + n,
                "image_id": image,
                "question_type": question.split()[0],
                "answer_type": kind,
                "answers": several,
                **({} if stemmed else {"multiple_choice_answer": answers[0]}),
            }
        )
    write_json(annotations, {"info": {}, "annotations": entries})
    return questions, annotations


def gqa(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """testdev_balanced_questions.json; `rows`: image, question, answer."""
    content = {
        f"20130{n}": {
            "semantic": [],
            "entailed": [],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "13-pot"},
            "answer": answer,
            "types": {"detailed": "existC", "semantic": "obj", "structural": "verify"},
            "fullAnswer": f"It is {answer}.",
        }
        for n, (image, question, answer) in enumerate(rows)
    }
    return write_json(path, content)
