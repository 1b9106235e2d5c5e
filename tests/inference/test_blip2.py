"""`Blip2`: captions, answers and conversations from a folder, equal in batches and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import NUM_QUERIES, SIZE, pictures, write_run, write_transformers

from blip2fast import Blip2
from blip2fast.frozen.images import ImageTransform
from blip2fast.inference.attention_maps import prompt_attention
from blip2fast.inference.loading import is_streamed

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
    plain = Blip2.from_pretrained(run).encode(pictures(1)).states
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    own = Blip2.from_pretrained(run)
    pixels = ImageTransform(SIZE, (0.5,) * 3, (0.5,) * 3)(pictures(1)[0])
    assert torch.equal(own.encode(pictures(1)).states, own.encode(pixels).states[:1])
    assert not torch.allclose(own.encode(pictures(1)).states, plain)


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
    assert blip2.encode(pictures(2)).states.dtype == torch.bfloat16
    assert len(blip2.caption(pictures(2))) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_qformer_that_reads_questions(kind: str, way: str, tmp_path: Path) -> None:
    """The image encoder sees an image once, the Q-Former sees it with every question."""
    run = write_run(tmp_path, kind, prompt="Question: {} Answer:", conditioned=True)
    blip2 = Blip2.from_pretrained(run, dtype=torch.float64)
    images = pictures(3)
    with Calls(blip2) as calls:
        together = blip2.answer(images, [ASKED, ASKED[0], ASKED[1]], batch_size=4, **WAYS[way])
    assert calls.encoder == [2, 1]
    assert calls.qformer == [4, 1]
    assert together[0] == [blip2.answer(images[0], question, **WAYS[way]) for question in ASKED]
    assert together[1:] == [
        blip2.answer(blip2.encode(images[1]), ASKED[0], **WAYS[way]),
        blip2.answer(images[2], ASKED[1], **WAYS[way]),
    ]
    seen = []
    handle = blip2.model.language_projection.register_forward_hook(
        lambda *call: seen.append(call[2])
    )
    blip2.answer(images[0], ASKED[:2])
    blip2.caption(images[0])
    handle.remove()
    assert not torch.allclose(seen[0][0], seen[0][1]), "soft prompts follow the question"
    assert blip2.prompts.caption == "A short image description:"
    one, other = (blip2.attention(images[0], question) for question in ASKED[:2])
    assert not torch.allclose(one, other), "and so does where the queries look"


def test_attention_lies_on_the_patches(blip2: Blip2) -> None:
    """Of 5 tokens the first belongs to no patch."""
    image = pictures(1)[0]
    seen = []
    layer = blip2.model.qformer
    handle = layer.register_forward_pre_hook(
        lambda *call: seen.append(call[2]["encoder_hidden_states"]), with_kwargs=True
    )
    maps = blip2.attention(image)
    handle.remove()
    assert (maps.shape, maps.dtype) == ((NUM_QUERIES, 2, 2), torch.float32)
    whole = (
        layer(
            query_embeds=blip2.model.query_tokens,
            encoder_hidden_states=seen[0],
            output_attentions=True,
        )
        .cross_attentions[-1]
        .mean(1)[0]
        .float()
    )
    assert whole.shape == (NUM_QUERIES, 5)
    torch.testing.assert_close(maps.flatten(1), whole[:, 1:])
    assert torch.equal(maps, blip2.attention(image, "what ?")), "it reads the image alone"
    with pytest.raises(ValueError, match="3 image tokens are no square of patches"):
        prompt_attention(blip2.model, seen[0][:, :3])
