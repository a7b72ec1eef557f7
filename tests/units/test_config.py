"""Settings: what is refused and in which words, what is converted, and what every algorithm promises of its own."""

import ast
import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import surefoot
from surefoot import PPO
from surefoot.algorithms import ALGORITHMS
from surefoot.config import check_bounds, configuration, nearest
from surefoot.training.presets import PRESETS, preset_for, with_settings

PACKAGE = Path(surefoot.__file__).parent


@configuration
class Settings:
    rate: float = 0.5
    count: int = 3
    limit: float | None = None
    widths: tuple[int, ...] = (4, 4)
    kind: Literal["short", "long"] = "short"
    is_on: bool = True
    name: str = "plain"

    def __post_init__(self):
        check_bounds(self, rate="[0, 1)", count="[1, inf)", limit="(0, inf]")


def test_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"^Settings has no setting 'rat', did you mean 'rate'\? Settings: rate, count, limit, .*name\.$"):
        Settings(rat=0.1)
    with pytest.raises(ValueError, match=r"^Settings has no setting 'zzz'\. Settings: rate"):
        Settings(zzz=0.1)
    assert nearest("gama", ["gamma", "gae_lambda"]) == ", did you mean 'gamma'?"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("count", 1e3, 1000),
        ("count", np.int64(7), 7),
        ("count", np.float32(2.0), 2),
        ("rate", 0, 0.0),
        ("rate", np.float64(0.25), 0.25),
        ("rate", np.float32(0.25), 0.25),
        ("limit", None, None),
        ("limit", 2, 2.0),
        ("limit", math.inf, math.inf),
        ("widths", [8.0, 9], (8, 9)),
        ("widths", (), ()),
        ("kind", "long", "long"),
        ("is_on", False, False),
    ],
)
def test_values_become_the_annotated_type_where_nothing_is_lost(name, given, expected):
    value = getattr(Settings(**{name: given}), name)
    assert value == expected
    assert type(value) is type(expected)
    assert not isinstance(value, tuple) or all(type(item) is int for item in value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 1.5}, r"Settings\.count expects int, got 1\.5 \(float\)"),
        ({"count": True}, r"Settings\.count expects int, got True \(bool\)"),
        ({"count": "3"}, r"Settings\.count expects int, got '3' \(str\)"),
        ({"count": None}, r"Settings\.count expects int, got None"),
        ({"count": math.inf}, r"Settings\.count expects int, got inf"),
        ({"count": math.nan}, r"Settings\.count expects int, got nan"),
        ({"rate": "fast"}, r"Settings\.rate expects float, got 'fast' \(str\)"),
        ({"rate": False}, r"Settings\.rate expects float, got False \(bool\)"),
        ({"rate": 10**400}, r"Settings\.rate expects float"),
        ({"limit": "none"}, r"Settings\.limit expects float or NoneType, got 'none'"),
        ({"widths": 64}, r"Settings\.widths expects tuple, got 64 \(int\)"),
        ({"widths": [64, 0.5]}, r"Settings\.widths expects int, got 0\.5"),
        ({"kind": "middle"}, r"Settings\.kind expects one of 'short', 'long', got 'middle' \(str\)"),
        ({"is_on": 1}, r"Settings\.is_on expects bool, got 1 \(int\)"),
        ({"name": 5}, r"Settings\.name expects str, got 5 \(int\)"),
    ],
)
def test_wrong_types_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(**settings)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 0.999}, {"count": 1}, {"limit": math.inf}, {"limit": 1e-9}, {"limit": None}])
def test_values_on_closed_ends_pass(settings):
    Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "interval"),
    [
        ({"rate": 1.0}, r"\[0, 1\)"),
        ({"rate": -1e-9}, r"\[0, 1\)"),
        ({"rate": math.nan}, r"\[0, 1\)"),
        ({"count": 0}, r"\[1, inf\)"),
        ({"limit": 0.0}, r"\(0, inf\]"),
        ({"limit": math.nan}, r"\(0, inf\]"),
    ],
)
def test_values_outside_are_refused_with_the_interval(settings, interval):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^Settings\.{name} must lie in {interval}, got ") as error:
        Settings(**settings)
    assert str(error.value).endswith(f"got {value!r}.")


