"""The recommenders by name."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from config import ModelSettings
from model import FMRLRec
from model.baselines.counting import ItemKNN, Popularity
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from model.extensions.whitening import Whitening


def build_model(num_items: int, features: Sequence[np.ndarray], config: ModelSettings, fit: bool = True) -> nn.Module:
    """Return the model that the settings describe, freshly initialised. fit: fit the whitening, too."""
    if config.model_code == "popularity":
        return Popularity(num_items)
    if config.model_code == "itemknn":
        return ItemKNN(num_items)
    dropouts = {"dropout": config.lru_dropout, "attn_dropout": config.lru_attn_dropout}
    if config.model_code == "sasrec":
        return SASRec(
            num_items,
            config.mrl_hidden_sizes[-1],
            config.lru_max_len,
            num_blocks=config.lru_num_blocks,
            num_heads=config.num_heads,
            **dropouts,
        )
    if config.model_code == "lrurec":
        return LRURec(
            num_items,
            config.mrl_hidden_sizes[-1],
            num_blocks=config.lru_num_blocks,
            use_bias=config.lru_use_bias,
            r_min=config.lru_r_min,
            r_max=config.lru_r_max,
            **dropouts,
        )
    parts = [torch.from_numpy(part) for part in features]
    whitening = Whitening(parts, fit=fit) if config.whiten_features else None
    return FMRLRec(
        num_items,
        (whitening.features() if whitening else parts) or None,
        config,
        whitening,
    )
