"""Exact tests run in another process: what they find must be seen here."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import jax, pytest
pytestmark = pytest.mark.x64
def test_precision(): assert jax.numpy.ones(1).dtype == "float64"
def test_broken(): assert 2 + 2 == 5, "told from over there"
@pytest.mark.parametrize("value", [1, 2])
def test_each(value): assert value == 1
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
"""


def test_failures_over_there_are_failures_here(tmp_path):
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_these.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "2 failed, 2 passed, 1 skipped" in run.stdout
    assert "told from over there" in run.stdout
