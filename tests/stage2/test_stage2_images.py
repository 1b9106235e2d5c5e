"""Any number of images in a sequence: against embeddings assembled by hand, and single calls."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stage2_models import PAD, Q, V, opt_config, reference_model, stage2_config, t5_config
from test_stage2_text import opt_tokenizer, t5_tokenizer, word_tokenizer
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text
from blip2fast.stage2.token_rows import IMAGE_PLACE

KINDS = ["opt", "t5"]
# per sample, front to back: a number is an image, letters are tokens
SEQUENCES = [
    [0, 5, 6, 1, 7, 8, 9],  # two images, each before its text
    [11, 12, 13],  # none
    [21, 2, 3, 22, 23],  # neighbours in the middle
]
SEQUENCES = [["image" if x < 4 else x for x in row] for row in SEQUENCES]
COUNTS = torch.tensor([2, 0, 2])


def tensors(side="right", sequences=SEQUENCES):
    rows = [
        [t for x in row for t in ([IMAGE_PLACE] * Q if x == "image" else [x])] for row in sequences
    ]
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([PAD] * left + row + [PAD] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask)


def images(count=4):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 5, 24, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return Blip2Stage2.from_transformers(reference_model(request.param)).eval()


def is_t5(model):
    return model.language_model.config.is_encoder_decoder


def by_hand(model, prompts, sequence, first):
    """[1, L, C] of one sample, piece by piece, its images counted from `first`."""
    embed, pieces = model.language_model.get_input_embeddings(), []
    for x in sequence:
        if x == "image":
            pieces.append(prompts[first])
            first += 1
        else:
            pieces.append(embed(torch.tensor([x])))
    return torch.cat(pieces)[None], first


def test_loss_and_gradients(model):
    """Labels among and after images; the rest of the text is read and not counted."""
    ids, mask = tensors()
    counted = [{6, 7, 9}, {12, 13}, {22, 23}]
    labels = torch.stack(
        [
            torch.where(torch.isin(row, torch.tensor(sorted(want))), row, -100)
            for row, want in zip(ids, counted, strict=True)
        ]
    )
    if is_t5(model):
        labels = torch.tensor([[5, 6, 2], [7, 2, -100], [9, 8, 2]])
    out = model(images(), ids, mask, labels, image_counts=COUNTS)
    parameters = list(model.trainable_parameters())
    got = torch.autograd.grad(out.loss, parameters)

    prompts, _ = model.encode_image(images())
    losses, first, language_model = [], 0, model.language_model
    for b, sequence in enumerate(SEQUENCES):
        read, first = by_hand(model, prompts, sequence, first)
        if is_t5(model):
            before = language_model.prepare_decoder_input_ids_from_labels(labels[b : b + 1])
            logits = language_model(inputs_embeds=read, decoder_input_ids=before).logits[0]
            targets = labels[b]
        else:
            logits = language_model(inputs_embeds=read).logits[0, :-1]
            targets = labels[b, 1 : read.shape[1]]
        kept = targets != -100
        losses.append(F.cross_entropy(logits[kept], targets[kept], reduction="none"))
    loss = torch.cat(losses).mean()
    assert len(torch.cat(losses)) == int((labels != -100).sum())
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
    want = torch.autograd.grad(loss, parameters)
    largest = max(float(x.abs().max()) for x in want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * largest)


def test_default_labels_are_the_text():
    """Not padding, not images, and not a first token that nothing stands before."""
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    ids, mask = tensors()
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE_PLACE), -100)
    want = model(images(), ids, mask, labels, image_counts=COUNTS).loss
    assert torch.equal(model(images(), ids, mask, image_counts=COUNTS).loss, want)
    labels[1:, 0] = -100
    assert torch.equal(model(images(), ids, mask, labels, image_counts=COUNTS).loss, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_equals_single_calls(model, side):
    settings = {"max_new_tokens": 6, "eos_token_id": V, "pad_token_id": PAD, "num_beams": 2}
    ids, mask = tensors(side)
    together = model.generate(images(), ids, mask, image_counts=COUNTS, **settings)
    prompts, _ = model.encode_image(images())
    first = 0
    for b, sequence in enumerate(SEQUENCES):
        read, first = by_hand(model, prompts, sequence, first)
        ones = torch.ones(read.shape[:2], dtype=torch.long)
        alone = model.language_model.generate(inputs_embeds=read, attention_mask=ones, **settings)
        assert torch.equal(alone[0, 1 if is_t5(model) else 0 :], together[b])
    assert len(together.unique()) > 2  # the comparison is not of constant outputs
    kept = model.generate(
        input_ids=ids, attention_mask=mask, image_counts=COUNTS, prompts=prompts, **settings
    )
    assert torch.equal(kept, together)


@pytest.mark.parametrize("kind", KINDS)
def test_one_marker_in_front_is_the_single_image(kind):
    """The same tokens, positions, loss and words as without markers, special tokens included."""
    tokenizer = opt_tokenizer() if kind == "opt" else t5_tokenizer()
    torch.manual_seed(0)
    if kind == "opt":
        language_model = OPTForCausalLM(
            opt_config(vocab_size=len(tokenizer), max_position_embeddings=64)
        )
    else:
        language_model = T5ForConditionalGeneration(t5_config(vocab_size=len(tokenizer)))
    template = "Question: {} Short answer:"
    single = Blip2Stage2(stage2_config(prompt=template), language_model).eval()
    several = copy.deepcopy(single)
    several.config = stage2_config(prompt=f"<image> {template}", image_marker="<image>")
    answers, questions = ["on the beach", "red"], ["where is the dog?", "is it red?"]
    embeds = torch.randn(2, 5, 24)
    batch = single.text(tokenizer).train_batch(answers, questions)
    marked = several.text(tokenizer).train_batch(answers, questions, image_counts=[1, 1])
    assert marked["image_counts"].tolist() == [1, 1]
    torch.testing.assert_close(
        several(embeds, **marked).loss, single(embeds, **batch).loss, rtol=1e-6, atol=0
    )
    asked, marked = (
        single.text(tokenizer).prompt_batch(questions),
        several.text(tokenizer).prompt_batch(questions),
    )
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        several.generate(embeds, **marked, **settings), single.generate(embeds, **asked, **settings)
    )


def test_markers_in_texts_and_prompts():
    """Each marker is Q places; a text's words are targets, a prompt's are not."""
    tokenizer = word_tokenizer("</s> $A")
    text = Stage2Text(tokenizer, False, image_marker="<image>", num_query_tokens=2)
    word = dict(tokenizer.get_vocab())
    a, cat, dog, end, P = word["a"], word["cat"], word["dog"], 2, IMAGE_PLACE
    batch = text.train_batch(["a cat <image>a dog", "dog"], ["<image><image>", ""])
    assert batch["image_counts"].tolist() == [3, 0]
    assert batch["input_ids"].tolist() == [
        [P, P, P, P, end, a, cat, P, P, a, dog, end],
        [end, dog, end, *[0] * 9],
    ]
    x = -100
    assert batch["labels"].tolist() == [
        [x, x, x, x, x, a, cat, x, x, a, dog, end],
        [end, dog, end, *[x] * 9],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [12, 3]
    asked = text.prompt_batch(["a <image> dog", ""])
    assert asked["input_ids"].tolist() == [[end, a, P, P, dog], [0, 0, 0, 0, end]]
    assert asked["image_counts"].tolist() == [1, 0]


def test_markers_before_a_decoder():
    """A split never comes before a text's last image, and is the same without it."""
    tokenizer, words = t5_tokenizer(), "a photo of two dogs running"
    text = Stage2Text(tokenizer, True, image_marker="<image>", num_query_tokens=2)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    plain = Stage2Text(tokenizer, True)
    for epoch in range(8):
        marked = text.train_batch([f"a <image> {words}"], indices=[3], epoch=epoch)
        without = plain.train_batch([words], indices=[3], epoch=epoch)
        first = without["input_ids"][0].tolist()
        a = tokenizer.convert_tokens_to_ids("a")
        assert marked["input_ids"][0].tolist() == [a, IMAGE_PLACE, IMAGE_PLACE, *first]
        assert torch.equal(marked["labels"], without["labels"])
        assert [*first[:-1], *marked["labels"][0].tolist()[:-1]] == ids
    # a sample with a prompt beside one without: each as by itself
    mixed = text.train_batch(["dog", words], ["<image> a photo of", ""], indices=[0, 3])
    assert mixed["labels"][0].tolist()[:2] == [tokenizer.convert_tokens_to_ids("dog"), 2]
    alone = plain.train_batch([words], indices=[3])["input_ids"][0].tolist()
    assert mixed["input_ids"][1].tolist()[: len(alone)] == alone


