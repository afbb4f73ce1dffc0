"""The paper: the fMRLRec operator, the LRU, the recommender, its loss, and slicing (torch alone); and serving what was
trained: `Recommender`, which needs no torch where an export has ONNX graphs.

Names are imported when they are used, so that a server without torch can import its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.fmrlrec import FMRLRec, ModelSettings, count_parameters
    from model.loss import matryoshka_cross_entropy
    from model.serving.recommender import Recommender
    from model.slicing import slice_model

_HOME = {
    "FMRLRec": "model.fmrlrec",
    "ModelSettings": "model.fmrlrec",
    "Recommender": "model.serving.recommender",
    "count_parameters": "model.fmrlrec",
    "matryoshka_cross_entropy": "model.loss",
    "slice_model": "model.slicing",
}

__all__ = ["FMRLRec", "ModelSettings", "Recommender", "count_parameters", "matryoshka_cross_entropy", "slice_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
