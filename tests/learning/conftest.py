"""Learning runs come last and give way: a machine on which all else has taken too long ends with its results, and says so."""

from __future__ import annotations

import os
import time

import pytest

MINUTES = 75  # since the tests began; continuous integration ends what takes 90


@pytest.fixture(autouse=True)
def _in_time() -> None:
    if time.time() - float(os.environ["SUREFOOT_TESTS_BEGAN"]) > 60 * MINUTES:
        pytest.skip(f"more than {MINUTES} minutes have passed: run tests/learning alone")
