"""In-batch image-text similarity, its softmax statistics and its hard negatives."""
