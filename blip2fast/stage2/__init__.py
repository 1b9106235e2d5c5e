"""Stage 2: images as soft prompts of a frozen language model."""
