"""Train once, deploy at any size (section 3.2 of the paper): the first m dimensions as a model of its own.

W[:m, :m] of a weight [D, D],  W[:m] of the projection [D, F],  v[:m] of a vector [D],  V[:, :m] of an embedding
"""

from dataclasses import replace

import torch

from model.fmrlrec import FMRLRec


def slice_model(model: FMRLRec, size: int) -> FMRLRec:
    """Return the stand-alone model of one trained size.

    It scores like the first `size` dimensions of `model`, and shares only the frozen features and their whitening with
    it. Raises ValueError for a size that was not trained.
    """
    if size not in model.sizes:
        raise ValueError(f"size {size} was not trained; the model has {', '.join(map(str, model.sizes))}")
    sizes = tuple(m for m in model.sizes if m <= size)
    features = model.items.features
    settings = replace(model.settings, mrl_hidden_sizes=sizes)
    weight = next(model.parameters())
    with weight.device:
        small = FMRLRec(model.num_items, features or None, settings, model.items.whitening)
    for parameter in small.parameters():  # not small.to(): it would widen the features, which can be large
        parameter.data = parameter.data.to(weight.dtype)
    large = model.state_dict()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(large[name][tuple(slice(0, n) for n in parameter.shape)])
    if model.items.gate and small.items.gate:
        small.items.gate.load_state_dict(model.items.gate.state_dict())
    if model.items.kept is not None:
        small.items.kept = model.items.kept[:, :size]
    return small.train(model.training)
