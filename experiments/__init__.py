"""Experiments: definitions of runs to compare, the runner, kept results, and the report."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MEDIA = Path(__file__).parent.parent / "media"  # figures
