"""What holds for every public function: shapes that would broadcast are refused, and the dtype of the input is kept."""

import importlib
import inspect
import pkgutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surefoot.math

pytestmark = pytest.mark.x64

T, N = 6, 4
FLAGS = ("terminated", "truncated")
WEIGHT = ("log_prob", "old_log_prob", *FLAGS)
BATCH = ("reward", "next_value", *FLAGS)

# Array arguments, by the names of the parameters, and options of each function. One that is missing here fails the first test.
FUNCTIONS = {
    "distributional.categorical_cross_entropy": (("log_probability", "target_probability"), {}),
    "distributional.categorical_projection": (("probability", "atom", "support"), {}),
    "distributional.quantile_huber_loss": (("quantile", "target"), {}),
    "divergences.adaptive_kl_coefficient": (("coefficient", "kl"), {"target": 0.01}),
    "divergences.categorical_kl": (("log_prob_p", "log_prob_q"), {}),
    "divergences.gaussian_kl": (("mean_p", "log_std_p", "mean_q", "log_std_q"), {}),
    "divergences.kl_k1": (("log_prob", "ref_log_prob"), {}),
    "divergences.kl_k2": (("log_prob", "ref_log_prob"), {}),
    "divergences.kl_k3": (("log_prob", "ref_log_prob"), {}),
    "divergences.proportional_kl_coefficient": (("coefficient", "kl"), {"target": 6.0, "gain": 0.1}),
    "episodes.continues": (FLAGS, {}),
    "episodes.episode_cumsum": (("x", *FLAGS), {}),
    "episodes.episode_sum": (("x", *FLAGS), {}),
    "episodes.linear_recurrence": (("term", "decay"), {}),
    "evolution.decaying_noise": (("generation",), {"start": 0.1, "generations": 10}),
    "evolution.refit_gaussian": (("elite",), {"extra_variance": 0.1}),
    "evolution.select_elites": (("candidate", "fitness"), {"num_elites": 2}),
    "policy_gradient.action_dependent_advantage": (("advantage", "control_variate", "expected_control_variate"), {}),
    "policy_gradient.check_support": (("log_prob_p", "log_prob_q"), {}),
    "policy_gradient.clip_weight": (("weight",), {"maximum": 1.5}),
    "policy_gradient.clipped_surrogate_loss": (("ratio", "advantage"), {"clip": 0.2, "dual_clip": 3.0}),
    "policy_gradient.expected_control_variate": (("log_probs", "control_variate"), {}),
    "policy_gradient.importance_ratio": (("log_prob", "old_log_prob"), {}),
    "policy_gradient.kl_penalised_surrogate_loss": (("ratio", "advantage", "kl"), {"penalty_coef": 1.0}),
    "policy_gradient.linear_control_variate": (("action", "mean", "slope"), {}),
    "policy_gradient.score_function_loss": (("log_prob", "advantage"), {}),
    "policy_gradient.self_normalise": (("weight", "mask"), {}),
    "policy_gradient.step_importance_weight": (WEIGHT, {}),
    "policy_gradient.surrogate_loss": (("ratio", "advantage"), {}),
    "policy_gradient.trajectory_importance_weight": (WEIGHT, {}),
    "preferences.bradley_terry_loss": (("chosen", "rejected"), {}),
    "preferences.group_mean": (("reward", "mask"), {}),
    "preferences.group_relative_advantage": (("reward", "mask"), {}),
    "preferences.kl_penalised_reward": (("score", "kl", "last"), {"penalty_coef": 0.1}),
    "preferences.leave_one_out_advantage": (("reward", "mask"), {}),
    "reduce.effective_sample_size": (("weight", "mask"), {}),
    "reduce.explained_variance": (("value", "value_target", "mask"), {}),
    "reduce.leave_one_out_mean": (("x", "mask"), {}),
    "reduce.masked_mean": (("x", "mask"), {}),
    "reduce.masked_variance": (("x", "mask"), {}),
    "reduce.mean_standard_error": (("x", "mask"), {}),
    "reduce.polyak": (("target", "online"), {"rate": 0.1}),
    "reduce.standardise": (("x", "mask"), {}),
    "returns.gae": (("reward", "value", "next_value", *FLAGS), {"discount": 0.9, "gae_lambda": 0.8}),
    "returns.lambda_return": (BATCH, {"discount": 0.9, "trace_decay": 0.8}),
    "returns.n_step_return": (BATCH, {"discount": 0.9, "num_steps": 3}),
    "returns.reward_to_go": (BATCH, {"discount": 0.9}),
    "returns.retrace": (("reward", "q_taken", "next_value", "ratio", *FLAGS), {"discount": 0.9, "gae_lambda": 0.8}),
    "returns.time_discount": (("time",), {"discount": 0.9}),
    "returns.total_return": (("reward", "time", *FLAGS), {"discount": 0.9}),
    "returns.vtrace": (("reward", "value", "next_value", "ratio", *FLAGS), {"discount": 0.9, "gae_lambda": 0.8}),
    "trust_region.adaptive_step_size": (("step_size", "kl"), {"target": 2e-3}),
    "trust_region.conjugate_gradient": (("target",), {"product": lambda vector: 2 * vector, "num_iterations": 3}),
    "trust_region.dual_ascent": (("multiplier", "divergence"), {"max_divergence": 0.01, "step_size": 3.0}),
    "trust_region.project_onto_half_space": (("vector", "normal"), {"bound": 0.1}),
    "trust_region.trust_region_scale": (("direction", "curvature_times_direction"), {"max_divergence": 0.01}),
    "values.clipped_value_loss": (("value", "old_value", "value_target"), {"clip": 0.2}),
    "values.double_q_value": (("online_q", "target_q", "action_mask"), {}),
    "values.huber": (("error",), {"delta": 1.0}),
    "values.max_value": (("q", "action_mask"), {}),
    "values.n_step_target": (("reward", "next_value", "discount"), {}),
    "values.squared_value_loss": (("value", "value_target"), {}),
    "values.td_target": (("reward", "next_value", "terminated"), {"discount": 0.9}),
    "values.twin_minimum": (("q",), {}),
}
TAKES_NO_ARRAYS = {"shapes.check_same_shape", "trust_region.backtracking_line_search", "trust_region.curvature_product"}
SAYS_YES_OR_NO = {"episodes.continues", "policy_gradient.check_support"}
DIFFER_IN_SHAPE = {"distributional.categorical_projection", "distributional.quantile_huber_loss", "evolution.select_elites"}
WITHOUT_FLOAT_INPUT = {"returns.time_discount"}
ONE_ARRAY = {name for name, (arguments, _) in FUNCTIONS.items() if len(arguments) == 1}


