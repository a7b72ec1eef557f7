"""Tests marked `x64` run in a process of their own: the precision of JAX is one switch for a whole process.

pytest collects, selects and reports them like any others; only their calls happen over there, all in one go when the first
is due. Under JAX_ENABLE_X64=1 they run in this process, as a debugger needs.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest

REPORTS = pytest.StashKey()


def pytest_configure(config):
    config.addinivalue_line("markers", "x64: exact to 1e-10, and so in need of 64-bit floats")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if jax.config.jax_enable_x64 or pyfuncitem.get_closest_marker("x64") is None:
        return None
    session = pyfuncitem.session
    if REPORTS not in session.stash:
        node_ids = [item.nodeid for item in session.items if item.get_closest_marker("x64")]
        session.stash[REPORTS] = run_with_x64(node_ids, session.config.rootpath)
    reports, output = session.stash[REPORTS]
    path, _, name = pyfuncitem.nodeid.partition("::")
    report = reports.get((path.removesuffix(".py").replace("/", "."), name))
    if report is None:
        pytest.fail(f"the process with 64-bit floats did not report on this test:\n{output}", pytrace=False)
    for problem in report:
        if problem.tag == "skipped":
            pytest.skip(problem.get("message"))
        if problem.tag in ("failure", "error"):
            pytest.fail(problem.text, pytrace=False)
    return True


def run_with_x64(node_ids, root):
    """Reports by (module, test), and all that the process printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={root}", f"--junitxml={report}", *node_ids]
        process = subprocess.run(
            command, cwd=root, env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
        )
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        return {(case.get("classname"), case.get("name")): list(case) for case in cases}, process.stdout + process.stderr
