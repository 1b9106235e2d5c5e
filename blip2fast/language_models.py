"""Language models of transformers, whole, by folder or hub name."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from blip2fast.hub_names import not_there


def load_language_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, by folder or hub name.

    Raises:
        ValueError: not there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(not_there("language model", name, error)) from error
