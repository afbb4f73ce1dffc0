"""Interrupt a training in a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.trainer import Trainer


@contextmanager
def cut_off_after(epochs: int) -> Iterator[None]:
    """Interrupt the training in this context after `epochs` epochs, and catch the KeyboardInterrupt."""
    keep = Trainer._keep

    def interrupt(self, *arguments):
        keep(self, *arguments)
        if self.progress.epoch == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_keep", interrupt)
        yield
