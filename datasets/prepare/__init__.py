"""Raw files of every kind to the layout of datasets/catalog.py: `python -m datasets.prepare`."""
