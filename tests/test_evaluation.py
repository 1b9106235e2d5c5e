"""Evaluation and retrieval against brute-force computations written independently."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from blip2fast.evaluation import (
    accuracy_by_type,
    caption_batches,
    continue_texts,
    evaluate_stage1,
    evaluate_stage2,
    exact_match,
    generate_texts,
    held_out_losses,
)
from blip2fast.retrieval import (
    Texts,
    encode_all,
    match_logits,
    query_similarity,
    rerank,
    retrieval_recall,
    swapped_match_accuracy,
)
from blip2fast.scenes import language_tokenizer
from blip2fast.stage2 import Blip2Stage2, Stage2Config
from blip2fast.stage2_text import Stage2Text

NUM_IMAGES, J, Q, T, E, D = 7, 11, 3, 5, 6, 4


class ToyStage1(nn.Module):
    """The contract of Blip2Stage1 with features that a test can compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(E, D)
        self.word = nn.Embedding(50, D)
        self.drop = nn.Dropout(0.5)
        self.match_calls: list[int] = []

    def encode_image(self, image_embeds):
        states = self.drop(self.image(image_embeds[:, :Q]))
        return nn.functional.normalize(states, dim=-1), states

    def encode_text(self, input_ids, attention_mask):
        words = self.word(input_ids) * attention_mask[..., None]
        return nn.functional.normalize(words.sum(1), dim=-1)

    def match(self, image_embeds, input_ids, attention_mask):
        self.match_calls.append(len(input_ids))
        yes = (self.image(image_embeds).sum(1) * self.encode_text(input_ids, attention_mask)).sum(1)
        return torch.stack([-yes, yes], 1)

    def forward(self, image_embeds, input_ids, attention_mask):
        noise = torch.rand(())
        mean = image_embeds.mean() + input_ids.float().mean()
        return SimpleNamespace(loss=mean, loss_itm=noise, accuracy_itm=None, other=mean)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = ToyStage1()
    embeds = torch.randn(NUM_IMAGES, 4, E)
    ids = torch.randint(1, 50, (J, T))
    mask = (torch.arange(T) < torch.randint(2, T + 1, (J, 1))).long()
    image = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6])
    return model, embeds, Texts(ids, mask, image)


def brute_force_recall(score_i2t, score_t2i, owner, k):
    i2t, t2i = [], []
    for i in range(score_i2t.shape[0]):
        own = [j for j, o in enumerate(owner) if o == i]
        wrong = [score_i2t[i, j].item() for j, o in enumerate(owner) if o != i]
        best = max(score_i2t[i, j].item() for j in own)
        i2t.append(sum(w >= best for w in wrong) < k)
    for j, i in enumerate(owner):
        column = score_t2i[:, j].tolist()
        t2i.append(sum(s >= column[i] for n, s in enumerate(column) if n != i) < k)
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


def test_similarity_and_recall_against_loops(toy):
    model, embeds, texts = toy
    model.train()
    image_features, text_features = encode_all(
        model, embeds.__getitem__, NUM_IMAGES, texts, batch_size=3
    )
    assert model.training, "the caller's mode must come back"
    similarity = query_similarity(image_features, text_features, batch_size=2)
    for i in range(NUM_IMAGES):
        for j in range(J):
            expected = max((image_features[i, q] * text_features[j]).sum().item() for q in range(Q))
            assert similarity[i, j].item() == pytest.approx(expected, abs=1e-6)
    recall = retrieval_recall(similarity, similarity, texts.image, ks=(1, 2, 5))
    for k in (1, 2, 5):
        i2t, t2i = brute_force_recall(similarity, similarity, texts.image.tolist(), k)
        assert recall[f"i2t_r{k}"] == pytest.approx(i2t)
        assert recall[f"t2i_r{k}"] == pytest.approx(t2i)
    assert 0 < recall["t2i_r2"] < 1, "the case must be able to tell good from bad"


