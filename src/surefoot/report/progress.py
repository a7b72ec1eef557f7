"""How a run goes, on the screen: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from ..networks import advice
from ..training.engine import DeviceEngine
from ..training.session import Report, Session

PLAIN_SECONDS = 5.0  # between plain lines


class Progress:
    """Prints what a session does; silent where there is no stream."""

    def __init__(self, session: Session, stream: TextIO | None):
        self.session = session
        self.console = Console(file=stream, highlight=False, soft_wrap=True) if stream else Console(quiet=True)
        self.quiet = stream is None
        self.live = (
            Live(console=self.console, refresh_per_second=8, transient=True) if self.console.is_terminal and not self.quiet else None
        )
        self.printed_step = -1
        self.printed = -float("inf")
        self.collecting: float | None = None  # seconds in an iteration on a device environment, once measured
        self.report: Report | None = None

    def __enter__(self) -> Progress:
        record, engine = self.session.record, self.session.engine
        where = "in JAX, compiled with the learner" if isinstance(engine, DeviceEngine) else "stepped from Python"
        self._print(
            f"{record['algorithm']} on {record['environment']} ({where}), {record['num_envs']} environments, seed {record['seed']}, "
            f"{engine.num_iterations * engine.batch_steps:,} steps -> {self.session.path}"
        )
        if record["preset"]:
            self._print(
                "preset: " + ", ".join(f"{name}={value}" for name, value in record["preset"].items()) + "  (--no-preset to leave it out)"
            )
        if engine.replay_bytes:
            self._print(f"replay: {engine.config.replay_size:,} rows, {engine.replay_bytes / 1e6:,.0f} MB of memory")
        if record["resume"] != "exact":
            self._print("note: this environment cannot give its state; if the run is stopped and resumed, its episodes start anew")
        if (note := advice(engine.config, engine.spec.observation_space)) is not None:
            self._print(f"note: {note}")
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
        engine = self.session.engine
        if self.collecting is None and not self.quiet and isinstance(engine, DeviceEngine) and now - self.compiled > 1.0:
            self.collecting = engine.time_collecting()
        if self.live:
            self.live.update(Spinner("dots", self._line(report)))
        elif now - self.printed >= PLAIN_SECONDS:
            self._print(self._line(report))
            self.printed, self.printed_step = now, report.step

    def _line(self, report: Report) -> str:
        engine, metrics = self.session.engine, report.metrics
        total = engine.num_iterations * engine.batch_steps
        episode_return = metrics["episode_return"]
        parts = [
            f"{report.step:>11,} / {total:,} ({report.step / total:4.0%})",
            "no episode yet" if episode_return is None else f"return {episode_return:.1f}",
            f"KL {metrics['kl']:.4f}" if metrics.get("kl") is not None else "",
            f"{metrics['time/steps_per_second']:,.0f} steps/s",
            self._split(report),
        ]
        if self.first_step < report.step < total:
            parts.append(f"{clock(self._seconds_per_step(report) * (total - report.step))} left")
        return "  ".join(part for part in parts if part)

    def _split(self, report: Report) -> str:
        if self.collecting is not None:
            share = min(1.0, self.collecting / (self._seconds_per_step(report) * self.session.engine.batch_steps))
            return f"environment + acting {share:.0%}, learning {1 - share:.0%}"
        names = ("environment", "acting", "learning")
        return ", ".join(f"{name} {report.metrics[f'time/{name}']:.0%}" for name in names if f"time/{name}" in report.metrics)

    def _seconds_per_step(self, report: Report) -> float:
        """Since the first iteration, which compiled."""
        return (time.monotonic() - self.compiled) / (report.step - self.first_step)

    def _print(self, line: str) -> None:
        self.console.print(Text(line))


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
