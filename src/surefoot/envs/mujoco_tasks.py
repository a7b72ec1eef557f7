"""The eleven MuJoCo-v5 tasks of Gymnasium with their default arguments, as expressions over N simulations at once.

Gymnasium writes them for one simulation, and rounds. An expression here may differ from its own only in ways that give
the same bits: terms stay in their order, the cost of an action stays in float32, and a comment says where two spellings of
one formula would part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Data = SimpleNamespace  # fields of MuJoCo's mjData, each [N, ...]; `model`; `body`, the number of each body by name
Start = tuple[Array, Array]  # qpos [nq], qvel [nv] of a new episode


@dataclass(frozen=True, kw_only=True)
class Task:
    """What makes one task; names and numbers are those of Gymnasium's class."""

    model: str  # file in Gymnasium's assets
    frame_skip: int  # physics steps in a step
    begin: Callable[[np.random.Generator, Any], Start]  # draws in the order of Gymnasium's reset_model
    observe: Callable[[Data], Array]  # [N, D] float64
    reward: Callable[[Data, Array, Any, Array], Array]  # of data, action [N, A], velocity [N], alive [N]
    position: Callable[[Data], Array] | None = None  # [N], whose rate of change is the velocity
    alive: Callable[[Data], Array] | None = None  # [N] bool, an episode terminates where false; None: never
    fields: tuple[str, ...] = ()  # of mjData, beyond qpos, qvel and ctrl
    has_contact_forces: bool = False  # needs `Loop`
    max_episode_steps: int = 1000


def noise(scale: float, normal_velocity: bool = False) -> Callable[[np.random.Generator, Any], Start]:
    """Uniform noise around the model's pose; velocities uniform too, or normal."""

    def begin(random: np.random.Generator, model: Any) -> Start:
        qpos = model.qpos0 + random.uniform(-scale, scale, model.nq)
        return qpos, scale * random.standard_normal(model.nv) if normal_velocity else random.uniform(-scale, scale, model.nv)

    return begin


def begin_reacher(random: np.random.Generator, model: Any) -> Start:
    """The target somewhere in a disc of radius 0.2."""
    qpos = random.uniform(-0.1, 0.1, model.nq) + model.qpos0
    while np.linalg.norm(target := random.uniform(-0.2, 0.2, 2)) >= 0.2:
        pass
    qpos[-2:] = target
    qvel = random.uniform(-0.005, 0.005, model.nv)
    qvel[-2:] = 0.0
    return qpos, qvel


def begin_pusher(random: np.random.Generator, model: Any) -> Start:
    """The object more than 0.17 away from its goal, the arm in the model's pose."""
    qpos = model.qpos0.copy()
    while True:
        cylinder = np.concatenate((random.uniform(-0.3, 0.0, 1), random.uniform(-0.2, 0.2, 1)))
        if np.linalg.norm(cylinder) > 0.17:
            break
    qpos[-4:] = *cylinder, 0.0, 0.0
    qvel = random.uniform(-0.005, 0.005, model.nv)
    qvel[-4:] = 0.0
    return qpos, qvel


def effort(control: Array) -> Array:
    """[N] squared length of each control; a sum along the last axis adds in the order of a sum over one row."""
    squared: Array = np.add.reduce(np.square(control), axis=1)
    return squared


def length(vector: Array) -> Array:
    """[N] as np.linalg.norm of one vector gives it, which is a BLAS dot product; its own `axis` would add differently."""
    return np.sqrt(np.vecdot(vector, vector))


def clipped(array: Array, low: float, high: float) -> Array:
    """np.clip, at half its cost for small arrays."""
    return np.minimum(np.maximum(array, low), high)


def between(d: Data, start: str, end: str) -> Array:
    """[N, 3] from one body to another."""
    return d.xpos[:, d.body[end]] - d.xpos[:, d.body[start]]


def flat(array: Array) -> Array:
    """[N, bodies, K] as [N, bodies * K], without the world, which is the first body."""
    return array[:, 1:].reshape(len(array), -1)


def root_x(d: Data) -> Array:
    return d.qpos[:, 0]


def torso_x(d: Data) -> Array:
    return d.xpos[:, d.body["torso"], 0]


