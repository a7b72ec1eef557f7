"""Run the command line and die by SIGKILL at a moment inside a given phase: `dying.py PHASE CALLS SECONDS surefoot-arguments`.

The kill comes SECONDS after the phase's function has been entered for the CALLS-th time, and at the latest when it is entered again.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import surefoot.api
import surefoot.collect
import surefoot.rlhf.trainers
import surefoot.training.engine
import surefoot.training.session
from surefoot.cli import main

PHASES: dict[str, tuple[Any, str]] = {
    "compiling": (surefoot.training.engine.Engine, "advance"),  # the first call
    "collecting": (surefoot.collect.HostCollector, "collect"),
    "updating": (surefoot.training.engine.Engine, "advance"),  # late in an iteration; all of it on a device environment
    "saving": (surefoot.training.session, "save"),
    "evaluating": (surefoot.api, "evaluate"),
    "text": (surefoot.rlhf.trainers.TextTrainer, "advance"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, calls: int, seconds: float) -> None:
    holder, name = PHASES[phase]
    original: Callable[..., Any] = getattr(holder, name)
    left = [calls]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(seconds, die).start()
        elif left[0] < 0:
            die()
        return original(*arguments, **keywords)

    setattr(holder, name, wrapped)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    main(sys.argv[4:])
