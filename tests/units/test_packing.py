"""What is packed inside a compiled program comes out as it went in."""

import jax
import jax.numpy as jnp
import numpy as np

from surefoot.packing import pack, packing_last, unpack

TREE = {
    "scalar": np.float32(2.5),
    "several": [np.arange(6, dtype=np.int32).reshape(2, 3), np.array([[True], [False]])],
    "empty": np.zeros((0, 4), np.float32),
    "none": None,
    "more": (np.full((2, 2), np.nan, np.float32), np.float32(-1.0)),
}


def test_values_shapes_dtypes_and_structure_are_kept():
    back = unpack(jax.jit(pack)(TREE))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert (type(got), got.dtype, got.shape) == (np.ndarray, expected.dtype, expected.shape)
        np.testing.assert_array_equal(got, expected)


def test_there_is_one_array_for_each_dtype():
    packed = jax.jit(pack)(TREE)
    assert {name: vector.shape for name, vector in packed.vectors.items()} == {"float32": (6,), "int32": (6,), "bool": (2,)}


def test_the_last_result_is_packed_and_the_others_are_not():
    first, second, packed = jax.jit(packing_last(lambda x: (x, x + 1, {"twice": 2 * x})))(jnp.arange(3))
    np.testing.assert_array_equal(second - first, 1)
    np.testing.assert_array_equal(unpack(packed)["twice"], [0, 2, 4])
