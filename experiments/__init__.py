"""What was run: the kept files of runs (results/), and RESULTS.md made from them."""