def function(name):
    module, attribute = name.split(".")
    return getattr(importlib.import_module(f"surefoot.math.{module}"), attribute)


def array(name, dtype):
    """A [T, N] array fit for the argument of that name."""
    values = np.random.default_rng(sum(map(ord, name))).uniform(0.1, 0.9, (T, N))
    if name in (*FLAGS, "mask", "action_mask", "last"):
        return values < 0.5
    if name == "time":
        return np.repeat(np.arange(T, dtype=np.int32)[:, None], N, axis=1)
    one_axis = {"fitness": values[:, 0], "support": np.linspace(0, 1, N)}
    return one_axis.get(name, values).astype(dtype)


def test_every_public_function_is_covered():
    public = set()
    for module in pkgutil.iter_modules(surefoot.math.__path__):
        members = inspect.getmembers(importlib.import_module(f"surefoot.math.{module.name}"), inspect.isfunction)
        public |= {f"{module.name}.{name}" for name, f in members if f.__module__ == f"surefoot.math.{module.name}" and name[0] != "_"}
    assert public - TAKES_NO_ARRAYS == set(FUNCTIONS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - SAYS_YES_OR_NO - WITHOUT_FLOAT_INPUT))
def test_dtype_is_kept_inside_a_compiled_program(name, dtype):
    arguments, options = FUNCTIONS[name]
    result = jax.eval_shape(partial(function(name), **options), **{argument: array(argument, dtype) for argument in arguments})
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - ONE_ARRAY - DIFFER_IN_SHAPE))
def test_shapes_that_would_broadcast_are_refused(name):
    arguments, options = FUNCTIONS[name]
    for odd in arguments:
        given = {argument: array(argument, jnp.float32)[:, 0] for argument in arguments}
        given[odd] = given[odd][:, None]
        with pytest.raises(ValueError, match=rf"{odd} \({T}, 1\)") as caught:
            function(name)(**given, **options)
        assert f" ({T},)" in str(caught.value)
