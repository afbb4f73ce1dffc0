"""Micro-batching: requests that arrive while others are computed are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serving.metrics import Metrics
from serving.recommender import Recommendation, Recommender
from serving.states import State

TOGETHER = 64  # requests in a batch
FEW_ITEMS = 1 << 16  # in a smaller catalogue, one answer costs less than waking a thread twice
MAX_WAITING = 1_000  # more are refused


class Batcher:
    """Answers waiting requests together: while one batch is computed, the next requests queue up."""

    def __init__(self, recommender: Recommender, metrics: Metrics) -> None:
        self._recommender, self._metrics = recommender, metrics
        self._waiting: asyncio.Queue[tuple[asyncio.Future, Any, dict[str, Any]]] = asyncio.Queue(MAX_WAITING)

    async def ask(self, history: Sequence | State, options: dict[str, Any]) -> Recommendation:
        """Return the answer. Raises asyncio.QueueFull if too many requests wait."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((future, history, options))
        return await future

    async def run(self) -> None:
        """Answer requests for ever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < TOGETHER and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            self._metrics.add("fmrlrec_batches_total")
            self._metrics.add("fmrlrec_batched_requests_total", by=len(batch))
            requests = [(history, options) for _, history, options in batch]
            if len(batch) == 1 and len(self._recommender.items) <= FEW_ITEMS:
                outcomes = self._answer(requests)
            else:
                outcomes = await asyncio.to_thread(self._answer, requests)
            for (future, *_), outcome in zip(batch, outcomes, strict=True):
                if not future.done():  # the client may be gone
                    is_error = isinstance(outcome, Exception)
                    future.set_exception(outcome) if is_error else future.set_result(outcome)

    def _answer(self, requests: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """Return an answer or an exception for each request; those with like options are computed together."""
        outcomes: list[Any] = [None] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for row, (_, options) in enumerate(requests):
            key = options["top_k"], options["exclude_history"], options["candidates"] is None
            groups.setdefault(key, []).append(row)
        for (top_k, exclude_history, every_item), rows in groups.items():
            candidates = None if every_item else [requests[row][1]["candidates"] for row in rows]
            answers: list[Any]
            try:
                answers = self._recommender.recommend(
                    [requests[row][0] for row in rows], top_k, exclude_history, candidates
                )
            except Exception as error:
                # One bad request must not fail the others.
                answers = [error] if len(rows) == 1 else [self._answer([requests[row]])[0] for row in rows]
            for row, answer in zip(rows, answers, strict=True):
                outcomes[row] = answer
        return outcomes
