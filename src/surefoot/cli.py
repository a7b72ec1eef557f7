"""The command line: `surefoot VERB ...`. Each algorithm's options are its configuration's fields."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from .envs import IN_JAX, NUM_ENVS

USAGE = """usage: surefoot VERB ...

  train ALGORITHM ENV   train a policy; `surefoot train ppo --help` lists the settings
  train --resume RUN    continue a run that was stopped
  eval RUN              play whole episodes with a run's policy
  plot RUN...           draw learning curves, or with --audit the step audit
  report RUN            write all about a run into one HTML page
  figure NAME           draw a figure that explains, such as cliff
  record RUN OUT        film episodes into a .mp4 or .gif
  watch RUN             play episodes in a window
  list algorithms|envs  what there is to choose from
  check ENV             play an environment at random and say what is wrong with it
  rlhf VERB             language models: fine-tune, learn what people prefer, optimise

ENV is the id of an environment, or module:factory. `surefoot VERB --help` tells more."""
HELP = "-h", "--help"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit code 0, 1 where it could not be done, 2 where the command line cannot be read, 130/143 when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in HELP:
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"surefoot {metadata.version('surefoot')}")
        return
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "eval": _eval,
        "plot": _plot,
        "figure": _figure,
        "report": _report,
        "record": _record,
        "watch": _watch,
        "list": _list,
        "check": _check,
        "rlhf": _rlhf,
    }
    if argv[0] not in verbs:
        from .config import nearest

        fail(f"there is no verb {argv[0]!r}{nearest(argv[0], verbs)}\n\n{USAGE}", code=2)
    warnings.formatwarning = lambda message, *_, **__: f"surefoot: warning: {message}\n"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # module:factory names modules of the directory the user works in
    with user_errors():
        verbs[argv[0]](argv[1:])


def fail(message: str, *, code: int = 1) -> None:
    print(f"surefoot: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend is a sentence, not a traceback. SUREFOOT_TRACEBACK=1 shows both."""
    from .envs.boundary import EnvironmentFault
    from .training.engine import NonFiniteError
    from .training.signals import Stopped

    try:
        yield
    except Stopped as stopped:
        fail(str(stopped), code=128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get("SUREFOOT_TRACEBACK"):
            raise
        if isinstance(error, EnvironmentFault) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)  # of the user's own code
        fail(str(error))


