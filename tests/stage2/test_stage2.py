"""Stage 2 against transformers' BLIP-2, against the definition, and what must stay frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stage2_models import (
    B,
    Q,
    T,
    V,
    batches,
    images,
    opt_config,
    reference_model,
    stage2_config,
    text_batch,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
)

from blip2fast.stage2.model import Blip2Stage2

KINDS = ["opt", "t5"]


def assert_same_gradients(ours, reference, rtol):
    """Of everything trained; the K bias has none in exact arithmetic, hence the floor."""
    theirs = dict(reference.named_parameters())
    names = list(ours.trainable_state_dict())
    largest = max(p.grad.abs().max() for p in ours.trainable_parameters())
    for name in names:
        twin = theirs[name.replace("ln_vision", "vision_model.post_layernorm")]
        gradient = ours.get_parameter(name).grad
        torch.testing.assert_close(gradient, twin.grad, rtol=rtol, atol=rtol * float(largest))
    assert {"query_tokens", "ln_vision.weight", "language_projection.bias"} <= set(names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_parity_with_transformers(kind, dtype, rtol):
    reference = reference_model(kind, dtype)
    ours_model = Blip2Stage2.from_transformers(copy.deepcopy(reference)).eval()
    ours, theirs = batches(kind)
    want = reference(pixel_values=images(dtype), **theirs)
    want_loss = want.loss
    if kind == "opt" and dtype == torch.float64:  # transformers rounds logits to fp32 for the loss
        shifted = theirs["labels"][:, 1:]
        want_loss = F.cross_entropy(want.logits[:, :-1].flatten(0, 1), shifted.flatten())
        torch.testing.assert_close(want_loss.float(), want.loss, rtol=1e-6, atol=0)
    got = ours_model(images=images(dtype), **ours)
    full = ours_model(images=images(dtype), **ours, return_logits=True)

    torch.testing.assert_close(got.loss, want_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(full.loss, want_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(full.logits, want.logits, rtol=rtol, atol=rtol)
    torch.testing.assert_close(got.query_output, want.qformer_outputs[0], rtol=rtol, atol=rtol)
    assert got.logits is None

    want_loss.backward()
    got.loss.backward()
    assert_same_gradients(ours_model, reference, rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_definition(kind):
    """One sample at a time, one token at a time, from the language model's own embeddings."""
    reference = reference_model(kind)
    model = Blip2Stage2.from_transformers(reference).eval()
    ours, _ = batches(kind)
    out = model(images=images(), **ours)
    language_model, losses = model.language_model, []
    for b in range(B):
        length = int(ours["attention_mask"][b].sum())
        text = language_model.get_input_embeddings()(ours["input_ids"][b, :length])
        read = torch.cat([out.prompts[b], text])
        for t, label in enumerate(ours["labels"][b].tolist()):
            if label == -100:
                continue
            if kind == "opt":
                logits = language_model(inputs_embeds=read[None, : Q + t]).logits[0, -1]
            else:
                before = [0, *ours["labels"][b, :t].tolist()]
                logits = language_model(
                    inputs_embeds=read[None], decoder_input_ids=torch.tensor([before])
                ).logits[0, -1]
            losses.append(logits.logsumexp(0) - logits[label])
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_stays_frozen(kind):
    model = Blip2Stage2.from_transformers(reference_model(kind, torch.float32))
    before = copy.deepcopy(model.language_model.state_dict())
    encoder_before = copy.deepcopy(model.image_encoder.state_dict())
    trained_before = copy.deepcopy(model.trainable_state_dict())
    model.train()
    assert model.qformer.training
    assert not any(m.training for m in model.language_model.modules())
    assert not any(m.training for m in model.image_encoder.modules())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ours, _ = batches(kind)
    model(images=images(torch.float32), **ours).loss.backward()
    optimiser.step()

    for module, state in ((model.language_model, before), (model.image_encoder, encoder_before)):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    changed = model.trainable_state_dict()
    assert all(not torch.equal(changed[name], trained_before[name]) for name in changed)


def test_language_model_has_no_dropout():
    """Only the Q-Former drops out; without its dropout two training passes are equal."""
    model = Blip2Stage2.from_transformers(reference_model("opt")).train()
    ours, _ = batches("opt")
    losses = {model(images=images(), **ours).loss.item() for _ in range(2)}
    assert len(losses) == 2
    model.qformer.eval()
    losses = {model(images=images(), **ours).loss.item() for _ in range(2)}
    assert len(losses) == 1


