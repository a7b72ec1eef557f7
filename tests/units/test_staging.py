"""Acting in NumPy against the same function compiled."""

from typing import Any, get_args, get_type_hints

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.algorithms.ppo import PPO
from surefoot.normalise import Moments
from surefoot.policies import Actor, StochasticPolicy, act
from surefoot.staging import ELEMENTWISE, MOST_ON_ONE_THREAD, MOST_PRODUCTS, REDUCTIONS, CompiledActor, NumpyActor, host_actor

NUM_STEPS, NUM_ENVS = 5, 3
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(NUM_ENVS, 4)).astype(np.float32)
POSITIVE, BITS = np.abs(FLOATS) + 0.1, FLOATS > 0
ONE_ARGUMENT = {
    **{"neg": jax.lax.neg, "sign": jax.lax.sign, "abs": jax.lax.abs, "exp": jax.lax.exp, "expm1": jax.lax.expm1, "tanh": jax.lax.tanh},
    **{"logistic": jax.lax.logistic, "square": jax.lax.square, "copy": jnp.copy, "stop_gradient": jax.lax.stop_gradient},
}
OF_POSITIVE = {"log": jax.lax.log, "log1p": jax.lax.log1p, "sqrt": jax.lax.sqrt, "rsqrt": jax.lax.rsqrt}
TWO_ARGUMENTS = {
    **{"add": jax.lax.add, "sub": jax.lax.sub, "mul": jax.lax.mul, "max": jax.lax.max, "min": jax.lax.min, "div": jax.lax.div},
    **{"eq": jax.lax.eq, "ne": jax.lax.ne, "lt": jax.lax.lt, "le": jax.lax.le, "gt": jax.lax.gt, "ge": jax.lax.ge},
}
REDUCED = {
    **{"reduce_sum": lambda x: jnp.sum(x, axis=1), "reduce_max": lambda x: jnp.max(x, axis=-1), "reduce_min": lambda x: jnp.min(x, axis=0)},
    **{"argmax": lambda x: jnp.argmax(x, axis=1), "argmin": lambda x: jnp.argmin(x, axis=0)},
}
SHAPED = {
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x[:, None], (NUM_ENVS, 2, 4)),
    "clamp": lambda x: jax.lax.clamp(-0.5, x, jnp.full_like(x, 0.5)),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, x], axis=1),
    "convert_element_type": lambda x: (3 * x).astype(jnp.int32),
    "integer_pow": lambda x: x**3,
    "reshape": lambda x: x.reshape(2, NUM_ENVS * 2),
    "select_n": lambda x: jnp.where(x > 0, x, -7 * x),
    "slice": lambda x: x[1:, ::2],
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "transpose": lambda x: x.T,
    "product with rows": lambda x: x @ FLOATS.T,
    "product from the left": lambda x: FLOATS.T @ x,
    "product of each row": jax.vmap(lambda row: jnp.asarray(FLOATS) @ row),
    "product of rows with rows": lambda x: jax.vmap(jnp.dot)(x, 2 * x + 1),
    "product and its transpose": lambda x: (product := jnp.asarray(FLOATS.T) @ x, product.T),
    "product over two axes": lambda x: jnp.tensordot(x, jnp.asarray(FLOATS), axes=2),
}


def steps_of(actor, parameters, key, *observed):
    actor.begin(parameters, key)
    return [actor(t, *observed) for t in range(NUM_STEPS)]


def check(function, *observed, parameters: Any = None, at_least=NumpyActor, **tolerance):
    """What `host_actor` makes of `function(parameters, key, t, *observed)` gives what the function gives."""
    actor = host_actor(function, parameters, KEY, observed, NUM_STEPS)
    assert type(actor) is at_least
    for t, got in enumerate(steps_of(actor, parameters, KEY, *observed)):
        expected = jax.jit(function)(parameters, KEY, t, *observed)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(ours, theirs, **({"rtol": 3e-6, "atol": 1e-6} | tolerance))


