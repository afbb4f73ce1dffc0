"""Beyond the paper: whitening, sampled softmax, scales and distillation. All off by default."""
