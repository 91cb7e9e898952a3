"""The ledger: one line for each step, with what it did, what it cost and how far it moved the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from surgery.manager import StepRecord

SAMPLE_SECONDS = 0.02


class Ledger:
    """Keeps the records of a run and measures the peak memory of each step.

    Args:
        show: Called with each record when it is complete.
    """

    def __init__(self, show: Callable[[StepRecord], None] = lambda record: None) -> None:
        self.records: list[StepRecord] = []
        self._show = show
        self._meter = MemoryMeter()

    def starting(self, number: int, word: str) -> None:
        """Start to measure."""
        self._meter.start()

    def close(self) -> None:
        """Stop measuring, after a step that stopped the run too."""
        self._meter.stop()

    def stepped(self, record: StepRecord) -> None:
        """Keep and show the record."""
        record.peak_bytes = self._meter.stop()
        if record.verdict is not None:
            record.warnings += record.verdict.warnings
        self.records.append(record)
        self._show(record)


class MemoryMeter:
    """Samples the anonymous memory of this process, of which mapped weights are no part; needs /proc."""

    def __init__(self) -> None:
        self._peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin a new measurement."""
        self.stop()
        self._peak = anonymous_bytes()
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int | None:
        """End the measurement and return the peak in bytes."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = anonymous_bytes()
            if now is not None:
                self._peak = max(self._peak or 0, now)


def anonymous_bytes() -> int | None:
    """Return the resident anonymous memory of this process, None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else None
