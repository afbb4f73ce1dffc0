"""The paper: the fMRLRec operator, the LRU, the recommender, its loss, and slicing. Needs torch alone.

MODELS holds the models by name: `--model_code` is a key of it. A new model is a line in it and one in
config.MODEL_PRESETS.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from config import ModelSettings
from model.base import CountingModel, SequenceModel
from model.baselines.counting import ItemKNN, Popularity
from model.baselines.gru4rec import GRU4Rec
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from model.extensions.item_table import Whitening
from model.fmrlrec import FMRLRec, count_parameters, slice_model
from model.loss import matryoshka_cross_entropy

__all__ = [
    "MODELS",
    "FMRLRec",
    "Model",
    "build_model",
    "count_parameters",
    "matryoshka_cross_entropy",
    "slice_model",
]

Model = SequenceModel | CountingModel

# Each takes (num_items, features [N, F] of every encoder, settings).
MODELS: dict[str, Callable[[int, list[Tensor], ModelSettings], Model]] = {
    "fmrlrec": lambda num_items, features, settings: FMRLRec(num_items, features or None, settings),
    "sasrec": lambda num_items, _, settings: SASRec(num_items, settings),
    "lrurec": lambda num_items, _, settings: LRURec(num_items, settings),
    "gru4rec": lambda num_items, _, settings: GRU4Rec(num_items, settings),
    "popularity": lambda num_items, _, settings: Popularity(num_items),
    "itemknn": lambda num_items, _, settings: ItemKNN(num_items),
}


def build_model(num_items: int, features: Sequence[Tensor], settings: ModelSettings, fit: bool = True) -> Model:
    """Return the model of settings.model_code, freshly initialised.

    features: [N, F] of every encoder; empty: a learned item table. fit: whether to fit the whitening; False if weights
    are loaded next.
    """
    if settings.whiten_features:  # an extension of fmrlrec alone
        whitening = Whitening(features, fit)
        return FMRLRec(num_items, whitening.features(), settings, whitening)
    return MODELS[settings.model_code](num_items, list(features), settings)
