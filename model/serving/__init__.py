"""Serving one size of a trained run: an export's folder, the engines that run it, the Recommender that answers."""
