"""`einfall report`: one page that loads nothing, holds every candidate once, and says what the database says."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import statistics
from html.parser import HTMLParser
from itertools import combinations

import pytest
from einfall.cli import run as command
from einfall.compiler.cost import cost
from einfall.compiler.search_space import search_space
from einfall.ir.errors import DatabaseError
from einfall.ir.text import parse_cascade
from einfall.schedules.target import load_target
from einfall.tuner.database import Database, Device, Workload, ulid
from einfall.tuner.database.why import why
from einfall.tuner.device import describe_device, describe_toolchain
from einfall.tuner.report import Accuracy, Run, tuning_reports
from einfall.tuner.report_page import tuning_page
from made_up import failed, measurement

CASCADE = parse_cascade("cascade rows(X[m,p]: f32) -> Y[m]\n  Y[m] = sum(p) X[m,p]\n")
SIZES = {"m": 640, "p": 4096}
CPU = load_target("cpu")
HERE = {"device": describe_device(CPU), "toolchain": describe_toolchain(CPU)}
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page read strictly: every element is closed in order; its texts, its tables' cells and its attributes are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def table(self, *head):
        """The rows below a head."""
        begin = self.rows.index(list(head)) + 1
        end = next((i for i, row in enumerate(self.rows) if i > begin and len(row) != len(head)), len(self.rows))
        return self.rows[begin:end]


CANDIDATES = ("schedule", "trial, ms", "median", "95 % interval", "samples", "verdict", "choices")


def time_of(trial):
    """A time in ms that no two of the trials share."""
    return 1.0 + ((trial * 7 + 9) % 24) / 10


@pytest.fixture
def tuned(path):
    """A file as a run on this machine leaves it: 16 trials in the space, one of them a failure, and finals; and the schedules."""
    space, default = search_space(CASCADE, SIZES, CPU)
    points = [default, *(p for p in space if p != default)][:16]
    run = {"workload": Workload.of(CASCADE, SIZES), "run": ulid(), "host": "a <b>host</b>", "seed": 7, **HERE}
    with Database.open(path, create=True) as db:
        for trial, point in enumerate(points):
            time_ms = time_of(trial)
            more = {"status": "crash", "reason": "it & it fell", "evidence": None} if trial == 5 else {}
            db.record(measurement(1, *([] if more else [time_ms] * 3), trial=trial, **{**run, "schedule": point, **more}))
        finals = [(points[0], [1.5, 1.5, 1.5, 1.5, 1.5]), (points[7], [0.6, 0.61, 0.62, 0.6, 0.61])]
        db.record_all([measurement(1, *x, role="final", baseline_ms=1.5, trial=16, **{**run, "schedule": p}) for p, x in finals])
    return path, points


def page_of(path, name="rows"):
    with Database.open(path, read_only=True) as db:
        reports = tuning_reports(db, name)
    return reports, tuning_page(reports)


def test_the_page_is_html_and_refers_to_nothing_outside(tuned):
    _, text = page_of(tuned[0])
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "a", "image", "use"} & set(page.tags)
    assert not [x for x in page.attributes if x[1] in ("src", "href", "xlink:href", "srcset", "action", "data") or x[1].startswith("on")]
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    assert page.tags.count("svg") == 3  # curve, roofline, ranks
    assert "a <b>host</b>" in page.text and "<b>host" not in text


def test_every_candidate_stands_in_its_table_once_with_the_numbers_of_the_database(tuned):
    path, points = tuned
    _, text = page_of(path)
    rows = {row[0]: row for row in Page(text).table(*CANDIDATES)}
    assert sorted(rows) == sorted(p.hash for p in points) and text.count("<td>" + points[3].hash + "</td>") == 1
    with sqlite3.connect(path) as connection:
        stored = connection.execute("SELECT schedule, samples_ms FROM measurement WHERE role = 'trial'").fetchall()
    connection.close()
    for schedule, samples in stored:
        values = json.loads(samples)
        assert rows[schedule][1] == (f"{statistics.median(values):.6g}" if values else "–")
        assert json.loads(rows[schedule][6]) == json.loads(next(p for p in points if p.hash == schedule).to_json())
    assert rows[points[5].hash][5] == "crash: it & it fell"
    with Database.open(path, read_only=True) as db:
        (choice,) = why(db, "rows")
    for e in choice.entrants:
        assert rows[e.schedule_id][4:6] == [str(e.samples), e.verdict]
        if e.low is not None:
            assert rows[e.schedule_id][3] == f"{e.low:.6g} to {e.high:.6g} of the default"


def test_the_winner_stands_against_the_default_and_the_floor(tuned):
    path, points = tuned
    (report,), text = page_of(path)
    floor = cost(CASCADE, SIZES, CPU).roofline.time_us / 1e3
    won, default, least = Page(text).table("", "schedule", "ms", "of the default's time", "of the floor")
    assert won == ["winner", points[7].hash, "0.61", f"{0.61 / 1.5:.3f}", f"{0.61 / floor:.3f}"]
    assert default == ["default", points[0].hash, "1.5", "1.000", f"{1.5 / floor:.3f}"]
    assert least[2:] == [f"{floor:.6g}", f"{floor / 1.5:.3f}", "1.000"]
    assert report.default == (points[0].hash, 1.5)


def test_the_curve_holds_the_best_so_far_after_every_trial(tuned):
    path, _ = tuned
    (report,), text = page_of(path)
    (run,) = report.runs
    expected, best = [], math.inf
    for trial in range(16):
        if trial != 5:
            best = min(best, time_of(trial))
            expected.append((trial, best))
    assert list(run.best) == expected and len({best for _, best in expected}) == 4
    assert run.about["trials"] == 16 and run.about["failures"] == 1 and "seed 7" in text


def tau(expected, times):
    """Kendall's tau-a, by the pairs."""

    def order(x, y):
        return (x > y) - (x < y)

    pairs = list(combinations(zip(expected, times, strict=True), 2))
    return sum(order(a[0], b[0]) * order(a[1], b[1]) for a, b in pairs) / len(pairs)


