"""Surefoot as a user calls it: with the step audit, logs and a run directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

from clock import Clock, read_job

import surefoot as sf
from surefoot.algorithms import named

job = read_job()
clock = Clock(job)
with tempfile.TemporaryDirectory() as directory:
    config = named(job["algorithm"]).config(**job["settings"])
    out = Path(directory) / "run"
    done = 0
    for report in sf.iterate(config, job["environment"], steps=1e9, num_envs=job["num_envs"], preset=False, out=out):
        clock.tick(report.metrics["iteration"] - done)
        done = report.metrics["iteration"]
        if clock.enough:
            break
clock.print_result()
