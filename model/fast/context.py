"""The type of an autograd function's context."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What forward saves for backward. torch's own annotations do not allow None among the saved tensors."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