@pytest.mark.parametrize("name", [*ONE_ARGUMENT, *REDUCED, *SHAPED])
def test_operation(name):
    check(lambda _, key, t, x: (ONE_ARGUMENT | REDUCED | SHAPED)[name](x), FLOATS)


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_over_either_axis(left, right, transposed):
    weight = RNG.normal(size=(FLOATS.shape[left], 5)).astype(np.float32)
    weight = jnp.asarray(weight if right == 0 else weight.T)

    def function(weight, key, t, x):
        product = jax.lax.dot_general(x, weight, (((left,), (right,)), ((), ())))
        swapped = jax.lax.dot_general(weight, x, (((right,), (left,)), ((), ())))
        return (product.T, swapped.T) if transposed else (product, swapped)

    check(function, FLOATS, parameters=weight)


@pytest.mark.parametrize("shape", [(8, 256, 256), (8, 256, 300), (2000, 256, 6), (3, 1000, 200)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_product_keeps_to_its_thread(shape, transposed, monkeypatch):
    """No product is so large that BLAS would wake other threads for it."""
    rows, inner, columns = shape
    assert MOST_ON_ONE_THREAD < rows * inner * columns < MOST_PRODUCTS
    x, weights = (RNG.normal(size=(n, inner)).astype(np.float32) for n in (rows, columns))

    def layer(weights, key, t, x):
        return jax.vmap(lambda row: weights @ row)(x) if transposed else x @ weights.T

    sizes, matmul = [], np.matmul

    def counted(x, y, **how):
        sizes.append(x.shape[0] * x.shape[1] * y.shape[1])
        return matmul(x, y, **how)

    monkeypatch.setattr(np, "matmul", counted)
    actor = host_actor(layer, weights, KEY, (x,), 1)
    assert type(actor) is NumpyActor
    actor.begin(weights, KEY)
    np.testing.assert_allclose(actor(0, x), x.astype(np.float64) @ weights.T, rtol=1e-4, atol=1e-4)
    assert sum(sizes) == rows * inner * columns
    assert max(sizes) <= MOST_ON_ONE_THREAD


@pytest.mark.parametrize("name", OF_POSITIVE)
def test_operation_on_positive_numbers(name):
    check(lambda _, key, t, x: OF_POSITIVE[name](x), POSITIVE)


@pytest.mark.parametrize("name", TWO_ARGUMENTS)
def test_operation_with_a_parameter(name):
    parameter = np.where(BITS, FLOATS, FLOATS[::-1])
    check(lambda parameters, key, t, x: TWO_ARGUMENTS[name](x, parameters), FLOATS, parameters=jnp.asarray(parameter))
    check(lambda parameters, key, t, x: TWO_ARGUMENTS[name](parameters, x), FLOATS, parameters=jnp.asarray(parameter))


def test_operations_on_flags_and_powers():
    def function(parameters, key, t, x, flag):
        return flag & (x > 0), flag | (x > 0.5), ~flag, jnp.all(flag, axis=1), jnp.any(flag, axis=0), jnp.abs(x) ** parameters

    check(function, FLOATS, BITS[::-1].copy(), parameters=jnp.float32(1.7))


def test_every_operation_of_the_table_has_a_test():
    here = {*ONE_ARGUMENT, *OF_POSITIVE, *TWO_ARGUMENTS, *REDUCED, *SHAPED, "and", "or", "not", "reduce_and", "reduce_or", "pow"}
    assert ELEMENTWISE.keys() | REDUCTIONS.keys() <= here | {"add_any"}  # which only a gradient has


def test_each_step_has_its_own_random_numbers():
    def function(parameters, key, t, x):
        return parameters * x + jax.random.normal(jax.random.fold_in(key, t), x.shape), jnp.int32(t) + jnp.argmax(x)

    check(function, FLOATS, parameters=jnp.float32(0.5))


def test_the_next_batch_has_other_parameters_and_random_numbers():
    def function(parameters, key, t, x):
        return jnp.exp(parameters) * x + jax.random.normal(jax.random.fold_in(key, t), x.shape)

    actor = host_actor(function, jnp.float32(0.5), KEY, (FLOATS,), NUM_STEPS)
    for parameters, key, x in ((0.5, KEY, FLOATS), (-0.5, jax.random.key(8), FLOATS[::-1])):
        for t, got in enumerate(steps_of(actor, jnp.float32(parameters), key, x)):
            np.testing.assert_allclose(got, function(parameters, key, t, x), rtol=1e-5, atol=1e-6)


SPACES, CONFIG = gymnasium.spaces, PPO()
OBSERVATIONS = SPACES.Dict({"place": SPACES.Box(-9, 9, (3,), np.float32), "room": SPACES.Discrete(4), "lamps": SPACES.MultiBinary(2)})


@pytest.mark.parametrize("activation", get_args(get_type_hints(PPO)["activation"]))
@pytest.mark.parametrize("kind", ["continuous", "discrete", "masked"])
@pytest.mark.parametrize("draws", [True, False])
def test_policies_act_in_numpy(kind, activation, draws):
    space = SPACES.Box(-1, 1, (2,)) if kind == "continuous" else SPACES.Discrete(6)
    actor = Actor("mlp", OBSERVATIONS, space, jax.random.key(0), hidden=(16, 8), activation=activation)
    actor = eqx.tree_at(lambda actor: actor.head.weight, actor, 100 * actor.head.weight)
    moments = Moments(jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray([4.0, 1.0, 0.25]), jnp.asarray(100.0))
    policy = StochasticPolicy(actor, {"place": moments, "room": None, "lamps": None})
    obs = {
        "place": RNG.normal(size=(NUM_ENVS, 3)).astype(np.float32),
        "room": RNG.integers(4, size=NUM_ENVS).astype(np.int32),
        "lamps": RNG.integers(2, size=(NUM_ENVS, 2)).astype(np.int8),
    }
    mask = (RNG.random((NUM_ENVS, 6)) > 0.4) | (np.arange(6) == 2) if kind == "masked" else None

    def function(policy, key, t, obs, mask):
        return act(CONFIG, policy, obs, mask, None, jax.random.fold_in(key, t) if draws else None)

    check(function, obs, mask, parameters=policy, atol=2e-5)


def test_results_do_not_change_with_the_memory_that_the_observation_stood_in():
    actor = host_actor(lambda _, key, t, x: (x.T, x), None, KEY, (FLOATS,), NUM_STEPS)
    observed = FLOATS.copy()
    action, carry = steps_of(actor, None, KEY, observed)[0]
    observed[:] = 9.0
    np.testing.assert_array_equal(action, FLOATS.T)
    np.testing.assert_array_equal(carry, FLOATS)


@pytest.mark.filterwarnings("error")
def test_an_overflow_does_not_warn():
    check(lambda _, key, t, x: (jax.nn.sigmoid(1e4 * x), jnp.exp(1e4 * x), jnp.log(x)), FLOATS)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, key, t, x: jnp.sin(x),
        lambda _, key, t, x: jax.lax.fori_loop(0, 3, lambda i, x: x * x, x),
        lambda _, key, t, x: x @ jnp.ones((4, 1 + MOST_PRODUCTS // 12)),
        lambda _, key, t, x: x.astype(jnp.int32) // jnp.full(x.shape, 2),
        lambda _, key, t, x: jax.lax.select_n(jnp.full(x.shape, 2), x, 2 * x, 3 * x),
    ],
    ids=["an operation that NumPy's table lacks", "a loop", "a large product", "a division of integers", "a choice among three"],
)
def test_what_numpy_cannot_do_or_not_as_fast_is_compiled(function):
    check(function, FLOATS, at_least=CompiledActor)


def test_a_function_with_an_effect_is_compiled():
    def function(parameters, key, t, x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), parameters)
        return x + parameters

    seen: list[np.ndarray] = []
    actor = host_actor(function, jnp.float32(1.0), KEY, (FLOATS,), NUM_STEPS)
    assert type(actor) is CompiledActor
    jax.block_until_ready(steps_of(actor, jnp.float32(1.0), KEY, FLOATS))
    jax.effects_barrier()
    assert len(seen) == NUM_STEPS
