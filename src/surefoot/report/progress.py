"""How a run goes, on the screen: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from ..networks import advice
from ..training.control import ControlSession
from ..training.engine import DeviceEngine
from ..training.session import Report, Session

PLAIN_SECONDS = 5.0  # between plain lines


class Progress:
    """Prints what a session does; silent where there is no stream. What there is to say is a subclass's."""

    def __init__(self, session: Session, stream: TextIO | None):
        self.session = session
        self.console = Console(file=stream, highlight=False, soft_wrap=True) if stream else Console(quiet=True)
        self.quiet = stream is None
        self.live = (
            Live(console=self.console, refresh_per_second=8, transient=True) if self.console.is_terminal and not self.quiet else None
        )
        self.printed_step = -1
        self.printed = -float("inf")
        self.report: Report | None = None

    def beginning(self) -> list[str]:
        """What a run is, and what is to be known of it beforehand."""
        raise NotImplementedError

    def parts(self, report: Report) -> list[str]:
        """How it goes, without times."""
        raise NotImplementedError

    def __enter__(self) -> Progress:
        engine = self.session.engine
        for line in self.beginning():
            self._print(line)
        if engine.iteration:
            self._print(f"continuing from step {engine.step:,}")
        self.started, self.first_step = time.monotonic(), engine.step
        if engine.finished:
            self._print("nothing left to do: the run is complete")
        elif self.live:
            self.live.start()
            self.console.show_cursor()  # a killed process could not bring it back
            self.live.update(Spinner("dots", "compiling the first iteration (the result is cached for the next run)"))
        else:
            self._print("compiling the first iteration (the result is cached for the next run) ...")
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self.live:
            self.live.stop()
        if self.report is not None:
            if self.printed_step != self.report.step:
                self._print(self._line(self.report))
            self._print(f"{'stopped' if error else 'done'} after {self.session.engine.step:,} steps in {clock(self.session.seconds)}")

    def update(self, report: Report) -> None:
        """Show a report, if the last one has been on the screen for long enough."""
        now = time.monotonic()
        if self.report is None:
            self.compiled, self.first_step = now, report.step
            self._print(f"compiled in {now - self.started:.1f} s")
        self.report = report
        if self.live:
            self.live.update(Spinner("dots", self._line(report)))
        elif now - self.printed >= PLAIN_SECONDS:
            self._print(self._line(report))
            self.printed, self.printed_step = now, report.step

    def _line(self, report: Report) -> str:
        total = self.session.engine.total_steps
        parts = [f"{report.step:>11,} / {total:,} ({report.step / total:4.0%})", *self.parts(report)]
        if self.first_step < report.step < total:
            parts.append(f"{clock(self.seconds_per_step(report) * (total - report.step))} left")
        return "  ".join(part for part in parts if part)

    def seconds_per_step(self, report: Report) -> float:
        """Since the first iteration, which compiled."""
        return (time.monotonic() - self.compiled) / (report.step - self.first_step)

    def shares(self, report: Report, *names: str) -> str:
        """Where the time goes."""
        return ", ".join(f"{name} {report.metrics[f'time/{name}']:.0%}" for name in names if f"time/{name}" in report.metrics)

    def _print(self, line: str) -> None:
        self.console.print(Text(line))


class ControlProgress(Progress):
    """Of an algorithm on an environment."""

    session: ControlSession

    def __init__(self, session: ControlSession, stream: TextIO | None):
        super().__init__(session, stream)
        self.collecting: float | None = None  # seconds in an iteration on a device environment, once measured

    def beginning(self) -> list[str]:
        record, engine = self.session.record, self.session.engine
        where = "in JAX, compiled with the learner" if isinstance(engine, DeviceEngine) else "stepped from Python"
        lines = [
            f"{record['algorithm']} on {record['environment']} ({where}), {record['num_envs']} environments, seed {record['seed']}, "
            f"{engine.total_steps:,} steps -> {self.session.path}"
        ]
        if record["preset"]:
            preset = ", ".join(f"{name}={value}" for name, value in record["preset"].items())
            lines.append(f"preset: {preset}  (--no-preset to leave it out)")
        if engine.replay_bytes:
            lines.append(f"replay: {engine.config.replay_size:,} rows, {engine.replay_bytes / 1e6:,.0f} MB of memory")
        if record["resume"] != "exact":
            lines.append("note: this environment cannot give its state; if the run is stopped and resumed, its episodes start anew")
        if (note := advice(engine.config, engine.spec.observation_space)) is not None:
            lines.append(f"note: {note}")
        return lines

    def update(self, report: Report) -> None:
        engine = self.session.engine
        is_steady = self.report is not None and time.monotonic() - self.compiled > 1.0
        if self.collecting is None and is_steady and not self.quiet and isinstance(engine, DeviceEngine):
            self.collecting = engine.time_collecting()
        super().update(report)

    def parts(self, report: Report) -> list[str]:
        metrics, episode_return = report.metrics, report.metrics["episode_return"]
        return [
            "no episode yet" if episode_return is None else f"return {episode_return:.1f}",
            f"KL {metrics['kl']:.4f}" if metrics.get("kl") is not None else "",
            f"{metrics['time/steps_per_second']:,.0f} steps/s",
            self._split(report),
        ]

    def _split(self, report: Report) -> str:
        if self.collecting is None or report.step == self.first_step:
            return self.shares(report, "environment", "acting", "learning")
        share = min(1.0, self.collecting / (self.seconds_per_step(report) * self.session.engine.batch_steps))
        return f"environment + acting {share:.0%}, learning {1 - share:.0%}"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
