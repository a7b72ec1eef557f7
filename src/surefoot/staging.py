"""Acting on the host: a traced function split by what its values depend on, and its last part run by NumPy.

Most of the work of drawing an action depends on the parameters alone, or on random numbers: both are known before the batch
begins, and one compiled call computes them for all its steps. What is left for each step is a few small products and
activations, which NumPy does in a tenth of the time that a compiled call needs to start. Where NumPy lacks an operation or
the network is large, each step is a compiled call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from .packing import pack, unpack
from .types import PyTree

BEFORE, EACH_STEP, OBSERVED = range(3)  # what a value depends on: the parameters; the step's random numbers too; what is observed too
MOST_PRODUCTS = 5_000_000  # multiplications in a step beyond which a compiled call is not slower
MOST_ON_ONE_THREAD = 262_144  # multiplications in a product of matrices, of which OpenBLAS gives more to several threads


class Instruction(NamedTuple):
    """One primitive operation on numbered values."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]  # shapes and dtypes: of the inputs, then of the outputs
    level: int  # what the outputs depend on


class Tape:
    """All operations of a traced function in order, with those of the functions that it calls."""

    def __init__(self, closed: core.ClosedJaxpr, levels: list[int]):
        """`levels` says of each argument what it depends on; the result says it of every value."""
        self.num_arguments, self.levels = len(levels), list(levels)
        self.constants: dict[int, Any] = {}
        self.instructions: list[Instruction] = []
        self.results = self._walk(closed.jaxpr, closed.consts, list(range(len(levels))))

    def _constant(self, value: Any) -> int:
        self.levels.append(BEFORE)
        self.constants[len(self.levels) - 1] = value
        return len(self.levels) - 1

    def _walk(self, jaxpr: Any, constants: Any, arguments: list[int]) -> list[int]:
        numbers = dict(zip(jaxpr.constvars, map(self._constant, constants), strict=True))
        numbers |= zip(jaxpr.invars, arguments, strict=True)

        def number(atom: Any) -> int:
            return self._constant(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, core.Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(number(atom) for atom in eqn.invars)
            called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if isinstance(called, core.ClosedJaxpr) and eqn.primitive.name in CALLS:
                outputs = self._walk(called.jaxpr, called.consts, list(inputs))
            else:
                level = max((self.levels[i] for i in inputs), default=BEFORE)
                outputs = list(range(len(self.levels), len(self.levels) + len(eqn.outvars)))
                self.levels += [level] * len(outputs)
                avals = tuple(atom.aval for atom in (*eqn.invars, *eqn.outvars))
                self.instructions.append(Instruction(eqn.primitive, eqn.params, inputs, tuple(outputs), avals, level))
            numbers |= zip(eqn.outvars, outputs, strict=True)
        return [number(atom) for atom in jaxpr.outvars]


CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def host_actor(act: Callable[..., Any], acting: PyTree, key: jax.Array, observed: tuple[PyTree, ...], num_steps: int) -> Any:
    """`NumpyActor` of `act(acting, key, t, *observed)`; a `CompiledActor` where NumPy cannot do it, or not as fast."""
    closed, shape = jax.make_jaxpr(act, return_shape=True)(acting, key, np.int32(0), *observed)
    levels = [BEFORE] * len(jax.tree.leaves((acting, key))) + [EACH_STEP] + [OBSERVED] * len(jax.tree.leaves(observed))
    tape = Tape(closed, levels)
    operations = [operation_of(each) for each in tape.instructions if each.level == OBSERVED]
    if closed.effects or None in operations or sum(map(products, tape.instructions)) > MOST_PRODUCTS:
        return CompiledActor(act)
    return NumpyActor(tape, jax.tree.structure(shape), num_steps)


class CompiledActor:
    """One compiled call for each step."""

    def __init__(self, act: Callable[..., Any]):
        self._act = jax.jit(act)
        self._fixed: tuple[PyTree, ...] = ()

    def ahead(self, acting: PyTree, key: jax.Array) -> None:
        """Nothing: each step computes all that it needs."""

    def begin(self, acting: PyTree, key: jax.Array, ahead: None = None) -> None:
        """Take the parameters and the random numbers of the next batch."""
        self._fixed = acting, key

    def __call__(self, t: int, *observed: PyTree) -> PyTree:
        """What `act` gives at step t of the batch."""
        return self._act(*self._fixed, np.int32(t), *observed)


class NumpyActor:
    """What of a tape depends on observations by NumPy at each step; the rest for all steps of a batch in one compiled call."""

    def __init__(self, tape: Tape, structure: Any, num_steps: int):
        early = [each for each in tape.instructions if each.level != OBSERVED]
        late = with_products_transposed([each for each in tape.instructions if each.level == OBSERVED], tape.results)
        needed = {i for each, _ in late for i in each.inputs} | set(tape.results)
        before, each_step = (sorted(i for i in needed if tape.levels[i] == level) for level in (BEFORE, EACH_STEP))

        shapes: dict[int, set[Any]] = {}  # to which operations spread a value
        for each, operation in late:
            for i in each.inputs:
                shapes.setdefault(i, set()).add(each.avals[-1].shape if isinstance(operation, np.ufunc) else None)

        def spread(i: int, x: jax.Array) -> jax.Array:
            """In the shape in which it is used: NumPy adds a row to every row in twice the time that equal shapes take."""
            (shape, *others) = shapes.get(i, {None})
            return x if shape is None or others or x.ndim == 0 else jnp.broadcast_to(x, shape)

        def known_at(leaves: list[jax.Array], t: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            values = tape.constants | dict(enumerate([*leaves, t]))
            for each in early:
                result = each.primitive.bind(*(values[i] for i in each.inputs), **each.params)
                values |= zip(each.outputs, result if each.primitive.multiple_results else [result], strict=True)
            return [spread(i, jnp.asarray(values[i])) for i in before], [values[i] for i in each_step]

        def ahead(acting: PyTree, key: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            """(what depends on the parameters alone, what depends on the step too [T, ...]) of a batch, to be compiled."""
            leaves, steps = jax.tree.leaves((acting, key)), jnp.arange(num_steps, dtype=jnp.int32)
            known: tuple[list[jax.Array], list[jax.Array]] = jax.vmap(known_at, in_axes=(None, 0), out_axes=(None, 0))(leaves, steps)
            return known

        values: list[Any] = [None] * len(tape.levels)

        def step_of(each: Instruction, operation: Operation) -> tuple[Operation, int, int | None, int]:
            """(operation, first input, second input if there are two, output); one of three inputs fetches the others itself."""
            first, *others = each.inputs
            if len(others) < 2:
                return operation, first, others[0] if others else None, each.outputs[0]
            return lambda x: operation(x, *[values[i] for i in others]), first, None, each.outputs[0]

        self._program = [step_of(each, operation) for each, operation in late]
        self.ahead, self._prepare = ahead, jax.jit(lambda acting, key: pack(ahead(acting, key)))
        self._values, self._before, self._each_step = values, before, each_step
        self._observed = slice(tape.levels.index(OBSERVED), tape.num_arguments)
        self._results, self._structure = tape.results, structure
        self._rows: list[tuple[int, Any]] = []

    def begin(self, acting: PyTree, key: jax.Array, ahead: PyTree = None) -> None:
        """Take the parameters and the random numbers of the next batch, or what `ahead` gave for them."""
        before, each_step = unpack(self._prepare(acting, key)) if ahead is None else ahead
        for i, value in zip(self._before, before, strict=True):
            self._values[i] = value
        self._rows = list(zip(self._each_step, each_step, strict=True))

    def __call__(self, t: int, *observed: PyTree) -> PyTree:
        """What `act` gives at step t of the batch."""
        values = self._values
        values[self._observed] = jax.tree.leaves(observed)
        for i, rows in self._rows:
            values[i] = rows[t]
        with np.errstate(all="ignore"):  # as compiled code has it
            for operation, first, second, output in self._program:
                values[output] = operation(values[first]) if second is None else operation(values[first], values[second])
        # Copied: a result may be a view of an observation, whose memory the next step writes over.
        return jax.tree.unflatten(self._structure, [np.array(values[i]) for i in self._results])


def with_products_transposed(program: list[Instruction], results: list[int]) -> list[tuple[Instruction, Operation]]:
    """Instructions with their operations; (A B)^T, which `vmap` of a linear layer makes, as B^T A^T, whose rows lie together."""
    uses = Counter(i for each in program for i in each.inputs) + Counter(results)
    made_by = {each.outputs[0]: each for each in program}
    folded: dict[int, tuple[Instruction, Operation]] = {}
    for each in program:
        product = made_by.get(each.inputs[0])
        if each.primitive.name == "transpose" and product is not None and uses[each.inputs[0]] == 1 and is_matrix_product(product):
            del folded[product.outputs[0]]
            folded[each.outputs[0]] = product._replace(outputs=each.outputs), dot_general(product, transposed=True)
        else:
            operation = operation_of(each)
            assert operation is not None
            folded[each.outputs[0]] = each, operation
    return list(folded.values())


def products(instruction: Instruction) -> int:
    """The multiplications in a product of matrices; 0 for other operations."""
    if instruction.primitive.name != "dot_general":
        return 0
    x, _, out = instruction.avals
    return out.size * math.prod(x.shape[i] for i in instruction.params["dimension_numbers"][0][0])


Operation = Callable[..., Any]


def operation_of(instruction: Instruction) -> Operation | None:
    """The NumPy function that does what the instruction says; None where there is none."""
    name, params = instruction.primitive.name, instruction.params
    x, out = instruction.avals[0], instruction.avals[-1]
    if name in ELEMENTWISE:
        return ELEMENTWISE[name]
    if name in REDUCTIONS:
        reduce, axes = REDUCTIONS[name], tuple(params["axes"])
        return lambda x: reduce(x, axis=axes, dtype=out.dtype)
    match name:
        case "argmax" | "argmin":
            arg_reduce, (axis,) = {"argmax": np.argmax, "argmin": np.argmin}[name], params["axes"]
            return lambda x: arg_reduce(x, axis=axis).astype(out.dtype)
        case "broadcast_in_dim":
            kept = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
            spread = tuple(kept.get(i, 1) for i in range(out.ndim))
            return lambda x: np.broadcast_to(x.reshape(spread), out.shape)
        case "concatenate":
            return lambda *parts: np.concatenate(parts, params["dimension"])
        case "convert_element_type":
            return lambda x: x.astype(out.dtype, copy=False)
        case "div" if np.issubdtype(out.dtype, np.floating):
            return np.divide
        case "dot_general":
            return dot_general(instruction)
        case "integer_pow":
            return lambda x: x ** params["y"]
        case "reshape" | "squeeze":
            return lambda x: x.reshape(out.shape)
        case "select_n" if x.dtype == bool:
            return lambda which, no, yes: np.where(which, yes, no)
        case "slice":
            where = tuple(map(slice, params["start_indices"], params["limit_indices"], params["strides"] or [1] * x.ndim))
            return lambda x: x[where]
        case "transpose":
            return lambda x: x.transpose(params["permutation"])
    return None


def is_matrix_product(instruction: Instruction) -> bool:
    """Whether it is a product of two matrices over one axis."""
    if instruction.primitive.name != "dot_general":
        return False
    (left, _), (batch, _) = instruction.params["dimension_numbers"]
    x, y, out = instruction.avals
    return x.ndim == y.ndim == 2 and len(left) == 1 and not batch and x.dtype == y.dtype == out.dtype


def dot_general(instruction: Instruction, transposed: bool = False) -> Operation:
    """A sum of products over the contracted axes: by BLAS, or by `einsum` where there are axes that go along with each other."""
    (left, right), (batch_left, batch_right) = instruction.params["dimension_numbers"]
    x, y, out = instruction.avals
    if is_matrix_product(instruction):
        turn_x, turn_y = left[0] == 0, right[0] == 1
        multiply = np.matmul if products(instruction) <= MOST_ON_ONE_THREAD else multiply_on_one_thread
        if transposed:
            return lambda x, y: multiply(y if turn_y else y.T, x if turn_x else x.T)
        return lambda x, y: multiply(x.T if turn_x else x, y.T if turn_y else y)
    if not batch_left:
        return lambda x, y: np.tensordot(x, y, (left, right)).astype(out.dtype, copy=False)
    axes_x, axes_y = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    for i, j in (*zip(left, right, strict=True), *zip(batch_left, batch_right, strict=True)):
        axes_y[j] = axes_x[i]
    free = [i for i in range(x.ndim) if i not in (*left, *batch_left)] + [axis for axis in axes_y if axis >= x.ndim]
    return lambda x, y: np.einsum(x, axes_x, y, axes_y, [*batch_left, *free]).astype(out.dtype, copy=False)


def multiply_on_one_thread(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x [N, K] times y [K, M], a few columns at a time, or rows where there are more of these.

    The threads that BLAS would divide it among spin for milliseconds after each product, on cores that the environment and the update need.
    """
    if len(x) > y.shape[1]:
        return multiply_on_one_thread(y.T, x.T).T
    product = np.empty((len(x), y.shape[1]), x.dtype)
    width = max(1, MOST_ON_ONE_THREAD // x.size)
    for begin in range(0, y.shape[1], width):
        columns = slice(begin, begin + width)
        np.matmul(x, y[:, columns], out=product[:, columns])
    return product


def same(x: Any) -> Any:
    return x


ELEMENTWISE: dict[str, Operation] = {
    **{"add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "sign": np.sign, "abs": np.abs},
    **{"max": np.maximum, "min": np.minimum, "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high)},
    **{"exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "tanh": np.tanh, "logistic": lambda x: 1 / (1 + np.exp(-x))},
    **{"sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "pow": np.power},
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert, "stop_gradient": same, "copy": same},
}
REDUCTIONS: dict[str, Operation] = {
    **{"reduce_sum": np.add.reduce, "reduce_max": np.maximum.reduce, "reduce_min": np.minimum.reduce},
    **{"reduce_and": np.bitwise_and.reduce, "reduce_or": np.bitwise_or.reduce},
}
