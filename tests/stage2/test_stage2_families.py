"""Any language model by path: each family against a call of its own on `inputs_embeds`.

A family may scale its embeddings (Gemma, Granite, BART), cap or scale its logits after the head
(Gemma 2, Granite, Cohere), add a bias there (BART), or look back a few positions only (Gemma 2).
"""

import pytest
import torch
import torch.nn.functional as F
from stage2_models import PAD, B, Q, T, V, opt_config, stage2_config, t5_config, text_batch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MT5Config,
    OPTForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from blip2fast.frozen.language_models import load_language_model
from blip2fast.stage2 import language_model as stage2_llm
from blip2fast.stage2.model import Blip2Stage2

SIZES = {
    "vocab_size": V,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 10}
NARROW = {"sliding_window": 4}
CAUSAL = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=1),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED),
    "gemma2": lambda: Gemma2Config(**GROUPED, **NARROW, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, **NARROW),
    "granite": lambda: GraniteConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=0.2),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=4.0),
    "cohere2": lambda: Cohere2Config(**SIZES, **NARROW, logit_scale=4.0),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}
SEQ2SEQ = {
    "bart": lambda: BartConfig(
        vocab_size=V,
        d_model=20,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        scale_embedding=True,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    ),
    "mt5": lambda: MT5Config(**{**t5_config().to_dict(), "model_type": "mt5"}),
}
FAMILIES = [*CAUSAL, *SEQ2SEQ]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Written to disk with weights far from 0, and loaded by its path as a run does."""
    kind = request.param
    auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    written = auto.from_config((CAUSAL | SEQ2SEQ)[kind]())
    for name, parameter in written.named_parameters():
        if parameter.dim() > 1:  # attention that outweighs the embeddings, to write varied text
            embeds = "embed_tokens" in name or "embed_in" in name or "shared" in name
            small = 0.2 if embeds else 0.1
            nn.init.normal_(parameter, std=small if embeds or name.endswith(".q.weight") else 0.8)
    if kind == "bart":
        nn.init.normal_(written.final_logits_bias, std=0.5)
    folder = tmp_path_factory.mktemp(kind)
    written.save_pretrained(folder)
    # Gemma 2 turns float64's lowest number, its mask, into -inf before an fp32 softmax
    dtype = torch.float32 if kind == "gemma2" else torch.float64
    loaded = load_language_model(str(folder), dtype)
    model = Blip2Stage2(stage2_config(), loaded).to(dtype).eval()
    nn.init.normal_(model.language_projection.weight, std=0.3)
    return kind, model


def image_embeds(count=B):
    return torch.randn(count, 5, 24, generator=torch.Generator().manual_seed(3))


def losses_by_hand(model, prompts, ids, mask, labels):
    """Sample by sample without padding, from the family's own logits of all positions."""
    language_model, losses = model.language_model, []
    for b in range(B):
        text = language_model.get_input_embeddings()(ids[b : b + 1, mask[b] == 1])
        read = torch.cat([prompts[b : b + 1], text], dim=1)
        if language_model.config.is_encoder_decoder:
            before = language_model.prepare_decoder_input_ids_from_labels(labels[b : b + 1])
            logits = language_model(inputs_embeds=read, decoder_input_ids=before).logits[0]
            target = labels[b]
        else:
            logits = language_model(inputs_embeds=read).logits[0, Q - 1 : -1]
            target = labels[b, mask[b] == 1]
        losses.append(F.cross_entropy(logits, target, ignore_index=-100, reduction="none"))
    return torch.cat(losses).sum() / (labels != -100).sum()


def batch(kind):
    ids, mask = text_batch()
    labels = ids.masked_fill(mask == 0, -100)
    if kind in CAUSAL:
        labels[:, 0] = -100
    return ids, mask, labels


