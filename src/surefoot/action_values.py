"""Networks that give each action a value, or the distribution of its return."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp

from .networks import build_torso
from .types import EnvironmentSpec, Observation


class NoisyLinear(eqx.Module):
    """A linear layer with factorised noise in its weights and biases (Fortunato et al. 2018, eq. 9-11)."""

    weight: jax.Array  # [in, out], the means
    bias: jax.Array
    weight_scale: jax.Array
    bias_scale: jax.Array

    def __init__(self, in_size: int, out_size: int, key: jax.Array, *, initial_scale: float = 0.5):
        weight_key, bias_key = jax.random.split(key)
        bound = in_size**-0.5
        self.weight = jax.random.uniform(weight_key, (in_size, out_size), minval=-bound, maxval=bound)
        self.bias = jax.random.uniform(bias_key, (out_size,), minval=-bound, maxval=bound)
        self.weight_scale = jnp.full_like(self.weight, initial_scale * bound)
        self.bias_scale = jnp.full_like(self.bias, initial_scale * bound)

    def noise(self, key: jax.Array) -> jax.Array:
        """The noise of every input, and behind it that of every output: [in + out]."""
        noise = jax.random.normal(key, (sum(self.weight.shape),))
        return jnp.sign(noise) * jnp.sqrt(jnp.abs(noise))

    def __call__(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Without noise, by the means."""
        if noise is None:
            return x @ self.weight + self.bias
        of_input, of_output = jnp.split(noise, [len(self.weight)])
        # x (w + s * in out^T), without the matrix of noise
        return x @ self.weight + self.bias + ((x * of_input) @ self.weight_scale + self.bias_scale) * of_output


class ActionValues(eqx.Module):
    """One observation to [A, K]: K numbers for each of A actions, of which `expected` makes values."""

    torso: Any
    advantage: Any  # the only head, or that of the advantages
    value: Any  # None unless dueling
    num_actions: int = eqx.field(static=True)
    support: tuple[float, float] | None = eqx.field(static=True)  # ends of the support, where the K are logits of a categorical

    def __init__(
        self,
        spec: EnvironmentSpec,
        key: jax.Array,
        *,
        network: str,
        num_atoms: int = 1,
        support: tuple[float, float] | None = None,
        dueling: bool = False,
        noisy: bool = False,
        **shape: Any,
    ):
        if not isinstance(spec.action_space, gymnasium.spaces.Discrete):
            raise ValueError(
                f"A method that values every action needs a Discrete action space, and this is {spec.action_space}; "
                "for a Box take sac or td3, for vectors of choices ppo."
            )
        torso_key, advantage_key, value_key = jax.random.split(key, 3)
        self.torso, features = build_torso(network, spec.observation_space, torso_key, **shape)
        self.num_actions, self.support = int(spec.action_space.n), support

        def head(size: int, key: jax.Array) -> Any:
            return NoisyLinear(features, size, key) if noisy else eqx.nn.Linear(features, size, key=key)

        self.advantage = head(self.num_actions * num_atoms, advantage_key)
        self.value = head(num_atoms, value_key) if dueling else None

    def noise(self, key: jax.Array) -> tuple[jax.Array | None, ...]:
        """What a key draws for the noisy layers among the heads."""
        heads, keys = (self.advantage, self.value), jax.random.split(key)
        return tuple(head.noise(key) if isinstance(head, NoisyLinear) else None for head, key in zip(heads, keys, strict=True))

    def __call__(self, obs: Observation, noise: tuple[jax.Array | None, ...] | None = None) -> jax.Array:
        """With `noise` in the weights of noisy layers, or by their means."""
        features, noise = self.torso(obs), noise or (None, None)

        def apply(head: Any, noise: jax.Array | None) -> jax.Array:
            return head(features, noise) if isinstance(head, NoisyLinear) else head(features)

        output = apply(self.advantage, noise[0]).reshape(self.num_actions, -1)
        if self.value is None:
            return output
        return apply(self.value, noise[1])[None] + output - jnp.mean(output, axis=0)  # Wang et al. 2016, eq. 9

    def expected(self, output: jax.Array) -> jax.Array:
        """Values [..., A] of outputs [..., A, K]: the mean of their distributions."""
        if self.support is None:
            return jnp.mean(output, axis=-1)
        return jnp.sum(jax.nn.softmax(output) * atoms(self.support, output.shape[-1]), axis=-1)


def atoms(support: tuple[float, float], num_atoms: int) -> jax.Array:
    """[K] equally spaced returns."""
    return jnp.linspace(*support, num_atoms)


Distribution = Literal["none", "categorical", "quantile"]
