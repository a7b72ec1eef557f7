"""Nothing in the package can turn the contents of a file into running code.

This reads every module's syntax tree, so it also covers code that no other test reaches. What it cannot see is a library
that unpickles on our behalf; the loaders of the libraries we use are therefore in the list by name.
"""

import ast
from pathlib import Path

import pytest

import surefoot

SOURCES = sorted(Path(surefoot.__file__).parent.rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg", "jsonpickle", "torch"}
FORBIDDEN_MODULES |= {"yaml", "ruamel", "code", "codeop", "runpy"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"tree_deserialise_leaves", "read_pickle", "exec_module", "load_module", "run_path", "run_module"}
ARRAY_MODULES = {"np", "numpy", "jnp"}
# An environment or a network that the user names as `module:factory` is the user's own code, and is run on the user's word.
# `importlib` has no business where files are read.
READERS = {"checkpoint.py", "policy.py", "pretrained.py"}


def dangers(source: str, filename: str = "any.py") -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in FORBIDDEN_ATTRIBUTES or (owner in ARRAY_MODULES and node.attr in {"load", "fromfile", "memmap"}):
                found.append(f"{owner}.{node.attr}")
            if owner == "builtins":
                found.append(f"builtins.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
        for module in modules:
            root = module.split(".")[0]
            if root in FORBIDDEN_MODULES or (root == "importlib" and "metadata" not in module and filename in READERS):
                found.append(module)
            if module in {"numpy.load", "jax.numpy.load"} or module.split(".")[-1] in FORBIDDEN_ATTRIBUTES:
                found.append(module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(Path(surefoot.__file__).parent)))
def test_a_module_has_nothing_that_runs_what_it_loads(path):
    assert dangers(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import cloudpickle as harmless",
        "from joblib import load",
        "import yaml",
        "import numpy as np\nnp.load(path)",
        "from numpy import load",
        "import numpy\nnumpy.lib.format.read_array(file, allow_pickle=True)",
        "eval(text)",
        "run = eval",
        "import builtins\nbuiltins.exec(text)",
        "from equinox import tree_deserialise_leaves",
        "eqx.tree_deserialise_leaves(path, like)",
        "def lazily():\n    import marshal",
    ],
)
def test_the_search_finds_what_it_is_for(snippet):
    assert dangers(snippet) != []


def test_files_are_read_without_importing_what_they_name():
    assert dangers("import importlib", "checkpoint.py") != []
    assert dangers("import importlib", "environments.py") == []
    assert dangers("import json, safetensors\njson.loads(text)\nprogram.compile()", "checkpoint.py") == []