def center_of_mass_x(d: Data) -> Array:
    return np.einsum("b,nb->n", d.model.body_mass, d.xipos[:, :, 0]) / d.model.body_mass.sum()


def observe_state(d: Data, skip: int) -> Array:
    """Positions but for the first `skip`, which say where on the plane it is, and velocities."""
    return np.concatenate((d.qpos[:, skip:], d.qvel), axis=1)


def observe_hopper(d: Data) -> Array:
    return np.concatenate((d.qpos[:, 1:], clipped(d.qvel, -10.0, 10.0)), axis=1)


def observe_ant(d: Data) -> Array:
    return np.concatenate((d.qpos[:, 2:], d.qvel, clipped(flat(d.cfrc_ext), -1.0, 1.0)), axis=1)


def observe_humanoid(d: Data) -> Array:
    return np.concatenate((d.qpos[:, 2:], d.qvel, flat(d.cinert), flat(d.cvel), d.qfrc_actuator[:, 6:], flat(d.cfrc_ext)), axis=1)


def observe_double_pendulum(d: Data) -> Array:
    angle = d.qpos[:, 1:].copy()  # contiguous, as Gymnasium's is: NumPy may compute others by another routine
    force = clipped(d.qfrc_constraint[:, :1], -10.0, 10.0)
    return np.concatenate((d.qpos[:, :1], np.sin(angle), np.cos(angle), clipped(d.qvel, -10.0, 10.0), force), axis=1)


def observe_pusher(d: Data) -> Array:
    bodies = [d.xpos[:, d.body[name]] for name in ("tips_arm", "object", "goal")]
    return np.concatenate((d.qpos[:, :7], d.qvel[:, :7], *bodies), axis=1)


def observe_reacher(d: Data) -> Array:
    angle = d.qpos[:, :2].copy()  # contiguous, as above
    offset = between(d, "target", "fingertip")[:, :2]
    return np.concatenate((np.cos(angle), np.sin(angle), d.qpos[:, 2:], d.qvel[:, :2], offset), axis=1)


def reward_ant(d: Data, action: Array, velocity: Array, alive: Array) -> Array:
    contact_cost = 5e-4 * effort(clipped(d.cfrc_ext, -1.0, 1.0).reshape(len(action), -1))
    return velocity + alive - (0.5 * effort(action) + contact_cost)


def reward_humanoid(d: Data, action: Array, velocity: Array, alive: Array) -> Array:
    return 1.25 * velocity + 5.0 * alive - (0.1 * effort(d.ctrl) + impact_cost(d, 5e-7))


def reward_standup(d: Data, action: Array, velocity: Any, alive: Array) -> Array:
    return d.qpos[:, 2] / d.model.opt.timestep - 0.1 * effort(d.ctrl) - impact_cost(d, 0.5e-6) + 1


def impact_cost(d: Data, weight: float) -> Array:
    """[N] weighted squared contact forces, at most 10."""
    return np.minimum(weight * effort(d.cfrc_ext.reshape(len(d.cfrc_ext), -1)), 10.0)


def reward_double_pendulum(d: Data, action: Array, velocity: Any, alive: Array) -> Array:
    # Gymnasium squares NumPy scalars, which is C's pow and now and then one bit off x * x; float_power is pow for arrays.
    square = np.float_power(np.column_stack((d.site_xpos[:, 0, 0], d.site_xpos[:, 0, 2] - 2, d.qvel[:, 1:])), 2)
    x, y, first, second = square.T
    return 10.0 * alive - (0.01 * x + y) - (1e-3 * first + 5e-3 * second)


def reward_pusher(d: Data, action: Array, velocity: Any, alive: Array) -> Array:
    far, near = length(between(d, "goal", "object")), length(between(d, "tips_arm", "object"))
    return -far - 0.1 * effort(action) - near * 0.5


def reward_reacher(d: Data, action: Array, velocity: Any, alive: Array) -> Array:
    return -length(between(d, "target", "fingertip")) - effort(action)


def alive_ant(d: Data) -> Array:
    height = d.qpos[:, 2]
    return (height >= 0.2) & (height <= 1.0) & np.isfinite(d.qpos).all(axis=1) & np.isfinite(d.qvel).all(axis=1)


