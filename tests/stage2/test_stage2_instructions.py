"""The text-conditioned Q-Former: against transformers' InstructBLIP, and stage 1's ITM pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stage2_models import (
    IMAGE_TOKEN,
    PAD,
    WORDS,
    B,
    Q,
    T,
    V,
    batches,
    images,
    instruct_model,
    opt_model,
    stage1_model,
    stage2_config,
    text_batch,
    with_placeholders,
)
from test_stage2_text import word_tokenizer
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipForConditionalGeneration,
)

from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.stage2.token_rows import IMAGE_PLACE

KINDS = ["opt", "t5"]


def instructions():
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1, WORDS, (B, 5), generator=generator)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
    return {"qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    reference = instruct_model(request.param)
    ours = Blip2Stage2.from_transformers(copy.deepcopy(reference)).eval()
    return request.param, reference, ours


def test_loss_and_gradients(models):
    kind, reference, model = models
    ours, theirs = batches(kind)
    reference.zero_grad()
    want = reference(pixel_values=images(), **theirs, **instructions())
    loss = want.loss
    if kind == "opt":  # transformers rounds logits to fp32 for the loss
        loss = F.cross_entropy(want.logits[:, :-1].flatten(0, 1), theirs["labels"][:, 1:].flatten())
    got = model(images=images(), **ours, **instructions())
    torch.testing.assert_close(got.loss, loss, rtol=1e-10, atol=0)
    states = want.qformer_outputs[0][:, :Q]
    torch.testing.assert_close(got.query_output, states, rtol=1e-10, atol=1e-10)
    loss.backward()
    names = list(model.trainable_state_dict())
    grads = torch.autograd.grad(
        got.loss, [model.get_parameter(n) for n in names], allow_unused=True
    )
    theirs_by_name = dict(reference.named_parameters())
    largest = max(float(x.abs().max()) for x in grads if x is not None)
    unused = set()
    for name, gradient in zip(names, grads, strict=True):
        twin = theirs_by_name[name.replace("ln_vision", "vision_model.post_layernorm")].grad
        if gradient is None or twin is None:
            unused.add(name)
            assert not (gradient if gradient is not None else torch.zeros(1)).any()
            assert not (twin if twin is not None else torch.zeros(1)).any()
            continue
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-10 * largest)
    # the last layer's text half is read by nobody
    assert all("layer.2." in name for name in unused)
    assert {"qformer.embeddings.word_embeddings.weight", "language_projection.bias"} <= set(names)


@pytest.mark.parametrize(
    "way", [{"num_beams": 1}, {"num_beams": 3, "length_penalty": -1.0}], ids=["greedy", "beam"]
)
def test_generation(models, way):
    kind, reference, model = models
    ids, mask = text_batch()
    if kind == "opt":
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    settings = {"max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False, **way}
    want = reference.generate(
        images(), **with_placeholders(ids, mask), **instructions(), **settings
    )
    got = model.generate(
        images=images(), input_ids=ids, attention_mask=mask, **instructions(), **settings
    )
    # transformers' own `generate` gives the prompt back for OPT, or a start token
    start = Q + T if kind == "opt" else 1
    assert torch.equal(got, want[:, start:])
    assert len(got.unique()) > 2


def test_the_instruction_changes_what_is_seen(models):
    _, _, model = models
    given = instructions()
    first, _ = model.encode_image(images=images(), **given)
    swapped = {name: value.flip(0) for name, value in given.items()}
    second, _ = model.encode_image(images=images(), **swapped)
    moved = (first - second).abs().amax(dim=(1, 2))
    assert moved[[0, 2]].min() > 1e-3
    assert moved[1] == 0  # the middle one stayed
    hidden = given["qformer_input_ids"].masked_fill(given["qformer_attention_mask"] == 0, 7)
    third, _ = model.encode_image(images=images(), **given | {"qformer_input_ids": hidden})
    torch.testing.assert_close(first, third, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_transformers(kind, tmp_path):
    reference = instruct_model(kind)
    model = Blip2Stage2.from_transformers(reference).eval()
    assert model.config.text_conditioned
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (WORDS, 12)
    back = model.to_transformers(IMAGE_TOKEN)
    assert isinstance(back, InstructBlipForConditionalGeneration)
    back.save_pretrained(tmp_path)
    loaded = InstructBlipForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    again = Blip2Stage2.from_transformers(loaded.eval()).eval()
    assert again.config == model.config
    ours, _ = batches(kind)
    losses = [m(images=images(), **ours, **instructions()).loss for m in (again, model)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)


def test_a_blip2_vision_model_serves_an_instructblip():
    """Trained here from BLIP-2's stage 1, handed over with BLIP-2's own image encoder."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    vision = Blip2VisionModel(
        Blip2VisionConfig(**sizes, num_hidden_layers=1, image_size=16, patch_size=8)
    )
    config = stage2_config(text_conditioned=True, vocab_size=WORDS, ln_vision_eps=1e-6)
    model = Blip2Stage2(config, opt_model()).eval()
    back = model.to_transformers(IMAGE_TOKEN, vision)
    assert isinstance(back, InstructBlipForConditionalGeneration)
    pixels = images(torch.float32)
    tokens = vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state
    _, theirs = batches("opt")
    ours, _ = batches("opt")
    want = model(tokens, **ours, **instructions()).loss
    got = back(pixel_values=pixels, **theirs, **instructions()).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_from_stage1_keeps_the_text_branch():
    """The queries beside an instruction are those of ITM, queries and text seeing each other."""
    stage1 = stage1_model().double().eval()
    text = stage1.state_dict()
    config = stage2_config(text_conditioned=True, vocab_size=50)
    model = Blip2Stage2.from_stage1(stage1.state_dict(), opt_model(), config).double().eval()
    ids = instructions()["qformer_input_ids"].clamp(min=1)
    mask = instructions()["qformer_attention_mask"]
    embeds = torch.randn(B, 5, 24, dtype=torch.float64)
    _, got = model.encode_image(embeds, qformer_input_ids=ids, qformer_attention_mask=mask)
    rows = torch.cat([stage1.query_tokens.expand(B, -1, -1), stage1.embeddings(ids)], dim=1)
    want = stage1.qformer(
        query_embeds=rows,
        query_length=Q,
        attention_mask=torch.cat([torch.ones(B, Q), mask], dim=1).long(),
        encoder_hidden_states=stage1.ln_vision(embeds),
    ).last_hidden_state[:, :Q]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    kept = model.trainable_state_dict()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(kept[f"qformer.{name}"], text[name])
    assert torch.equal(kept["qformer.embeddings.layernorm.bias"], text["qformer.layernorm.bias"])
    whole = Blip2Stage2.from_stage1(
        stage1, opt_model(), type(config).from_stage1(stage1.config, text_conditioned=True)
    )
    assert whole.config.vocab_size == 50
    with pytest.raises(ValueError, match=r"word_embeddings.weight: expected \(51, 16\), got \(50"):
        Blip2Stage2.from_stage1(
            stage1.state_dict(), opt_model(), stage2_config(text_conditioned=True, vocab_size=51)
        )


