"""Stopping politely: the first SIGINT or SIGTERM is noted and polled for, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ONE_REQUEST = 0.5  # seconds in which signals count as one: wrappers pass on a Ctrl-C that the terminal has sent already


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal after saving a checkpoint; the shell's exit code is 128 + `signal_number`."""

    def __init__(self, signal_number: int, path: Path | None):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}" + (f"; {path} can be resumed" if path else ""))
        self.signal_number, self.path = signal_number, path


class StopRequest:
    """Which signal has asked this process to stop, if any."""

    signal_number: int | None = None
    noted_at = 0.0

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self.noted_at = signal_number, now
        elif now - self.noted_at > ONE_REQUEST:
            os._exit(128 + signal_number)  # the last checkpoint is intact, nothing else matters

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
