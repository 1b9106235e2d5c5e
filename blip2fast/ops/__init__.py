"""The fused ops, one file each: check, choose a backend, register with PyTorch."""