def test_the_accuracy_is_that_of_the_ranks_shown(tuned):
    (report,), text = page_of(tuned[0])
    found = report.runs[0].accuracy
    assert found.missing == "" and found.half is not None and found.half.known == 8 and len(found.ranks) == 8
    predicted, measured = zip(*((p, m) for _, p, m in found.ranks), strict=True)
    assert found.half.tau == pytest.approx(tau(predicted, measured))
    times = {points.hash: time_of(trial) for trial, points in enumerate(tuned[1])}
    later = [name for name, _, _ in found.ranks]
    assert later == [p.hash for p in tuned[1][8:]]
    assert [m for _, _, m in found.ranks] == [1 + sorted(times[n] for n in later).index(times[name]) for name in later]
    assert all(s.known + s.later == 16 and -1 <= s.tau <= 1 for s in found.steps)
    assert f"tau {found.half.tau:.3f}" in text
    again, _ = page_of(tuned[0])
    assert again[0].runs[0].accuracy == found


def test_a_model_is_right_about_times_that_its_features_decide(path):
    """Times that grow with one tile: the order of the later half is learned from the first."""
    space, default = search_space(CASCADE, SIZES, CPU)
    points = [default, *(p for p in space if p != default)]
    points = points[:: max(1, len(points) // 40)]
    run = {"workload": Workload.of(CASCADE, SIZES), "run": ulid(), **HERE}
    with Database.open(path, create=True) as db:
        for trial, p in enumerate(sorted(points, key=lambda p: p.hash)):
            time_ms = 1.0 + sum(size for _, size in p.tile) / 100
            db.record(measurement(1, *[time_ms] * 3, trial=trial, **{**run, "schedule": p}))
    (report,), _ = page_of(path)
    assert report.runs[0].accuracy.half.tau > 0.5


def test_what_is_not_known_is_said(path):
    """A device of which there is no description, a run without a default, no usable measurement."""
    other = {"workload": Workload.of(CASCADE, SIZES), "device": Device("other", "a device", "x1", 3)}
    with Database.open(path, create=True) as db:
        for trial in range(9):
            db.record(measurement(trial + 1, 1.0 + trial, 1.0 + trial, 1.0 + trial, trial=trial, **other))
    (report,), text = page_of(path)
    assert "there is none here" in report.runs[0].accuracy.missing and "Not worked out: its features need" in text
    assert report.default is None and report.winner["floor_ms"] is None and "The floor is not known" in text
    with Database.open(path.with_name("failed.db"), create=True) as db:
        db.record(failed(1, "crash", "bang"))
    (report,), text = page_of(path.with_name("failed.db"), None)
    assert report.winner is None and "No winner" in text and "too few" in text and "crash: bang" in text
    Page(text)


TEXTS = [
    (table, column)
    for table, columns in {
        "workload": ("cascade", "layout", "extents", "family"), "device": ("vendor", "model", "arch", "units"),
        "toolchain": ("version", "backend", "compiler", "abi"), "policy": ("mode", "cache", "timer", "method"), "schedule": ("json",),
        "evidence": ("oracle", "seeds", "distributions", "shapes", "tolerance", "largest_error"),
        "best": ("extents", "median_ms", "relative", "samples", "schedule_json"),
        "measurement": (
            "name", "host", "driver", "run", "seed", "trial", "memory_bytes", "code_commit", "event", "reason", "status", "samples_ms",
            "median_ms", "baseline_ms", "samples",
        ),
    }.items()
    for column in columns
]  # fmt: skip


@pytest.mark.parametrize("value", ["'\"><script>alert(1)</script>'", "x'ff00'", "9e999", "-5"])
def test_hostile_values_are_text_in_every_column(tuned, value):
    path, _ = tuned
    (name,) = sqlite3.connect(path).execute("SELECT id FROM workload").fetchone()
    for table, column in TEXTS:
        changed = path.with_name("changed.db")
        with sqlite3.connect(path) as source, sqlite3.connect(changed) as connection:
            source.backup(connection)
            connection.execute(f"UPDATE {table} SET {column} = {value}")
        source.close()
        connection.close()
        _, text = page_of(changed, name)
        page = Page(text)
        assert "script" not in page.tags, (table, column)
        changed.unlink()


def call(*words, capfd):
    status = command([str(w) for w in words])
    said = capfd.readouterr()
    return status, said.out, said.err


def test_the_command_writes_the_page_and_answers_in_json(tuned, tmp_path, capfd):
    path, points = tuned
    (tmp_path / "rows.cascade").write_text(str(CASCADE))
    for words in ([], ["rows"], [Workload.of(CASCADE, SIZES).id[:8]], [tmp_path / "rows.cascade"]):
        status, out, err = call("report", *words, "--db", path, "-o", tmp_path / "page.html", capfd=capfd)
        assert (status, err) == (0, "") and "16 candidates, 1 runs" in out
        assert points[7].hash in (tmp_path / "page.html").read_text()
    status, out, _ = call("report", "--db", path, "-o", tmp_path / "page.html", "--json", capfd=capfd)
    (found,) = json.loads(out)["reports"]
    assert status == 0 and found["winner"]["median_ms"] == 0.61 and found["default"]["median_ms"] == 1.5
    assert len(found["candidates"]) == 16 and len(found["runs"][0]["best_so_far"]) == 15


def test_what_cannot_be_done_is_one_message_with_the_remedy(tuned, tmp_path, capfd):
    path, _ = tuned
    Database.open(tmp_path / "empty.db", create=True).close()
    (tmp_path / "text.db").write_text("this is no database at all")
    for words, said in (
        (["--db", tmp_path / "none.db", "-o", tmp_path / "p.html"], "no tuning database"),
        (["--db", tmp_path / "text.db", "-o", tmp_path / "p.html"], "not an SQLite database"),
        (["--db", tmp_path / "empty.db", "-o", tmp_path / "p.html"], "nothing was measured"),
        (["nope", "--db", path, "-o", tmp_path / "p.html"], "nothing was measured for 'nope'"),
        (["rows", "--db", path, "-o", tmp_path / "no" / "p.html"], "cannot be written"),
        (["rows", "--db", path, "-o", tmp_path], "cannot be written"),
        (["none.py:rows", "--db", path, "-o", tmp_path / "p.html"], "there is no file"),
    ):
        status, out, err = call("report", *words, capfd=capfd)
        assert (status, out) == (2, "") and said in err and err.count("try: ") <= 1 and "Traceback" not in err
        assert not (tmp_path / "p.html").exists()
    assert "try: `einfall tune REF" in call("report", "--db", tmp_path / "empty.db", "-o", tmp_path / "p.html", capfd=capfd)[2]


def test_a_page_has_a_limit(path):
    with Database.open(path, create=True) as db:
        for rows in range(1, 22):
            db.record(measurement(1, 1.0, 1.0, 1.0, workload=Workload.of(CASCADE, {"m": rows, "p": 8})))
        with pytest.raises(DatabaseError, match="21 choices were made") as caught:
            tuning_reports(db, "rows")
        assert "workload's id" in str(caught.value)


def test_a_curve_that_leaves_out_trials_says_so(tuned, monkeypatch):
    from einfall.tuner import report_page
    from einfall.tuner.database import figures

    assert "are shown as curves" not in page_of(tuned[0])[1]
    for module in (figures, report_page):
        monkeypatch.setattr(module, "MAX_DRAWN", 10)
    (report,), text = page_of(tuned[0])
    assert "the first 10 are shown as curves" in text and report.runs[0].about["trials"] == 10 and len(report.candidates) == 16


def test_a_run_as_data_is_plain():
    assert Run({"run": "a"}, ((0, 1.0),), "", Accuracy(missing="why")).to_dict()["cost_model"] == {
        "tau": None, "steps": [], "ranks": [], "missing": "why"
    }  # fmt: skip
