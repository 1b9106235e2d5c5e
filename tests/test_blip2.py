"""`Blip2`: captions, answers and conversations from a folder, equal in batches and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import SIZE, pictures, write_run, write_transformers
from stage2_models import B
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip2fast import Blip2
from blip2fast.blip2_loading import is_streamed
from blip2fast.image_files import ImageTransform

KINDS = ["opt", "t5"]
WAYS: dict[str, dict[str, Any]] = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 3}}
ASKED = ["what is it ?", "where is the red dog on the left ?", "colour ?"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def blip2(run: Path) -> Blip2:
    return Blip2.from_pretrained(run, dtype=torch.float64)


class Calls:
    """Counts the images that the encoder and the Q-Former read."""

    def __init__(self, blip2: Blip2) -> None:
        self.encoder: list[int] = []
        self.qformer: list[int] = []
        encoder = blip2.model.image_encoder
        self.handles = [
            blip2.model.qformer.register_forward_hook(
                lambda *call: self.qformer.append(len(call[2].last_hidden_state))
            )
        ]
        if encoder is not None:
            self.handles.append(
                encoder.register_forward_hook(lambda *call: self.encoder.append(len(call[2])))
            )

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_captions_in_a_batch_are_those_of_single_calls(blip2: Blip2, way: str) -> None:
    images = pictures(5)
    together = blip2.caption(images, **WAYS[way])
    assert together == [blip2.caption(image, **WAYS[way]) for image in images]
    assert together == blip2.caption(images, batch_size=2, **WAYS[way])
    assert len(set(together)) > 1, "the images matter"


@pytest.mark.parametrize("way", WAYS)
def test_answers_in_a_batch_are_those_of_single_calls(blip2: Blip2, way: str) -> None:
    images = pictures(3)
    together = blip2.answer(images, ASKED, **WAYS[way])
    alone = [blip2.answer(x, q, **WAYS[way]) for x, q in zip(images, ASKED, strict=True)]
    assert together == alone
    assert len(set(together)) == 3
    nested = blip2.answer(images, [ASKED, "colour ?", ASKED[:1]], batch_size=2, **WAYS[way])
    assert nested[0] == [blip2.answer(images[0], question, **WAYS[way]) for question in ASKED]
    assert nested[1:] == [
        blip2.answer(images[1], "colour ?", **WAYS[way]),
        [blip2.answer(images[2], ASKED[0], **WAYS[way])],
    ]
    assert blip2.answer(images[0], ASKED, **WAYS[way]) == nested[0]


def test_an_image_is_read_once(blip2: Blip2) -> None:
    image = pictures(1)[0]
    for ask in (
        lambda: blip2.caption(image, num_beams=4, num_captions=3),
        lambda: blip2.answer(image, ASKED, batch_size=2),
        lambda: blip2.answer([image], [ASKED], batch_size=1),
        lambda: [blip2.chat(image)(question) for question in ASKED[:1]],
    ):
        with Calls(blip2) as calls:
            ask()
        assert (calls.encoder, calls.qformer) == ([1], [1])
    with Calls(blip2) as calls:
        chat = blip2.chat(image)
        for question in ASKED:
            chat(question)
        blip2.caption(blip2.encode(pictures(4), batch_size=3))
    assert calls.encoder == calls.qformer == [1, 3, 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind_there", KINDS)
def test_a_transformers_folder_writes_as_transformers(
    kind_there: str, way: str, tmp_path: Path
) -> None:
    folder = write_transformers(tmp_path, kind_there)
    blip2 = Blip2.from_pretrained(folder, dtype=torch.float64)
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    processor = Blip2Processor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left" if kind_there == "opt" else "right"

    def expected(texts: list[str], **settings: Any) -> list[str]:
        inputs = processor(images=pictures(B), text=texts, padding=True, return_tensors="pt").to(
            torch.float64
        )
        ids = theirs.generate(**inputs, do_sample=False, **WAYS[way], **settings)
        if kind_there == "opt":
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    want = expected(["a photo of"] * B, max_new_tokens=30)
    assert blip2.caption(pictures(B), **WAYS[way]) == want
    assert len(set(want)) > 1
    short = " Short" if kind_there == "t5" else ""
    word = "answer" if kind_there == "t5" else "Answer"
    asked = [f"Question: {question}{short} {word}:" for question in ASKED]
    penalty = {} if way == "greedy" else {"length_penalty": -1.0}
    want = expected(asked, max_new_tokens=10, **penalty)
    assert blip2.answer(pictures(B), ASKED, **WAYS[way]) == want
    assert len(set(want)) > 1


def test_every_form_of_an_image_gives_the_same(blip2: Blip2, tmp_path: Path) -> None:
    image = pictures(1)[0]
    image.save(tmp_path / "it.png")
    pixels = ImageTransform(SIZE)(image)
    encoder = blip2.model.image_encoder
    assert encoder is not None
    tokens = encoder(pixels[None].double())
    want = blip2.caption(image)
    for form in (
        tmp_path / "it.png",
        str(tmp_path / "it.png"),
        np.asarray(image),
        torch.from_numpy(np.array(image)),
        pixels,
        pixels.numpy(),
        blip2.encode(image),
    ):
        assert blip2.caption(form) == want
        assert blip2.answer(form, ["colour ?"]) == [blip2.answer(image, "colour ?")]
    assert blip2.caption(image_embeds=tokens[0]) == want
    for several in ([image, tmp_path / "it.png"], pixels.expand(2, -1, -1, -1)):
        assert blip2.caption(several) == [want, want]
    assert blip2.caption(image_embeds=tokens) == blip2.caption(pixels[None]) == [want]
    assert blip2.chat(image_embeds=tokens)("colour ?") == blip2.chat(image)("colour ?")


def test_the_transform_is_the_encoders(tmp_path: Path) -> None:
    run = write_run(tmp_path, "opt")
    plain = Blip2.from_pretrained(run).encode(pictures(1)).prompts
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    own = Blip2.from_pretrained(run)
    pixels = ImageTransform(SIZE, (0.5,) * 3, (0.5,) * 3)(pictures(1)[0])
    assert torch.equal(own.encode(pictures(1)).prompts, own.encode(pixels).prompts[:1])
    assert not torch.allclose(own.encode(pictures(1)).prompts, plain)


def read_texts(blip2: Blip2, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """What the language model is given from now on: texts, and the most tokens it may write."""
    texts: list[str] = []
    lengths: list[int] = []
    generate = blip2.model.generate

    def listening(*, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Any:
        for ids, real in zip(input_ids, attention_mask, strict=True):
            texts.append(blip2._parts.text.tokenizer.decode(ids[real == 1]))
            lengths.append(more["max_new_tokens"])
        return generate(input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(blip2.model, "generate", listening)
    return texts, lengths


def test_a_conversation_is_read_from_its_beginning(
    blip2: Blip2, kind: str, monkeypatch: pytest.MonkeyPatch
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


def test_prompts_are_those_of_the_run(tmp_path: Path) -> None:
    own = Blip2.from_pretrained(write_run(tmp_path / "a", "opt", prompt="the photo of"))
    assert own.prompts.caption == "the photo of"
    assert own.prompts.question == "Question: {} Answer:"
    asked = Blip2.from_pretrained(write_run(tmp_path / "b", "t5", prompt="question: {} answer:"))
    assert asked.prompts.question == asked.prompts.chat == "question: {} answer:"
    assert asked.prompts.caption == "a photo of"
    none = {kind: write_run(tmp_path / kind, kind) for kind in KINDS}
    loaded = {kind: Blip2.from_pretrained(path).prompts for kind, path in none.items()}
    assert [loaded[kind].caption for kind in KINDS] == ["", "a photo of"]
    assert loaded["t5"].question == "Question: {} Short answer:"
    image = pictures(1)[0]
    assert own.caption(image) == own.caption(image, prompt="the photo of")
    assert own.caption(image) != own.caption(image, prompt="a dog on")


def test_samples_come_from_the_seed(blip2: Blip2) -> None:
    images = pictures(2)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = blip2.caption(images, num_captions=3, seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == blip2.caption(images, num_captions=3, seed=1, **settings)
    assert one != blip2.caption(images, num_captions=3, seed=2, **settings)
    assert [len(each) for each in one] == [3, 3]
    free = blip2.caption(images, **settings)
    assert free != blip2.caption(images, **settings)


def test_several_captions_of_one_image(blip2: Blip2) -> None:
    image = pictures(1)[0]
    found = blip2.caption(image, num_captions=3, max_new_tokens=5)
    assert len(set(found)) == 3
    assert found[0] == blip2.caption(image, max_new_tokens=5)
    assert blip2.caption([image], num_captions=3, max_new_tokens=5) == [found]


def test_the_streamed_model_writes_the_same(run: Path, blip2: Blip2) -> None:
    streamed = Blip2.from_pretrained(run, dtype=torch.float64, offload="stream")
    assert is_streamed(streamed.model)
    assert not is_streamed(blip2.model)
    assert streamed.caption(pictures(3)) == blip2.caption(pictures(3))
    with pytest.raises(ValueError, match="streamed to cpu; give from_pretrained device='cpu'"):
        streamed.to("cpu")
    assert blip2.to("cpu") is blip2


def test_a_streamed_transformers_folder(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path, "opt")
    want = Blip2.from_pretrained(folder, dtype=torch.float64).caption(pictures(2))
    streamed = Blip2.from_pretrained(folder, dtype=torch.float64, offload="stream")
    assert streamed.caption(pictures(2)) == want


def test_half_precision(run: Path) -> None:
    blip2 = Blip2.from_pretrained(run, dtype=torch.bfloat16)
    assert blip2.encode(pictures(2)).prompts.dtype == torch.bfloat16
    assert len(blip2.caption(pictures(2))) == 2