def test_features_do_not_depend_on_batching(toy):
    model, embeds, texts = toy
    one = encode_all(model, embeds.__getitem__, NUM_IMAGES, texts, batch_size=1)
    all_at_once = encode_all(model, embeds.__getitem__, NUM_IMAGES, texts, batch_size=100)
    for a, b in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_constant_or_broken_scores_are_not_perfect_retrieval(value):
    scores = torch.full((20, 20), value)
    recall = retrieval_recall(scores, scores, torch.arange(20))
    assert set(recall.values()) == {0.0}


def test_recall_skips_images_without_text():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    recall = retrieval_recall(scores, scores, torch.tensor([0, 1]), ks=(1,))
    assert recall == {"i2t_r1": 1.0, "t2i_r1": 1.0}


def test_recall_refuses_disagreeing_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 3\) and \(2,\)"):
        retrieval_recall(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("k", [1, 3, 100])
def test_rerank_against_loops(toy, k):
    model, embeds, texts = toy
    features = encode_all(model, embeds.__getitem__, NUM_IMAGES, texts)
    similarity = query_similarity(*features)
    score_i2t, score_t2i = rerank(model, embeds.__getitem__, texts, similarity, k, batch_size=4)

    def matched(i, j):
        with torch.no_grad():
            logits = model.eval().match(
                embeds[i : i + 1], texts.input_ids[j : j + 1], texts.attention_mask[j : j + 1]
            )[0]
        return (similarity[i, j] + logits[1]).item()

    for i in range(NUM_IMAGES):
        order = sorted(range(J), key=lambda j: -similarity[i, j].item())
        expected = sorted(order[:k], key=lambda j: -matched(i, j)) + order[k:]
        assert score_i2t[i].argsort(descending=True).tolist() == expected
    for j in range(J):
        order = sorted(range(NUM_IMAGES), key=lambda i: -similarity[i, j].item())
        expected = sorted(order[:k], key=lambda i: -matched(i, j)) + order[k:]
        assert score_t2i[:, j].argsort(descending=True).tolist() == expected


def test_rerank_matches_each_pair_once(toy):
    model, embeds, texts = toy
    similarity = torch.zeros(NUM_IMAGES, J)
    rerank(model, embeds.__getitem__, texts, similarity, k=max(NUM_IMAGES, J))
    assert sum(model.match_calls) == NUM_IMAGES * J


def test_rerank_refuses_no_candidates(toy):
    model, embeds, texts = toy
    with pytest.raises(ValueError, match="k=0"):
        rerank(model, embeds.__getitem__, texts, torch.zeros(NUM_IMAGES, J), k=0)


def test_swapped_match_accuracy_against_loops(toy):
    model, embeds, texts = toy
    torch.manual_seed(1)
    swapped = Texts(torch.randint(1, 50, (J, T)), texts.attention_mask, texts.image)
    result = swapped_match_accuracy(model, embeds.__getitem__, texts, swapped, batch_size=3)
    true_right = wrong_right = ranked = 0
    for j in range(J):
        i = texts.image[j : j + 1]
        a, b = (
            model.match(embeds[i], t.input_ids[j : j + 1], t.attention_mask[j : j + 1])[0]
            for t in (texts, swapped)
        )
        true_right += int(a[1] > a[0])
        wrong_right += int(b[1] <= b[0])
        ranked += int(a[1] - a[0] > b[1] - b[0])
    assert result["itm_true"] == pytest.approx(true_right / J)
    assert result["itm_swapped"] == pytest.approx(wrong_right / J)
    assert result["itm_accuracy"] == pytest.approx((true_right + wrong_right) / (2 * J))
    assert result["itm_ranked"] == pytest.approx(ranked / J)


def test_swapped_texts_must_be_of_the_same_images(toy):
    model, embeds, texts = toy
    other = Texts(texts.input_ids, texts.attention_mask, texts.image.flip(0))
    with pytest.raises(ValueError, match="image by image"):
        swapped_match_accuracy(model, embeds.__getitem__, texts, other)


def test_held_out_losses_are_row_weighted_reproducible_and_leave_the_random_state(toy):
    model, embeds, texts = toy
    batches = list(caption_batches(embeds.__getitem__, texts, batch_size=5))
    assert [b["input_ids"].shape[0] for b in batches] == [5, 2]
    torch.manual_seed(3)
    expected_next = torch.rand(())
    torch.manual_seed(3)
    first = held_out_losses(model, batches)
    assert torch.rand(()) == expected_next
    second = held_out_losses(model, batches)
    assert first == second
    assert set(first) == {"loss", "loss_itm"}
    means = [(b["image_embeds"].mean() + b["input_ids"].float().mean()).item() for b in batches]
    assert first["loss"] == pytest.approx((5 * means[0] + 2 * means[1]) / 7, rel=1e-5)


def test_caption_batches_take_one_text_per_image_and_no_batch_of_one(toy):
    _, embeds, texts = toy
    batches = list(caption_batches(embeds.__getitem__, texts, batch_size=6))
    assert [len(b["input_ids"]) for b in batches] == [6]
    expected = texts.input_ids[[0, 2, 3, 4, 7, 8]]
    assert torch.equal(batches[0]["input_ids"], expected)
    assert torch.equal(batches[0]["image_embeds"], embeds[:6])


def test_losses_refuse_no_batch(toy):
    with pytest.raises(ValueError, match="at least one batch"):
        held_out_losses(toy[0], [])


def test_evaluate_stage1_reports_what_was_asked(toy):
    model, embeds, texts = toy
    plain = evaluate_stage1(model, embeds.__getitem__, NUM_IMAGES, texts, batch_size=4)
    assert {"loss", "t2i_r1", "i2t_r10"} <= set(plain)
    assert not any(name.startswith(("rerank", "itm")) for name in plain)
    full = evaluate_stage1(
        model, embeds.__getitem__, NUM_IMAGES, texts, swapped=texts, rerank_k=2, batch_size=4
    )
    assert full["itm_accuracy"] == pytest.approx(0.5), "the same texts cannot be told apart"
    similarity = query_similarity(*encode_all(model, embeds.__getitem__, NUM_IMAGES, texts))
    scores = rerank(model, embeds.__getitem__, texts, similarity, 2)
    assert full["rerank_t2i_r1"] == retrieval_recall(*scores, texts.image)["t2i_r1"]


def test_texts_refuse_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        Texts(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="each of the 2 texts"):
        Texts(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_match_scores_of_no_pairs(toy):
    model, embeds, texts = toy
    none = torch.empty(0, dtype=torch.long)
    assert match_logits(model, embeds.__getitem__, texts, (none, none)).shape == (0, 2)


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
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    if request.param == "decoder-only":
        language_model = OPTForCausalLM(
            OPTConfig(
                hidden_size=16,
                word_embed_proj_dim=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                init_std=0.5,
                **sizes,
            )
        )
    else:
        language_model = T5ForConditionalGeneration(
            T5Config(
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=1,
                initializer_factor=8.0,
                **sizes,
            )
        )
    config = Stage2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=E,
        num_query_tokens=Q,
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
    with pytest.raises(ValueError, match="without tokens"):
        continue_texts(model.language_model, text, [[5], []])


def test_evaluate_stage2_is_the_row_weighted_loss(stage2):
    model, tokenizer = stage2
    text = Stage2Text(tokenizer, model.language_model.config.is_encoder_decoder, prompt="{}")
    torch.manual_seed(2)
    batches = [
        {"image_embeds": torch.randn(n, 4, E), **text.train_batch(["red"] * n, ["what ?"] * n)}
        for n in (3, 1)
    ]
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in batches]
    result = evaluate_stage2(model, batches)
    assert result == {"loss": pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-6)}