def test_loss_and_gradients(family):
    """Of a padded batch, head on label rows only, against unpadded samples and all logits."""
    kind, model = family
    ids, mask, labels = batch(kind)
    seen = []
    head = model.language_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:2]))
    out = model(image_embeds(), ids, mask, labels)
    handle.remove()
    assert seen == [(1, int((labels != -100).sum()))]
    got = torch.autograd.grad(out.loss, [out.prompts, *model.trainable_parameters()])

    prompts, _ = model.encode_image(image_embeds())
    loss = losses_by_hand(model, prompts, ids, mask, labels)
    want = torch.autograd.grad(loss, [prompts, *model.trainable_parameters()])
    # transformers keeps some steps (norms, rotary tables) in fp32 whatever the weights are
    rtol = 1e-6 if prompts.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.loss, loss, rtol=rtol, atol=0)
    assert float(want[0].abs().max()) > 1e-4
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        largest = max(float(x.abs().max()) for x in (want[:1] if i == 0 else want[1:]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * rtol * largest)
    full = model(image_embeds(), ids, mask, labels, return_logits=True)
    torch.testing.assert_close(full.loss, out.loss, rtol=rtol, atol=0)


def test_text_embeddings_are_what_the_family_reads(family):
    """`get_input_embeddings()` of ids is, as `inputs_embeds`, what `input_ids` alone would be."""
    kind, model = family
    ids, mask, _ = batch(kind)
    language_model, ids = model.language_model, ids[mask.sum(1) == T]
    embeds = language_model.get_input_embeddings()(ids)
    decoder = {"decoder_input_ids": ids} if kind in SEQ2SEQ else {}
    want = language_model(input_ids=ids, **decoder).logits
    assert torch.equal(language_model(inputs_embeds=embeds, **decoder).logits, want)


def test_greedy_with_cache_equals_full_passes(family):
    """Token by token by hand, without a cache; the batch has texts of 7, 4 and 2 tokens."""
    kind, model = family
    ids, mask, _ = batch(kind)
    settings = {"max_new_tokens": 6, "eos_token_id": V, "pad_token_id": PAD, "do_sample": False}
    written = model.generate(image_embeds(), ids, mask, **settings)
    assert written.shape == (B, 6)
    # not one word whatever it reads; a random BART repeats itself, but not across images
    assert len(written.unique()) > (2 if kind == "bart" else 3)
    prompts, _ = model.encode_image(image_embeds())
    language_model = model.language_model
    for b in range(B):
        embed = language_model.get_input_embeddings()
        read = torch.cat([prompts[b : b + 1], embed(ids[b : b + 1, mask[b] == 1])], dim=1)
        before = None
        if kind in SEQ2SEQ:
            before = torch.tensor([[language_model.config.decoder_start_token_id]])
        for step in range(6):
            if before is None:
                logits = language_model(inputs_embeds=read, use_cache=False).logits
            else:
                logits = language_model(inputs_embeds=read, decoder_input_ids=before).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            assert token.item() == written[b, step], (b, step)
            if before is None:
                read = torch.cat([read, embed(token)], dim=1)
            else:
                before = torch.cat([before, token], dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_single_calls(family, side):
    kind, model = family
    ids, mask, _ = batch(kind)
    settings = {"max_new_tokens": 8, "eos_token_id": V, "pad_token_id": PAD, "num_beams": 2}
    if side == "left":
        order = mask.argsort(dim=1, stable=True)
        padded, padded_mask = ids.gather(1, order), mask.gather(1, order)
    else:
        padded, padded_mask = ids, mask
    together = model.generate(image_embeds(), padded, padded_mask, **settings)
    for b in range(B):
        alone = image_embeds()[b : b + 1], ids[b : b + 1, mask[b] == 1]
        assert torch.equal(model.generate(*alone, **settings)[0], together[b]), b


def test_soft_prompts_match_scaled_embeddings(family):
    """As large as what the model reads for a token, where the embedding module scales it."""
    _, model = family
    language_model = model.language_model
    config = stage2_config(match_embedding_scale=True)
    torch.manual_seed(0)
    started = Blip2Stage2(config, language_model)
    prompts = started.encode_image(torch.randn(64, 5, 24))[0].std().detach()
    read = language_model.get_input_embeddings()(torch.arange(4, V)).std().detach()
    assert 0.7 < float(prompts / read) < 1.4


def test_a_head_called_in_parts_runs_in_full():
    """The rows are cut from its output then, and no part is taken for the whole."""
    torch.manual_seed(0)
    language_model = OPTForCausalLM(opt_config()).eval()
    ids, mask = text_batch()
    embeds = language_model.get_input_embeddings()(ids)
    rows = torch.tensor([0, 5, 9, 13, 20])
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    whole = language_model(**inputs).logits.flatten(0, 1)[rows]
    language_model.forward = lambda **given: _parts_only(language_model, given)
    torch.testing.assert_close(
        stage2_llm.logits_on_rows(language_model, rows, **inputs), whole, rtol=1e-6, atol=1e-6
    )


def _parts_only(language_model, inputs):
    states = language_model.model(**inputs, return_dict=True).last_hidden_state
    parts = [language_model.lm_head(part) for part in states.split(5, dim=1)]
    return type("Output", (), {"logits": torch.cat(parts, dim=1)})