def parse(kind: Any, argv: list[str], verb: str, description: str | None = None) -> Any:
    """`argv` as an instance of `kind`."""
    return tyro.cli(kind, args=argv, prog=f"surefoot {verb}", description=description, config=(tyro.conf.OmitArgPrefixes,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a run needs besides its algorithm's settings."""

    steps: float = 1e6
    """Environment steps in all, over all parallel environments."""
    seed: int = 0
    """Everything random in the run follows from it."""
    seeds: int = 1
    """Train this many seeds, from `seed` on, in parallel where cores allow; each as if it were trained alone."""
    envs: int = NUM_ENVS
    """Environments stepped in parallel."""
    out: Path | None = None
    """The run directory; by default a new one under runs/."""
    preset: bool = True
    """Use the settings known to work on this environment where none are given."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints; there is always one at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Continue a run, or the runs of several seeds, to the end."""

    resume: Path
    """The run directory."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints; there is always one at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Play whole episodes with a run's policy, taking the most likely action and drawing actions, on seeds not trained on."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run directory, or that of several seeds."""
    episodes: int = 100
    """How many episodes of each kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw learning curves: several seeds of one experiment as their mean, several experiments side by side."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run directories, or those of several seeds."""
    audit: bool = False
    """Draw the step audit of one run, or of the seeds of one experiment, instead."""
    out: Path | None = None
    """The picture, .png or .svg; by default curve.png, or audit.png, in the first directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's results, step audit, times, settings and environment into one HTML page that needs nothing else."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run directory, or that of several seeds."""
    out: Path | None = None
    """The page, .html; by default report.html in the directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Draw a figure that explains, and say what it shows."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """Which figure."""
    out: Path | None = None
    """The picture, .png or .svg; by default NAME.png here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Film the first episodes of `surefoot eval`."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The film, .mp4 or .gif."""
    episodes: int = 1
    """How many, one after the other."""
    stochastic: bool = False
    """Draw actions instead of taking the most likely one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Play episodes in a window, until they are over or it is closed."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    episodes: int = 5
    """How many, one after the other."""
    stochastic: bool = False
    """Draw actions instead of taking the most likely one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Play an environment at random and say in plain words what is wrong with it."""

    env: Annotated[Positional[str], tyro.conf.arg(metavar="ENV")]
    """An environment id, or module:factory."""
    steps: int = 1000
    """How many steps to play."""
    seed: int = 0
    """Of the environment and of the random actions."""


def _train(argv: list[str]) -> None:
    from . import api
    from .algorithms import ALGORITHMS, named
    from .networks import find_factory, own_network
    from .training.presets import preset_for, with_settings
    from .training.session import whole_number

    if any(word == "--resume" or word.startswith("--resume=") for word in argv):
        _resume(argv)
        return
    if not argv or argv[0] in HELP:
        print(f"usage: surefoot train ALGORITHM ENV [options]\n       surefoot train --resume RUN\n\nalgorithms: {', '.join(ALGORITHMS)}\n")
        print("`surefoot train ALGORITHM --help` lists the options.")
        sys.exit(0 if argv else 2)
    try:
        algorithm = named(argv[0])
    except ValueError as error:
        fail(str(error), code=2)

    group = algorithm.name.replace("-", "_")  # a field of a dataclass, which a hyphen must not be in

    def arguments(default: Any, words: list[str], about: str = "") -> Any:
        kind = dataclasses.make_dataclass(
            "Arguments",
            [
                ("env", Annotated[Positional[str], tyro.conf.arg(metavar="ENV", help="An environment id, or module:factory.")]),
                ("run", TrainOptions, TrainOptions()),
                (group, algorithm.config, default),
            ],
        )
        return parse(kind, words, f"train {algorithm.name}", description=f"{algorithm.config.__doc__}{about}")

    default = algorithm.config()
    words = [word for word in argv[1:] if word not in HELP]
    if len(words) < len(argv) - 1:
        settings = preset_for(default, words[0]) if words and "--no-preset" not in words else {}
        arguments(with_settings(default, settings), ["--help"], f" The defaults are the preset of {words[0]}." if settings else "")
    # Settings that are not given take the preset's values, and the preset depends on an argument: read once to know it.
    given = arguments(default, words)
    if given.run.preset:
        default = with_settings(default, preset_for(default, given.env))
        given = arguments(default, words)
    settings = getattr(given, group)
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    config = algorithm.config(**{name: value for name, value in chosen.items() if value != getattr(default, name)})
    if (network := own_network(config)) is not None:
        find_factory(network, import_module=True)
    options = given.run
    if whole_number("seeds", options.seeds, minimum=1) > 1:
        _train_seeds(given.env, options, argv)
        return
    _finish(
        lambda: api.train(
            config,
            given.env,
            steps=options.steps,
            seed=options.seed,
            num_envs=options.envs,
            preset=options.preset,
            out=options.out,
            checkpoint_seconds=options.checkpoint_seconds,
        )
    )


def _rlhf(argv: list[str]) -> None:
    from . import cli_text

    cli_text.main(argv)


def _resume(argv: list[str]) -> None:
    from . import api
    from .report.curves import run_directories
    from .training.session import kind_of

    options = parse(ResumeOptions, argv, "train")
    if kind_of(options.resume) == "text":
        from . import cli_text

        cli_text.resume(options.resume, options.checkpoint_seconds)
        return
    runs = run_directories(options.resume)
    if runs == [options.resume]:
        _finish(lambda: api.resume(options.resume, checkpoint_seconds=options.checkpoint_seconds))
        return
    more = ["--checkpoint-seconds", str(options.checkpoint_seconds)]
    run_side_by_side({run.name: ["train", "--resume", str(run), *more] for run in runs}, options.resume)
    _show_seeds(options.resume, runs)


def _finish(run: Callable[[], Any]) -> None:
    """Train, then say where everything is."""
    path = run().path
    print(f"run    {path}\ncurve  {path / 'curve.png'}\nnext   surefoot eval {path}")


def _train_seeds(env: str, options: TrainOptions, argv: list[str]) -> None:
    from .training.session import create_directory
    from .training.signals import Stopped

    directory = create_directory(options.out, f"{argv[0]}-{env}")
    shared = without_options(argv, "--seeds", "--seed", "--out")
    seeds = range(options.seed, options.seed + options.seeds)
    commands = {f"seed-{seed}": ["train", *shared, "--seed", str(seed), "--out", str(directory / f"seed-{seed}")] for seed in seeds}
    try:
        run_side_by_side(commands, directory)
    except Stopped:
        for name in commands:
            if not (directory / name / "run.json").exists():
                print(f"surefoot: {name} had not begun; start it with `surefoot {shlex.join(commands[name])}`", file=sys.stderr)
        raise
    _show_seeds(directory, [directory / name for name in commands])


def _show_seeds(directory: Path, runs: list[Path]) -> None:
    from .report.curves import plot

    plot(runs, directory / "curve.png")
    print(f"runs   {directory}\ncurve  {directory / 'curve.png'}")


def without_options(argv: Sequence[str], *names: str) -> list[str]:
    """`argv` without these options and their values."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in names:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def _eval(argv: list[str]) -> None:
    import numpy as np

    from . import api
    from .report.curves import run_directories
    from .training.session import write_json
    from .training.signals import catch_signals

    options = parse(EvalOptions, argv, "eval")
    runs = run_directories(options.run)
    with catch_signals() as stop:
        for path in runs:
            results: dict[str, Any] = {"episodes": options.episodes}
            print(path)
            for name, deterministic in (("deterministic", True), ("stochastic", False)):
                returns = api.Run(path).evaluate(options.episodes, deterministic=deterministic, stop=stop)
                spread = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
                results[name] = {"mean": float(np.mean(returns)), "standard_deviation": spread, "returns": returns.tolist()}
                print(
                    f"  {name:<13}  return {np.mean(returns):.1f} +- {spread:.1f} (standard deviation), "
                    f"from {np.min(returns):.1f} to {np.max(returns):.1f}, {len(returns)} episodes"
                )
            write_json(path / "evaluation.json", results)


def _plot(argv: list[str]) -> None:
    from .report.audit import plot_audit
    from .report.curves import plot

    options = parse(PlotOptions, argv, "plot")
    if not options.runs:
        fail("plot expects at least one run directory", code=2)
    if options.audit and len(options.runs) > 1:
        fail(f"plot --audit expects one run, or one directory of seeds, got {len(options.runs)}", code=2)
    out = options.out or options.runs[0] / ("audit.png" if options.audit else "curve.png")
    print(plot_audit(options.runs[0], out) if options.audit else plot(options.runs, out))


def _report(argv: list[str]) -> None:
    from .training.session import kind_of

    options = parse(ReportOptions, argv, "report")
    if kind_of(options.run) == "text":
        from .rlhf.page import write_report
    else:
        from .report.page import write_report
    print(write_report(options.run, options.out or options.run / "report.html"))


def _figure(argv: list[str]) -> None:
    from .report import figures

    options = parse(FigureOptions, argv, "figure", f"{FigureOptions.__doc__} Figures: {', '.join(figures.FIGURES)}.")
    try:
        sentence = figures.sentence(options.name)
    except ValueError as error:
        fail(str(error), code=2)
    out = options.out or Path(f"{options.name}.png")
    figures.write(options.name, out)
    print(f"{sentence}\nfigure {out}")


def _record(argv: list[str]) -> None:
    options = parse(RecordOptions, argv, "record")
    with film_of(options.run) as (run, on_moment):
        run.record(options.out, options.episodes, deterministic=not options.stochastic, on_moment=on_moment)
    print(f"film   {options.out}")


def _watch(argv: list[str]) -> None:
    options = parse(WatchOptions, argv, "watch")
    with film_of(options.run) as (run, on_moment):
        run.watch(options.episodes, deterministic=not options.stochastic, on_moment=on_moment)


@contextlib.contextmanager
def film_of(path: Path) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """The run, and a function that tells how its episodes go and stops them when a signal has come."""
    from rich.console import Console

    from . import api
    from .report.curves import run_directories
    from .training.signals import catch_signals

    runs = run_directories(path)
    if len(runs) > 1:
        fail(f"{path} holds {len(runs)} runs; choose one, such as {runs[0]}")
    with catch_signals() as stop, Console(stderr=True).status("drawing the first picture") as status:

        def on_moment(moment: Any) -> None:
            stop.poll()
            stands = f"episode {moment.episode + 1}  return {moment.episode_return:.1f}, {moment.length} steps"
            status.update(stands)
            if moment.ended:
                print(stands)

        yield api.Run(runs[0]), on_moment


def _list(argv: list[str]) -> None:
    from .algorithms import ALGORITHMS
    from .config import nearest
    from .envs.atari import atari_games
    from .envs.mujoco_tasks import TASKS

    what = argv[0] if argv else ""
    if what in HELP:
        print("usage: surefoot list algorithms|envs")
    elif what == "algorithms":
        for name, algorithm in ALGORITHMS.items():
            print(f"{name:<{max(map(len, ALGORITHMS))}}  {algorithm.config.__doc__}")
    elif what == "envs":
        print("in JAX, compiled with the learner:")
        for name, environment in IN_JAX.items():
            print(f"  {name:<28} actions {environment.action_space}, at most {environment.max_episode_steps} steps")
        print("MuJoCo, all streams stepped at once on threads (surefoot[mujoco]):")
        for name, task in TASKS.items():
            print(f"  {name:<28} at most {task.max_episode_steps} steps")
        print("through Gymnasium, stepped from Python (gymnasium:ID also for those above):")
        import gymnasium

        for name in sorted(spec.id for spec in gymnasium.registry.values() if spec.id not in IN_JAX | TASKS):
            print(f"  {name}")
        print("Atari, all streams stepped at once on threads (surefoot[atari]; PongNoFrameskip-v4 is Pong as Mnih et al. 2015 played it):")
        for game in atari_games():  # last, since ALE registers more with Gymnasium
            print(f"  ALE/{game}-v5")
    else:
        fail(f"list expects 'algorithms' or 'envs', got {what!r}{nearest(what, ['algorithms', 'envs'])}", code=2)


def _check(argv: list[str]) -> None:
    from .envs.check import check, print_findings
    from .training.session import whole_number

    options = parse(CheckOptions, argv, "check")
    findings = check(options.env, num_steps=whole_number("steps", options.steps, minimum=1), seed=options.seed)
    print_findings(options.env, findings)
    sys.exit(1 if any(finding.level == "error" for finding in findings) else 0)


def run_side_by_side(commands: dict[str, list[str]], directory: Path) -> None:
    """Run surefoot commands in processes of their own, as many at a time as there are cores; every line under its name.

    `directory` is where they work, to be named when they are stopped. If this process is killed, they save and end when they
    next have something to say, since nobody reads it any more.
    """
    import signal
    import subprocess
    import threading

    from .training.signals import catch_signals

    waiting, running, codes = dict(commands), {}, {}

    def relay(name: str, process: Any) -> None:
        for line in process.stdout:
            print(f"{name} | {line}", end="", flush=True)

    with catch_signals() as stop:
        forwarded = False
        while running or (waiting and stop.signal_number is None):
            while waiting and len(running) < len(os.sched_getaffinity(0)) and stop.signal_number is None:
                name = next(iter(waiting))
                process = subprocess.Popen(
                    [sys.executable, "-m", "surefoot", *waiting.pop(name)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,  # a Ctrl-C reaches them once, from here
                )
                thread = threading.Thread(target=relay, args=(name, process), daemon=True)
                thread.start()
                running[name] = process, thread
            if stop.signal_number is not None and not forwarded:
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
                forwarded = True
            for name, (process, thread) in list(running.items()):
                if process.poll() is not None:
                    thread.join()
                    codes[name] = process.returncode
                    del running[name]
            if running:
                time.sleep(0.05)
        stop.poll(directory)
    if failed := [name for name, code in codes.items() if code]:
        fail(f"{', '.join(failed)} of {len(commands)} did not finish; the messages are above")
