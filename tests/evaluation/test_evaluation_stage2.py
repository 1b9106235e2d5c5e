"""Texts that stage 2 writes, against loops written independently, and how they are judged."""

import pytest
import torch
from stage2_models import opt_config, stage2_config, t5_config
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from blip2fast.evaluation.stage1 import held_out_losses
from blip2fast.evaluation.stage2 import (
    accuracy_by_type,
    continue_texts,
    exact_match,
    generate_texts,
)
from blip2fast.scenes import language_tokenizer
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text

E = 6


def test_exact_match_uses_the_callers_match():
    same_words = lambda text, reference: sorted(text.split()) == sorted(reference.split())  # noqa: E731
    assert exact_match(["a b", "c d", "e"], ["b a", "c d", "f"], same_words) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 texts, 2 references"):
        exact_match(["a"], ["a", "b"], same_words)
    with pytest.raises(ValueError, match="0 texts"):
        exact_match([], [], same_words)


def test_accuracy_by_type():
    result = accuracy_by_type(
        ["red", " Blue", "two", "no"], ["red", "blue", "one", "yes"], ["c", "c", "n", "e"]
    )
    assert result == {"all": 0.5, "c": 1.0, "n": 0.0, "e": 0.0}
    with pytest.raises(ValueError, match="1 predictions, 2 answers"):
        accuracy_by_type(["a"], ["a", "b"], ["t", "t"])


@pytest.fixture(scope="module", params=["decoder-only", "encoder-decoder"])
def stage2(request):
    torch.manual_seed(0)
    tokenizer = language_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    if request.param == "decoder-only":
        wide = {"max_position_embeddings": 64, "init_std": 0.5}
        language_model = OPTForCausalLM(opt_config(**ids, **wide))
    else:
        wide = {"decoder_start_token_id": 1, "initializer_factor": 8.0}
        language_model = T5ForConditionalGeneration(t5_config(**ids, **wide))
    config = stage2_config(
        num_hidden_layers=1,
        encoder_hidden_size=E,
        num_query_tokens=3,
        cross_attention_frequency=1,
        initializer_range=0.5,
    )
    return Blip2Stage2(config, language_model).eval(), tokenizer


QUESTIONS = ["is there a red ring top left ?", "how many objects are there ?", "what ?", "where ?"]


def greedy_by_hand(stage2, image, text, prompt_ids, steps):
    """One sequence, one full forward per token, nothing cached, nothing batched."""
    language_model = stage2.language_model
    prompts, _ = stage2.encode_image(image[None])
    read = language_model.get_input_embeddings()(torch.tensor([prompt_ids]))
    embeds, written = torch.cat([prompts, read], 1), []
    for _ in range(steps):
        if text.is_encoder_decoder:
            ids = torch.tensor([[1, *written]])
            logits = language_model(inputs_embeds=embeds, decoder_input_ids=ids).logits
        else:
            logits = language_model(inputs_embeds=embeds).logits
        token = logits[0, -1].argmax().item()
        if token == text.end_token_id:
            break
        written.append(token)
        if not text.is_encoder_decoder:
            new = language_model.get_input_embeddings()(torch.tensor([[token]]))
            embeds = torch.cat([embeds, new], 1)
    return text.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("asked", [True, False])
def test_generated_texts_are_those_of_a_greedy_loop(stage2, asked):
    model, tokenizer = stage2
    prompt = "question: {} answer:" if asked else ""
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder, prompt=prompt)
    torch.manual_seed(1)
    embeds = torch.randn(4, 4, E)
    rows = torch.tensor([2, 0, 3, 1])
    questions = QUESTIONS if asked else None
    generated = generate_texts(
        model, text, embeds.__getitem__, rows, questions, max_new_tokens=5, batch_size=3
    )
    for position, row in enumerate(rows.tolist()):
        ids = text.prompt_batch([QUESTIONS[position]] if asked else None, batch_size=1)
        with torch.no_grad():
            expected = greedy_by_hand(model, embeds[row], text, ids["input_ids"][0].tolist(), 5)
        assert generated[position] == expected
    assert len(set(generated)) > 1, "the case must be able to tell images apart"


def test_generate_texts_refuses_other_numbers_of_questions(stage2):
    model, tokenizer = stage2
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder, prompt="{}")
    with pytest.raises(ValueError, match="1 questions for 2 images"):
        generate_texts(model, text, torch.zeros(2, 4, E).__getitem__, torch.arange(2), ["what ?"])


def test_continued_texts_are_those_of_one_by_one_generation(stage2, monkeypatch):
    """Also where prompts return, which are continued once."""
    model, tokenizer = stage2
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder)
    prompts = tokenizer([*QUESTIONS, *QUESTIONS[::-1]])["input_ids"]
    generate, rows = model.language_model.generate, []

    def counted(**inputs):
        rows.append(len(inputs["input_ids"]))
        return generate(**inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.language_model, "generate", counted)
        together = continue_texts(
            model.language_model, text, prompts, max_new_tokens=5, batch_size=3
        )
    assert sum(rows) == len(set(QUESTIONS))
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = model.language_model.generate(ids, max_new_tokens=5, do_sample=False)[0]
        start = 1 if text.is_encoder_decoder else ids.shape[1]
        alone.append(text.decode(written[None, start:])[0])
    assert together == alone
    assert any(together)


def test_continue_texts_refuses_an_empty_prompt(stage2):
    model, tokenizer = stage2
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder)
    with pytest.raises(ValueError, match="has no tokens"):
        continue_texts(model.language_model, text, [[5], []])


def test_the_loss_of_stage2_is_over_words(stage2):
    model, tokenizer = stage2
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder, prompt="{}")
    torch.manual_seed(2)
    batches = [
        {"image_embeds": torch.randn(n, 4, E), **text.train_batch([answer] * n, ["what ?"] * n)}
        for n, answer in ((3, "red"), (1, "red red red"))
    ]
    words = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert words[0] != 3 * words[1]
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in batches]
    result = held_out_losses(model, batches)
    assert result == {
        "loss": pytest.approx((words[0] * losses[0] + words[1] * losses[1]) / sum(words), rel=1e-6)
    }
