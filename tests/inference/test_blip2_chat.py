"""Conversations: what the language model reads, turn by turn, and of which images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_models import NUM_QUERIES, pictures, write_run
from torch import Tensor

from blip2fast import Blip2
from blip2fast.stage2.token_rows import IMAGE_PLACE

GREEDY: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=["opt", "t5"])
def blip2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Blip2:
    run = write_run(tmp_path_factory.mktemp("run"), request.param)
    return Blip2.from_pretrained(run, dtype=torch.float64)


def read_texts(blip2: Blip2, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """What the language model is given from now on: texts, and the most tokens it may write."""
    texts: list[str] = []
    lengths: list[int] = []
    generate = blip2.model.generate

    def listening(*, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Any:
        for ids, real in zip(input_ids, attention_mask, strict=True):
            words = ids[(real == 1) & (ids != IMAGE_PLACE)]
            texts.append(blip2._parts.text.tokenizer.decode(words))
            lengths.append(more["max_new_tokens"])
        return generate(input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(blip2.model, "generate", listening)
    return texts, lengths


def test_a_conversation_is_read_from_its_beginning(
    blip2: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, lengths = read_texts(blip2, monkeypatch)
    chat = blip2.chat(pictures(1)[0], max_new_tokens=3, num_beams=1)
    first = chat("what is it ?")
    second = chat("and its colour ?", max_new_tokens=4)
    assert chat.history == [("what is it ?", first), ("and its colour ?", second)]
    tokenizer = blip2._parts.text.tokenizer
    turns = f"Question: what is it ? Answer: {first}. Question: and its colour ? Answer:"
    assert [text.replace("</s>", "").strip() for text in texts] == [
        "Question : what is it ? Answer :",
        tokenizer.decode(tokenizer(turns, add_special_tokens=False)["input_ids"]),
    ]
    assert lengths == [3, 4]
    assert chat.prompt("x") == (
        f"Question: what is it ? Answer: {first}. Question: and its colour ? Answer: {second}. "
        "Question: x Answer:"
    )
    again = blip2.chat(pictures(1)[0], max_new_tokens=3, num_beams=1)
    again.history = [("where ?", "on the left.")]
    again("and its colour ?")
    assert ": where ? Answer : on the left . Question" in texts[-1]


def test_the_oldest_turns_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, "opt", max_position_embeddings=40)
    blip2 = Blip2.from_pretrained(run)
    texts, _ = read_texts(blip2, monkeypatch)
    chat = blip2.chat(pictures(1)[0], max_new_tokens=4, num_beams=1)
    chat.history = [("what ?", "dog"), ("where ?", "left"), ("colour ?", "red")]
    # 4 soft prompts, 4 new tokens, </s> and 7 of the question leave room for 24: two turns of 8
    chat("is it on top ?")
    assert chat.left_out == 1
    assert "where" in texts[-1]
    assert "what" not in texts[-1]
    assert len(chat.history) == 4
    with pytest.raises(ValueError, match=r"45 text tokens.*embeddings=40"):
        chat("red " * 40)
    assert chat.left_out == 4
    assert len(chat.history) == 4


def test_several_images_stand_in_front(blip2: Blip2) -> None:
    images = pictures(3)
    chat = blip2.chat(images[:2], **GREEDY)
    answer = chat("what is it ?")
    seen = blip2.encode(images).states
    text = blip2._parts.text

    def written(states: Tensor, prompt: str) -> str:
        batch = text.prompt_batch([prompt], image_counts=[len(states)])
        end = {"eos_token_id": text.end_token_id, "pad_token_id": text.pad_token_id}
        tokens = blip2.model.generate(prompts=states, **batch, **GREEDY, **end)
        return text.decode(tokens)[0]

    first = "<image><image>Question: what is it ? Answer:"
    assert answer == written(seen[:2], first)
    second = chat("and <image> ?", images[2])
    assert second == written(seen, f"{first} {answer}. Question: and <image> ? Answer:")
    assert chat.history == [("what is it ?", answer), ("and <image> ?", second)]
    other = blip2.chat(images[:2], **GREEDY)
    other("what is it ?")
    other("colour ?", images=[images[2]])
    assert other.history[1][0] == "<image>colour ?"
    third = other("where ?")
    turns = f"{first} {answer}. Question: <image>colour ? Answer: {other.history[1][1]}."
    assert third == written(seen, f"{turns} Question: where ? Answer:")
    with pytest.raises(ValueError, match="marker"):
        other("is <image> like <image> ?", images[0])
    assert len(other.history) == 3
    assert other("colour ?") == written(
        seen,
        f"{turns} Question: where ? Answer: {third}. Question: colour ? Answer:",
    ), "a refused question leaves no image behind"


def test_a_turn_takes_its_image_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blip2 = Blip2.from_pretrained(write_run(tmp_path, "opt", max_position_embeddings=44))
    given: list[tuple[int, Tensor]] = []
    generate = blip2.model.generate

    def listening(*, prompts: Tensor, input_ids: Tensor, **more: Any) -> Any:
        given.append((int((input_ids == IMAGE_PLACE).sum()), prompts))
        return generate(prompts=prompts, input_ids=input_ids, **more)

    monkeypatch.setattr(blip2.model, "generate", listening)
    images = pictures(3)
    chat = blip2.chat(images[0], max_new_tokens=1, num_beams=1)
    chat("colour ?", images[1])
    chat("where is it ?", images[2])
    chat("where is the dog ?")
    chat("what ?")
    seen = blip2.encode(images).states
    # 44 positions: at the fourth question there is no room for the first one and its image
    left = [[0, 1], [0, 1, 2], [0, 1, 2], [0, 2]]
    assert chat.left_out == 1
    for (places, prompts), rows in zip(given, left, strict=True):
        assert places == NUM_QUERIES * len(rows)
        assert torch.equal(prompts, seen[rows])
