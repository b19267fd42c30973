"""Kernels: each operation defined in plain torch and implemented in Triton. Knows nothing of timm, inversion or files."""
