"""The contrastive loss: its op, and the sweep over all pairs behind it."""
