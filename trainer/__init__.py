"""The step, the average of the weights, the loop, evaluation, metrics, run folders, checkpoints, the log and plots."""
