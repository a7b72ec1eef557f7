"""Where and of what a benchmark was made: every recorded result carries this."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """Date, command line, commit (with -dirty where files differ from it) and machine, as JSON."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", os.path.relpath(sys.modules["__main__"].__file__, ROOT), *sys.argv[1:]]),
        "commit": commit or None,
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
    }


def processor() -> str:
    """The name that Linux has for it, or what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
