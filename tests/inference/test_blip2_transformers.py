"""`Blip2` from a folder of transformers: the words that transformers writes, with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_models import pictures, write_transformers
from stage2_models import B
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from blip2fast import Blip2

KINDS = ["opt", "t5"]
WAYS: dict[str, dict[str, Any]] = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 3}}
ASKED = ["what is it ?", "where is the red dog on the left ?", "colour ?"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("instruct", [False, True], ids=["blip2", "instructblip"])
@pytest.mark.parametrize("kind_there", KINDS)
def test_a_transformers_folder_writes_as_transformers(
    kind_there: str, instruct: bool, way: str, tmp_path: Path
) -> None:
    folder = write_transformers(tmp_path, kind_there, instruct)
    blip2 = Blip2.from_pretrained(folder, dtype=torch.float64)
    whole = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    theirs = whole.from_pretrained(folder, dtype=torch.float64)
    processor = (InstructBlipProcessor if instruct else Blip2Processor).from_pretrained(folder)
    processor.tokenizer.padding_side = "left" if kind_there == "opt" else "right"

    def expected(texts: list[str], **settings: Any) -> list[str]:
        inputs = processor(images=pictures(B), text=texts, padding=True, return_tensors="pt").to(
            torch.float64
        )
        ids = theirs.generate(**inputs, do_sample=False, **WAYS[way], **settings)
        if kind_there == "opt":
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    caption = "A short image description:" if instruct else "a photo of"
    want = expected([caption] * B, max_new_tokens=30)
    assert blip2.caption(pictures(B), **WAYS[way]) == want
    assert len(set(want)) > 1
    answer = "Short answer" if instruct or kind_there == "t5" else "Answer"
    asked = [f"Question: {question} {answer}:" for question in ASKED]
    penalty = {} if way == "greedy" else {"length_penalty": -1.0}
    want = expected(asked, max_new_tokens=10, **penalty)
    assert blip2.answer(pictures(B), ASKED, **WAYS[way]) == want
    assert len(set(want)) > 1
