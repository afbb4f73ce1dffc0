"""The paper: the fMRLRec operator, the LRU, the recommender, its loss, and slicing. Needs torch alone."""

from model.fmrlrec import FMRLRec, count_parameters, slice_model
from model.loss import matryoshka_cross_entropy

__all__ = ["FMRLRec", "count_parameters", "matryoshka_cross_entropy", "slice_model"]
