"""Records, images and texts of a run, and the batches made of them."""
