"""Training speed of Surefoot and of its peers, side by side on one machine.

    python benchmarks/speed.py                                             measure, print the table, write results/speed.json
    python benchmarks/speed.py replay                                      the same of methods with a replay, results/speed-replay.json
    python benchmarks/speed.py --table benchmarks/results/speed.json       print the table of a recorded result

Every measurement is a process of its own and has the machine to itself. Rounds go through all rows in turn, so that a slow
moment of a shared machine hits all alike; the median over rounds counts. Each peer lives in a virtual environment of its
own, made on first use, and is measured with the vector environment and number of threads that a short trial finds best.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, NamedTuple

from machine import RESULTS, ROOT, provenance

RUNNERS = Path(__file__).parent / "runners"
NUM_ENVS = 8
ITERATIONS_OF_WARM_UP = 2

# By Surefoot's names; the runners translate them.
SHARED = {
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "hidden": [64, 64],
    "activation": "tanh",
    "initial_log_std": 0.0,
    "normalise_observation": False,
    "normalise_reward": False,
}
REPLAY = {
    "gamma": 0.99,
    "activation": "relu",
    "replay_size": 1_000_000,
    "learning_starts": 1_000,  # none of these steps is measured
}
OF_CONTINUOUS_ACTIONS = REPLAY | {
    "hidden": [256, 256],
    "num_steps": 1,
    "update_to_data": 1.0,
    "minibatch_size": 256,
    "actor_learning_rate": 3e-4,
    "critic_learning_rate": 3e-4,
    "target_rate": 0.005,
}
SETTINGS = {
    "ppo": SHARED
    | {
        "num_steps": 256,
        "minibatch_size": 64,
        "epochs": 10,
        "learning_rate": 3e-4,
        "clip": 0.2,
        "entropy_coef": 0.0,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
        "normalise_advantage": True,
    },
    "a2c": SHARED
    | {
        "num_steps": 5,
        "gae_lambda": 1.0,
        "optimiser": "rmsprop",
        "learning_rate": 7e-4,
        "learning_rate_schedule": "constant",
        "entropy_coef": 0.0,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
        "normalise_advantage": False,
    },
    "trpo": SHARED
    | {
        "num_steps": 256,
        "minibatch_size": 64,
        "max_kl": 0.01,
        "cg_iterations": 15,
        "cg_damping": 0.1,
        "fisher_fraction": 1.0,
        "backtrack_factor": 0.8,
        "backtrack_tries": 10,
        "critic_epochs": 10,
        "critic_learning_rate": 1e-3,
    },
    "sac": OF_CONTINUOUS_ACTIONS | {"temperature_learning_rate": 3e-4},
    "td3": OF_CONTINUOUS_ACTIONS
    | {
        "exploration_noise": 0.1,
        "policy_delay": 2,
        "target_noise": 0.2,
        "target_noise_clip": 0.5,
    },
    "dqn": REPLAY
    | {
        "hidden": [64, 64],
        "num_steps": 4,
        "update_to_data": 0.25,
        "minibatch_size": 64,
        "learning_rate": 1e-3,
        "max_grad_norm": 10.0,
        "target_interval": 250,
        "target_rate": 1.0,
        "exploration_fraction": 1e-6,  # a thousand of a billion steps, so that actions are the network's when the clock starts
        "final_epsilon": 0.05,
    },
}


class Peer(NamedTuple):
    runner: str
    requirements: tuple[str, ...]


TORCH = "torch==2.13.0"  # installed first and alone, so that nothing asks for another build of it
ENVIRONMENTS = "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "imageio==2.38.1", "numpy==2.4.6"
PEERS = {
    "stable-baselines3": Peer("measure_sb3.py", (*ENVIRONMENTS, "stable-baselines3==2.9.2")),
    "sb3-contrib": Peer("measure_sb3.py", (*ENVIRONMENTS, "stable-baselines3==2.9.2", "sb3-contrib==2.9.2")),
    "sbx-rl": Peer(
        "measure_sbx.py",
        (
            *(*ENVIRONMENTS, "stable-baselines3==2.9.2", "sbx-rl==0.28.0"),
            *("jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "tfp-nightly==0.26.0.dev20261027"),
        ),
    ),
    "tianshou": Peer("measure_tianshou.py", (*ENVIRONMENTS, "tianshou==2.0.1")),
}
ALONE = "environment alone"
OWN = {ALONE: "measure_environment.py", "surefoot": "measure_surefoot.py"}
Row = dict[str, Any]  # environment, algorithm, library, variant; then what was measured


GYMNASIUM = "gymnasium:"  # before the name of an environment, asks Surefoot for Gymnasium's own


class Task(NamedTuple):
    algorithm: str
    environment: str
    peers: tuple[str, ...]
    vec_envs: tuple[str, ...] = ("DummyVecEnv", "SubprocVecEnv")  # what the peers may choose from
    prefixes: tuple[str, ...] = ("",)  # of the environment's name, with each of which Surefoot is measured


# A step of CartPole takes microseconds: processes would only add to it.
ONE_PROCESS = ("DummyVecEnv",)
WITH_REPLAY = "stable-baselines3", "sbx-rl", "tianshou"
TASKS = {
    "on-policy": (
        Task("ppo", "CartPole-v1", ("stable-baselines3", "sbx-rl"), vec_envs=ONE_PROCESS),
        Task("ppo", "HalfCheetah-v5", ("stable-baselines3", "sbx-rl")),
        Task("trpo", "HalfCheetah-v5", ("sb3-contrib",)),
        Task("a2c", "HalfCheetah-v5", ("stable-baselines3",)),
    ),
    "replay": (
        Task("sac", "HalfCheetah-v5", WITH_REPLAY),
        Task("td3", "HalfCheetah-v5", WITH_REPLAY),
        Task("dqn", "CartPole-v1", WITH_REPLAY, vec_envs=ONE_PROCESS, prefixes=("", GYMNASIUM)),
    ),
}
RECORDS = {"on-policy": RESULTS / "speed.json", "replay": RESULTS / "speed-replay.json"}


def python_of(peer: str, requirements: Sequence[str], venvs: Path) -> Path:
    """The interpreter of a peer's virtual environment, which is made anew unless it holds exactly the pinned versions."""
    directory = venvs / peer
    pins, installed = "\n".join((TORCH, *requirements)), directory / "installed.txt"
    python = directory / "bin" / "python"
    if not installed.exists() or installed.read_text() != pins:
        print(f"installing {peer} into {directory} ...", file=sys.stderr)
        venv.create(directory, with_pip=True, clear=True)
        for packages in ((TORCH,), requirements):
            subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages], check=True)
        installed.write_text(pins)
    return python


