"""The language model's own dropout: off, or as LAVIS trains, and never outside training."""

import copy

import pytest
import torch
from stage2_models import PAD, B, batches, opt_config, stage2_config, t5_config
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from blip2fast.stage2.model import Blip2Stage2

KINDS = ["opt", "t5"]


def stage2(kind, **settings):
    """Nothing but the language model drops out."""
    torch.manual_seed(0)
    if kind == "opt":
        language_model = OPTForCausalLM(opt_config(attention_dropout=0.1))
    else:
        language_model = T5ForConditionalGeneration(t5_config())
    config = stage2_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)
    return Blip2Stage2(config, language_model)


def losses(model, kind, times=4):
    ours, _ = batches(kind)
    embeds = torch.randn(B, 5, 24, generator=torch.Generator().manual_seed(1))
    return [model(embeds, **ours).loss for _ in range(times)]


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_and_with_the_flag_alone(kind):
    for flag, training, different in (
        (False, True, 1),
        (False, False, 1),
        (True, False, 1),
        (True, True, 4),
    ):
        model = stage2(kind, llm_dropout=flag).train(training)
        assert len({x.item() for x in losses(model, kind)}) == different, (flag, training)
        assert any(m.training for m in model.language_model.modules()) == (flag and training)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_language_model_s_own_in_training_mode(kind):
    """As in LAVIS: the same random numbers, the same loss as the model's own forward."""
    model = stage2(kind, llm_dropout=True).train()
    ours, _ = batches(kind)
    embeds = torch.randn(B, 5, 24)
    torch.manual_seed(7)
    got = model(embeds, **ours).loss
    prompts, _ = model.encode_image(embeds)
    text = model.language_model.get_input_embeddings()(ours["input_ids"])
    inputs = {
        "inputs_embeds": torch.cat([prompts, text], dim=1),
        "attention_mask": torch.cat([torch.ones(B, prompts.shape[1]), ours["attention_mask"]], 1),
    }
    labels = ours["labels"]
    if kind == "opt":
        labels = torch.cat([torch.full(prompts.shape[:2], -100), labels], dim=1)
    assert model.language_model.training
    torch.manual_seed(7)
    want = model.language_model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_start_and_frozen(kind):
    model = stage2(kind, llm_dropout=True)
    assert model.training
    assert model.language_model.training
    before = copy.deepcopy(model.language_model.state_dict())
    losses(model, kind, 1)[0].backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    state = model.language_model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_never_while_writing(kind):
    """In the middle of a training too, and the mode is what it was afterwards."""
    model = stage2(kind, llm_dropout=True).train()
    embeds = torch.randn(B, 5, 24)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    written = [model.generate(embeds, **settings) for _ in range(3)]
    assert model.language_model.training
    model.eval()
    assert all(torch.equal(each, model.generate(embeds, **settings)) for each in written)
    assert not model.language_model.training


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_drop_out_the_same_twice(kind):
    """Gradients of a checkpointed pass are those of the pass itself: the masks are drawn again."""
    plain = stage2(kind, llm_dropout=True).train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable()
    gradients = []
    for each in (plain, model):
        torch.manual_seed(3)
        losses(each, kind, 1)[0].backward()
        gradients.append(each.query_tokens.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