def test_an_open_infinite_end_excludes_infinity():
    with pytest.raises(ValueError, match=r"learning_rate must lie in \(0, inf\)"):
        PPO(learning_rate=math.inf)


def test_explicit_holds_what_was_given_and_does_not_tell_settings_apart():
    given = Settings(rate=0.5, widths=[4, 4])
    assert given.explicit == {"rate", "widths"}
    assert Settings().explicit == frozenset()
    assert given == Settings()
    assert hash(given) == hash(Settings())
    assert "explicit" not in dataclasses.asdict(given)


def test_settings_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rate = 0.1
    with pytest.raises(TypeError):
        Settings(0.1)


def test_settings_are_hashable_by_value():
    assert {PPO(hidden=[3]): "one program"}[PPO(hidden=(3,))] == "one program"
    assert PPO(hidden=(3,)) != PPO(hidden=(4,))


# What every algorithm's configuration promises.


def class_body(config):
    (definition,) = (node for node in ast.parse(source_of(config)).body if isinstance(node, ast.ClassDef) and node.name == config.__name__)
    return definition.body


def source_of(config):
    return Path(inspect.getsourcefile(config)).read_text()


def undocumented(config):
    """Settings whose definition no docstring follows: their --help would be empty."""
    documented = {
        statement.target.id
        for one in config.__mro__
        if dataclasses.is_dataclass(one)
        for statement, following in itertools.pairwise(class_body(one))
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    return {field.name for field in dataclasses.fields(config)} - documented


def readings(tree, holder="config"):
    """What the code in `tree` reads as `config.name`, or as `getattr(config, "name", ...)` where only some methods have it."""
    read = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == holder:
                read.add(attribute)
            case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id=name), ast.Constant(value=attribute), *_]) if name == holder:
                read.add(attribute)
    return read


