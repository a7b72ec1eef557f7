"""What the tests of algorithms share: 64-bit floats where mathematics is checked, and the oracle of tests/math."""

import sys
from pathlib import Path

import jax
import pytest

from surefoot.training.cache import use_compilation_cache

use_compilation_cache()  # most of the time here would go into compiling what has not changed
sys.path.append(str(Path(__file__).parents[1] / "math"))


@pytest.fixture
def x64():
    """64-bit floats for one test."""
    with jax.enable_x64(True):
        yield
