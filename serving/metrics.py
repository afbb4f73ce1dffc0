"""Counters of the server in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # upper bounds of the histogram


class Metrics:
    """Counters by name, which includes the labels. Any thread may add."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, *names: str, by: float = 1) -> None:
        with self._lock:
            self._counts.update(dict.fromkeys(names, by))

    def took(self, path: str, status: int, seconds: float) -> None:
        """Count one request."""
        buckets = [*(str(bound) for bound in SECONDS if seconds <= bound), "+Inf"]
        names = [f'fmrlrec_request_seconds_bucket{{path="{path}",le="{bound}"}}' for bound in buckets]
        self.add(f'fmrlrec_requests_total{{path="{path}",status="{status}"}}', *names)
        self.add(f'fmrlrec_request_seconds_count{{path="{path}"}}')
        self.add(f'fmrlrec_request_seconds_sum{{path="{path}"}}', by=seconds)

    def text(self, items: int) -> str:
        with self._lock:
            counts = {**self._counts, "fmrlrec_items": items}
        return "".join(f"{name} {count}\n" for name, count in sorted(counts.items()))
