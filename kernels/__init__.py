"""The kernels: CUDA sources, their CPU build, and what compiles, loads and launches them."""