def read_by_properties(config):
    """What a configuration reads of itself to give it out under another name."""
    methods = [node for node in class_body(config) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    return {name for node in methods for name in readings(node, "self")}


def read_by_shared_functions(source):
    """What the functions read that a `source` takes from other rooms of the package."""
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level in (1, 2):
            path = PACKAGE.joinpath(*node.module.split(".")).with_suffix(".py")
            names = {alias.name for alias in node.names}
            for definition in ast.parse(path.read_text()).body:
                if isinstance(definition, ast.FunctionDef) and definition.name in names:
                    read |= readings(definition)
    return read


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_every_setting_is_documented_and_read(algorithm):
    assert algorithm.config.__doc__
    assert undocumented(algorithm.config) == set()
    read_by_all = readings(ast.parse((PACKAGE / "training" / "engine.py").read_text()))
    shared = {source_of(one) for one in algorithm.config.__mro__ if dataclasses.is_dataclass(one)}
    read = read_by_all.union(*(readings(ast.parse(one)) | read_by_shared_functions(one) for one in shared))
    read |= {name for one in algorithm.config.__mro__ if dataclasses.is_dataclass(one) for name in read_by_properties(one)}
    assert {field.name for field in dataclasses.fields(algorithm.config)} - read == set()


def test_a_setting_without_documentation_or_reader_is_found():
    assert undocumented(Settings) == {field.name for field in dataclasses.fields(Settings)}
    assert readings(ast.parse("def update(config):\n    return config.rate * other.count\n# config.limit")) == {"rate"}
    assert readings(ast.parse("getattr(config, 'rate', 0) + getattr(other, 'count', 0)")) == {"rate"}
    assert read_by_shared_functions("from ..minibatches import check_minibatch") == {"num_steps", "minibatch_size"}
    assert read_by_shared_functions("from ..minibatches import descend") == set()


SHARED = {
    "normalise_observation": True,
    "normalise_reward": True,
    "state_discount": False,
    "network": "mlp",
    "hidden": (64, 64),
    "activation": "tanh",
    "shared_trunk": False,
    "memory": "none",
    "memory_size": 64,
    "initial_log_std": 0.0,
}
OFF_POLICY = {
    "gamma": 0.99,
    "replay_size": 1_000_000,
    "learning_starts": 1_000,
    "collect_beside_learning": False,
    "network": "mlp",
    "activation": "relu",
}
VALUES_OF_ACTIONS = OFF_POLICY | {
    "num_steps": 4,
    "update_to_data": 0.25,
    "minibatch_size": 32,
    "learning_rate": 1e-4,
    "learning_rate_schedule": "constant",
    "max_grad_norm": 10.0,
    "target_interval": 2_500,
    "target_rate": 1.0,
    "exploration": "epsilon",
    "exploration_fraction": 0.1,
    "final_epsilon": 0.05,
    "double": False,
    "dueling": False,
    "n_step": 1,
    "distribution": "none",
    "num_atoms": 51,
    "value_range": (-10.0, 10.0),
    "prioritised": False,
    "priority_exponent": 0.5,
    "importance_exponent": 0.4,
    "hidden": (64, 64),
}
PATHWISE = OFF_POLICY | {
    "num_steps": 1,
    "update_to_data": 1.0,
    "minibatch_size": 256,
    "actor_learning_rate": 3e-4,
    "critic_learning_rate": 3e-4,
    "max_grad_norm": math.inf,
    "target_rate": 0.005,
    "hidden": (256, 256),
}
FLAGS = {
    "q-learning": {
        "gamma": 0.99,
        "num_steps": 8,
        "learning_rate": 0.1,
        "learning_rate_schedule": "constant",
        "initial_value": 0.0,
        "exploration_fraction": 0.5,
        "final_epsilon": 0.05,
    },
    "dqn": VALUES_OF_ACTIONS,
    "rainbow": VALUES_OF_ACTIONS
    | {
        "learning_rate": 6.25e-5,
        "exploration": "noisy",
        "double": True,
        "dueling": True,
        "n_step": 3,
        "distribution": "categorical",
        "prioritised": True,
    },
    "ddpg": PATHWISE | {"exploration_noise": 0.1},
    "td3": PATHWISE | {"exploration_noise": 0.1, "policy_delay": 2, "target_noise": 0.2, "target_noise_clip": 0.5},
    "off-policy-actor-critic": PATHWISE
    | {
        "critic_target": "one_step",
        "sequence_length": 8,
        "trace_decay": 1.0,
        "action_samples": 8,
        "entropy_coef": 0.01,
        "initial_log_std": 0.0,
    },
    "sac": PATHWISE | {"temperature": None, "target_entropy": None, "temperature_learning_rate": 3e-4},
    "ppo": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip": 0.2,
        "clip_schedule": "constant",
        "dual_clip": None,
        "num_steps": 256,
        "epochs": 10,
        "minibatch_size": 64,
        "sequence_length": 16,
        "learning_rate": 3e-4,
        "learning_rate_schedule": "constant",
        "max_grad_norm": 0.5,
        "entropy_coef": 0.0,
        "value_coef": 0.5,
        "clip_value": None,
        "target_kl": None,
        "normalise_advantage": True,
    },
    "ppo-penalty": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "kl_penalty_coef": 1.0,
        "target_kl": 0.01,
        "kl_direction": "old||new",
        "num_steps": 256,
        "epochs": 10,
        "minibatch_size": 64,
        "sequence_length": 16,
        "learning_rate": 3e-4,
        "learning_rate_schedule": "constant",
        "max_grad_norm": 0.5,
        "entropy_coef": 0.0,
        "value_coef": 0.5,
        "normalise_advantage": True,
    },
    "trpo": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "max_kl": 0.01,
        "kl_direction": "old||new",
        "cg_iterations": 10,
        "cg_damping": 0.1,
        "fisher_fraction": 1.0,
        "backtrack_factor": 0.8,
        "backtrack_tries": 15,
        "num_steps": 256,
        "critic_epochs": 10,
        "minibatch_size": 64,
        "critic_learning_rate": 1e-3,
    },
    "actor-critic": SHARED
    | {
        "gamma": 0.99,
        "critic": "value",
        "control_variate": False,
        "target": "td",
        "fit_first": True,
        "num_steps": 16,
        "learning_rate": 1e-3,
        "critic_epochs": 10,
        "minibatch_size": None,
        "critic_learning_rate": 1e-3,
    },
    "trpo-penalty": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "max_kl": 0.01,
        "kl_direction": "old||new",
        "multiplier": 2.0,
        "multiplier_step_size": 10.0,
        "inner_steps": 30,
        "learning_rate": 1e-2,
        "num_steps": 256,
        "critic_epochs": 10,
        "minibatch_size": 64,
        "critic_learning_rate": 1e-3,
    },
    "cem": {
        "gamma": 1.0,
        "population": 40,
        "elite_fraction": 0.2,
        "episodes": 1,
        "initial_std": 0.5,
        "extra_noise": 0.1,
        "noise_generations": 10,
        "num_steps": 32,
        "normalise_observation": True,
        "network": "mlp",
        "hidden": (),
        "activation": "tanh",
    },
    "a2c": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "num_steps": 5,
        "optimiser": "rmsprop",
        "learning_rate": 7e-4,
        "learning_rate_schedule": "linear",
        "max_grad_norm": 0.5,
        "entropy_coef": 0.01,
        "value_coef": 0.5,
        "normalise_advantage": False,
    },
    "a2c-trust-region": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "max_kl_slope": 1.0,
        "average_decay": 0.99,
        "num_steps": 5,
        "optimiser": "rmsprop",
        "learning_rate": 7e-4,
        "learning_rate_schedule": "linear",
        "max_grad_norm": 0.5,
        "entropy_coef": 0.01,
        "value_coef": 0.5,
        "normalise_advantage": False,
    },
    "vpg-adaptive": SHARED
    | {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "target_kl": 2e-3,
        "learning_rate": 1e-3,
        "normalise_advantage": True,
        "num_steps": 256,
        "critic_epochs": 10,
        "minibatch_size": 64,
        "critic_learning_rate": 1e-3,
    },
    "reinforce": SHARED
    | {
        "gamma": 0.99,
        "credit": "reward_to_go",
        "discounting": "reward_to_go",
        "baseline": "value",
        "epochs": 1,
        "importance": "none",
        "self_normalised": False,
        "max_weight": None,
        "normalise_advantage": True,
        "num_steps": 256,
        "window": 1000,
        "learning_rate": 3e-3,
        "critic_epochs": 10,
        "minibatch_size": 64,
        "critic_learning_rate": 1e-3,
    },
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_flags_and_defaults_are_frozen(name):
    """A change here breaks somebody's command line or changes their results: it belongs in the changelog, with a reason."""
    assert dataclasses.asdict(ALGORITHMS[name].config()) == FLAGS[name]


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("clip", (1e-6, 10.0), (0.0, -0.2)),
        ("dual_clip", (1.01, None), (1.0, 0.5)),
        ("num_steps", (1,), (0, -1)),
        ("epochs", (1,), (0,)),
        ("minibatch_size", (1,), (0,)),
        ("sequence_length", (1,), (0,)),
        ("memory_size", (1,), (0,)),
        ("learning_rate", (1e-9,), (0.0, -1e-3)),
        ("max_grad_norm", (0.5, math.inf), (0.0,)),
        ("entropy_coef", (0.0, 1.0), (-0.01,)),
        ("value_coef", (0.0, 1.0), (-0.01,)),
        ("clip_value", (0.2, None), (0.0,)),
        ("target_kl", (0.01, None), (0.0,)),
    ],
)
def test_bounds_of_ppo(name, inside, outside):
    for value in inside:
        PPO(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^PPO\.{name} must lie in"):
            PPO(**{name: value})


@pytest.mark.parametrize("algorithm", ["off-policy-actor-critic", "dqn", "rainbow", "ddpg", "td3", "sac"])
@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("num_steps", (1,), (0,)),
        ("update_to_data", (0.01, 20.0), (0.0, -1.0)),
        ("minibatch_size", (1,), (0,)),
        ("replay_size", (4,), (3,)),
        ("learning_starts", (1,), (0,)),
        ("max_grad_norm", (0.5, math.inf), (0.0,)),
        ("target_rate", (1e-3, 1.0), (0.0, 1.01)),
        # of the methods that value every action
        ("learning_rate", (1e-9,), (0.0,)),
        ("n_step", (1,), (0,)),
        ("target_interval", (1,), (0,)),
        ("exploration_fraction", (1e-3, 1.0), (0.0, 1.01)),
        ("final_epsilon", (0.0, 1.0), (-0.01, 1.01)),
        ("num_atoms", (2,), (1,)),
        ("priority_exponent", (0.0, 1.0), (-0.01, 1.01)),
        ("importance_exponent", (0.0, 1.0), (-0.01, 1.01)),
        # of those whose actor follows the gradient of a critic
        ("actor_learning_rate", (1e-9,), (0.0,)),
        ("critic_learning_rate", (1e-9,), (0.0,)),
        ("exploration_noise", (0.0, 2.0), (-0.01, math.inf)),
        ("policy_delay", (1,), (0,)),
        ("target_noise", (0.0,), (-0.01,)),
        ("target_noise_clip", (0.0,), (-0.01,)),
        ("temperature", (1e-3, None), (0.0,)),
        ("target_entropy", (-1.0, 0.0, None), ()),
        ("temperature_learning_rate", (1e-9,), (0.0,)),
        # of the one whose actor is stochastic, and learns from what others did
        ("sequence_length", (1,), (0,)),
        ("trace_decay", (0.0, 1.0), (-0.01, 1.01)),
        ("action_samples", (2,), (1,)),
        ("entropy_coef", (0.0,), (-0.01,)),
    ],
)
def test_bounds_of_what_learns_from_a_replay(algorithm, name, inside, outside):
    config = ALGORITHMS[algorithm].config
    if name not in {field.name for field in dataclasses.fields(config)}:
        pytest.skip(f"{algorithm} has no such setting")
    used = {"exploration": "epsilon", "distribution": "quantile", "prioritised": True} if "dueling" in FLAGS[algorithm] else {}
    if "critic_target" in FLAGS[algorithm]:
        used = {"critic_target": "retrace", "sequence_length": 1}
    for value in inside:
        config(**used | {name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{config.__name__}\.{name} must lie in"):
            config(**used | {name: value})


@pytest.mark.parametrize("value_range", [(1.0, 1.0), (2.0, 1.0), (0.0,), (0.0, 1.0, 2.0), (math.nan, 1.0)])
def test_a_range_of_returns_has_a_lower_and_an_upper_end(value_range):
    with pytest.raises(ValueError, match=r"^DQN\.value_range expects the lowest and the highest return, got \("):
        ALGORITHMS["dqn"].config(distribution="categorical", value_range=value_range)


@pytest.mark.parametrize(
    ("algorithm", "settings", "name", "needs"),
    [
        ("dqn", {"num_atoms": 7}, "num_atoms", "a distribution"),
        ("dqn", {"value_range": (0.0, 1.0)}, "value_range", "distribution='categorical'"),
        ("dqn", {"distribution": "quantile", "value_range": (0.0, 1.0)}, "value_range", "distribution='categorical'"),
        ("dqn", {"priority_exponent": 0.7}, "priority_exponent", "prioritised=True"),
        ("dqn", {"importance_exponent": 0.7}, "importance_exponent", "prioritised=True"),
        ("dqn", {"exploration": "noisy", "final_epsilon": 0.1}, "final_epsilon", "exploration='epsilon'"),
        ("rainbow", {"exploration_fraction": 0.2}, "exploration_fraction", "exploration='epsilon'"),
        ("rainbow", {"distribution": "none", "num_atoms": 7}, "num_atoms", "a distribution"),
        ("rainbow", {"prioritised": False, "priority_exponent": 0.7}, "priority_exponent", "prioritised=True"),
        ("off-policy-actor-critic", {"sequence_length": 4}, "sequence_length", "critic_target='retrace' or 'vtrace'"),
        ("off-policy-actor-critic", {"trace_decay": 0.5}, "trace_decay", "critic_target='retrace' or 'vtrace'"),
        (
            "off-policy-actor-critic",
            {"critic_target": "vtrace", "action_samples": 4},
            "action_samples",
            "critic_target='one_step' or 'retrace'",
        ),
        ("sac", {"temperature": 0.2, "temperature_learning_rate": 1e-3}, "temperature_learning_rate", "temperature=None"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused_with_what_it_is_for(algorithm, settings, name, needs):
    config = ALGORITHMS[algorithm].config
    with pytest.raises(ValueError, match=rf"^{config.__name__}\.{name} is for {needs} only; leave it out, or set"):
        config(**settings)


def test_settings_that_are_read_are_not_refused():
    config = ALGORITHMS["dqn"].config
    config(distribution="quantile", num_atoms=7)
    config(distribution="categorical", num_atoms=7, value_range=(0.0, 1.0))
    config(prioritised=True, priority_exponent=0.7, importance_exponent=0.5)
    config(num_atoms=51, value_range=(-10.0, 10.0), priority_exponent=0.5)  # what a preset or a record may say: the defaults
    ALGORITHMS["rainbow"].config(exploration="epsilon", final_epsilon=0.2)
    for target in ("retrace", "vtrace"):
        ALGORITHMS["off-policy-actor-critic"].config(critic_target=target, sequence_length=4, trace_decay=0.5)
    with pytest.raises(ValueError, match=r"SAC\.target_entropy is for temperature=None only; leave it out, or set temperature=None too"):
        ALGORITHMS["sac"].config(temperature=0.2, target_entropy=-1.0)


@pytest.mark.parametrize("algorithm", ["reinforce", "vpg-adaptive", "actor-critic", "trpo", "trpo-penalty"])
def test_a_shared_trunk_is_refused_where_the_critic_is_fitted_apart(algorithm):
    with pytest.raises(ValueError, match=r"fits its critic apart from the policy's step.*leave shared_trunk at False, or use ppo or a2c"):
        ALGORITHMS[algorithm].config(shared_trunk=True)


def test_memories_are_refused_where_rows_would_miss_them():
    with pytest.raises(ValueError, match=r"reinforce keeps rows of unfinished episodes .* use a2c or ppo with a memory"):
        ALGORITHMS["reinforce"].config(memory="gru")
    with pytest.raises(ValueError, match="fisher_fraction leaves out steps, and a memory needs them all"):
        ALGORITHMS["trpo"].config(memory="gru", fisher_fraction=0.5)


def test_sequences_of_a_replay_divide_its_minibatches():
    config = ALGORITHMS["off-policy-actor-critic"].config
    with pytest.raises(ValueError, match="sequence_length=7 must divide minibatch_size=64; choose a divisor"):
        config(critic_target="vtrace", sequence_length=7, minibatch_size=64)
    config(minibatch_size=63)  # of which transitions are drawn one by one


def test_a_control_variate_wants_two_critics_of_earlier_batches():
    config = ALGORITHMS["actor-critic"].config
    for settings in ({}, {"critic": "both"}, {"critic": "action_value", "fit_first": False}, {"fit_first": False}):
        with pytest.raises(ValueError, match=r"control_variate=True wants .*; set critic='both' and fit_first=False too"):
            config(control_variate=True, **settings)
    config(control_variate=True, critic="both", fit_first=False)


# Presets.


@pytest.mark.parametrize(("algorithm", "environment"), PRESETS)
def test_a_preset_makes_sense_and_yields_to_the_user(algorithm, environment):
    config, preset = ALGORITHMS[algorithm].config, PRESETS[algorithm, environment]
    assert preset_for(config(), environment) == preset == preset_for(config(), f"gymnasium:{environment}")
    first, *others = preset
    with_default = config(**{first: getattr(config(), first)})
    assert preset_for(with_default, environment) == {name: preset[name] for name in others}
    together = with_settings(with_default, preset_for(with_default, environment))
    assert getattr(together, first) == getattr(config(), first)
    assert all(getattr(together, name) == preset[name] for name in others)


def test_an_unknown_environment_has_no_preset():
    config = PPO(clip=0.1)
    assert preset_for(config, "Nowhere-v0") == {}
    assert with_settings(config, {}) is config