def test_one_instruction_a_sample_for_all_its_images():
    model = Blip2Stage2.from_transformers(instruct_model("opt")).eval()
    P = [IMAGE_PLACE] * Q
    ids = torch.tensor([[*P, 5, *P, 6], [7, 8, *[9] * 8], [*P, 5, 6, 7, 8, 9, 10]])
    counts = torch.tensor([2, 0, 1])
    tokens = torch.randn(3, 5, 24, dtype=torch.float64)
    given = instructions()
    got = model(tokens, ids, image_counts=counts, **given)
    each = torch.tensor([0, 0, 2])
    prompts, _ = model.encode_image(tokens, **{name: value[each] for name, value in given.items()})
    assert torch.equal(got.prompts, prompts)
    none = {name: value[1:2] for name, value in given.items()}
    model.zero_grad()
    out = model(None, ids[1:2], image_counts=counts[1:2], **none)
    out.loss.backward()
    assert not model.query_tokens.grad.any()
    written = model.generate(tokens, ids, image_counts=counts, **given, max_new_tokens=3)
    kept = model.generate(input_ids=ids, image_counts=counts, prompts=prompts, max_new_tokens=3)
    assert torch.equal(written, kept)


def test_text_gives_the_prompt_to_the_qformer():
    """Prompt and question, as the language model reads them, without image markers."""
    tokenizer, bert = word_tokenizer(), word_tokenizer("$A </s>")
    text = Stage2Text(
        tokenizer,
        False,
        prompt="<image> Question: {} Short answer:",
        image_marker="<image>",
        qformer_tokenizer=bert,
    )
    questions = ["where?", "is it red?"]
    batch = text.train_batch(["yes", "red"], questions)
    for row, question in enumerate(questions):
        kept = batch["qformer_attention_mask"][row].bool()
        read = bert.decode(batch["qformer_input_ids"][row, kept], skip_special_tokens=True)
        assert read == f"Question: {question} Short answer:"
    asked = text.prompt_batch(questions)
    assert torch.equal(asked["qformer_input_ids"], batch["qformer_input_ids"])
    plain = Stage2Text(tokenizer, False).train_batch(["yes"])
    assert "qformer_input_ids" not in plain


