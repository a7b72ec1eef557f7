"""What a run writes at every iteration: a line of metrics.jsonl and a TensorBoard event. A full disk stops neither."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

# tensorboardX imports PyTorch where it is installed, which takes seconds, and what is used here does not need it.
_torch = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402

if _torch is None:
    del sys.modules["torch"]


class Logs:
    """The two logs of a run directory, continued at `step` with the first `size` bytes of metrics.jsonl."""

    def __init__(self, directory: Path, *, step: int, size: int):
        self._file = os.open(directory / "metrics.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if os.fstat(self._file).st_size < size:  # somebody has cut or removed the file: whole lines are kept
            size = (directory / "metrics.jsonl").read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, size)  # lines that came after the checkpoint will be written again
        self._waiting, self._size, self._warned = b"", size, False
        self._events = EventsWriter(str(directory / "events"), f".{step}")
        if step:  # tells TensorBoard to forget what other files have from here on
            self._events.write_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """Add one iteration's metrics; what the disk does not take now waits in memory."""
        self._waiting += json.dumps(metrics).encode() + b"\n"
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if value is not None]
        try:
            self._flush()
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        except OSError as error:
            if not self._warned:
                warnings.warn(f"the logs cannot be written ({error}); training goes on, and metrics.jsonl will catch up", stacklevel=2)
            self._warned = True

    def sync(self) -> int:
        """Bring metrics.jsonl safely to the disk; its size in bytes. OSError where that cannot be done."""
        self._flush()
        os.fsync(self._file)
        with suppress(OSError):
            self._events.flush()
        return self._size

    def close(self) -> None:
        with suppress(OSError):
            self._flush()
        with suppress(OSError):
            self._events.close()
        os.close(self._file)

    def _flush(self) -> None:
        while self._waiting:
            written = os.write(self._file, self._waiting)
            self._waiting, self._size = self._waiting[written:], self._size + written
