"""Classic control as pure functions: Gymnasium's five tasks, stepped inside the compiled program.

Each task is a `reset` and a `step` for one environment, written from its equations of motion; the assembly is at the bottom.
Constants, the order of integration and the treatment of walls and limits are Gymnasium's, so that one step from any state
equals Gymnasium's to float32 rounding. Whole trajectories part sooner or later, for Gymnasium integrates in float64 and some
tasks are chaotic. What a step past the end of an episode would pay is left out: the collector never takes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete

# (state, observation, reward, terminated)
Outcome = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_static  # an environment may be an argument of a jitted function
@dataclass(frozen=True, eq=False)  # spaces cannot be hashed; identity can, and jit needs a hash
class ClassicEnvironment:
    """A `DeviceEnvironment` without parameters."""

    name: str
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    max_episode_steps: int
    reset: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    step: Callable[[jax.Array, jax.Array], Outcome]


def wrap_angle(angle: jax.Array) -> jax.Array:
    """The same angle in [-pi, pi]; an angle that is already there keeps its bits."""
    return angle - 2 * math.pi * jnp.round(angle / (2 * math.pi))


# CartPole-v1: Barto, Sutton and Anderson 1983, without friction, in the equations of Florian 2007.

CART_MASS, POLE_MASS, HALF_POLE = 1.0, 0.1, 0.5
CART_LIMIT, POLE_LIMIT = 2.4, 12 * 2 * math.pi / 360  # metres, radians


def cartpole_reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """state = observation = [position, velocity, angle from upright, angular velocity]."""
    state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return state, state


def cartpole_step(state: jax.Array, action: jax.Array) -> Outcome:
    """Push with 10 N, right (1) or left (0), for one explicit Euler step of 0.02 s. Each step pays 1."""
    _, velocity, angle, spin = state
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    total_mass = CART_MASS + POLE_MASS
    force = jnp.where(action == 1, 10.0, -10.0)

    push = (force + POLE_MASS * HALF_POLE * spin**2 * sin) / total_mass
    spin_rate = (9.8 * sin - cos * push) / (HALF_POLE * (4 / 3 - POLE_MASS * cos**2 / total_mass))
    acceleration = push - POLE_MASS * HALF_POLE * spin_rate * cos / total_mass

    state = state + 0.02 * jnp.stack([velocity, acceleration, spin, spin_rate])
    terminated = (jnp.abs(state[0]) > CART_LIMIT) | (jnp.abs(state[2]) > POLE_LIMIT)
    return state, state, jnp.float32(1.0), terminated


# Pendulum-v1: a uniform rod of 1 kg and 1 m, hung at one end, g = 10.

MAX_TORQUE, MAX_SPIN = 2.0, 8.0  # N m, rad/s


def pendulum_observation(state: jax.Array) -> jax.Array:
    angle, spin = state
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), spin])


def pendulum_reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """state = [angle from upright, not wrapped; angular velocity], anywhere on the circle."""
    bound = jnp.array([math.pi, 1.0])
    state = jax.random.uniform(key, (2,), minval=-bound, maxval=bound)
    return state, pendulum_observation(state)


def pendulum_step(state: jax.Array, action: jax.Array) -> Outcome:
    """Apply a clipped torque [1] for one semi-implicit Euler step of 0.05 s; the cost is that of the state before it."""
    angle, spin = state
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    cost = wrap_angle(angle) ** 2 + 0.1 * spin**2 + 0.001 * torque**2

    spin = jnp.clip(spin + 0.05 * (15.0 * jnp.sin(angle) + 3.0 * torque), -MAX_SPIN, MAX_SPIN)
    state = jnp.stack([angle + 0.05 * spin, spin])
    return state, pendulum_observation(state), -cost, jnp.bool_(False)


# Acrobot-v1: Sutton and Barto, Reinforcement Learning, section 11.3 of the first edition: the book's dynamics, not those of
# Sutton's 1996 paper, which lack the centrifugal term of the second joint.

LINK_MASS, LINK_LENGTH, LINK_CENTRE, LINK_INERTIA = 1.0, 1.0, 0.5, 1.0  # of both links
MAX_SPINS = (4 * math.pi, 9 * math.pi)


def acrobot_observation(state: jax.Array) -> jax.Array:
    angle1, angle2, spin1, spin2 = state
    return jnp.stack([jnp.cos(angle1), jnp.sin(angle1), jnp.cos(angle2), jnp.sin(angle2), spin1, spin2])


def acrobot_reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """state = [angle of link 1 from hanging, of link 2 from link 1, and their angular velocities], near rest."""
    state = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    return state, acrobot_observation(state)


def acrobot_derivative(state: jax.Array, torque: jax.Array) -> jax.Array:
    """d state / dt under `torque` at the joint between the links, g = 9.8."""
    angle1, angle2, spin1, spin2 = state
    cos2, sin2 = jnp.cos(angle2), jnp.sin(angle2)
    coupling = LINK_MASS * LINK_LENGTH * LINK_CENTRE
    own = LINK_MASS * LINK_CENTRE**2 + LINK_INERTIA

    d1 = 2 * own + LINK_MASS * LINK_LENGTH**2 + 2 * coupling * cos2
    d2 = own + coupling * cos2
    phi2 = LINK_MASS * LINK_CENTRE * 9.8 * jnp.sin(angle1 + angle2)
    gravity1 = LINK_MASS * (LINK_CENTRE + LINK_LENGTH) * 9.8 * jnp.sin(angle1)
    phi1 = gravity1 + phi2 - coupling * sin2 * (spin2**2 + 2 * spin1 * spin2)

    spin_rate2 = (torque + d2 / d1 * phi1 - coupling * spin1**2 * sin2 - phi2) / (own - d2**2 / d1)
    spin_rate1 = -(d2 * spin_rate2 + phi1) / d1
    return jnp.stack([spin1, spin2, spin_rate1, spin_rate2])


def acrobot_step(state: jax.Array, action: jax.Array) -> Outcome:
    """Apply a torque of -1, 0 or 1 N m for one Runge-Kutta step of 0.2 s. Each step costs 1 until the tip is above the bar."""
    torque = action - 1.0
    slope1 = acrobot_derivative(state, torque)
    slope2 = acrobot_derivative(state + 0.1 * slope1, torque)
    slope3 = acrobot_derivative(state + 0.1 * slope2, torque)
    slope4 = acrobot_derivative(state + 0.2 * slope3, torque)
    angle1, angle2, spin1, spin2 = state + 0.2 / 6 * (slope1 + 2 * slope2 + 2 * slope3 + slope4)

    angle1, angle2 = wrap_angle(angle1), wrap_angle(angle2)
    spin1, spin2 = jnp.clip(spin1, -MAX_SPINS[0], MAX_SPINS[0]), jnp.clip(spin2, -MAX_SPINS[1], MAX_SPINS[1])
    terminated = -jnp.cos(angle1) - jnp.cos(angle1 + angle2) > 1.0
    state = jnp.stack([angle1, angle2, spin1, spin2])
    return state, acrobot_observation(state), jnp.where(terminated, 0.0, -1.0), terminated


# MountainCar-v0 and MountainCarContinuous-v0: Moore 1990. One valley, two engines, two goals.

LEFT_WALL, RIGHT_WALL, MAX_SPEED = -1.2, 0.6, 0.07


def mountain_car_reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """state = observation = [position, velocity], at rest near the bottom of the valley."""
    state = jnp.stack([jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.zeros(())])
    return state, state


def drive(state: jax.Array, thrust: jax.Array) -> jax.Array:
    """The next state under `thrust` (velocity per step); the left wall stops the car, the right one does not."""
    position, velocity = state
    velocity = jnp.clip(velocity + thrust - 0.0025 * jnp.cos(3 * position), -MAX_SPEED, MAX_SPEED)
    position = jnp.clip(position + velocity, LEFT_WALL, RIGHT_WALL)
    velocity = jnp.where((position <= LEFT_WALL) & (velocity < 0), 0.0, velocity)
    return jnp.stack([position, velocity])


def mountain_car_step(state: jax.Array, action: jax.Array) -> Outcome:
    """Drive left (0), coast (1) or drive right (2). Each step costs 1, the one that reaches 0.5 too."""
    state = drive(state, 0.001 * (action - 1))
    terminated = (state[0] >= 0.5) & (state[1] >= 0)
    return state, state, jnp.float32(-1.0), terminated


def mountain_car_continuous_step(state: jax.Array, action: jax.Array) -> Outcome:
    """Drive with a thrust [1] that is clipped, while its cost is not. Reaching 0.45 pays 100."""
    state = drive(state, 0.0015 * jnp.clip(action[0], -1.0, 1.0))
    terminated = (state[0] >= 0.45) & (state[1] >= 0)
    return state, state, jnp.where(terminated, 100.0, 0.0) - 0.1 * action[0] ** 2, terminated


def box(*high: float) -> Box:
    """[-high, high] in float32."""
    bound = np.array(high, np.float32)
    return Box(-bound, bound, dtype=np.float32)


MOUNTAIN_CAR_SPACE = Box(np.array([LEFT_WALL, -MAX_SPEED], np.float32), np.array([RIGHT_WALL, MAX_SPEED], np.float32), dtype=np.float32)

CLASSIC: dict[str, ClassicEnvironment] = {
    environment.name: environment
    for environment in (
        ClassicEnvironment(
            "CartPole-v1",
            # Twice the limits, so that the observation that ends an episode is inside.
            observation_space=box(2 * CART_LIMIT, np.inf, 2 * POLE_LIMIT, np.inf),
            action_space=Discrete(2),
            max_episode_steps=500,
            reset=cartpole_reset,
            step=cartpole_step,
        ),
        ClassicEnvironment(
            "Pendulum-v1",
            observation_space=box(1, 1, MAX_SPIN),
            action_space=box(MAX_TORQUE),
            max_episode_steps=200,
            reset=pendulum_reset,
            step=pendulum_step,
        ),
        ClassicEnvironment(
            "Acrobot-v1",
            observation_space=box(1, 1, 1, 1, *MAX_SPINS),
            action_space=Discrete(3),
            max_episode_steps=500,
            reset=acrobot_reset,
            step=acrobot_step,
        ),
        ClassicEnvironment(
            "MountainCar-v0",
            observation_space=MOUNTAIN_CAR_SPACE,
            action_space=Discrete(3),
            max_episode_steps=200,
            reset=mountain_car_reset,
            step=mountain_car_step,
        ),
        ClassicEnvironment(
            "MountainCarContinuous-v0",
            observation_space=MOUNTAIN_CAR_SPACE,
            action_space=box(1),
            max_episode_steps=999,
            reset=mountain_car_reset,
            step=mountain_car_continuous_step,
        ),
    )
}