def rows_of(tasks: Sequence[Task]) -> list[Row]:
    """What to measure: each environment alone once, then Surefoot and the peers on each task."""
    rows: dict[tuple[str, str], Row] = {}
    for task in tasks:
        variants = [{"vec_env": vec_env, "threads": threads} for threads in (1, 2) for vec_env in task.vec_envs]
        own = [(prefix + task.environment, library, [{}]) for prefix in task.prefixes for library in OWN]
        for environment, library, choices in (*own, *((task.environment, peer, variants) for peer in task.peers)):
            algorithm = task.algorithm if library != ALONE else ""
            rows[environment, f"{algorithm} {library}"] = {
                "environment": environment,
                "algorithm": algorithm,
                "library": library,
                "variants": choices,
            }
    return list(rows.values())


def measure(row: Row, variant: dict[str, Any], seconds: float, python: Path, timeout: float | None = None) -> dict[str, Any]:
    """One process, measured for `seconds` after its warm-up: {"result": ..., "versions": ...}."""
    job = variant | {
        "algorithm": row["algorithm"],
        "environment": row["environment"],
        "settings": SETTINGS[row["algorithm"]] if row["algorithm"] else {"num_steps": 256},
        "num_envs": NUM_ENVS,
        "warm_up": ITERATIONS_OF_WARM_UP,
        "seconds": seconds,
    }
    library = row["library"]
    runner = OWN[library] if library in OWN else PEERS[library].runner
    measured = run(runner, job, python, threads=variant.get("threads"), timeout=timeout)
    print(f"{measured['result']['steps_per_second']:>12,.0f} steps/s  {name_of(row, variant)}", file=sys.stderr)
    return measured


def run(runner: str, job: dict[str, Any], python: Path, *, threads: int | None = None, timeout: float | None = None) -> dict[str, Any]:
    """What a runner prints about its job."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([python, RUNNERS / runner, json.dumps(job)], env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with it the processes of a SubprocVecEnv, which outlive it
    if process.returncode:
        sys.exit(f"{runner} failed on {job}.\n{output}{errors}")
    return json.loads(output.splitlines()[-1])


def trial(row: Row, variant: dict[str, Any], seconds: float, python: Path) -> float:
    """Steps per second of a variant, 0 where a minute was not enough to see any: on a busy machine waiting threads spin."""
    try:
        return measure(row, variant, seconds, python, timeout=60.0)["result"]["steps_per_second"]
    except subprocess.TimeoutExpired:
        print(f"    given up after a minute  {name_of(row, variant)}", file=sys.stderr)
        return 0.0


def name_of(row: Row, variant: dict[str, Any]) -> str:
    return " ".join([row["environment"], row["algorithm"], row["library"], *map(str, variant.values())])


def benchmark(tasks: Sequence[Task], *, repetitions: int, seconds: float, trials: bool, venvs: Path) -> dict[str, Any]:
    """Trials of the peers' variants, then the rounds; everything that was measured, as JSON."""
    pythons = {peer: python_of(peer, PEERS[peer].requirements, venvs) for task in tasks for peer in task.peers} | dict.fromkeys(
        OWN, Path(sys.executable)
    )
    load = load_now()
    rows = rows_of(tasks)
    for row in rows:
        variants, python = row.pop("variants"), pythons[row["library"]]
        row |= {"variant": variants[0], "repetitions": []}
        if trials and len(variants) > 1:
            row["trials"] = [{"variant": v, "steps_per_second": trial(row, v, seconds / 4, python)} for v in variants]
            row["variant"] = max(row["trials"], key=lambda tried: tried["steps_per_second"])["variant"]
    for _ in range(repetitions):
        for row in rows:
            measured = measure(row, row["variant"], seconds, pythons[row["library"]])
            row["versions"] = measured["versions"]
            row["repetitions"].append(measured["result"])
    settings = {"num_envs": NUM_ENVS} | {task.algorithm: SETTINGS[task.algorithm] for task in tasks}
    return provenance() | {"load": load, "settings": settings, "rows": rows}