def test_frozen_from_the_start():
    """Parts that come in training mode, as a new module does, leave it when they are taken."""
    language_model, encoder = OPTForCausalLM(opt_config()).train(), torch.nn.Conv2d(3, 24, 8)
    model = Blip2Stage2(stage2_config(), language_model, encoder)
    assert model.qformer.training
    assert not any(m.training for m in [*language_model.modules(), *encoder.modules()])
    assert not any(p.requires_grad for p in [*language_model.parameters(), *encoder.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_head_sees_label_rows_only(kind):
    model = Blip2Stage2.from_transformers(reference_model(kind)).eval()
    ours, _ = batches(kind)
    seen = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    model(images=images(), **ours)
    assert seen == [(1, int((ours["labels"] != -100).sum()), V)]
    model(images=images(), **ours, return_logits=True)
    assert seen[1] == (B, T if kind == "t5" else Q + T, V)


def causal_models():
    sizes = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 2}
    yield OPTForCausalLM(opt_config(hidden_size=24, do_layer_norm_before=False))  # as OPT-350m
    yield LlamaForCausalLM(
        LlamaConfig(**sizes, hidden_size=20, intermediate_size=24, max_position_embeddings=32)
    )
    yield GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=20,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


@pytest.mark.parametrize("number", range(3))
def test_other_causal_models(number):
    """Any AutoModelForCausalLM: loss on label rows equals the loss of the full logits."""
    torch.manual_seed(0)
    language_model = list(causal_models())[number].double()
    config = stage2_config()
    model = Blip2Stage2(config, language_model).double().eval()
    ours, _ = batches("opt")
    embeds = torch.randn(B, 5, 24, dtype=torch.float64)
    got = model(embeds, **ours)
    full = model(embeds, **ours, return_logits=True)
    ignored = torch.full((B, Q), -100)
    labels = torch.cat([ignored, ours["labels"]], dim=1)[:, 1:]
    want = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    assert got.prompts.shape == (B, Q, 20)
    written = model.generate(embeds, max_new_tokens=3, eos_token_id=V, pad_token_id=0)
    assert written.shape == (B, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_language_model_in_half_precision(dtype):
    """An fp32 trained part on a half-precision language model: fp32 loss and gradients."""
    torch.manual_seed(0)
    language_model = OPTForCausalLM(opt_config())
    model = Blip2Stage2(stage2_config(), language_model).eval()
    ours, _ = batches("opt")
    embeds = torch.randn(B, 5, 24)
    want = model(embeds, **ours).loss
    language_model.to(dtype)
    got = model(embeds.to(dtype), **ours).loss
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    assert model.query_tokens.grad.dtype == torch.float32
    assert model.query_tokens.grad.abs().sum() > 0


def test_image_mask_hides_tokens():
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    ours, _ = batches("opt")
    embeds = torch.randn(B, 5, 24, dtype=torch.float64)
    mask = torch.ones(B, 5, dtype=torch.long)
    mask[:, 3:] = 0
    got = model(embeds, **ours, image_attention_mask=mask).loss
    torch.testing.assert_close(got, model(embeds[:, :3], **ours).loss, rtol=1e-10, atol=0)


def test_padding_changes_nothing():
    """What stands at padded places, and how many there are, does not matter."""
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    ours, _ = batches("opt")
    want = model(images=images(), **ours).loss
    ids = ours["input_ids"].masked_fill(ours["attention_mask"] == 0, 17)
    longer = {
        "input_ids": F.pad(ids, (0, 2), value=5),
        "attention_mask": F.pad(ours["attention_mask"], (0, 2)),
        "labels": F.pad(ours["labels"], (0, 2), value=-100),
    }
    torch.testing.assert_close(model(images=images(), **longer).loss, want, rtol=1e-10, atol=0)


def test_default_labels_are_the_text_without_padding():
    model = Blip2Stage2.from_transformers(reference_model("opt")).eval()
    ids, mask = text_batch()
    inputs = {"images": images(), "input_ids": ids, "attention_mask": mask}
    given = model(**inputs, labels=ids.masked_fill(mask == 0, -100)).loss
    assert torch.equal(model(**inputs).loss, given)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind):
    """Twice the layer passes, the same gradients; also after a copy, and while generating."""
    plain = Blip2Stage2.from_transformers(reference_model(kind)).train()
    plain.qformer.eval()  # its dropout would differ between the two models
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()
    model = copy.deepcopy(model)
    passes = []
    layers = [m for n, m in model.language_model.named_modules() if n.endswith(("q_proj", ".q"))]
    for layer in layers:
        layer.register_forward_hook(lambda *_: passes.append(1))
    ours, _ = batches(kind)
    plain(images=images(), **ours).loss.backward()
    model(images=images(), **ours).loss.backward()
    assert len(passes) == 2 * len(layers) > 0
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name
    settings = {"images": images(), "input_ids": ours["input_ids"], "max_new_tokens": 3}
    assert torch.equal(model.generate(**settings), plain.generate(**settings))


def test_gradient_checkpointing_needs_layers():
    language_model = OPTForCausalLM(opt_config(num_hidden_layers=0))
    model = Blip2Stage2(stage2_config(), language_model)
    with pytest.raises(ValueError, match="OPTForCausalLM has no layers that support gradient"):
        model.gradient_checkpointing_enable()


def test_soft_prompts_start_at_the_size_of_the_embeddings():
    torch.manual_seed(0)
    language_model = OPTForCausalLM(opt_config())
    spread = language_model.get_input_embeddings().weight.detach().std()
    prompts = {}
    for matched in (False, True):
        config = stage2_config(match_embedding_scale=matched)
        model = Blip2Stage2(config, language_model)
        tokens = torch.randn(64, 5, config.encoder_hidden_size)
        prompts[matched] = model.encode_image(tokens)[0].detach().std()
    assert 0.7 < float(prompts[True] / spread) < 1.4
    assert float(prompts[False] / spread) > 3
