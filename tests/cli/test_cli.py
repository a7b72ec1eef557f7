"""The command line as its users meet it: what they read, the exit code, and what is left on the disk."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import BATCH, SMALL, SMALL_OPTIONS, bits, metrics, steps_saved

import surefoot as sf
from surefoot.algorithms import ALGORITHMS
from surefoot.cli import main, without_options
from surefoot.training.presets import PRESETS

PNG, SVG = b"\x89PNG", b"<?xml"
BROKEN = """
from support import Endless, NanObservation, OldGym, Raises, Walk
"""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run `surefoot ARGUMENTS` in this process, in an empty directory: (what it printed, what it said), with the given exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SUREFOOT_TRACEBACK", raising=False)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        left = 0
        try:
            main([str(word) for word in arguments])
        except SystemExit as exited:
            left = exited.code if isinstance(exited.code, int) else 1 if exited.code else 0
        told = capfd.readouterr()
        assert left == code, f"exit code {left}\n{told.out}\n{told.err}"
        return told.out, told.err

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    return sf.train(SMALL, "CartPole-v1", steps=3 * BATCH, out=tmp_path_factory.mktemp("whole"), progress=False, preset=False).path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def test_help_and_version(cli: Callable[..., tuple[str, str]]) -> None:
    usage, _ = cli("--help")
    assert cli("-h") == (usage, "")
    assert cli(code=2) == (usage, "")
    assert cli("--version") == (f"surefoot {sf.__version__}\n", "")
    verbs = re.findall(r"^  (\w+)", usage, re.MULTILINE)
    assert verbs[:3] == ["train", "train", "eval"]
    for verb in verbs:
        for word in ("--help", "-h"):
            out, err = cli(verb, word)
            assert out.startswith(f"usage: surefoot {verb}"), verb
            assert err == ""


def test_the_help_of_an_algorithm_shows_every_setting_with_its_docstring_and_default(cli: Callable[..., tuple[str, str]]) -> None:
    def flat(text: str) -> str:
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())

    body = ast.parse(inspect.getsource(sf.PPO)).body[0].body
    docstrings = {
        field.target.id: doc.value.value
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }
    assert len(docstrings) > 15
    preset = PRESETS["ppo", "CartPole-v1"]
    for argument, defaults in (([], {}), (["CartPole-v1"], preset), (["CartPole-v1", "--no-preset"], {}), (["Acrobot-v1"], {})):
        text = flat(cli("train", "ppo", *argument, "--help")[0])
        assert ("The defaults are the preset of CartPole-v1." in text) == bool(defaults)
        assert "usage: surefoot train ppo [-h] [OPTIONS] ENV" in text
        for name, doc in docstrings.items():
            default = defaults.get(name, getattr(sf.PPO(), name))
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            option = f"--{name}".replace("_", "-")
            assert re.search(rf"{option}\b[^()]*? {re.escape(flat(doc))} \(default: {re.escape(str(shown))}\)", text), option


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        ("tran", 2, ["there is no verb 'tran', did you mean 'train'?", "usage: surefoot VERB"]),
        ("train pppo CartPole-v1", 2, ["There is no algorithm 'pppo', did you mean 'ppo'?"]),
        ("train CartPole-v1", 2, ["There is no algorithm 'CartPole-v1'", "Algorithms: "]),
        ("train ppo", 2, ["ENV", "surefoot train ppo --help"]),
        ("train ppo CartPol-v1", 1, ["There is no environment 'CartPol-v1'", "Did you mean CartPole-v1"]),
        ("train ppo no_such_module:make", 1, ["No module named 'no_such_module'", "must be a module that Python can import"]),
        ("train ppo os:getcwd", 1, ["os:getcwd built a str", "return a gymnasium.Env"]),
        ("train ppo CartPole-v1 Acrobot-v1", 2, ["Unrecognized", "Acrobot-v1"]),
        ("train ppo CartPole-v1 --gama 0.9", 2, ["--gama", "Perhaps you meant", "--gamma"]),
        ("train ppo CartPole-v1 --gamma 1.5", 2, ["gamma must lie in [0, 1], got 1.5"]),
        ("train ppo CartPole-v1 --gamma nan", 2, ["gamma must lie in [0, 1], got nan"]),
        ("train ppo CartPole-v1 --clip -1", 2, ["clip must lie in (0, inf), got -1.0"]),
        ("train ppo CartPole-v1 --activation tnah", 2, ["'tnah'", "tanh"]),
        ("train ppo CartPole-v1 --minibatch-size 100", 1, ["minibatch_size=100 does not divide the batch of ", "choose a divisor"]),
        ("train ppo CartPole-v1 --network resnet", 1, ["There is no network 'resnet'", "'module:Class'"]),
        ("train ppo CartPole-v1 --network no_such_module:Net", 1, ["no_such_module"]),
        ("train ppo CartPole-v1 --steps abc", 2, ["--steps", "'abc'"]),
        ("train ppo CartPole-v1 --steps 1.5", 1, ["steps must be a whole number of at least 1, got 1.5"]),
        ("train ppo CartPole-v1 --steps -3", 1, ["steps must be a whole number of at least 1, got -3"]),
        ("train ppo CartPole-v1 --steps inf", 1, ["steps must be a whole number of at least 1, got inf"]),
        ("train ppo CartPole-v1 --envs 0", 1, ["number of environments must be at least 1, got 0"]),
        ("train ppo CartPole-v1 --seed -1", 1, ["seed must be a whole number of at least 0, got -1"]),
        ("train ppo CartPole-v1 --seeds 0", 1, ["seeds must be a whole number of at least 1, got 0"]),
        ("train --resume", 2, ["--resume"]),
        ("train --resume nowhere", 1, ["nowhere holds no run; give a directory that `surefoot train` wrote"]),
        ("train --resume nowhere --gamma 0.5", 2, ["--gamma"]),
        ("eval", 2, ["RUN"]),
        ("eval nowhere", 1, ["nowhere holds no run"]),
        ("plot", 2, ["plot expects at least one run directory"]),
        ("plot nowhere", 1, ["nowhere holds no run"]),
        ("figure", 2, ["NAME"]),
        ("figure clif", 2, ["There is no figure 'clif', did you mean 'cliff'? Figures: cliff, importance, clip, "]),
        ("figure clip --out clip.gif", 1, ["A figure is written to a .png or .svg, got 'clip.gif'"]),
        ("figure clip --out no/clip.png", 1, ["There is no directory no to write clip.png into; make it first."]),
        ("plot --audit", 2, ["plot expects at least one run directory"]),
        ("plot --audit here there", 2, ["plot --audit expects one run, or one directory of seeds, got 2"]),
        ("plot --audit nowhere", 1, ["nowhere holds no run"]),
        ("report", 2, ["RUN"]),
        ("report nowhere", 1, ["nowhere holds no run"]),
        ("list", 2, ["list expects 'algorithms' or 'envs'"]),
        ("list algoritms", 2, ["list expects 'algorithms' or 'envs', got 'algoritms', did you mean 'algorithms'?"]),
        ("check", 2, ["ENV"]),
        ("check CartPole-v1 --steps 0", 1, ["steps must be a whole number of at least 1, got 0"]),
    ],
)
def test_what_cannot_be_done_is_one_clear_message_and_leaves_nothing(
    command: str, code: int, expected: list[str], cli: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    out, err = cli(*command.split(), code=code)
    assert out == ""
    for text in expected:
        assert text in err
    assert "Traceback" not in err
    if code == 1:
        assert re.fullmatch(r"surefoot: .*[.?\w]\n", err), "one sentence"
    assert list(tmp_path.rglob("*.json")) == []
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("steps", "done"), [("1e2", BATCH), ("200", 2 * BATCH), ("1", BATCH)])
def test_training_from_the_shell(steps: str, done: int, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = cli("train", "ppo", "CartPole-v1", "--steps", steps, "--out", "new/run", *SMALL_OPTIONS)
    assert out == "run    new/run\ncurve  new/run/curve.png\nnext   surefoot eval new/run\n"
    lines = err.splitlines()
    assert lines[0] == f"ppo on CartPole-v1 (in JAX, compiled with the learner), 8 environments, seed 0, {done} steps -> new/run"
    assert lines[1] == "compiling the first iteration (the result is cached for the next run) ..."
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[2])
    assert re.fullmatch(rf" +{BATCH} / {done} \( *\d+%\)  (return [\d.]+|no episode yet)  KL [\d.]+  [\d,]+ steps/s", lines[3])
    assert re.fullmatch(rf"done after {done} steps in \d:\d\d", lines[-1])
    assert steps_saved(tmp_path / "new" / "run") == [done]
    assert (tmp_path / "new" / "run" / "curve.png").read_bytes().startswith(PNG)


def test_the_run_is_announced_with_its_preset_and_what_a_resume_can_do(cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    _, err = cli("train", "ppo", "CartPole-v1", "--steps", "1", "--epochs", "1", "--out", "run")
    announced = dict(word.split("=") for word in re.search(r"preset: (.*?)  \(--no-preset", err)[1].split(", "))
    assert announced == {name: str(value) for name, value in PRESETS["ppo", "CartPole-v1"].items() if name != "epochs"}
    (tmp_path / "mine.py").write_text("from support import Walk\nclass Own(Walk):\n    get_state = None\n")
    _, err = cli("train", "ppo", "mine:Own", "--steps", "1", "--out", "own", *SMALL_OPTIONS)
    assert "preset:" not in err
    assert "note: this environment cannot give its state; if the run is stopped and resumed, its episodes start anew" in err
    assert "environment " in err
    assert "acting " in err


def test_a_run_directory_is_never_written_over(whole: Path, run: Path, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    _, err = cli("train", "ppo", "CartPole-v1", "--out", "run", code=1)
    assert err == "surefoot: run holds a run already; continue it with `surefoot train --resume run`, or choose another out.\n"
    assert bits(run) == bits(whole)
    (tmp_path / "file").touch()
    assert "file is a file; choose a directory for out" in cli("train", "ppo", "CartPole-v1", "--out", "file", code=1)[1]


def test_a_fault_in_ones_own_environment_comes_with_its_traceback(cli: Callable[..., tuple[str, str]]) -> None:
    _, err = cli("train", "ppo", "support:Raises", "--out", "run", *SMALL_OPTIONS, code=1)
    assert 'raise RuntimeError("the motor is on fire")' in err
    assert re.search(
        r"surefoot: support:Raises: environment 0 \(seed \d+\), step 46: it raised RuntimeError: the motor is on fire\.\n$", err
    )
    _, err = cli("train", "ppo", "support:NanObservation", "--out", "nan", *SMALL_OPTIONS, code=1)
    assert "Traceback" not in err
    assert "stopped after 256 steps" in err


def test_programmers_can_have_the_traceback(cli: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="There is no environment"):
        cli("train", "ppo", "CartPol-v1")


def test_an_update_that_is_not_finite_exits_with_its_losses(cli: Callable[..., tuple[str, str]]) -> None:
    _, err = cli("train", "ppo", "CartPole-v1", "--learning-rate", "1e30", "--out", "run", *SMALL_OPTIONS, code=1)
    assert re.search(
        r"surefoot: Iteration \d .* was not finite: .*_loss = (nan|inf)\. The step was not taken; .*smaller learning_rate", err
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_help(name: str, cli: Callable[..., tuple[str, str]]) -> None:
    out, err = cli("train", name, "--help")
    assert f"usage: surefoot train {name} [-h] [OPTIONS] ENV" in out
    assert f" {name} options " in out
    assert err == ""


def test_lists(cli: Callable[..., tuple[str, str]]) -> None:
    assert re.search(r"^ppo +Proximal policy optimisation with the clipped surrogate\.$", cli("list", "algorithms")[0], re.MULTILINE)
    out, err = cli("list", "envs")
    in_jax, through_gymnasium = out.split("through Gymnasium")
    through_gymnasium, atari = through_gymnasium.split("Atari, all streams")
    assert "  CartPole-v1 " in in_jax
    assert "  FrozenLake-v1\n" in through_gymnasium
    assert "  ALE/MsPacman-v5\n" in atari
    assert err == ""


def test_environments_of_the_working_directory_are_checked(cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    assert "broken:Walk: 0 errors" in cli("check", "broken:Walk")[0]
    for name, what in {"OldGym": "this is the API of old Gym", "NanObservation": "is nan", "Raises": "the motor is on fire"}.items():
        out, err = cli("check", f"broken:{name}", code=1)
        assert out.startswith(f"broken:{name}: 1 error, ")
        assert what in out
        assert err == ""
    assert "No episode ended within 1000 steps" in cli("check", "broken:Endless")[0]
    assert "There is no environment 'CartPol'" in cli("check", "CartPol", code=1)[0]


def test_plots(run: Path, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    for number in range(2):
        seed = shutil.copytree(run, tmp_path / "seeds" / f"seed-{number}")
        (seed / "run.json").write_text((seed / "run.json").read_text().replace('"seed": 0', f'"seed": {number}'))
    (run / "curve.png").unlink()
    assert cli("plot", "run") == ("run/curve.png\n", "")
    assert (run / "curve.png").read_bytes().startswith(PNG)
    assert cli("plot", "run", "seeds", "--out", "all.svg") == ("all.svg\n", "")
    assert (tmp_path / "all.svg").read_bytes().startswith(SVG)
    assert cli("plot", "seeds", "seeds/seed-0") == ("seeds/curve.png\n", "")
    assert re.fullmatch(r"surefoot: .*'no/where.png'\n", cli("plot", "run", "--out", "no/where.png", code=1)[1])
    assert "Format 'docx' is not supported" in cli("plot", "run", "--out", "curve.docx", code=1)[1]


def test_figures(cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    from surefoot.report.figures import FIGURES, sentence

    assert cli("figure", "clip") == (f"{sentence('clip')}\nfigure clip.png\n", "")
    assert cli("figure", "clip", "--out", "other.svg") == (f"{sentence('clip')}\nfigure other.svg\n", "")
    assert (tmp_path / "clip.png").read_bytes().startswith(PNG)
    assert (tmp_path / "other.svg").read_bytes().startswith(SVG)
    assert f"Figures: {', '.join(FIGURES)}." in cli("figure", "--help")[0]


def test_audits_and_reports(run: Path, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    for number in range(2):
        seed = shutil.copytree(run, tmp_path / "seeds" / f"seed-{number}")
        (seed / "run.json").write_text((seed / "run.json").read_text().replace('"seed": 0', f'"seed": {number}'))
    curve = (run / "curve.png").read_bytes()
    assert cli("plot", "run", "--audit") == ("run/audit.png\n", "")
    assert cli("plot", "--audit", "seeds") == ("seeds/audit.png\n", "")
    assert (run / "audit.png").read_bytes().startswith(PNG)
    assert (run / "curve.png").read_bytes() == curve
    assert cli("plot", "seeds", "--audit", "--out", "audit.svg") == ("audit.svg\n", "")
    assert (tmp_path / "audit.svg").read_bytes().startswith(SVG)
    assert cli("report", "run") == ("run/report.html\n", "")
    assert cli("report", "seeds", "--out", "all.html") == ("all.html\n", "")
    assert "<h1>ppo on CartPole-v1</h1>" in (run / "report.html").read_text()
    assert "seed 0, seed 1" in (tmp_path / "all.html").read_text()
    assert "choose this ending" in cli("report", "run", "--out", "all.pdf", code=1)[1]
    assert "Format 'docx' is not supported" in cli("plot", "run", "--audit", "--out", "audit.docx", code=1)[1]
    (run / "metrics.jsonl").write_text("")
    for command in (["report", "run"], ["plot", "run", "--audit"]):
        assert re.fullmatch(r"surefoot: run has no metrics yet; `surefoot train --resume run` .*\.\n", cli(*command, code=1)[1])


def test_evaluations(run: Path, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = cli("eval", "run", "--episodes", "3")
    pattern = r"run\n" + "".join(
        rf"  {kind} +return [\d.]+ \+- [\d.]+ \(standard deviation\), from [\d.]+ to [\d.]+, 3 episodes\n"
        for kind in ("deterministic", "stochastic")
    )
    assert re.fullmatch(pattern, out)
    assert err == ""
    result = json.loads((run / "evaluation.json").read_text())
    assert result["deterministic"]["returns"] == sf.Run(run).evaluate(3).tolist()
    assert "episodes must be a whole number of at least 1, got 0" in cli("eval", "run", "--episodes", "0", code=1)[1]
    assert json.loads((run / "evaluation.json").read_text()) == result
    for number in range(2):
        shutil.copytree(run, tmp_path / "seeds" / f"seed-{number}")
    assert cli("eval", "seeds", "--episodes", "1")[0].count("1 episodes") == 4
    (run / "policy.safetensors").unlink()
    assert "run/policy.safetensors" in cli("eval", "run", code=1)[1]


def test_resuming_from_the_shell(whole: Path, run: Path, cli: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = cli("train", "--resume", "run")
    assert out == "run    run\ncurve  run/curve.png\nnext   surefoot eval run\n"
    assert err.endswith("continuing from step 384\nnothing left to do: the run is complete\n")
    shutil.rmtree(run / "checkpoints")
    _, err = cli("train", "--resume", "run")
    assert "compiling the first iteration" in err
    assert bits(run) == bits(whole)
    (run / "run.json").write_text("{}")
    assert cli("train", "--resume", "run", code=1) == ("", "surefoot: run/run.json cannot be used: it is not the record of a run.\n")


def test_options_are_taken_out_with_their_values() -> None:
    words = ["ppo", "E", "--seeds", "3", "--seed=4", "--out", "x", "--seeded", "--steps", "5"]
    assert without_options(words, "--seeds", "--seed", "--out") == ["ppo", "E", "--seeded", "--steps", "5"]


def test_each_of_several_seeds_has_the_bits_of_its_own_run_and_one_that_fails_is_named(
    whole: Path, surefoot: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "runs" / "seed-1")  # in the way
    done = surefoot("train", "ppo", "CartPole-v1", "--steps", 3 * BATCH, *SMALL_OPTIONS, "--out", "runs", "--seeds", "3", code=1)
    assert "seed-1 | surefoot: runs/seed-1 holds a run already" in done.stdout
    assert done.stderr == "surefoot: seed-1 of 3 did not finish; the messages are above\n"
    assert bits(tmp_path / "runs" / "seed-0") == bits(whole)
    alone = sf.train(SMALL, "CartPole-v1", steps=3 * BATCH, seed=2, out=tmp_path / "alone", progress=False, preset=False)
    assert bits(tmp_path / "runs" / "seed-2") == bits(alone.path)


def test_nothing_but_the_run_is_on_the_screen(surefoot: Callable[..., Any]) -> None:
    """In a process of its own, with every warning that Python shows by default and the libraries' own noise."""
    done = surefoot("train", "ppo", "gymnasium:Pendulum-v1", "--steps", "256", "--out", "run", *SMALL_OPTIONS)
    kinds = r"ppo on |compiling |compiled in |note: |\s+\d+ / 256 |done after "
    assert [line for line in done.stderr.splitlines() if not re.match(kinds, line)] == []
    assert done.stdout.count("\n") == 3


