"""Text for stage 2: targets, padding, and the prefix/suffix split."""

import pytest
import torch
from stage2_models import opt_config, stage2_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text, split_point

CAPTIONS = [
    "a photo of a cat",
    "a photo of two dogs running on the beach near the sea",
    "dog",
    "a photo of a red circle top left and a blue ring bottom right",
]
QUESTIONS = ["what colour is it?", "how many dogs are there on the beach?", "where?", "is it red?"]
ANSWERS = ["red", "two", "on the beach", "yes"]
TEMPLATE = "Question: {} Short answer:"


def opt_tokenizer():
    """Byte-level BPE whose bos and eos are one token, put before every text, as OPT's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS + QUESTIONS + ANSWERS + [TEMPLATE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", None, [("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def word_tokenizer(template=None, **special):
    """One token a word; pad 0, unk 1, eos 2."""
    words = sorted({w for t in CAPTIONS + QUESTIONS + ANSWERS + [TEMPLATE] for w in t.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, None, [("</s>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def t5_tokenizer():
    return word_tokenizer("$A </s>")


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("max_txt_len", [32, 9])
def test_opt_as_in_lavis(prompt, max_txt_len):
    """LAVIS's recipe: caption + newline, cut; padding and the prompt's length ignored."""
    tokenizer = opt_tokenizer()
    texts = [c.removeprefix("a photo of ") for c in CAPTIONS] if prompt else CAPTIONS
    text = Stage2Text(
        tokenizer, False, prompt=prompt, end_text="\n", max_txt_len=max_txt_len
    ).train_batch(texts)

    tokenizer.padding_side = "right"
    want = tokenizer(
        [f"{prompt} {t}\n".lstrip(" ") for t in texts],
        return_tensors="pt",
        padding="longest",
        truncation=True,
        max_length=max_txt_len,
    )
    labels = want.input_ids.masked_fill(want.input_ids == tokenizer.pad_token_id, -100)
    if prompt:
        labels[:, : len(tokenizer(prompt).input_ids)] = -100
    assert torch.equal(text["input_ids"], want.input_ids)
    assert torch.equal(text["attention_mask"], want.attention_mask)
    assert torch.equal(text["labels"], labels)


def test_questions_are_read_and_answers_are_targets():
    tokenizer = opt_tokenizer()
    text = Stage2Text(tokenizer, False, prompt=TEMPLATE, end_text="\n", max_txt_len=64)
    batch = text.train_batch(ANSWERS, QUESTIONS)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        targets = batch["labels"][i] != -100
        assert tokenizer.decode(batch["input_ids"][i, targets]) == f" {answer}\n"
        read = batch["attention_mask"][i].bool() & ~targets
        asked = tokenizer.decode(batch["input_ids"][i, read])
        assert asked == f"</s>Question: {question} Short answer:"
        assert torch.equal(batch["labels"][i, targets], batch["input_ids"][i, targets])


def test_training_and_generation_read_the_same_prompt():
    text = Stage2Text(opt_tokenizer(), False, prompt=TEMPLATE, end_text="\n", max_txt_len=64)
    batch = text.train_batch(ANSWERS, QUESTIONS)
    prompts = text.prompt_batch(QUESTIONS)
    assert bool(prompts["attention_mask"][:, -1].all())
    for i in range(len(QUESTIONS)):
        read = batch["attention_mask"][i].bool() & (batch["labels"][i] == -100)
        alone = prompts["input_ids"][i, prompts["attention_mask"][i].bool()]
        assert torch.equal(batch["input_ids"][i, read], alone)


@pytest.mark.parametrize("template", [None, "</s> $A", "$A </s>"])
def test_end_token_is_eos_by_default(template):
    """Once, whatever the tokenizer adds itself; and never at the end of a prompt."""
    text = Stage2Text(word_tokenizer(template), False, prompt="a photo of")
    row = text.train_batch(["a cat"])["labels"][0]
    assert row[row != -100].tolist() == [*text.tokenizer.convert_tokens_to_ids(["a", "cat"]), 2]
    prompt = text.prompt_batch(batch_size=2)["input_ids"]
    assert prompt.shape == (2, 4 if template == "</s> $A" else 3)
    assert (prompt[:, -1] != 2).all()


def test_no_pad_token():
    text = Stage2Text(word_tokenizer(pad_token=None), False)
    batch = text.train_batch(["a cat", "dog"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][1, 1:].tolist() == [2, -100]  # the end counts, the filler does not


def test_random_split_takes_the_text_apart():
    text = Stage2Text(t5_tokenizer(), True, seed=3)
    ids = text.tokenizer.convert_tokens_to_ids
    lengths = set()
    for epoch in range(40):
        batch = text.train_batch(CAPTIONS, indices=range(len(CAPTIONS)), epoch=epoch)
        for i, caption in enumerate(CAPTIONS):
            prefix = batch["input_ids"][i, batch["attention_mask"][i].bool()].tolist()
            suffix = batch["labels"][i][batch["labels"][i] != -100].tolist()
            assert prefix[-1] == suffix[-1] == 2
            assert prefix[:-1] + suffix[:-1] == ids(caption.split())
            if i == 1:
                lengths.add(len(prefix) - 1)
    assert lengths == set(range(1, len(CAPTIONS[1].split()) // 2 + 1))


def test_random_split_depends_on_seed_index_and_epoch_alone():
    def prefixes(indices, epoch=0, seed=0, texts=CAPTIONS):
        text = Stage2Text(t5_tokenizer(), True, seed=seed)
        return text.train_batch([texts[i] for i in indices], indices=indices, epoch=epoch)

    long = [" ".join(["a"] * 24)] * 12
    first = prefixes(range(12), texts=long)["attention_mask"].sum(1)
    alone = [int(prefixes([i], texts=long)["attention_mask"].sum()) for i in reversed(range(12))]
    assert first.tolist() == alone[::-1]
    for changes in ({"epoch": 1}, {"seed": 1}):
        other = prefixes(range(12), texts=long, **changes)["attention_mask"].sum(1)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, {0}), (2, {1}), (3, {1}), (6, {1, 2, 3})])
def test_split_point_is_from_the_first_token_to_the_middle(num_tokens, expected):
    assert {split_point(num_tokens, 0, 0, i) for i in range(200)} == expected


def test_split_point_is_uniform():
    counts = torch.bincount(torch.tensor([split_point(8, 7, 2, i) for i in range(4000)]))
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 100).all()


def test_given_prefix_and_suffix():
    text = Stage2Text(t5_tokenizer(), True, prompt=TEMPLATE)
    batch = text.train_batch(ANSWERS, QUESTIONS)
    ids = text.tokenizer.convert_tokens_to_ids
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        read = batch["input_ids"][i, batch["attention_mask"][i].bool()].tolist()
        assert read == [*ids(TEMPLATE.format(question).split()), 2]
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == [*ids(answer.split()), 2]
    prompts = text.prompt_batch(QUESTIONS)
    assert torch.equal(prompts["input_ids"], batch["input_ids"])
    assert bool(prompts["attention_mask"][:, 0].all())  # an encoder is padded on the right


def test_long_texts_are_cut():
    caption = "a photo of a red circle top left and a blue ring bottom right"
    batch = Stage2Text(t5_tokenizer(), True, max_txt_len=6).train_batch([caption], indices=[0])
    words = int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum()) - 2
    assert words == 5
    cut = Stage2Text(t5_tokenizer(), True, prompt="dog", max_txt_len=6).train_batch([caption])
    assert cut["labels"].shape == (1, 6)
    assert cut["labels"][0, -1] == 2


def test_decode_stops_at_the_end():
    text = Stage2Text(opt_tokenizer(), False, end_text="\n")
    ids = text.tokenizer([" a cat\n and more", " dog"], padding=True, return_tensors="pt").input_ids
    assert text.decode(ids) == ["a cat", "dog"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage2Text(t5_tokenizer(), True, end_text="\n"), r"end_text is '\\n'; an encoder"),
        (lambda: Stage2Text(word_tokenizer(), False, end_text="\n"), r"end_text '\\n' must be one"),
        (lambda: Stage2Text(word_tokenizer(), False, end_text="zebra"), r"but it is \[1\]"),
        (lambda: Stage2Text(word_tokenizer(eos_token=None), False), "no eos token"),
        (lambda: Stage2Text(word_tokenizer(), False, max_txt_len=1), "max_txt_len is 1"),
        (lambda: Stage2Text(word_tokenizer(), False, seed=-1), "seed is -1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("prompt", "encoder_decoder", "arguments", "message"),
    [
        ("", False, ([],), "empty batch"),
        ("", False, (["a cat", " "],), r"text ' ' is empty"),
        (TEMPLATE, False, (["red"],), r"'Question: \{\} Short answer:' has a place for questions"),
        ("a photo of", False, (["red"], ["where?"]), r"'a photo of' has no \{\}"),
        (TEMPLATE, False, (["red"], QUESTIONS), "4 questions for 1 texts"),
        ("", True, (["a cat"],), "1 texts, none indices"),
        ("a " * 12, False, (["cat"],), "has 12 tokens, but max_txt_len is 9"),
        ("a " * 12, True, (["cat"],), "has 13 tokens, but max_txt_len is 9"),
        ("a " * 9, False, (["cat"],), r"leaves no room for the text 'cat': max_txt_len is 9"),
    ],
)
def test_bad_texts(prompt, encoder_decoder, arguments, message):
    tokenizer = t5_tokenizer() if encoder_decoder else word_tokenizer()
    text = Stage2Text(tokenizer, encoder_decoder, prompt=prompt, max_txt_len=9)
    with pytest.raises(ValueError, match=message):
        text.train_batch(*arguments)


def test_empty_prompt_batch():
    with pytest.raises(ValueError, match="questions=None, batch_size=None; give either"):
        Stage2Text(word_tokenizer(), False).prompt_batch()


def test_learns_to_answer():
    """Text to tensors to loss to written text: four images, each with its own first word.

    More than one word would be too much to steer in a language model of random weights.
    """
    answers = ["red", "two", "dog", "yes"]
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    language_model = OPTForCausalLM(opt_config(vocab_size=len(tokenizer), **special))
    for parameter in language_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = Blip2Stage2(stage2_config(prompt=TEMPLATE, hidden_dropout_prob=0.0), language_model)
    text = model.text(tokenizer)
    batch = text.train_batch(answers, [QUESTIONS[2]] * 4)
    embeds = torch.randn(4, 5, 24)
    optimiser = torch.optim.Adam(model.trainable_parameters(), lr=5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        model(embeds, **batch).loss.backward()
        optimiser.step()
    model.eval()
    asked = text.prompt_batch([QUESTIONS[2]] * 4)
    written = model.generate(embeds, **asked, max_new_tokens=1, eos_token_id=text.end_token_id)
    assert text.decode(written) == answers


@pytest.mark.parametrize("known_texts", [50_000, 5, 1])
def test_texts_that_return_are_tokenized_once_while_there_is_room(known_texts, monkeypatch):
    """The same tensors whatever is kept, and a bound on how much that is."""
    monkeypatch.setattr("blip2fast.stage2.text.KNOWN_TEXTS", known_texts)
    tokenizer = opt_tokenizer()
    text = Stage2Text(tokenizer, False, prompt=TEMPLATE)
    expected = Stage2Text(tokenizer, False, prompt=TEMPLATE).train_batch(ANSWERS, QUESTIONS)
    read = []
    monkeypatch.setattr(
        text,
        "tokenizer",
        lambda texts, **kwargs: read.append(len(texts)) or tokenizer(texts, **kwargs),
    )
    for _ in range(3):
        batch = text.train_batch(ANSWERS, QUESTIONS)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert len(text._known) <= max(known_texts, len(QUESTIONS))
    assert sum(read) == (8 if known_texts == 50_000 else 24)
