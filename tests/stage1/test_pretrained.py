"""Starting stage 1 from transformers' BERT and from its retrieval model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage1_cases import SMALL
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    OPTConfig,
)

from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import initialise_from_bert, stage1_from_retrieval


def make_bert(**changes: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": SMALL.vocab_size - 1,  # without [DEC]
        "hidden_size": SMALL.hidden_size,
        "num_hidden_layers": SMALL.num_hidden_layers,
        "num_attention_heads": SMALL.num_attention_heads,
        "intermediate_size": SMALL.intermediate_size,
        "max_position_embeddings": SMALL.max_position_embeddings,
    }
    config = BertConfig(**{**sizes, **changes}, layer_norm_eps=1e-12, initializer_range=0.2)
    return BertForMaskedLM(config).eval()


def test_text_alone_is_bert(tmp_path: Path, small_batch: dict[str, Tensor]) -> None:
    """Without an image, the Q-Former is BERT but for its token types, which are zero here."""
    bert = make_bert()
    torch.nn.init.zeros_(bert.bert.embeddings.token_type_embeddings.weight)
    bert.save_pretrained(tmp_path)
    model = Blip2Stage1(SMALL).eval()
    new_row = model.embeddings.word_embeddings.weight[-1].clone()
    initialise_from_bert(model, tmp_path)

    ids, mask = small_batch["input_ids"], small_batch["attention_mask"]
    with torch.no_grad():
        truth = bert(ids, attention_mask=mask)
        hidden = bert.bert(ids, attention_mask=mask).last_hidden_state
        states = model.qformer(
            query_embeds=model.embeddings(ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        scores = model.lm_head(states, model.embeddings.word_embeddings.weight)
    real = mask.bool()
    torch.testing.assert_close(states[real], hidden[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[..., :-1][real], truth.logits[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embeddings.word_embeddings.weight[-1], new_row)
    for layer in model.qformer.encoder.layer:
        assert torch.equal(layer.intermediate.dense.weight, layer.intermediate_query.dense.weight)


def test_bert_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BERT does not fit.*expected \(48,\), got \(40,\)"):
        initialise_from_bert(Blip2Stage1(SMALL), make_bert(intermediate_size=40))
    with pytest.raises(ValueError, match=r"qformer\.encoder\.layer\.2\S+: missing"):
        initialise_from_bert(Blip2Stage1(SMALL), make_bert(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"qformer\.encoder\.layer\.3\S+: unknown"):
        initialise_from_bert(Blip2Stage1(SMALL), make_bert(num_hidden_layers=4))


def test_bert_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"BERT 'no/such/folder': not found: give a local"):
        initialise_from_bert(Blip2Stage1(SMALL), "no/such/folder")


def test_retrieval_model_gives_the_same_scores(small_batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=SMALL.encoder_hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=12,
        patch_size=6,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=replace(SMALL).qformer_config().to_dict(),
        text_config=OPTConfig(hidden_size=16, num_attention_heads=2).to_dict(),
        num_query_tokens=SMALL.num_query_tokens,
        image_text_hidden_size=SMALL.embed_dim,
        image_token_index=None,
    )
    theirs = Blip2ForImageTextRetrieval(config).double().eval()
    torch.nn.init.normal_(theirs.query_tokens)
    torch.nn.init.normal_(theirs.vision_model.post_layernorm.weight)
    ours = stage1_from_retrieval(theirs).eval()

    pixels = torch.randn(6, 3, 12, 12, dtype=torch.float64)
    text = {name: small_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        captured = {}
        theirs.vision_model.post_layernorm.register_forward_pre_hook(
            lambda module, args: captured.setdefault("tokens", args[0])
        )
        itc = theirs(pixels, **text, use_image_text_matching_head=False)
        itm = theirs(pixels, **text, use_image_text_matching_head=True)
        features, _ = ours.encode_image(captured["tokens"])
        texts = ours.encode_text(**text)
        similarity = torch.einsum("iqd,jd->ijq", features, texts).amax(-1)
        match = ours.match(captured["tokens"], **text)
    torch.testing.assert_close(similarity, itc.logits_per_image, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(match, itm.logits_per_image, rtol=1e-10, atol=1e-10)
