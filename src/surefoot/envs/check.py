"""`surefoot check ENV`: a thousand random steps through the boundary that training uses, and what they show, in plain words."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from ..types import EnvironmentSpec, HostEnvironment, Observation, counted
from .atari import atari_environment, is_atari
from .boundary import EnvironmentWarning
from .gymnasium import gymnasium_environment
from .minatar import MINATAR

NUM_REPLAYED = 200  # steps that are taken a second time, to see whether the seed decides everything
SLOW_STEP = 1e-3  # seconds; above it the environment, not the learner, sets the pace


class Finding(NamedTuple):
    """One thing that random play has shown."""

    level: Literal["error", "warning", "note"]  # an error stops training; a warning is likely not meant; a note is good to know
    sentence: str
    remedy: str = ""  # empty where there is nothing to do, or where the sentence says it


class Play(NamedTuple):
    """What random play has recorded of M steps in N streams; rows that a vector environment spent on resets are left out."""

    actions: list[np.ndarray[Any, Any]]  # M of [N, ...]
    trace: list[bytes]  # the first steps' observations, rewards and flags
    reward: np.ndarray[Any, Any]  # [steps]
    obs: dict[str, np.ndarray[Any, Any]]  # by path, [3, ...]: mean, standard deviation and largest magnitude of float leaves
    lengths: list[int]  # of the episodes that ended
    num_terminated: int
    num_truncated: int
    seconds: float  # inside `step`


def check(env: Any, num_steps: int = 1000, seed: int = 0) -> list[Finding]:
    """What is wrong or noteworthy about `env` (all that `gymnasium_environment` takes), most serious first.

    One stream plays random legal actions for `num_steps` steps (a `VectorEnv`: all of its streams), and is closed afterwards.
    """
    if isinstance(env, str) and env in MINATAR:
        return [Finding("note", "it is written in JAX and part of this package, whose tests hold every step against recorded play")]
    findings: list[Finding] = []
    host: HostEnvironment | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EnvironmentWarning)
        try:
            host = atari_environment(env, 1) if is_atari(env) else gymnasium_environment(env, num_envs=None)
            play = random_play(host, num_steps, seed)
            findings += [*_about_rewards(play), *_about_episodes(play), *_about_observations(play), *_about_running(host.spec, play)]
            findings += _about_repeating(host, play, seed)
        except ValueError as error:  # spaces that cannot be learned from, and every `EnvironmentFault`
            findings.append(Finding("error", str(error)))
        finally:
            if host is not None:
                host.close()
    for warning in caught:
        name = "" if issubclass(warning.category, EnvironmentWarning) else f"it issues a {warning.category.__name__}: "
        findings.append(Finding("note" if name else "warning", f"{name}{warning.message}"))
    return sorted(dict.fromkeys(findings), key=lambda finding: ("error", "warning", "note").index(finding.level))


def print_findings(name: str, findings: list[Finding]) -> None:
    """Print what `check` found, one sentence a line with its remedy below it."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning", "note")}
    print(f"{name}: " + ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()))
    for finding in findings:
        print(f"  {finding.level:7}  {finding.sentence}")
        if finding.remedy:
            print(f"           -> {finding.remedy}")


def random_play(host: HostEnvironment, num_steps: int, seed: int) -> Play:
    """Random legal actions for `num_steps` steps of every stream."""
    space, num_envs = host.spec.action_space, host.spec.num_envs
    space.seed(seed)
    obs, mask = host.reset(seed)
    moments = {path: np.zeros((3, *leaf.shape[1:])) for path, leaf in float_leaves(host.spec.observation_space, obs)}
    actions, trace, rewards, lengths = [], [_bytes(obs)], [], []
    elapsed = np.zeros(num_envs, np.int64)
    num_terminated = num_truncated = 0
    seconds = 0.0
    for index in range(num_steps):
        actions.append(np.stack([_random_action(space, mask, stream) for stream in range(num_envs)]))
        began = time.perf_counter()
        step = host.step(actions[-1])
        seconds += time.perf_counter() - began
        obs, mask = step.obs, step.action_mask
        rewards.append(step.reward[step.valid])
        elapsed += step.valid
        _, ended = counted(step)
        lengths += elapsed[ended].tolist()
        elapsed[ended] = 0
        num_terminated += int((step.terminated & ended).sum())
        num_truncated += int((step.truncated & ~step.terminated & ended).sum())
        for path, leaf in float_leaves(host.spec.observation_space, obs):
            wide = leaf.astype(np.float64)
            moments[path][0] += wide.mean(0)
            moments[path][1] += np.square(wide).mean(0)
            np.maximum(moments[path][2], np.abs(wide).max(0), out=moments[path][2])
        if index < NUM_REPLAYED:
            trace.append(_bytes((obs, step.reward, step.terminated, step.truncated)))
    for sums in moments.values():
        sums[:2] /= num_steps
        sums[1] = np.sqrt(np.maximum(sums[1] - np.square(sums[0]), 0.0))
    return Play(actions, trace, np.concatenate(rewards), moments, lengths, num_terminated, num_truncated, seconds)


