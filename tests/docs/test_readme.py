"""What the documents show is what happens: every block of every page runs, and every file and line they name is there.

Blocks of one page run in order, in one directory. Python blocks share their names; one that begins with `# name.py` is saved as
that file too. Shell lines that call `surefoot` or `python` run; those that call `make` or `pip` are held against the Makefile
and pyproject.toml. A block marked `text` that follows a Python block is what that block prints, other ones are samples of output;
those marked `math` are formulas, those marked `py` are lines of the source file that the line above them links to.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$\n(.*?)^\$\$$", re.MULTILINE | re.DOTALL)
QUOTATION = re.compile(r"^\[`([^`]+)`\]\(([^)]+)\).\n\n```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    assert {language for language, _ in blocks(page)} <= {"sh", "python", "text", "math", "py"}
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence is not closed, or is indented"
    assert "~~~" not in page.read_text(), "a fence that no test reads"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CHINESE and {"sh", "python"} & set(dict(blocks(page)))], ids=name)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names, before = {"__name__": page.stem.lower()}, None
    for language, text in blocks(page):
        if language == "python":
            if file := re.match(r"# (\w+\.py)\n", text):
                (tmp_path / file[1]).write_text(text)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, name(page), "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                run_line(line)
        elif language == "text" and before == "python":
            check_output(text, output.getvalue())
        before = language


def check_output(shown, printed):
    """Equal, word by word; decimals to one unit of the last digit shown, since processors round float32 sums differently."""
    for word, expected in zip(printed.split(), shown.split(), strict=True):
        if decimal := re.fullmatch(r"-?\d+\.(\d+)", expected):
            assert abs(float(word) - float(expected)) < 1.01 * 10.0 ** -len(decimal[1]), f"{shown}is not\n{printed}"
        else:
            assert word == expected, f"{shown}is not\n{printed}"


def run_line(line):
    command, *words = shlex.split(line)
    if command == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in words), line
    elif command == "pip":
        check_installation(words)
    else:
        assert command in ("surefoot", "python"), f"cannot check {line!r}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        result = subprocess.run(line, shell=True, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"


def check_installation(words):
    """`pip install [-c FILE] -e .[extra]` with a file and an extra that are there."""
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, value in zip(words[1::2], words[2::2], strict=True):
        if option == "-c":
            assert (ROOT / value).is_file()
        else:
            assert option == "-e"
            assert re.fullmatch(r"\.(\[(\w+)\])?", value)
            assert value == "." or value[2:-1] in extras


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_is_there(page):
    text = BLOCK.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_quoted_line_is_in_the_file_that_is_named(page):
    quotations = QUOTATION.findall(page.read_text())
    assert len(quotations) == sum(language == "py" for language, _ in blocks(page)), "a quotation without a link to its file above it"
    for file, link, quoted in quotations:
        assert (page.parent / link).resolve() == ROOT / file
        assert quoted.strip()
        source = (ROOT / file).read_text()
        assert any("\n" + textwrap.indent(quoted, " " * indent) in source for indent in range(0, 24, 4)), f"not in {file}:\n{quoted}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_formulas_survive_markdown(page):
    text = BLOCK.sub("", page.read_text())
    assert text.count("$$") == 2 * len(FORMULA.findall(text)), "a formula is not closed, or does not stand on lines of its own"
    for formula in FORMULA.findall(text):
        assert not re.search(r"\\[^A-Za-z]", formula), f"Markdown takes a backslash before a sign for its own:\n{formula}"
        assert formula.count("{") == formula.count("}")
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula))
        assert formula.count(r"\begin{") == formula.count(r"\end{")


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_a_chinese_page_shows_the_same_code_and_the_same_sections(chinese):
    english = chinese.with_name(chinese.name.replace(".zh-CN", ""))
    assert blocks(english) == blocks(chinese)
    assert FORMULA.findall(english.read_text()) == FORMULA.findall(chinese.read_text())
    assert english.read_text().count("\n## ") == chinese.read_text().count("\n## ")
    first_column = re.compile(r"^\| (`.*?) \|", re.MULTILINE)
    assert first_column.findall(english.read_text()) == first_column.findall(chinese.read_text())


def test_the_audit_in_the_readme_is_what_a_run_reports(tmp_path):
    import surefoot as sf

    report = next(iter(sf.iterate(sf.PPO(num_steps=64, epochs=1), "CartPole-v1", steps=512, out=tmp_path / "run")))
    section = (ROOT / "README.md").read_text().partition("## How far")[2].partition("\n## ")[0]
    promised = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))
    assert len(promised) == 10
    assert set(promised) <= report.metrics.keys()
    assert {"predicted_improvement_error", "realised_improvement_error", "episode_return"} <= report.metrics.keys()
