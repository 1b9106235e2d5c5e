"""Stage-1 weights from transformers: BERT, which BLIP-2 starts from, and BLIP-2 retrieval.

For LAVIS checkpoints, see `Blip2Stage1.from_lavis_state_dict`.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor
from transformers import BertForMaskedLM, Blip2Config, Blip2ForImageTextRetrieval

from blip2fast.frozen.local_models import not_found
from blip2fast.qformer.checks import check_state
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1

# (transformers' BERT prefix, our prefix); the first match is used
_BERT_PREFIXES = (
    ("bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("bert.embeddings.", "embeddings."),
    ("bert.encoder.", "qformer.encoder."),
    ("cls.predictions.", "lm_head."),
)

# not used by the Q-Former; the decoder is tied to the word embeddings
_BERT_IGNORED = (
    "bert.embeddings.token_type_embeddings.",
    "bert.embeddings.position_ids",
    "bert.pooler.",
    "cls.predictions.decoder.",
)


def initialise_from_bert(
    model: Blip2Stage1, bert: BertForMaskedLM | str | os.PathLike[str]
) -> None:
    """Initialise the Q-Former from BERT, as BLIP-2 does (arXiv 2301.12597, section 3.1).

    Embeddings, self-attention, feed-forward layers and generation head are loaded from BERT. The
    query feed-forward layers are copies of the text ones. Cross-attention, queries, the other heads
    and word embeddings that BERT lacks ([DEC]) are unchanged. BERT's token type and pooler weights
    are not used.

    Args:
        model: Modified in place.
        bert: The model, or a folder or hub name, for example `"bert-base-uncased"`.

    Raises:
        ValueError: not found, or sizes differ (lists the tensors with both shapes).
    """
    if not isinstance(bert, BertForMaskedLM):
        try:
            bert = BertForMaskedLM.from_pretrained(bert)
        except OSError as error:
            raise ValueError(not_found("BERT", bert, error)) from error
    own = model.state_dict()
    loaded = _rename_bert(bert.state_dict(), own)
    expected = {
        name: value
        for name, value in own.items()
        if name.startswith(("embeddings.", "lm_head.", "qformer."))
        and "crossattention" not in name
        and "_query." not in name
    }
    check_state("BERT", loaded, expected)
    queries = {name: loaded[name.replace("_query.", ".")] for name in own if "_query." in name}
    model.load_state_dict(loaded | queries, strict=False)


def _rename_bert(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith(_BERT_IGNORED):
            continue
        for theirs, ours in _BERT_PREFIXES:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        name = re.sub(r"\.attention\.self\.", ".attention.attention.", name)
        if name in ("embeddings.word_embeddings.weight", "lm_head.bias"):
            value = torch.cat([value, own[name][len(value) :].to(value)])
        renamed[name] = value
    return renamed


def stage1_from_retrieval(model: Blip2ForImageTextRetrieval) -> Blip2Stage1:
    """Convert transformers' retrieval model to a stage-1 model; the weights are copied.

    The retrieval checkpoint has no temperature and no generation head, so these are re-initialised.
    `ln_vision` is the vision model's `post_layernorm`, with the epsilon of the vision config.

    Args:
        model: For example `Salesforce/blip2-itm-vit-g`.

    Returns:
        A model without image encoder, to be called with `image_embeds`.

    Raises:
        ValueError: the Q-Former is not supported by this package.
    """
    config = config_from_retrieval(model.config)
    stage1 = Blip2Stage1(config)
    theirs = {
        name.replace("vision_model.post_layernorm.", "ln_vision."): value
        for name, value in model.state_dict().items()
    }
    own = stage1.state_dict()
    expected = {k: v for k, v in own.items() if not k.startswith("lm_head.") and k != "temp"}
    loaded = {name: value for name, value in theirs.items() if name in expected}
    check_state(type(model).__name__, loaded, expected)
    stage1.to(model.query_tokens.dtype)
    stage1.load_state_dict(loaded, strict=False)
    return stage1


def config_from_retrieval(config: Blip2Config) -> Stage1Config:
    """The sizes of transformers' retrieval model.

    Raises:
        ValueError: the Q-Former is not supported by this package.
    """
    q = config.qformer_config
    if q.hidden_act != "gelu":
        raise ValueError(f"qformer_config.hidden_act: expected 'gelu', got {q.hidden_act!r}")
    return Stage1Config(
        hidden_size=q.hidden_size,
        num_hidden_layers=q.num_hidden_layers,
        num_attention_heads=q.num_attention_heads,
        intermediate_size=q.intermediate_size,
        encoder_hidden_size=q.encoder_hidden_size,
        num_query_tokens=config.num_query_tokens,
        vocab_size=q.vocab_size,
        max_position_embeddings=q.max_position_embeddings,
        bos_token_id=q.vocab_size - 1,
        pad_token_id=q.pad_token_id,
        embed_dim=config.image_text_hidden_size,
        cross_attention_frequency=q.cross_attention_frequency,
        layer_norm_eps=q.layer_norm_eps,
        ln_vision_eps=config.vision_config.layer_norm_eps,
        hidden_dropout_prob=q.hidden_dropout_prob,
        attention_probs_dropout_prob=q.attention_probs_dropout_prob,
        initializer_range=q.initializer_range,
    )