def alive_hopper(d: Data) -> Array:
    small = (np.abs(d.qpos[:, 2:]) < 100.0).all(axis=1) & (np.abs(d.qvel) < 100.0).all(axis=1)
    height = d.qpos[:, 1]
    return small & (height > 0.7) & (height < np.inf) & (np.abs(d.qpos[:, 2]) < 0.2)


def alive_walker(d: Data) -> Array:
    height = d.qpos[:, 1]
    return (height > 0.8) & (height < 2.0) & (np.abs(d.qpos[:, 2]) < 1.0)


def alive_humanoid(d: Data) -> Array:
    height = d.qpos[:, 2]
    return (height > 1.0) & (height < 2.0)


def alive_pendulum(d: Data) -> Array:
    state = observe_state(d, 0)
    return np.isfinite(state).all(axis=1) & (np.abs(state[:, 1]) <= 0.2)


TASKS = {
    "Ant-v5": Task(
        model="ant.xml",
        frame_skip=5,
        begin=noise(0.1, normal_velocity=True),
        observe=observe_ant,
        position=torso_x,
        reward=reward_ant,
        alive=alive_ant,
        fields=("xpos", "cfrc_ext"),
        has_contact_forces=True,
    ),
    "HalfCheetah-v5": Task(
        model="half_cheetah.xml",
        frame_skip=5,
        begin=noise(0.1, normal_velocity=True),
        observe=lambda d: observe_state(d, 1),
        position=root_x,
        reward=lambda d, action, velocity, alive: velocity - 0.1 * effort(action),
    ),
    "Hopper-v5": Task(
        model="hopper.xml",
        frame_skip=4,
        begin=noise(5e-3),
        observe=observe_hopper,
        position=root_x,
        reward=lambda d, action, velocity, alive: velocity + alive - 1e-3 * effort(action),
        alive=alive_hopper,
    ),
    "Humanoid-v5": Task(
        model="humanoid.xml",
        frame_skip=5,
        begin=noise(1e-2),
        observe=observe_humanoid,
        position=center_of_mass_x,
        reward=reward_humanoid,
        alive=alive_humanoid,
        fields=("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        has_contact_forces=True,
    ),
    "HumanoidStandup-v5": Task(
        model="humanoidstandup.xml",
        frame_skip=5,
        begin=noise(1e-2),
        observe=observe_humanoid,
        reward=reward_standup,
        fields=("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        has_contact_forces=True,
    ),
    "InvertedDoublePendulum-v5": Task(
        model="inverted_double_pendulum.xml",
        frame_skip=5,
        begin=noise(0.1, normal_velocity=True),
        observe=observe_double_pendulum,
        reward=reward_double_pendulum,
        alive=lambda d: ~(d.site_xpos[:, 0, 2] <= 1),
        fields=("site_xpos", "qfrc_constraint"),
    ),
    "InvertedPendulum-v5": Task(
        model="inverted_pendulum.xml",
        frame_skip=2,
        begin=noise(0.01),
        observe=lambda d: observe_state(d, 0),
        reward=lambda d, action, velocity, alive: alive,
        alive=alive_pendulum,
    ),
    "Pusher-v5": Task(
        model="pusher_v5.xml",
        frame_skip=5,
        begin=begin_pusher,
        observe=observe_pusher,
        reward=reward_pusher,
        fields=("xpos",),
        max_episode_steps=100,
    ),
    "Reacher-v5": Task(
        model="reacher.xml",
        frame_skip=2,
        begin=begin_reacher,
        observe=observe_reacher,
        reward=reward_reacher,
        fields=("xpos",),
        max_episode_steps=50,
    ),
    "Swimmer-v5": Task(
        model="swimmer.xml",
        frame_skip=4,
        begin=noise(0.1),
        observe=lambda d: observe_state(d, 2),
        position=root_x,
        reward=lambda d, action, velocity, alive: velocity - 1e-4 * effort(action),
    ),
    "Walker2d-v5": Task(
        model="walker2d_v5.xml",
        frame_skip=4,
        begin=noise(5e-3),
        observe=observe_hopper,
        position=root_x,
        reward=lambda d, action, velocity, alive: velocity + alive - 1e-3 * effort(action),
        alive=alive_walker,
    ),
}
