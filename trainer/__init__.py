"""The step, the loop, evaluation, metrics, run folders, checkpoints, the log and plots."""
