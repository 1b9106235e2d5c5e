"""Self- and cross-attention of the Q-Former."""
