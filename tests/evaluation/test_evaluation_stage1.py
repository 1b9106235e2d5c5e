"""Evaluation and retrieval of stage 1 against brute-force computations written independently."""

import math
from types import SimpleNamespace

import pytest
import torch
from stage1_cases import SMALL, make_batch
from torch import nn

from blip2fast.evaluation.retrieval import (
    TokenizedTexts,
    encode_all,
    match_logits,
    rerank,
    retrieval_recall,
    swapped_match_accuracy,
)
from blip2fast.evaluation.stage1 import caption_batches, evaluate_stage1, held_out_losses, seeded
from blip2fast.stage1.losses import max_query_similarity
from blip2fast.stage1.model import Blip2Stage1

NUM_IMAGES, J, Q, T, E, D = 7, 11, 3, 5, 6, 4


class ToyStage1(nn.Module):
    """The contract of Blip2Stage1 with features that a test can compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(E, D)
        self.word = nn.Embedding(50, D)
        self.drop = nn.Dropout(0.5)
        self.match_calls: list[int] = []
        self.projected: list[int] = []

    def encode_image(self, image_embeds):
        states = self.drop(self.image(image_embeds[:, :Q]))
        return nn.functional.normalize(states, dim=-1), states

    def encode_text(self, input_ids, attention_mask):
        words = self.word(input_ids) * attention_mask[..., None]
        return nn.functional.normalize(words.sum(1), dim=-1)

    def project_images(self, image_embeds):
        self.projected.append(len(image_embeds))
        return image_embeds

    def match(self, image_embeds, input_ids, attention_mask, image_index=None):
        self.match_calls.append(len(input_ids))
        if image_index is not None:
            image_embeds = image_embeds[image_index]
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
    return model, embeds, TokenizedTexts(ids, mask, image)


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
    similarity = max_query_similarity(image_features, text_features, batch_size=2)
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
    similarity = max_query_similarity(*features)
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


def test_images_are_projected_once_whatever_the_batch(toy):
    model, embeds, texts = toy
    pairs = torch.tensor([3, 0, 3, 6, 0, 0, 3, 0, 1]), torch.tensor([0, 5, 4, 10, 1, 2, 9, 7, 8])
    expected = [model.match(embeds[i : i + 1], texts.input_ids[j : j + 1],
        texts.attention_mask[j : j + 1])[0] for i, j in zip(*pairs, strict=True)]  # fmt: skip
    for batch_size in (1, 2, 3, 100):
        model.projected.clear()
        found = match_logits(model, embeds.__getitem__, texts, pairs, batch_size)
        assert sum(model.projected) == 4
        assert max(model.projected) <= batch_size
        assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        match_logits(model, embeds.__getitem__, texts, pairs, 0)


def test_rerank_refuses_no_candidates(toy):
    model, embeds, texts = toy
    with pytest.raises(ValueError, match="k=0"):
        rerank(model, embeds.__getitem__, texts, torch.zeros(NUM_IMAGES, J), k=0)


def test_swapped_match_accuracy_against_loops(toy):
    model, embeds, texts = toy
    torch.manual_seed(1)
    swapped = TokenizedTexts(torch.randint(1, 50, (J, T)), texts.attention_mask, texts.image)
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
    other = TokenizedTexts(texts.input_ids, texts.attention_mask, texts.image.flip(0))
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


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(6, [7]), (5, [5, 2]), (3, [3, 4]), (2, [2, 2, 3])]
)
def test_caption_batches_take_one_text_of_every_image_and_no_batch_of_one(toy, batch_size, sizes):
    _, embeds, texts = toy
    batches = list(caption_batches(embeds.__getitem__, texts, batch_size))
    assert [len(b["input_ids"]) for b in batches] == sizes
    expected = texts.input_ids[[0, 2, 3, 4, 7, 8, 9]]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), expected)
    assert torch.equal(torch.cat([b["image_embeds"] for b in batches]), embeds)


def test_held_out_losses_of_stage1_are_over_pairs_and_words():
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).double().eval()
    batches = [make_batch(SMALL, size, seed=size) for size in (4, 3)]
    batches[0]["attention_mask"][:, 3:] = 0
    batches[1]["image_ids"] = torch.zeros(3).long()  # without a negative: ITM counts the first
    found = held_out_losses(model, batches)
    with torch.no_grad(), seeded(0, torch.device("cpu")):
        first, last = (model(**batch) for batch in batches)
    words = [int(batch["attention_mask"].sum()) - len(batch["input_ids"]) for batch in batches]
    assert words[0] == 8 < words[1]
    itg = (words[0] * first.loss_itg + words[1] * last.loss_itg) / sum(words)
    itc = (4 * first.loss_itc + 3 * last.loss_itc) / 7
    assert found["loss_itg"] == pytest.approx(itg.item(), rel=1e-12)
    assert found["loss_itc"] == pytest.approx(itc.item(), rel=1e-12)
    assert found["loss_itm"] == pytest.approx(first.loss_itm.item(), rel=1e-12)
    assert found["accuracy_itm"] == pytest.approx(first.accuracy_itm.item(), rel=1e-6)
    assert found["loss"] == pytest.approx(sum(found[f"loss_{n}"] for n in ("itc", "itm", "itg")))


def test_itg_of_held_out_data_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).double().eval()
    batch = make_batch(SMALL, 7)
    texts = TokenizedTexts(batch["input_ids"], batch["attention_mask"], torch.arange(7))

    def itg(batch_size):
        batches = caption_batches(batch["image_embeds"].__getitem__, texts, batch_size)
        return held_out_losses(model, batches)["loss_itg"]

    assert [itg(size) for size in (2, 3, 5, 6)] == [pytest.approx(itg(7), rel=1e-12)] * 4


def test_held_out_losses_that_are_not_finite_stay_so():
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).double().eval()
    batches = [make_batch(SMALL, 4, seed=seed) for seed in (0, 1)]
    batches[1]["image_embeds"][2] = torch.nan
    found = held_out_losses(model, batches)
    assert all(math.isnan(found[n]) for n in ("loss", "loss_itc", "loss_itm", "loss_itg"))


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
    similarity = max_query_similarity(*encode_all(model, embeds.__getitem__, NUM_IMAGES, texts))
    scores = rerank(model, embeds.__getitem__, texts, similarity, 2)
    assert full["rerank_t2i_r1"] == retrieval_recall(*scores, texts.image)["t2i_r1"]


def test_texts_refuse_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        TokenizedTexts(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="each of the 2 texts"):
        TokenizedTexts(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_match_scores_of_no_pairs(toy):
    model, embeds, texts = toy
    none = torch.empty(0, dtype=torch.long)
    assert match_logits(model, embeds.__getitem__, texts, (none, none)).shape == (0, 2)
