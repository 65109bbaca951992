"""The server: pages a person can browse, segments that a pull takes, nothing that can be changed, no text that becomes markup."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from einfall.ir.errors import DatabaseError
from einfall.ir.text import parse_cascade
from einfall.schedules.target import load_target
from einfall.tuner.database import Database, Workload, merge, segments, ulid
from einfall.tuner.database.merge import content
from einfall.tuner.database.pull import pull
from einfall.tuner.device import describe_device, describe_toolchain
from made_up import failed, measurement

pytest.importorskip("datasette")
CASCADE = parse_cascade("cascade rows(X[m,p]: f32) -> Y[m]\n  Y[m] = sum(p) X[m,p]\n")
HERE = {"device": describe_device(load_target("cpu")), "toolchain": describe_toolchain(load_target("cpu"))}


@pytest.fixture
def tuned(tmp_path):
    """A file as a run on this machine leaves it, and its one workload."""
    path, w = tmp_path / "tuned.db", Workload.of(CASCADE, {"m": 64, "p": 4096})
    run = {"workload": w, "run": ulid(), "host": "a <b>host</b>", **HERE}
    with Database.open(path, create=True) as db:
        for trial, time_ms in enumerate([3.0, 2.0, 2.5, 1.0]):
            db.record(measurement(trial + 1, *[time_ms] * 3, trial=trial, **run))
        db.record(failed(9, "crash", "<script>alert(1)</script>"))
        db.record_all([measurement(t, *[x] * 5, role="final", baseline_ms=3.0, trial=5, **run) for t, x in ((1, 3.0), (4, 1.0))])
    return path, w


def get(path, *addresses):
    """The answers of the application to requests."""
    from einfall.tuner.database.server import make_datasette

    async def ask():
        datasette = make_datasette([path])
        await datasette.invoke_startup()
        return [await datasette.client.get(address) for address in addresses]

    return asyncio.run(ask())


def test_the_overview_shows_winners_roofline_and_machines(tuned):
    path, w = tuned
    (page,) = get(path, "/-/einfall")
    assert page.status_code == 200
    assert re.search(r"<td>m=64, p=4096</td>\s*<td>[^<]+</td><td>1</td>\s*<td>0.333</td>", page.text)
    assert f"/-/einfall/tuned/{w.id}" in page.text
    assert 'aria-label="roofline"' in page.text and page.text.count('class="won"') == 1 and 'class="roof"' in page.text
    assert "a &lt;b&gt;host&lt;/b&gt;" in page.text and "<b>host" not in page.text


def test_the_page_of_a_workload_shows_curve_candidates_and_sources(tuned):
    path, w = tuned
    (page,) = get(path, f"/-/einfall/tuned/{w.id}")
    assert page.status_code == 200
    assert page.text.count('class="tried"') == 4 and 'aria-label="tuning curve"' in page.text
    for words in ("wins", "slower", "not in the finals", "recorded here", "reference in float64", "sum(p) X[m,p]"):
        assert words in page.text, words
    assert get(path, f"/-/einfall/tuned/{'0' * 32}", f"/-/einfall/none/{w.id}")[1].status_code == 404


def test_the_curve_goes_down_to_the_best_so_far(tuned):
    from einfall.tuner.database.figures import curves

    path, w = tuned
    with Database.open(path, read_only=True) as db:
        (run,) = curves(db, w.id)
    (places,) = re.findall(r'class="roof" d="M([^"]+)"', run["svg"])
    heights = [float(place.split()[1]) for place in places.split("L")]
    assert heights == sorted(heights) and len(set(heights)) == 3  # 3.0, 2.0, 1.0; down is a larger y
    assert run["trials"] == 4 and run["failures"] == 0


@pytest.mark.parametrize("query", ["winners", "who_measured_what_where", "failures", "transfers"])
def test_canned_queries_answer(tuned, query):
    path, _ = tuned
    page, data = get(path, f"/tuned/{query}", f"/tuned/{query}.json?_shape=array")
    assert page.status_code == data.status_code == 200
    assert (query == "transfers") == (data.json() == [])
    assert "<script>alert" not in page.text and "<b>host" not in page.text


def test_queries_with_a_parameter_answer(tuned):
    path, w = tuned
    curve, of = get(path, f"/tuned/curve.json?_shape=array&workload={w.id}", "/tuned/winners_of.json?_shape=array&kernel=rows")
    assert [row["best_so_far_ms"] for row in curve.json()] == [3.0, 2.0, 2.0, 1.0]
    assert [row["ms"] for row in of.json()] == [1.0]


def test_nothing_can_be_written(tuned):
    path, _ = tuned
    before = path.read_bytes()
    answers = get(path, "/tuned?sql=delete+from+measurement", "/tuned?sql=select+load_extension('x')", "/tuned?sql=pragma+user_version%3D9")
    assert all(answer.status_code == 400 for answer in answers)
    assert path.read_bytes() == before


def test_hostile_values_are_text_on_every_page(tuned):
    import sqlite3

    path, w = tuned
    with sqlite3.connect(path) as connection:
        for table, column in (("device", "model"), ("measurement", "name"), ("workload", "cascade"), ("measurement", "host")):
            connection.execute(f"UPDATE {table} SET {column} = '\"><script>alert(1)</script>'")
        connection.execute("UPDATE measurement SET median_ms = 9e999, event = 'x', trial = -5, run = x'ff'")
    connection.close()
    for page in get(path, "/-/einfall", f"/-/einfall/tuned/{w.id}", "/tuned", "/tuned/winners", "/tuned/measurement"):
        assert page.status_code in (200, 404) and "<script>alert" not in page.text


# Pulling ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(tuned):
    """The command that serves the file, and its address."""
    path, _ = tuned
    command = [sys.executable, "-m", "einfall", "db", "serve", str(path), "--port", "0", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    text = b""
    while not text.endswith(b"}\n"):
        line = child.stdout.readline()
        assert line, child.stderr.read().decode()
        text += line
    yield json.loads(text)["url"], path
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 0, err.decode()
    assert b"Traceback" not in err


def test_a_pull_takes_what_is_new_and_goes_on_from_there(serving, tmp_path, monkeypatch):
    url, source = serving
    with Database.open(tmp_path / "mine.db", create=True) as mine, Database.open(source) as theirs:
        assert pull(mine, url).taken.measurements == 7
        assert content(mine) == content(theirs)
        assert pull(mine, url).segments == ()
        theirs.record(measurement(50, 9.0, 9.0, 9.0))
        assert pull(mine, f"{url}tuned").taken.measurements == 1
        assert pull(mine, f"{url}tuned").segments == ()
        assert content(mine) == content(theirs)
        with pytest.raises(DatabaseError, match="serves no tuning database 'other'"):
            pull(mine, f"{url}other")
        assert {place for (place,) in mine.read("SELECT place FROM transfer")} == {f"{url}tuned"}
    with Database.open(tmp_path / "merged.db", create=True) as merged:
        merge.merge(merged, source)
        assert merged.ls() == Database.open(tmp_path / "mine.db", read_only=True).ls()


def test_pages_come_over_the_wire(serving):
    import urllib.request

    url, _ = serving
    for page in ("", "-/einfall", "tuned", "tuned/measurement"):
        with urllib.request.urlopen(url + page, timeout=30) as answer:
            assert answer.status == 200 and b"<html" in answer.read()


def test_a_server_that_is_not_there_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Database.open(tmp_path / "mine.db", create=True) as mine, pytest.raises(DatabaseError, match="cannot be reached") as caught:
        pull(mine, f"http://127.0.0.1:{port}/")
    assert "try:" in str(caught.value)


class Liar(BaseHTTPRequestHandler):
    """A server that answers whatever a test wants."""

    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}  # noqa: RUF012

    def do_GET(self):
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def liar():
    server = HTTPServer(("127.0.0.1", 0), Liar)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    Liar.answers = {}


def honest(tmp_path):
    """A segment and what a server says with it."""
    with Database.open(tmp_path / "theirs.db", create=True) as theirs:
        theirs.record(measurement(8, 1.0, 1.0, 1.0))
        found = segments.pack(theirs, 0)
    return found, dict(segments.header(found, "ab" * 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, d: (h, d[:-9]), "was refused: it is truncated"),
        (lambda h, d: ({**h, "x-einfall-segment": "0" * 64}, d), "was refused: its content hashes to"),
        (lambda h, d: ({**h, "x-einfall-segment": "../../etc/passwd"}, d), "does not say what it sends"),
        (lambda h, d: ({**h, "x-einfall-last": "-1"}, d), "does not say what it sends"),
        (lambda h, d: ({**h, "x-einfall-last": "0"}, d), "sends the same measurements again"),
        (lambda h, d: ({}, d), "does not say what it sends"),
    ],
)
def test_a_server_that_lies_is_refused_and_nothing_is_taken(tmp_path, liar, change, message):
    found, headers = honest(tmp_path)
    headers, data = change(headers, found.data)
    Liar.answers = {"/-/einfall.json": (200, {}, b'{"databases": ["x"]}'), "/-/einfall/x/after/0": (200, headers, data)}
    with Database.open(tmp_path / "mine.db", create=True) as mine:
        with pytest.raises(DatabaseError, match=message):
            pull(mine, liar)
        assert mine.ls() == ()


def test_a_server_that_fails_half_way_leaves_what_came_before(tmp_path, liar):
    found, headers = honest(tmp_path)
    Liar.answers = {
        "/-/einfall.json": (200, {}, b'{"databases": ["x"]}'), "/-/einfall/x/after/0": (200, headers, found.data),
        "/-/einfall/x/after/1": (500, {}, b""),
    }  # fmt: skip
    with Database.open(tmp_path / "mine.db", create=True) as mine:
        with pytest.raises(DatabaseError, match="answered 500"):
            pull(mine, liar)
        assert len(mine.ls()) == 1


def test_another_file_behind_the_same_address_is_read_from_its_beginning(tmp_path, liar):
    found, headers = honest(tmp_path)
    names = (200, {}, b'{"databases": ["x"]}')
    Liar.answers = {
        "/-/einfall.json": names, "/-/einfall/x/after/0": (200, {**headers, "x-einfall-last": "900"}, found.data),
        "/-/einfall/x/after/900": (200, headers, b""),
    }  # fmt: skip
    with Database.open(tmp_path / "mine.db", create=True) as mine:
        assert pull(mine, liar).taken.measurements == 1
        with Database.open(tmp_path / "other.db", create=True) as other:
            other.record(measurement(16, 0.5, 0.5, 0.5))
            second = segments.pack(other, 0)
        said = dict(segments.header(second, "cd" * 16))
        rest = {"/-/einfall/x/after/0": (200, said, second.data), "/-/einfall/x/after/1": (200, said, b"")}
        Liar.answers = {"/-/einfall.json": names, **rest}
        assert pull(mine, liar).taken.measurements == 1


def test_what_is_no_server_of_ours_is_a_store(tmp_path, liar):
    """A plain web server of files: its listing is read by fsspec."""
    pytest.importorskip("aiohttp")
    found, _ = honest(tmp_path)
    file = f"{found.name}.jsonl.gz"
    Liar.answers = {
        "/store": (200, {"content-type": "text/html"}, f'<a href="{file}">{file}</a><a href="other.txt">other</a>'.encode()),
        f"/store/{file}": (200, {}, found.data),
    }
    with Database.open(tmp_path / "mine.db", create=True) as mine:
        assert pull(mine, f"{liar}/store").segments == (found.name,)
        assert len(mine.ls()) == 1


def test_a_port_that_is_taken_and_a_file_that_cannot_be_served_are_named(tuned, tmp_path):
    from einfall.tuner.database.server import serve

    path, _ = tuned
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DatabaseError, match="cannot be listened at"):
        serve([path], host="127.0.0.1", port=taken.getsockname()[1], on_start=print)
    with pytest.raises(DatabaseError, match="no tuning database"):
        serve([tmp_path / "none.db"], host="127.0.0.1", port=0, on_start=print)


def test_without_datasette_the_remedy_is_named(tuned, monkeypatch):
    from einfall.tuner.database import server

    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match=r"einfall\[serve\]"):
        server.make_application([tuned[0]])
