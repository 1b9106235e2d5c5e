"""Trained models and checkpoints of runs on disk."""
