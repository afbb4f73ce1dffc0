"""Scripts that print a table of measured times, against a baseline measured in the same run."""
