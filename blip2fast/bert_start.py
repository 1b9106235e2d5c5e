"""Start a stage-1 model from BERT: text weights copied, cross-attention and queries left random.

Paper, section 3.1. The published recipe uses bert-base-uncased with its masked-word head.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import BertForMaskedLM

from blip2fast.stage1 import Blip2Stage1

_RENAMED = (
    (r"^bert\.embeddings\.(word|position)_embeddings\.", r"embeddings.\1_embeddings."),
    (r"^bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"^bert\.encoder\.layer\.(\d+)\.attention\.self\.",
        r"qformer.encoder.layer.\1.attention.attention.",
    ),
    (r"^bert\.encoder\.", "qformer.encoder."),
    (r"^cls\.predictions\.transform\.", "lm_head.transform."),
    (r"^cls\.predictions\.bias$", "lm_head.bias"),
)
# Token types, which the Q-Former has none of, and the tied output embedding.
_LEFT_OUT = ("bert.embeddings.token_type_embeddings.", "cls.predictions.decoder.", "bert.pooler.")


def start_from_bert(model: Blip2Stage1, name: str) -> None:
    """Copy BERT's weights into ``model``, the query feed-forward layers included.

    Words beyond BERT's vocabulary ([DEC]) keep their random start.

    Args:
        model: of BERT's hidden size and number of layers or fewer.
        name: folder or hub name.

    Raises:
        ValueError: not there, or of other sizes.
    """
    try:
        bert = BertForMaskedLM.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"model.bert {name!r}: not there: give a local folder or a hub name that can be "
            f"reached ({error})"
        ) from error
    own = dict(model.named_parameters())
    for bert_name, value in bert.state_dict().items():
        target = _own_name(bert_name)
        if target is None:
            continue
        _copy(own, target, value, name)
        query_branch = re.sub(r"(layer\.\d+\.)(intermediate|output)\.", r"\1\2_query.", target)
        if query_branch != target:
            _copy(own, query_branch, value, name)


def _own_name(bert_name: str) -> str | None:
    if bert_name.startswith(_LEFT_OUT) or bert_name.endswith("position_ids"):
        return None
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(pattern, replacement, bert_name)
        if count:
            return renamed
    raise ValueError(f"BERT's {bert_name!r} has no place in the Q-Former")


def _copy(own: dict[str, torch.nn.Parameter], target: str, value: Tensor, source: str) -> None:
    if target not in own:
        raise ValueError(f"model.bert {source!r} has {target}, this model does not: fewer layers?")
    parameter = own[target]
    rows_fit = (
        len(value) <= len(parameter)
        if "word" in target or target == "lm_head.bias"
        else (len(value) == len(parameter))
    )
    if not rows_fit or value.shape[1:] != parameter.shape[1:]:
        raise ValueError(
            f"model.bert {source!r}: {target} has shape {tuple(value.shape)}, this model's is "
            f"{tuple(parameter.shape)}"
        )
    with torch.no_grad():
        parameter[: len(value)] = value
