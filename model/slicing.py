"""Train once, deploy at any size: the first m dimensions of a trained model as a model of its own."""

from dataclasses import replace

import torch

from model.fmrlrec import FMRLRec


def slice_model(model: FMRLRec, size: int) -> FMRLRec:
    """The stand-alone model of one trained size: of every weight what the first `size` dimensions use.

    It shares nothing with `model` but the frozen features and what whitened them, and scores as `model` does on the
    first `size` dimensions. Raises ValueError for a size that was not trained.
    """
    if size not in model.sizes:
        raise ValueError(f"size {size} was not trained; the model has {', '.join(map(str, model.sizes))}")
    sizes = tuple(m for m in model.sizes if m <= size)
    features = model.items.features
    settings = replace(model.settings, mrl_hidden_sizes=sizes)
    weight = next(model.parameters())
    with weight.device:
        small = FMRLRec(model.num_items, features or None, settings, model.items.whitening)
    for parameter in small.parameters():  # not small.to(), which would widen the features: they can be large
        parameter.data = parameter.data.to(weight.dtype)
    large = model.state_dict()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(large[name][tuple(slice(0, n) for n in parameter.shape)])
    return small.train(model.training)
