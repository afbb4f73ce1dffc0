"""Figures of the README and the report, and the code that draws the README's."""
