"""Prepared datasets, the demo dataset and cached features.

Import nothing here: Hugging Face's library has the same name, and its users may import this package by accident.
"""
