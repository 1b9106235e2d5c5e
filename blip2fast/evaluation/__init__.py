"""Evaluation of trained models: losses, retrieval, matching, captions and answers."""