def test_mixed_precision():
    model = Blip2Stage2.from_transformers(instruct_model("opt", torch.float32))
    model.qformer.to(torch.bfloat16)
    ours, _ = batches("opt")
    assert model(images=images(torch.float32), **ours, **instructions()).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qformer_input_ids": None}, "text-conditioned and needs an instruction .* got none"),
        (
            {"qformer_input_ids": torch.ones(2, 5, dtype=torch.long)},
            r"qformer_input_ids: expected \[3, T\] integers, one row an image, got \(2, 5\)",
        ),
        (
            {"qformer_attention_mask": torch.ones(3, 4)},
            r"expected the shape of qformer_input_ids \(3, 5\), got \(3, 4\)",
        ),
        (
            {"qformer_input_ids": torch.full((3, 5), WORDS)},
            r"qformer_input_ids: expected ids from 0 to 28, got 29 to 29; does the tokenizer",
        ),
        (
            {
                "input_ids": torch.full((2, 4), IMAGE_PLACE),
                "attention_mask": None,
                "image_counts": torch.tensor([1, 2]),
            },
            "one instruction for each of 2 samples, got",
        ),
    ],
)
def test_refuses(changes, message):
    model = Blip2Stage2.from_transformers(instruct_model("opt", torch.float32)).eval()
    ids, mask = text_batch()
    inputs = {"images": images(torch.float32), "input_ids": ids, "attention_mask": mask}
    with pytest.raises(ValueError, match=message):
        model(**(inputs | instructions() | changes))


def test_a_blip2_qformer_reads_no_instruction():
    model = Blip2Stage2(stage2_config(), opt_model())
    ids, _ = text_batch()
    with pytest.raises(ValueError, match="reads images alone; build it with text_conditioned=True"):
        model(torch.randn(B, 5, 24), ids, **instructions())
    with pytest.raises(ValueError, match="qformer_tokenizer: text_conditioned is False, got one"):
        model.text(word_tokenizer(), qformer_tokenizer=word_tokenizer())
    instructed = Blip2Stage2(stage2_config(text_conditioned=True, vocab_size=V), opt_model())
    with pytest.raises(ValueError, match="qformer_tokenizer: text_conditioned is True, got none"):
        instructed.text(word_tokenizer())
