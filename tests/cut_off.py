"""A training that is cut off, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.trainer import Trainer


@contextmanager
def cut_off_after(epochs: int) -> Iterator[None]:
    """Ctrl-C, which is awaited, in a training within, once so many epochs are kept."""
    keep = Trainer._keep

    def interrupt(self, *arguments):
        keep(self, *arguments)
        if self.progress.epoch == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_keep", interrupt)
        yield
