"""The list of mutants fits the source: each line is there, once, and breaking it changes it. Running them is a command of its own."""

import pytest
from mutants import MUTANTS, ROOT, SOURCE


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_line_is_there_and_so_are_its_tests(mutant):
    assert (SOURCE / mutant.file).read_text().count(mutant.line) == 1
    assert mutant.broken != mutant.line
    assert all((ROOT / "tests" / name).exists() for name in mutant.tests.split())


def test_there_are_enough_of_them_and_their_names_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
