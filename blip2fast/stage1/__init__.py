"""Stage 1: the Q-Former learns from image-text pairs."""
