"""Encoders without weights or download. F: feature width, B: batch."""

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from datasets.features.encoders.base import Encoder, normalised

LEXICAL: dict[str, Any] = {"encoder": "lexical", "version": 1}
PIXEL: dict[str, Any] = {"encoder": "pixel", "version": 1}


class LexicalEncoder(Encoder):
    """Hashed bag of words, word pairs and character trigrams, each term weighted 1 + log(count)."""

    dim = 1024
    fingerprint = LEXICAL

    def prepare(self, batch: Iterable[str]) -> np.ndarray:
        batch = list(batch)
        vectors = np.zeros((len(batch), self.dim))
        for row, text in enumerate(batch):
            for term, count in Counter(self._terms(text)).items():
                code = zlib.crc32(term.encode())
                vectors[row, code % self.dim] += (1 + np.log(count)) * (1 if code & 1 << 31 else -1)
        return normalised(vectors)

    @staticmethod
    def _terms(text: str) -> list[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        trigrams = [f"#{w[i : i + 3]}" for w in (f"<{word}>" for word in words) for i in range(len(w) - 2)]
        return words + pairs + trigrams


class PixelEncoder(Encoder):
    """Colour and shape statistics of a 32 x 32 thumbnail: a histogram of hue and saturation, the mean colour and the
    gradient orientations of 4 x 4 cells. The three parts weigh the same."""

    side, cells = 32, 4
    dim = 16 * 4 + 4 * 4 * 3 + 4 * 4 * 8
    fingerprint = PIXEL

    def prepare(self, batch: Iterable[Any]) -> np.ndarray:
        return normalised(np.stack([self._describe(picture) for picture in batch]))

    def _describe(self, picture: Any) -> np.ndarray:
        thumbnail = picture.convert("RGB").resize((self.side, self.side))
        hue, saturation, value = np.asarray(thumbnail.convert("HSV"), dtype=np.float64).transpose(2, 0, 1) / 255
        colours, _, _ = np.histogram2d(
            hue.ravel(), saturation.ravel(), bins=(16, 4), range=((0, 1), (0, 1)), weights=value.ravel()
        )
        means = self._by_cell(np.asarray(thumbnail, dtype=np.float64) / 255 - 0.5).mean(axis=2)
        dy, dx = np.gradient(value)
        bins = ((np.arctan2(dy, dx) / np.pi + 1) * 4).astype(int) % 8
        edges = self._by_cell(np.hypot(dx, dy)[..., None] * (bins[..., None] == np.arange(8))).sum(axis=2)
        return np.concatenate([normalised(part.reshape(1, -1))[0] for part in (colours, means, edges)])

    def _by_cell(self, image: np.ndarray) -> np.ndarray:
        """[side, side, channels] -> [cells, cells, pixels of a cell, channels]."""
        k, n = self.cells, self.side // self.cells
        return image.reshape(k, n, k, n, -1).swapaxes(1, 2).reshape(k, k, n * n, -1)
