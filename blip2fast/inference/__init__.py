"""Captions, answers and conversations with a trained model."""
