"""Beyond the paper: whitening, sampled softmax, learned scales and distillation. All off by default."""
