"""The fused operator on the kernels' own arrays: forward and backward joined by one custom_vjp."""
