"""Scripts that print tables of measured times against a baseline measured in the same run."""
