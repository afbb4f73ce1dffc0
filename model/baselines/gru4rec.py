"""GRU4Rec (Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016): a GRU over items.

    x = Dropout(E_{i_t})
    x = Dropout(GRU(x))                                                                each layer;  z = x after the last
    score of item i:  z · E_i

Differs from the original: it is trained with the full softmax's cross-entropy, like the other baselines, not with the
ranking losses TOP1 and BPR on the items of the mini-batch; batches hold whole histories, not parallel sessions; items
enter as embeddings and share them with the output, not one-hot with an output layer of their own; AdamW, not Adagrad.

Histories are packed as in model/lru.py. T tokens, D dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from config import ModelSettings
from model.base import Dropout, SequenceModel
from model.items import ItemEncoder


class GRU4Rec(SequenceModel):
    """The recommender, with a learned item table."""

    static_shapes = False  # the number of histories, and their lengths, are read from the positions

    def __init__(self, num_items: int, settings: ModelSettings) -> None:
        super().__init__()
        dim = settings.mrl_hidden_sizes[-1]
        self.num_items, self.sizes = num_items, (dim,)
        self.items = ItemEncoder(num_items, dim, None)
        self.dropout, self.hidden_dropout = Dropout(settings.lru_dropout), Dropout(settings.lru_attn_dropout)
        self.layers = nn.ModuleList(nn.GRU(dim, dim) for _ in range(settings.lru_num_blocks))

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        lengths = (position == 0).cumsum(dim=0).bincount()[1:].tolist()
        x = self.dropout(x)
        for gru in self.layers:
            y, _ = gru(pack_sequence(x.split(lengths), enforce_sorted=False))
            x = self.hidden_dropout(torch.cat(unpack_sequence(y)))
        return x if at is None else x[at]
