"""Several devices: the sequences of a batch are divided among them, and with `weight_devices` every weight is.

The compiled programs know little of it: arrays are placed, one constraint keeps every micro-batch divided, and XLA adds what must be
exchanged (Xu et al. 2021, arXiv:2105.04663). With one device nothing of this happens.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..types import PyTree

SEQUENCES, WEIGHTS = "sequences", "weights"


def device_mesh(weight_devices: int) -> Mesh | None:
    """All devices, `weight_devices` of them side by side; None where there is but one. ValueError where they do not divide the devices."""
    devices = jax.devices()
    if len(devices) % weight_devices:
        raise ValueError(f"weight_devices={weight_devices} does not divide the number of devices, {len(devices)}; choose a divisor.")
    return None if len(devices) == 1 else Mesh(np.array(devices).reshape(-1, weight_devices), (SEQUENCES, WEIGHTS))


def weight_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Where each array goes: divided along its longest axis that can be divided, or else whole on every device."""

    def sharding(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        number = mesh.shape[WEIGHTS]
        spec: list[str | None] = [None] * len(x.shape)
        if number > 1 and len(x.shape) > 1 and (fitting := [axis for axis, size in enumerate(x.shape) if size % number == 0]):
            spec[max(fitting, key=lambda axis: x.shape[axis])] = WEIGHTS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def row_sharding(mesh: Mesh, rows: int, *, axis: int = 0) -> NamedSharding:
    """Of arrays with that many rows along `axis`: divided among all devices, or as many as divide them."""
    for names in ((SEQUENCES, WEIGHTS), (SEQUENCES,)):
        if rows % int(np.prod([mesh.shape[name] for name in names])) == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, names))
    return NamedSharding(mesh, PartitionSpec())


def place_weights(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays where `weight_shardings` says."""
    return tree if mesh is None else jax.device_put(tree, weight_shardings(tree, mesh))


def place_rows(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays [B, ...] where `row_sharding` says."""
    return tree if mesh is None else jax.device_put(tree, jax.tree.map(lambda x: row_sharding(mesh, len(x)), tree))


def divided(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a compiled program: arrays [parts, B, ...] whose every part is divided among the devices."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, row_sharding(mesh, x.shape[1], axis=1)), tree)