def test_a_terminal_shows_a_live_line_and_is_left_clean(tmp_path: Path) -> None:
    """The screen is played back: spinner while compiling, then the line of numbers, and nothing of either afterwards."""
    command = [sys.executable, "-m", "surefoot", "train", "ppo", "CartPole-v1", "--steps", "1e9", "--out", "run", *SMALL_OPTIONS]
    terminal, other_end = pty.openpty()
    environment = os.environ | {"COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=other_end, stdout=other_end, stderr=other_end)
    os.close(other_end)
    shown = ""
    try:
        while "left" not in shown or "learning" not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while True:
            shown += os.read(terminal, 4096).decode(errors="replace")
    except OSError:  # the other end is closed
        pass
    finally:
        process.kill()
    assert process.wait() == 130
    assert "⠋ compiling the first iteration" in shown
    numbers = (
        r"[\d,]+ / 1,000,000,000 \( *\d+%\)  return [\d.]+  KL [\d.]+  [\d,]+ steps/s  "
        r"environment \+ acting \d+%, learning \d+%  [\d:]+ left"
    )
    assert re.search(numbers, shown)
    assert "\x1b[?25l\x1b[?25h" in shown, "the cursor is there even if the process is killed"
    screen = played_back(shown)
    assert len(screen) == 5
    assert [line.split()[0] for line in [*screen[:2], *screen[3:]]] == ["ppo", "compiled", "stopped", "surefoot:"]
    assert re.fullmatch(numbers, screen[2].strip())
    assert not any(character in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" for line in screen for character in line)
    assert metrics(tmp_path / "run")[-1]["step"] == steps_saved(tmp_path / "run")[-1]


def played_back(shown: str) -> list[str]:
    """The lines that a terminal is left with."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row -= int(piece[2:-1])
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b") and piece != "\r":
            lines[row] = piece
    return [line for line in lines if line.strip()]