def load_now() -> float:
    """Processes that want to run, with a warning where there are some."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}), so the numbers will be worse than they could be", file=sys.stderr)
    return load


def speed(row: dict[str, Any]) -> float:
    return statistics.median(repetition["steps_per_second"] for repetition in row["repetitions"])


def table(record: dict[str, Any]) -> str:
    """Markdown: the speed of every row, how many times that of a peer Surefoot's is, and the share of the environment's own."""
    rows = record["rows"]
    alone = {row["environment"]: speed(row) for row in rows if row["library"] == ALONE}
    own = {(row["environment"], row["algorithm"]): speed(row) for row in rows if row["library"] == "surefoot"}
    counts_updates = any("updates_per_second" in repetition for row in rows for repetition in row["repetitions"])
    updates = [" updates/s |", " ---: |"] if counts_updates else ["", ""]
    lines = [
        f"| | steps/s: median (range) |{updates[0]} Surefoot is faster by | of the environment's speed | start-up |",
        f"| --- | ---: |{updates[1]} ---: | ---: | ---: |",
    ]
    for row in rows:
        speeds = [repetition["steps_per_second"] for repetition in row["repetitions"]]
        name, ratio, share, startup = f"{row['environment']}, {row['library']}", "", "", ""
        if row["library"] != ALONE:
            name = f"{row['environment']}, {row['algorithm']}, {row['library']} {row['versions'][row['library']]}"
            share = f"{speed(row) / alone[row['environment']]:.1%}"
            startup = f"{row['repetitions'][0]['startup_seconds']:.1f} s"
        if row["variant"]:
            ratios = [(prefix, own.get((prefix + row["environment"], row["algorithm"]))) for prefix in ("", GYMNASIUM)]
            ratio = ", ".join(f"{prefix.replace(':', ' ')}{mine / speed(row):.1f}x" for prefix, mine in ratios if mine)
            name += " ({vec_env}, threads: {threads})".format_map(row["variant"])
        cells = [name, f"{speed(row):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})", ratio, share, startup]
        if counts_updates:
            of_learning = [repetition.get("updates_per_second") for repetition in row["repetitions"]]
            cells.insert(2, "" if None in of_learning else f"{statistics.median(of_learning):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    versions = {name: version for row in rows for name, version in row["versions"].items() if name not in (*OWN, *PEERS)}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    machine = record["machine"]
    return "\n".join([*lines, "", f"`{machine['processor']}, {machine['cores']} cores; {record['date']}; {listed}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {group: {f"{task.algorithm}-{task.environment}": task for task in tasks} for group, tasks in TASKS.items()}
    listed = "; ".join(f"{group}: {', '.join(tasks)}" for group, tasks in names.items())
    parser.add_argument("group", nargs="?", choices=TASKS, default="on-policy", help="methods without a replay, or with one")
    parser.add_argument("--only", nargs="+", metavar="TASK", help=f"of these alone, with no record unless --out names one; {listed}")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a measurement, after the warm-up")
    parser.add_argument("--quick", action="store_true", help="one iteration, one round, no trials: does it run?")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "surefoot" / "benchmarks", help="where the peers live")
    records = ", ".join(str(path.relative_to(ROOT)) for path in RECORDS.values())
    parser.add_argument("--out", type=Path, help=f"the record; by default that of the group ({records}), none with --quick")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    if unknown := set(options.only or ()) - names[options.group].keys():
        parser.error(f"no {' or '.join(sorted(unknown))} in {options.group}; {listed}")
    tasks = [task for name, task in names[options.group].items() if name in (options.only or names[options.group])]
    if options.quick:
        options.repetitions, options.seconds = 1, 0.0
    out = options.out or (None if options.quick or options.only else RECORDS[options.group])
    venvs, trials = options.venvs.resolve(), not options.quick
    with tempfile.TemporaryDirectory() as directory, chdir(directory):  # MuJoCo writes its warnings where it runs
        # Compiled programs are kept in a cache that begins empty: the first round compiles, the others load.
        os.environ |= {"XDG_CACHE_HOME": directory, "JAX_PLATFORMS": "cpu"}
        record = benchmark(tasks, repetitions=options.repetitions, seconds=options.seconds, trials=trials, venvs=venvs)
    print(table(record), end="")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
