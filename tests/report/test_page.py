"""The page of a run holds its numbers, stands alone, and lets nothing from a run be more than text."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from support import BATCH, SMALL, metrics

import surefoot as sf
from surefoot.report.curves import COLOURS, FRAME, GRID, INK
from surefoot.report.page import FIRST, page, time_spent, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "</title></h1><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;'$\ud800"


class Page(HTMLParser):
    """The elements, attributes, tables and text of a page; AssertionError where tags do not balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), "no attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def table(self):
        return {name: cells for name, *cells in self.rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on an environment stepped from Python."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return sf.train(SMALL, "support:Walk", steps=6 * BATCH, out=out, progress=False, preset=False).path


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def seeds(whole, tmp_path):
    for seed in (0, 3):
        shutil.copytree(whole, tmp_path / "seeds" / f"seed-{seed}")
        change(tmp_path / "seeds" / f"seed-{seed}", seed=seed)
    return tmp_path / "seeds"


def change(run, **values):
    record = json.loads((run / "run.json").read_text()) | values
    (run / "run.json").write_text(json.dumps(record))
    return run


def rewrite(run, change):
    """Change every line of a run's metrics."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in metrics(run)))
    return run


def read(run):
    return Page(page([run]))


def test_the_last_numbers_are_those_of_the_metrics(run):
    rows, table = metrics(run), read(run).table()
    assert table["environment steps"] == [f"{6 * BATCH} of {6 * BATCH}"]
    assert table["iterations"] == ["6"]
    assert table["episodes"] == [str(rows[-1]["episodes"])]
    assert table["mean return of the last 100 episodes"] == [f"{rows[-1]['episode_return']:.1f}"]
    best = max(rows, key=lambda row: row["episode_return"])
    assert table["the same at its best"] == [f"{best['episode_return']:.1f} at step {best['step']}"]
    assert table["steps per second, median"] == [f"{np.median([row['time/steps_per_second'] for row in rows]):,.0f}"]
    assert table["time of training"] == [f"{rows[-1]['time/seconds']:.1f} s"]
    assert not any(name.startswith("evaluation") for name in table)


def test_an_evaluation_is_told(run):
    result = {"mean": 1234.56, "standard_deviation": 7.89, "returns": [1.0, 2.0]}
    (run / "evaluation.json").write_text(json.dumps({"episodes": 2, "deterministic": result, "stochastic": result | {"mean": -1.0}}))
    table = read(run).table()
    assert table["evaluation, deterministic"] == ["1,234.6 +- 7.9 (standard deviation), 2 episodes"]
    assert table["evaluation, stochastic"][0].startswith("-1.0 +- ")
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read .*run `surefoot eval .*` again, or remove the file"):
        page([run])


def test_settings_come_with_where_they_are_from(tmp_path):
    path = tmp_path / "run"
    sf.iterate(sf.PPO(num_steps=16, minibatch_size=64, hidden=(8, 4), gamma=0.99), "CartPole-v1", steps=1, out=path).close()
    next(iter(sf.iterate(SMALL, "CartPole-v1", steps=1, out=tmp_path / "other")))
    shutil.copy(tmp_path / "other" / "metrics.jsonl", path)
    rows = read(path).rows
    record = json.loads((path / "run.json").read_text())
    begin = rows.index(["setting", "value", "from"]) + 1
    listed = {name: (value, origin) for name, value, origin in rows[begin : begin + len(record["config"])]}
    assert listed.keys() == record["config"].keys()
    assert listed["num_steps"] == ("16", "set by the user")
    assert listed["hidden"] == ("8, 4", "set by the user")
    assert listed["minibatch_size"] == ("64", "default")
    assert listed["learning_rate"] == ("0.001", "preset")
    assert listed["learning_rate_schedule"] == ("linear", "preset")
    assert listed["target_kl"] == ("none", "default")
    assert listed["normalise_reward"] == ("true", "default")
    origins = [origin for _, origin in listed.values()]
    assert origins == sorted(origins, key=["set by the user", "preset", "default"].index)
    assert ["hidden", "64, 64", "default"] in read(change(path, config=record["config"] | {"hidden": [64, 64]})).rows


def test_environment_versions_and_machine_are_told(run):
    record, table = json.loads((run / "run.json").read_text()), read(run).table()
    assert table["name"] == ["support:Walk"]
    assert table["observation space"] == ["Box(-1.0, 1.0, (3,), float32)"]
    assert table["action space"] == ["Discrete(2)"]
    assert table["streams stepped in parallel"] == ["8"]
    assert table["resume"][0].startswith("exact")
    assert table["begun"] == [record["created"]]
    assert {name: [version] for name, version in record["versions"].items()}.items() <= table.items()
    assert table["cores"] == [str(record["machine"]["cores"])]
    assert read(change(run, resume="episodes restart")).table()["resume"][0].startswith("episodes start anew")


def test_the_time_adds_up_to_that_of_training(run):
    values = {name: np.array([row[name] for row in metrics(run)], float) for name in metrics(run)[0] if "time/" in name or name == "step"}
    values["time/seconds"][-1] += 1000.0
    spent, seconds = time_spent(values), BATCH / values["time/steps_per_second"]
    assert list(spent) == [FIRST, "environment", "acting", "learning", "rest"]
    np.testing.assert_allclose(spent[FIRST], seconds[0])
    np.testing.assert_allclose(spent["acting"], np.sum(seconds[1:] * values["time/acting"][1:]))
    np.testing.assert_allclose(sum(spent.values()), values["time/seconds"][-1])
    rewrite(run, lambda row: row | {"time/seconds": row["time/seconds"] + (1000.0 if row["iteration"] == 6 else 0.0)})
    bars = [attributes["style"] for tag, attributes in read(run).elements if tag == "span" and "width" in attributes.get("style", "")]
    widths = [float(re.match(r"width: ([\d.]+)%", style)[1]) for style in bars]
    np.testing.assert_allclose(widths, [100 * part / sum(spent.values()) for part in spent.values()], atol=0.01)
    compiled = time_spent({name: value for name, value in values.items() if name in ("step", "time/steps_per_second", "time/seconds")})
    np.testing.assert_allclose(list(compiled.values())[1], seconds[1:].sum())
    assert "environment, acting and learning, compiled as one" in compiled


def test_what_stands_out_is_told_and_else_that_nothing_does(run):
    rewrite(run, lambda row: row | {"explained_variance": 0.5, "kl": 0.01})
    assert "Nothing in the audit stands out." in read(run).text
    rewrite(run, lambda row: row | {"kl": 0.5})
    text = read(run).text
    assert "Steps are long: lately a KL divergence of 0.5 nats. Shorten the steps" in text
    assert "Nothing in the audit" not in text
    assert f"not complete: 50% of its steps. Continue it with surefoot train --resume {run}" in read(change(run, steps=12 * BATCH)).text


def test_the_page_stands_alone(run):
    text = page([run])
    document = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in document.elements}
    assert "http" not in re.sub(r"\s", "", text)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src") is None
        for name in ("href", "xlink:href"):
            assert re.match(r"#|data:,$", attributes.get(name, "#")), attributes
    assert text.encode() == page([run]).encode(), "the same every time"


def test_pictures_have_no_id_in_common_and_find_what_they_refer_to(seeds):
    text = page(sorted(seeds.iterdir()))
    identities = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(identities) == len(set(identities)) > 10
    assert set(re.findall(r"url\(#(\w+)\)", text) + re.findall(r'href="#(\w+)"', text)) <= set(identities)


def test_pictures_take_their_colours_from_the_style_sheet(run):
    text = page([run])
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert pictures.count("<svg") == 9
    for colour in (INK, FRAME, GRID, *COLOURS):
        assert not re.search(rf"(fill|stroke): {colour}", pictures, re.IGNORECASE)
    used = set(re.findall(r"var\((--\w+)\)", text))
    for scheme in (text.partition("@media")[0], text.partition("@media (prefers-color-scheme: dark)")[2].partition("} }")[0]):
        assert used <= set(re.findall(r"(--\w+):", scheme)), "light and dark have every colour"
    assert not re.search(r"<text(?![^>]*fill: var)", pictures), "no black text on a dark page"
    assert not re.search(r"fill: (#fff|white)", pictures), "no white panel on a dark page"


def test_whatever_a_run_says_is_text(run):
    change(run, environment=HOSTILE, resume=HOSTILE, created=HOSTILE, command=[HOSTILE], machine={HOSTILE: HOSTILE})
    change(run, versions={"surefoot": HOSTILE, HOSTILE: "1"})
    write_report(run, run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    document = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in document.elements}
    assert text.count("<h1>") == text.count("</title>") == 1
    assert document.table()["name"][0].startswith("</title></h1><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;'$")
    assert document.table()["command"][0].count("<script>") == 1


def test_seeds_have_a_column_each(seeds):
    document = Page(page(sorted(seeds.iterdir())))
    assert document.rows[0] == ["", "seed 0", "seed 3"]
    assert document.table()["iterations"] == ["6", "6"]
    assert document.table()["seeds"] == ["0, 3"]
    assert document.text.count("in all") == 2
    assert (
        "Seed 3: " in Page(page([change(rewrite(run, lambda row: row | {"kl": 0.5}), steps=768) for run in sorted(seeds.iterdir())])).text
    )


def test_a_run_without_an_audit_or_an_episode_has_a_page(run):
    names = {"step", "iteration", "episodes", "episode_return", "time/steps_per_second", "time/seconds"}
    rewrite(run, lambda row: {name: row[name] for name in row if name in names} | {"episode_return": None, "episodes": 0})
    document = read(run)
    assert "ppo reports nothing of it." in document.text
    assert "No episode has ended" in document.text
    assert "mean return of the last 100 episodes" not in document.table()


def test_one_iteration_is_enough(run):
    (run / "metrics.jsonl").write_text(json.dumps(metrics(run)[0]) + "\n")
    assert read(run).table()["iterations"] == ["1"]


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.html.txt"])
def test_only_html_is_written(name, run):
    with pytest.raises(ValueError, match=rf"A report is written as \.html, got '{name}'; choose this ending"):
        write_report(run, run / name)
    assert not (run / name).exists()


def test_what_has_no_report_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no run"):
        write_report(tmp_path / "nowhere", tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match=r"There is no directory .*missing to write report.html into; make it first"):
        write_report(run, tmp_path / "missing" / "report.html")
    with pytest.raises(ValueError, match=r"metrics\.jsonl lacks episode_return"):
        page([rewrite(run, lambda row: {name: value for name, value in row.items() if name != "episode_return"})])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="run has no metrics yet"):
        page([run])


def test_a_record_that_makes_no_sense_is_named(run):
    change(run, config={"clip": -1})
    with pytest.raises(ValueError, match=r"run\.json cannot be used: .*PPO\.clip must lie in"):
        page([run])
