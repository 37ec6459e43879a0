"""The divergences and their gradients, dense, sparse and fused; truth, kernels."""
