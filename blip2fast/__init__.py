"""BLIP-2, fast: the Q-Former between a frozen image encoder and a frozen LLM."""

__version__ = "0.1.0.dev0"