def float_leaves(space: spaces.Space[Any], obs: Observation, path: str = "") -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(path, array) of every leaf that is numbers on a scale, not categories or an image."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from float_leaves(part, obs[key], f"{path}/{key}".lstrip("/"))
    elif isinstance(space, spaces.Box) and space.dtype != np.uint8:
        yield path, obs


def _random_action(space: spaces.Space[Any], mask: Any, stream: int) -> Any:
    return space.sample() if mask is None else space.sample(mask[stream].astype(np.int8))


def _bytes(tree: Any) -> bytes:
    if isinstance(tree, (dict, tuple)):
        return b"".join(_bytes(part) for part in (tree.values() if isinstance(tree, dict) else tree))
    return np.asarray(tree).tobytes()


def _about_rewards(play: Play) -> Iterator[Finding]:
    low, high, deviation = float(play.reward.min()), float(play.reward.max()), float(play.reward.std())
    if low == high and len(set(play.lengths)) <= 1:
        yield Finding(
            "warning",
            f"Every step has the reward {low:g}, and no two episodes differ in length: nothing that was done made a difference.",
            "Give a reward that random play sometimes changes; where success is rare, reward progress towards it.",
        )
    elif low == high == 0.0:
        yield Finding("note", "Random play saw no reward but 0.", "Where success is that rare, reward progress towards it.")
    elif deviation > 10.0 or max(abs(low), abs(high)) > 100.0:
        yield Finding(
            "note",
            f"The reward is on a large scale: from {low:g} to {high:g}, standard deviation {deviation:.3g}.",
            "Use normalise_reward=True.",
        )


def _about_episodes(play: Play) -> Iterator[Finding]:
    if not play.lengths:
        yield Finding(
            "warning",
            f"No episode ended within {len(play.actions)} steps of random play.",
            "If it has no time limit, give it one: max_episode_steps in gymnasium.register, or gymnasium.wrappers.TimeLimit.",
        )
        return
    shortest, longest = min(play.lengths), max(play.lengths)
    if longest == 1:
        yield Finding(
            "warning",
            "Every episode lasts one step.",
            "Meant as a bandit, this is right; else return terminated=False until the task is over.",
        )
    yield Finding(
        "note",
        f"{len(play.lengths)} episodes ended, {play.num_terminated} terminated and {play.num_truncated} truncated, "
        f"after {shortest} to {longest} steps.",
    )


def _about_observations(play: Play) -> Iterator[Finding]:
    for path, (mean, deviation, largest) in play.obs.items():
        name = f"The observation {path!r}" if path else "The observation"
        if deviation.max(initial=0.0) > 5.0 or np.abs(mean).max(initial=0.0) > 10.0:
            yield Finding(
                "note",
                f"{name} is on a large scale: standard deviations up to {deviation.max():.3g}, magnitudes up to {largest.max():.3g}.",
                "Use normalise_observation=True.",
            )
        num_constant = int((deviation <= 1e-7 * np.maximum(largest, 1e-30)).sum())
        if num_constant:
            yield Finding("note", f"{name} has {num_constant} of {deviation.size} numbers that never changed.")


def _about_running(spec: EnvironmentSpec, play: Play) -> Iterator[Finding]:
    seconds = play.seconds / max(play.reward.size, 1)
    slow = seconds > SLOW_STEP
    yield Finding(
        "note",
        f"A step takes {seconds * 1e6:.0f} us{', which is slow: the environment will set the pace' if slow else ''}.",
        "Run its copies in processes, with gymnasium.vector.AsyncVectorEnv." if slow and not is_atari(spec.name) else "",
    )
    if spec.resume == "exact":
        yield Finding("note", "A stopped run can be resumed exactly.")
    else:
        yield Finding(
            "note",
            "A stopped run can be resumed, but its episodes restart: the state of the environment cannot be saved.",
            "Offer get_state() -> (dict of arrays, JSON object) and set_state(arrays, info) on the environment's own class."
            if not is_atari(spec.name)
            else "",
        )


def _about_repeating(host: HostEnvironment, play: Play, seed: int) -> Iterator[Finding]:
    """Play the beginning again: with one seed and the same actions, everything should come out the same."""
    trace = [_bytes(host.reset(seed)[0])]
    for action in play.actions[:NUM_REPLAYED]:
        step = host.step(action)
        trace.append(_bytes((step.obs, step.reward, step.terminated, step.truncated)))
    if trace != play.trace:
        first = next(index for index, (old, new) in enumerate(zip(play.trace, trace, strict=True)) if old != new)
        yield Finding(
            "warning",
            f"The same seed and actions give something else at step {first}, so a run cannot be repeated.",
            "Call super().reset(seed=seed) in reset, draw from self.np_random only, and keep nothing from one seeded reset to the next.",
        )
