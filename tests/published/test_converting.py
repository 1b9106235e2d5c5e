"""Conversions both ways: the same tensors, the same outputs, and folders that just load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_models import pictures
from published_files import IMAGE_SIZE, PATCH, WIDTH, eva_tokens, lavis_state, write_lavis
from small_run import word_tokenizer, write_world
from stage2_models import spread_weights
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2fast import Blip2
from blip2fast.checkpoints.trained import load_trained, read_description
from blip2fast.command_line import main
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.published import convert, converting, open_weights
from blip2fast.published.transformers_layout import add_image_token
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.model import Blip2Stage2

CASES = {
    "opt": ("blip2_caption_opt2.7b", "opt"),
    "t5": ("blip2_pretrained_flant5xl", "t5"),
    "instruct": ("instruct_blip_flanxl_trimmed", "t5"),
}
WORDS = ["what is it", "a red ring"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of LAVIS, two language models that write varied texts, and all of them converted."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for seed, kind in enumerate(("opt", "t5")):
        model_class = {"opt": OPTForCausalLM, "t5": T5ForConditionalGeneration}[kind]
        model = model_class.from_pretrained(folder / kind)
        spread_weights(model, seed)
        model.tie_weights()
        model.save_pretrained(folder / kind)
    # LAVIS's OPT models end a text with a new line
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>"}
    tokenizer = word_tokenizer(special | {"eos_token": "</s>"}, "</s> $A")
    tokenizer.add_tokens(["\n"])
    tokenizer.save_pretrained(folder / "opt")
    model = OPTForCausalLM.from_pretrained(folder / "opt")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "opt")
    for kind, (file, language) in CASES.items():
        write_lavis(folder, file)
        convert(
            folder / f"{file}.pth",
            folder / f"hf_{kind}",
            "transformers",
            language_model=str(folder / language),
            image_encoder=None if kind == "opt" else str(folder / "hf_opt"),
            tokenizer=str(folder / "qformer_tokenizer") if kind == "instruct" else None,
        )
    write_lavis(folder, "blip2_finetune_coco")
    return folder


def whole(folder: Path, **settings: Any) -> Any:
    instruct = "instruct" in folder.name
    kind = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    return kind.from_pretrained(folder, **settings).eval()


def pixels(size: int = IMAGE_SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4), dtype=dtype)


def lavis(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def written(folder: Path) -> Any:
    """The configuration of a folder, without where its parts had been."""

    def strip(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: strip(v) for k, v in values.items() if k not in ("_name_or_path", "dtype")}

    return strip(json.loads((folder / "config.json").read_text()))


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", CASES)
def test_lavis_in_transformers_computes_the_same(world: Path, kind: str) -> None:
    """LAVIS's encoder by its definition, then stage 2 on its weights, against the folder.

    transformers has 1e-6 as the epsilon of its last norm, and so has the comparison.
    """
    file, language = CASES[kind]
    model = whole(world / f"hf_{kind}", dtype=torch.float64)
    weights = open_weights(str(world / f"{file}.pth"))
    own = lavis_state("blip2_caption_opt2.7b")
    tokens = eva_tokens(own, pixels(dtype=torch.float64))
    parameters = weights.parameters()
    norm = [parameters[f"ln_vision.{part}"].double() for part in ("weight", "bias")]
    truth = torch.nn.functional.layer_norm(tokens, (WIDTH,), *norm, 1e-6)
    seen = model.vision_model(pixels(dtype=torch.float64)).last_hidden_state
    torch.testing.assert_close(seen, truth, rtol=1e-9, atol=1e-9)

    sizes = Stage2Config(**weights.sizes | {"ln_vision_eps": 1e-6})
    kind_of_model = T5ForConditionalGeneration if language == "t5" else OPTForCausalLM
    stage2 = Blip2Stage2(sizes, kind_of_model.from_pretrained(world / language).double())
    stage2.double().load_trainable_state_dict(parameters)
    stage2.eval()
    processor = AutoProcessor.from_pretrained(world / f"hf_{kind}")
    processor.tokenizer.padding_side = "right"
    inputs = processor(images=pictures(2), text=WORDS, return_tensors="pt", padding=True).to(
        torch.float64
    )
    inputs["pixel_values"] = pixels(dtype=torch.float64)
    decoder = {} if language == "opt" else {"labels": torch.tensor([[5, 6, 2], [7, 2, 2]])}
    theirs = model(**inputs, **decoder).logits
    given = {n: inputs[n] for n in inputs if n.startswith("qformer")}
    ours = stage2(
        tokens,
        inputs["input_ids"][:, sizes.num_query_tokens :],
        inputs["attention_mask"][:, sizes.num_query_tokens :],
        return_logits=True,
        **given,
        **({"labels": decoder["labels"]} if decoder else {}),
    ).logits
    rows = ours.shape[-1]
    torch.testing.assert_close(theirs[..., :rows], ours, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", CASES)
def test_a_folder_of_transformers_is_laid_out_as_published_ones(world: Path, kind: str) -> None:
    model = whole(world / f"hf_{kind}")
    processor = AutoProcessor.from_pretrained(world / f"hf_{kind}")
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_index == place == len(processor.tokenizer) - 1
    assert model.config.num_query_tokens == processor.num_query_tokens == 4
    assert model.get_input_embeddings().num_embeddings == 64
    assert model.config.text_config.vocab_size == 64
    end = processor.tokenizer.eos_token_id
    if kind == "opt":
        (end,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.padding_side == "left"
    else:
        assert model.config.text_config.dense_act_fn == "gelu"
        assert model.config.text_config.bos_token_id == end
    assert model.language_model.generation_config.eos_token_id == end
    assert model.generation_config.eos_token_id == end
    assert processor.image_processor.size == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = processor(images=pictures(1), text="a red", return_tensors="pt")
    assert model.generate(**images, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("kind", CASES)
def test_round_trips_are_equal(world: Path, tmp_path: Path, kind: str) -> None:
    """LAVIS to transformers, to this library, to LAVIS; and back into transformers."""
    file, language = CASES[kind]
    first, own, back = world / f"hf_{kind}", tmp_path / "own", tmp_path / "back.pth"
    convert(first, own, "blip2fast")
    convert(own, back, "lavis")
    expected = lavis_state("blip2_caption_opt2.7b")
    encoder = {n: v for n, v in expected.items() if n.startswith("visual_encoder.")}
    state = encoder | lavis(world / f"{file}.pth")
    tied = ("opt_model.", "t5_model.")
    equal(lavis(back), {n: v for n, v in state.items() if not n.startswith(tied)})
    again = tmp_path / f"again_{kind}"
    convert(own, again, "transformers")
    equal(whole(again).state_dict(), whole(first).state_dict())
    third = tmp_path / f"third_{kind}"
    words = str(world / "qformer_tokenizer") if kind == "instruct" else None
    convert(back, third, "transformers", language_model=str(world / language), tokenizer=words)
    equal(whole(third).state_dict(), whole(first).state_dict())
    for folder in (again, third):
        assert written(folder) == written(first)
        processor = AutoProcessor.from_pretrained(folder)
        assert len(processor.tokenizer) == len(AutoProcessor.from_pretrained(first).tokenizer)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_equal_before_and_after(
    world: Path, tmp_path: Path, kind: str, beams: int
) -> None:
    """What transformers writes, and what `Blip2` writes from both folders, with their prompts."""
    first, own = world / f"hf_{kind}", tmp_path / "own"
    convert(first, own, "blip2fast")
    before = Blip2.from_pretrained(first, dtype=torch.float64)
    after = Blip2.from_pretrained(own, dtype=torch.float64)
    assert after.prompts == before.prompts
    least = {"num_beams": beams, "min_new_tokens": 4}
    wanted = before.caption(pictures(3), **least)
    assert after.caption(pictures(3), **least) == wanted
    asked = ["what is it ?"] * 3
    answers = before.answer(pictures(3), asked, **least)
    assert after.answer(pictures(3), asked, **least) == answers
    assert any(wanted)
    assert any(answers)
    processor = AutoProcessor.from_pretrained(first)
    inputs = processor(
        images=pictures(3), text=[before.prompts.caption] * 3, return_tensors="pt"
    ).to(torch.float64)
    model = whole(first, dtype=torch.float64)
    ids = model.generate(**inputs, **least, do_sample=False, max_new_tokens=30)
    if kind == "opt":
        ids = ids[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    assert [text.strip() for text in texts] == wanted


def test_stage1_both_ways(world: Path, tmp_path: Path) -> None:
    """Scores of the retrieval model are those of stage 1 on LAVIS's weights; all comes back."""
    file, words = world / "blip2_finetune_coco.pth", str(world / "qformer_tokenizer")
    report = convert(file, tmp_path / "hf", "transformers", tokenizer=words)
    assert report.left["transformers' retrieval has none of it"][0] == "temp"
    model = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(images=pictures(2), text=WORDS, padding=True, return_tensors="pt")
    inputs = inputs.to(torch.float64)
    weights = open_weights(str(file))
    sizes = weights.sizes | {"bos_token_id": 4, "ln_vision_eps": 1e-6}
    stage1 = Blip2Stage1(Stage1Config(**sizes)).double().eval()
    stage1.load_state_dict(weights.parameters())
    tokens = eva_tokens(lavis_state("blip2_finetune_coco"), inputs["pixel_values"])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    itm = model(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(stage1.match(tokens, **text), itm, rtol=1e-8, atol=1e-8)
    itc = model(**inputs).logits_per_image
    features, _ = stage1.encode_image(tokens)
    scores = torch.einsum("iqd,jd->ijq", features, stage1.encode_text(**text)).amax(-1)
    torch.testing.assert_close(scores, itc, rtol=1e-8, atol=1e-8)

    convert(file, tmp_path / "own", "blip2fast", tokenizer=words)
    equal(
        {
            n: v.reshape(w.shape)
            for (n, v), w in zip(
                load_trained(tmp_path / "own").state_dict().items(),
                load_trained(tmp_path / "own").state_dict().values(),
                strict=True,
            )
        },
        {n: v.reshape(1) if n == "temp" else v for n, v in _ordered(weights, tmp_path / "own")},
    )
    convert(tmp_path / "own", tmp_path / "back.pth", "lavis")
    equal(lavis(tmp_path / "back.pth"), lavis(file))
    report = convert(tmp_path / "hf", tmp_path / "part", "blip2fast")
    assert {name.split(".")[0] for name in report.missing} == {"lm_head", "temp"}
    assert read_description(tmp_path / "part").tokenizer == str(tmp_path / "part/qformer_tokenizer")
    report = convert(tmp_path / "hf", tmp_path / "part.pth", "lavis")
    assert report.missing == ["Qformer.cls.predictions", "temp"]


def _ordered(weights: Any, folder: Path) -> list[tuple[str, Tensor]]:
    found = weights.parameters()
    return [(name, found[name]) for name in load_trained(folder).state_dict()]


def test_positions_are_interpolated_for_larger_images(world: Path, tmp_path: Path) -> None:
    """As transformers does it on the fly, and LAVIS when it loads a file."""
    first, size = world / "hf_opt", 2 * IMAGE_SIZE
    convert(first, tmp_path / "large", "transformers", image_size=size)
    large, small = whole(tmp_path / "large"), whole(first)
    seen = large.vision_model(pixels(size)).last_hidden_state
    expected = small.vision_model(pixels(size), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "large")
    assert processor.image_processor.size == {"height": size, "width": size}
    convert(first, tmp_path / "large.pth", "lavis", image_size=size)
    table = lavis(tmp_path / "large.pth")["visual_encoder.pos_embed"]
    assert torch.equal(table, large.vision_model.embeddings.position_embedding)
    convert(first, tmp_path / "own", "blip2fast", image_size=size)
    assert Blip2.from_pretrained(tmp_path / "own").model.image_encoder.image_size == size
    with pytest.raises(ValueError, match=rf"image size 30: expected a multiple .* {PATCH}"):
        convert(first, tmp_path / "odd", "transformers", image_size=30)
    assert not list(tmp_path.glob("odd*"))


def test_rows_of_the_published_embeddings() -> None:
    """OPT: token 50265 of 50304 rows; FlanT5: token 32100 of 32128."""
    for length, rows, wanted, kind in ((50265, 50272, 50304, "opt"), (32100, 32128, 32128, "t5")):
        vocabulary = {f"w{i}": i for i in range(length)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
            unk_token="w0",
        )
        if kind == "opt":
            sizes = {"hidden_size": 4, "word_embed_proj_dim": 4, "ffn_dim": 4}
            config = OPTConfig(vocab_size=rows, num_hidden_layers=1, num_attention_heads=1, **sizes)
            model = OPTForCausalLM(config)
        else:
            sizes = {"d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1}
            model = T5ForConditionalGeneration(T5Config(vocab_size=rows, **sizes))
        assert add_image_token(model, tokenizer) == length
        weight = model.get_input_embeddings().weight
        assert (weight.shape[0], model.config.vocab_size) == (wanted, wanted)
        if wanted > rows:
            torch.testing.assert_close(weight[rows:], weight[:rows].mean(0).expand(32, -1))


def test_a_target_that_exists_is_replaced_only_when_asked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"there exists already; .*--overwrite"):
        convert(world / "hf_opt", target, "blip2fast")

    def fail(*_: Any) -> None:
        _[-2].mkdir()
        (_[-2] / "half").write_text("")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setitem(converting._WRITERS, "blip2fast", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(world / "hf_opt", target, "blip2fast", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (target / "mine").read_text() == "kept"
    convert(world / "hf_opt", target, "blip2fast", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not (target / "mine").exists()
    assert read_description(target).language_model == str(target / "language_model")


def test_what_cannot_be_converted_is_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t5, opt, out = CASES["t5"][0], world / "opt", tmp_path / "out"
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((world / "hf_opt", out, "lavis"), {}, r"out: LAVIS reads a file; .*ends with .pth"),
        ((world / "hf_opt", out, "transformers"), {}, r"BLIP-2, stage 2 already: there is nothing"),
        ((world / "hf_opt", world / "hf_opt", "blip2fast"), {}, r"source and target are the same"),
        ((world / "hf_opt", world, "blip2fast"), {"overwrite": True}, r"hf_opt lies in it and wou"),
        ((world / f"{t5}.pth", out, "transformers"), {}, r"holds no image encoder, which tr"),
        (
            (world / f"{t5}.pth", out, "transformers"),
            {"image_encoder": str(world / "hf_opt")},
            r"holds no language model: give --language-model",
        ),
        (
            (world / f"{t5}.pth", out, "transformers"),
            {"image_encoder": str(world / "hf_opt"), "language_model": str(opt)},
            r"another language model .*model_type is 't5' there, 'opt' here",
        ),
        (
            (world / f"{t5}.pth", out, "transformers"),
            {"image_encoder": str(opt)},
            r"image encoder '.*opt' is a 'opt' model: BLIP-2 in transformers and in LAVIS's",
        ),
        ((world / "blip2_finetune_coco.pth", out, "transformers"), {}, r"give --tokenizer"),
        ((world / f"{t5}.pth", out, "blip2fast"), {"image_size": 24}, r"holds no image encoder"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(*arguments, **settings)
        assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"error: .*nowhere.*not found"):
        main(["convert", str(tmp_path / "nowhere"), str(out), "--to", "blip2fast"])
    main(["convert", str(world / "hf_opt"), str(tmp_path / "out.pth"), "--to", "lavis"])
    said = capsys.readouterr().out
    assert "a file of LAVIS\n  taken: 103 tensors\n  missing: none" in said
    assert "left out (the language model): language_model.* (" in said


def test_named_models_are_recorded_and_not_copied(world: Path, tmp_path: Path) -> None:
    """A stage-2 file of LAVIS with the frozen models of a user, as a run."""
    file = world / "blip2_pretrained_flant5xl.pth"
    out = tmp_path / "out"
    convert(
        file,
        out,
        "blip2fast",
        language_model=str(world / "t5"),
        image_encoder=str(world / "hf_opt"),
    )
    assert {path.name for path in out.iterdir()} == {
        *("model.json", "model.safetensors", "manifest.json"),
    }
    description = read_description(out)
    assert description.language_model == str(world / "t5")
    assert description.image_encoder == f"{world}/hf_opt, block 2"
    assert set(description.frozen) == {"language_model", "image_encoder"}
    assert description.sizes["llm_activation"] == "gelu"
    blip2 = Blip2.from_pretrained(out)
    assert blip2.caption(pictures(1)) is not None
    assert dataclasses.asdict(blip2.model.config) == description.sizes


def test_language_models_load_by_themselves(world: Path, tmp_path: Path) -> None:
    """The frozen parts of a converted folder are ordinary folders of transformers."""
    convert(world / "hf_opt", tmp_path / "own", "blip2fast")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own" / "language_model")
    expected = whole(world / "hf_opt").language_model
    equal(model.state_dict(), expected.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own" / "language_model")
    assert tokenizer.decode([model.config.eos_token_id]) == "\n"
    assert read_description(tmp_path / "own").sizes["end_text"] == "\n"


def test_one_image_encoder_is_itself_in_every_layout(world: Path) -> None:
    """In BLIP-2, InstructBLIP and LAVIS's file; a run from one takes tokens of the others."""
    names = [world / "hf_opt", world / "hf_instruct", world / "blip2_caption_opt2.7b.pth"]
    encoders = [load_image_encoder(str(name)) for name in names]
    first, *others = [encoder(pixels()) for encoder in encoders]
    for tokens in others:
        torch.testing.assert_close(tokens, first, rtol=0, atol=0)
    for name in names:
        there = open_weights(str(name)).described.frozen["image_encoder"]
        assert all(not there.differences(encoder.identity) for encoder in encoders)
    instruct = open_weights(str(world / "hf_instruct"))
    assert instruct.what == "transformers' InstructBLIP, stage 2"
    assert instruct.described.sizes["text_conditioned"]
    assert torch.equal(
        instruct.parameters()["qformer.embeddings.word_embeddings.weight"],
        lavis(world / "instruct_blip_flanxl_trimmed.pth")[
            "Qformer.bert.embeddings.word_embeddings.weight"
        ],
    )
