"""The persistent compilation cache: a program compiled once is loaded the next time."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, unless JAX has been given another place or it cannot be written."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surefoot" / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # slower, not wrong
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Some processors refuse cached programs with a warning; the program is then compiled as if there were no cache.
    warnings.filterwarnings("ignore", message=".*compilation cache", category=UserWarning)