def test_a_batch_without_images_has_gradients_of_zero(model):
    """So that every process of a run has some for each parameter."""
    model = copy.deepcopy(model).train()
    ids, mask = tensors(sequences=SEQUENCES[1:2] * 2)
    counts = torch.tensor([0, 0])
    labels = ids if is_t5(model) else None
    for embeds in (None, images()[:0]):
        model.zero_grad()
        out = model(embeds, ids, mask, labels, image_counts=counts)
        out.loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.trainable_parameters())
    assert model.generate(None, ids, mask, image_counts=counts, max_new_tokens=2).shape[0] == 2


def test_one_image_may_serve_as_pixels():
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    pixels = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    ids, mask = tensors()
    got = model(images=pixels, input_ids=ids, attention_mask=mask, image_counts=COUNTS).loss
    want = model(model.image_encoder(pixels), ids, mask, image_counts=COUNTS).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


IDS, MASK = tensors()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_embeds": images(3)}, "the 3 samples have 4 images, but 3 are given"),
        ({"image_embeds": None}, "the 3 samples have 4 images, but 0 are given"),
        (
            {"image_counts": torch.tensor([1, 1, 2])},
            r"text 0 has 8 places .* = 2 image markers of 4 queries, but image_counts\[0\] is 1",
        ),
        (
            {"input_ids": IDS.masked_fill(torch.arange(IDS.shape[1]) == 0, 5)},
            r"text 0 has 7 places .* = 1.75 image markers",
        ),
        (
            {"image_counts": torch.tensor([2, 2])},
            r"image_counts: expected \[B\] = \[3\] integers, got \(2,\)",
        ),
        ({"image_counts": None}, r"one text for each of 4 images, got 3"),
        ({"image_counts": None, "image_embeds": images(3)}, "expected ids from 0 to 40, got -1"),
        ({"input_ids": IDS + V * (IDS > 0)}, "expected ids from 0 to 40"),
        (
            {"input_ids": F.pad(IDS, (0, 30), value=5), "attention_mask": F.pad(MASK, (0, 30))},
            r"8 soft prompts \+ 35 text tokens = 43 positions, .*max_position_embeddings=32",
        ),
        ({"attention_mask": MASK[:, 1:]}, "the mask of input_ids: expected its shape"),
        ({"labels": IDS}, "labels: expected ids from 0 to 40, got -1"),
    ],
)
def test_refuses(changes, message):
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    inputs = {
        "image_embeds": images(),
        "input_ids": IDS,
        "attention_mask": MASK,
        "image_counts": COUNTS,
    }
    with pytest.raises(ValueError, match=message):
        model(**(inputs | changes))
    if "labels" not in changes:
        with pytest.raises(ValueError, match=message):
            model.generate(**(inputs | changes))


