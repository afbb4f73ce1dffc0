"""After training: export a size of a run, and serve it."""

from serving.recommender import Recommender

__all__ = ["Recommender"]
