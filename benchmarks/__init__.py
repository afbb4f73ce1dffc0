"""Scripts that measure against a baseline in the same run and print a table."""
