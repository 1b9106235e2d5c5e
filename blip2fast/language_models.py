"""Language models of transformers, whole, by folder or hub name."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel


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
        raise ValueError(
            f"language model {name!r}: not there: give a local folder or a hub name that can be "
            f"reached ({error})"
        ) from error