def test_generation_needs_the_places():
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    with pytest.raises(ValueError, match="images in a text need input_ids that hold their places"):
        model.generate(images(), image_counts=COUNTS)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "opt",
            {"texts": ["<image> a cat"], "image_counts": [2]},
            "text 0 has 1 image markers '<image>', but 2 images are given",
        ),
        ("opt", {"texts": ["<image> "]}, "text '<image> ' is empty"),
        (
            "opt",
            {"texts": ["a photo of a cat <image> dog"]},
            "has 7 tokens, but max_txt_len 4 cuts off 1 of 1 images; raise",
        ),
        (
            "opt",
            {"texts": ["cat"], "questions": ["<image> a photo of a"]},
            "leaves no room for the text .cat.: max_txt_len is 4",
        ),
        (
            "t5",
            {"texts": ["a <image> cat"], "questions": ["a dog"]},
            "has images, but a decoder writes it and reads none; put them into its prompt",
        ),
        (
            "t5",
            {"texts": ["a cat <image>"], "indices": [0]},
            "nothing to write after its last image within max_txt_len 4",
        ),
        ("t5", {"texts": ["a cat <image> dog"]}, "one sample index a text: 1 texts, none indices"),
    ],
)
def test_text_refuses(kind, arguments, message):
    tokenizer = t5_tokenizer() if kind == "t5" else word_tokenizer()
    text = Stage2Text(tokenizer, kind == "t5", max_txt_len=4, image_marker="<image>")
    with pytest.raises(ValueError, match=message):
        text.train_batch(**arguments)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="image_marker is ' '; give a word such as"):
        Stage2Text(word_tokenizer(), False, image_marker=" ")
    with pytest.raises(ValueError, match="this text has no image_marker; set image_marker"):
        Stage2Text(word_tokenizer(), False).train_batch(["a cat"], image_counts=[1])
