"""Frozen image encoders and language models, and their identity."""
