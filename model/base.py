"""The two kinds of models, as the trainer sees them: sequence models are trained, counting models only count."""

from torch import Tensor, nn

from model.items import ItemEncoder


class SequenceModel(nn.Module):
    """A model that encodes a history into z and scores item i by z · E_i.

    A subclass sets num_items, sizes and items, and defines `encode`.
    """

    num_items: int
    sizes: tuple[int, ...]  # the nested sizes; the last one is D; a model that is not nested has one
    items: ItemEncoder  # E [N+1, D]
    static_shapes = True  # False: tensor shapes depend on the histories, so a step cannot become a CUDA graph

    def item_table(self) -> Tensor:
        """Return E [N+1, D]; row 0 is the begin-of-sequence token, which is not an item."""
        return self.items.everything()

    def ranking_bias(self) -> list[float] | None:
        """Return what each size adds to the scores of history items (model/extensions/history.py), or None."""
        return None

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Encode each token's history up to it: z [T, D], or [B, D] of the tokens `at` only.

        x: [T, D], the tokens' rows of the item table, histories packed as in model/lru.py; position: [T], steps since
        the state was empty; longest: the most tokens of one history, or more; at: [B].
        """
        raise NotImplementedError


class CountingModel(nn.Module):
    """A model that counts the training items once and scores items by the last one of a history."""

    num_items: int
    sizes: tuple[int, ...] = (1,)  # numbers per item

    def count(self, users: Tensor, items: Tensor) -> None:
        """Count pairs (user, item), [n] each: users from 0, items from 1."""
        raise NotImplementedError

    def scores(self, last: Tensor) -> Tensor:
        """Return the scores [B, N+1] of all tokens for histories whose last items are `last` [B]."""
        raise NotImplementedError
