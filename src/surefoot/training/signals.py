"""Stopping politely: the first SIGINT or SIGTERM is noted and polled for, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal after saving a checkpoint; the shell's exit code is 128 + `signal_number`."""

    def __init__(self, signal_number: int, path: Path | None):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}" + (f"; {path} can be resumed" if path else ""))
        self.signal_number, self.path = signal_number, path


class StopRequest:
    """Which signal has asked this process to stop, if any."""

    signal_number: int | None = None

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + signal_number)  # the second time: the last checkpoint is intact, nothing else matters
        self.signal_number = signal_number

    def poll(self, path: Path | None = None) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signal_number is not None:
            raise Stopped(self.signal_number, path)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying of them; outside the main thread, where Python forbids it, do nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
