"""The shape of the house: dependencies point down, and the path from environment step to gradient is short."""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "surefoot"
LAYERS = [
    {"math"},
    {
        *{"types", "config", "spaces", "distributions", "networks", "policies", "normalise"},
        *{"minibatches", "critics", "estimates", "waiting", "audit", "packing", "staging"},
        *{"replay", "action_values", "pathwise"},
    },
    {"envs", "collect"},
    {"algorithms"},
    {"training"},
    {"report"},
    {"rlhf"},
    {"api", "cli", "cli_text", "__main__"},
    {"surefoot"},  # the package's own __init__.py
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATH_MAY_IMPORT = {"__future__", "collections", "jax", "numpy", "typing"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(["surefoot", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def part(module: str) -> str:
    """The row of the table that a module of the package belongs to."""
    return module.split(".")[1] if "." in module else module


def imports(module: str, source: str) -> list[str]:
    """Every module that `source` imports, at its top or inside a function, by absolute name."""
    package = module if PACKAGE.joinpath(*module.split(".")[1:]).is_dir() else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.append(inner if inner in MODULES else origin)
    return found


def violations(module: str, source: str) -> list[str]:
    """What the imports of a module break."""
    found: list[str] = []
    for target in imports(module, source):
        inside = target.split(".")[0] == "surefoot"
        if part(module) == "math" and not inside and target.split(".")[0] not in MATH_MAY_IMPORT:
            found.append(f"{module} imports {target}: mathematics knows nothing but arrays")
        if inside and LEVEL[part(target)] > LEVEL[part(module)]:
            found.append(f"{module} imports {target}, which stands above it")
        if inside and part(module) == part(target) == "algorithms" and module != "surefoot.algorithms":
            found.append(f"{module} imports {target}: what two algorithms share moves down")
    return found


def test_every_module_has_its_place():
    assert {part(module) for module in MODULES} <= LEVEL.keys(), "add the module to LAYERS, here and in ARCHITECTURE.md"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_dependencies_point_down(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("surefoot.math.returns", "from ..types import Rollout"),
        ("surefoot.math.returns", "import gymnasium"),
        ("surefoot.math", "def f():\n    from surefoot import config"),
        ("surefoot.distributions", "import surefoot.algorithms.ppo"),
        ("surefoot.envs.classic", "from .. import algorithms"),
        ("surefoot.algorithms.trpo", "from .ppo import State"),
        ("surefoot.algorithms.trpo", "from . import ALGORITHMS"),
        ("surefoot.training.session", "from .. import __version__"),
        ("surefoot.training.session", "from ..report.curves import plot"),
        ("surefoot.report.curves", "from ..cli import main"),
        ("surefoot.report.page", "from ..rlhf.runs import METHODS"),
        ("surefoot.rlhf.demo", "from ..cli_text import main"),
    ],
)
def test_an_import_that_points_up_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("surefoot.math.returns", "import jax.numpy as jnp\nfrom .shapes import check_same_shape"),
        ("surefoot.algorithms", "from . import ppo\nfrom ..config import nearest"),
        ("surefoot.algorithms.ppo", "from ..audit import step_audit\nimport optax"),
        ("surefoot.cli", "from . import api\nfrom .training import session"),
        ("surefoot.rlhf.page", "from ..report.page import table\nfrom .runs import METHODS"),
        ("surefoot", "from .api import train"),
    ],
)
def test_an_import_that_points_down_or_aside_is_not(module, source):
    assert violations(module, source) == []


def test_the_unstable_part_of_jax_is_kept_to_one_file():
    assert sum("jax.experimental" in path.read_text() for path in FILES) <= 1


# How much there is to read.

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Unit(NamedTuple):
    """A function, a method, a constant, or a class without its methods."""

    lines: set[int]
    names: set[str]  # what it mentions, its decorators left out: they act once, when the module is loaded
    attributes: set[str]  # what it asks of objects


def span(node: ast.stmt) -> set[int]:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return set(range(first, node.end_lineno + 1))


def methods(node: ast.stmt) -> list[ast.FunctionDef]:
    return [item for item in node.body if isinstance(item, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []


def unit(node: ast.stmt) -> Unit:
    apart = [*methods(node), *getattr(node, "decorator_list", [])]
    inside = set(ast.walk(node)) - {child for other in apart for child in ast.walk(other)}
    return Unit(
        span(node) - {line for method in methods(node) for line in span(method)},
        {child.id for child in inside if isinstance(child, ast.Name)},
        {child.attr for child in inside if isinstance(child, ast.Attribute)},
    )


def units(tree: ast.Module) -> dict[str, Unit]:
    """The units of a module, methods as `Class.method`."""
    found: dict[str, Unit] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = unit(node)
            found |= {f"{node.name}.{method.name}": unit(method) for method in methods(node)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: unit(node) for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def origins(module: str, tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Where the names that a module takes from others of the package come from."""
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                (origin,) = imports(module, ast.unparse(ast.ImportFrom(node.module, [alias], node.level)))
                found[alias.asname or alias.name] = origin, alias.name
    return found


def code_lines(source: str) -> set[int]:
    """The lines that hold code: not blank, not a comment, not in a docstring (those of fields included)."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= span(node)
    return lines


def reading(*starts: tuple[str, str]) -> dict[str, int]:
    """Code lines by module that one reads when following `starts`, pairs of module and name, down to the libraries.

    Every name that is mentioned is followed, annotations included, and so is every method whose name occurs as an attribute,
    on whatever object, or that makes its objects callable. Import statements are not counted.
    """
    sources = {module_name(path): path.read_text() for path in FILES}
    trees = {module: ast.parse(source) for module, source in sources.items()}
    known = {module: units(tree) for module, tree in trees.items()}
    elsewhere = {module: origins(module, tree) for module, tree in trees.items()}
    reached: dict[tuple[str, str], Unit] = {}
    waiting = list(starts)
    while waiting:
        module, name = waiting.pop()
        if name in elsewhere.get(module, {}):
            waiting.append(elsewhere[module][name])
        elif name in known.get(module, {}) and (module, name) not in reached:
            reached[module, name] = known[module][name]
            waiting += [(module, mentioned) for mentioned in [name.partition(".")[0], *known[module][name].names]]
        if not waiting:
            asked = {"__call__"}.union(*(found.attributes for found in reached.values()))
            candidates = [(module, name) for module in known for name in known[module] if name.rpartition(".")[2] in asked and "." in name]
            waiting = [key for key in candidates if key not in reached and (key[0], key[1].partition(".")[0]) in reached]
    code = {module: code_lines(sources[module]) for module, _ in reached}
    lines = {module: set[int]().union(*(found.lines for (where, _), found in reached.items() if where == module)) for module in code}
    return {module: len(lines[module] & code[module]) for module in sorted(code)}


def test_ppo_is_short():
    lines = (PACKAGE / "algorithms" / "ppo.py").read_text().count("\n")
    assert lines < 200


def test_from_environment_step_to_gradient_is_a_short_read():
    lines = reading(
        ("surefoot.envs.classic", "cartpole_reset"),
        ("surefoot.envs.classic", "cartpole_step"),
        ("surefoot.collect", "scan_rollout"),
        ("surefoot.algorithms.ppo", "act"),
        ("surefoot.networks", "MLP"),
        ("surefoot.algorithms.ppo", "update"),
        ("surefoot.training.engine", "DeviceEngine._whole_iteration"),
    )
    report = "\n".join(f"{number:5} {module}" for module, number in lines.items())
    print(f"{report}\n{sum(lines.values()):5} in all")
    assert {"envs.classic", "collect", "policies", "networks", "math.returns", "algorithms.ppo", "training.engine"} <= {
        module.removeprefix("surefoot.") for module in lines
    }
    assert sum(lines.values()) < 650, report


def test_what_counts_as_code():
    source = '"""Doc."""\n\nx = 1  # why\n# only why\n\n\ndef f():\n    """Doc\n    doc."""\n    return (\n        x\n    )\n'
    assert code_lines(source) == {3, 7, 10, 11, 12}
