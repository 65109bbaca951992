"""The disk cache: what is stored comes back whole, and what is damaged is noticed, named and replaced."""

import json
import multiprocessing
import os

import pytest
from einfall.compiler.cache import MANIFEST, DiskCache, key_of, read_entry, write_entry
from einfall.ir.errors import BuildError

FACTS = {"name": "k", "registers": 3}


def stored(root):
    cache = DiskCache(root)
    entry = cache.put("artifact", key_of("a"), FACTS, {"kernel.py": b"x = 1\n", "kernel.so": bytes(range(256))})
    return cache, entry


def test_an_entry_comes_back_as_it_was_stored(tmp_path):
    cache, _ = stored(tmp_path)
    entry = cache.get("artifact", key_of("a"))
    assert dict(entry.facts) == FACTS
    assert entry.file("kernel.so").read_bytes() == bytes(range(256))
    assert cache.usage()[0] == 1 and cache.usage()[1] > 256


def test_keys_do_not_depend_on_where_the_parts_are_cut():
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("ab", "c") == key_of("ab", "c")


def test_an_absent_entry_is_none(tmp_path):
    assert DiskCache(tmp_path).get("artifact", key_of("b")) is None
    assert DiskCache(None).get("artifact", key_of("b")) is None
    assert DiskCache(None).put("artifact", key_of("b"), FACTS, {}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "kernel.so").write_bytes(b"short"),
        lambda path: (path / "kernel.so").unlink(),
        lambda path: (path / MANIFEST).write_text("{"),
        lambda path: (path / MANIFEST).write_text("[1, 2]"),
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"registers": 3', '"registers": 4')),
    ],
)
def test_a_damaged_entry_is_named_removed_and_replaced(tmp_path, damage):
    cache, entry = stored(tmp_path)
    damage(entry.path)
    with pytest.warns(RuntimeWarning, match=f"{entry.path.name} is damaged"):
        assert cache.get("artifact", key_of("a")) is None
    assert not entry.path.exists()
    assert stored(tmp_path)[1] is not None
    assert cache.get("artifact", key_of("a")) is not None


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    entry = write_entry(tmp_path / "entry", FACTS, {"a": b"x"})
    data = json.loads((entry.path / MANIFEST).read_text())
    data["files"] = {"../secret": data["files"]["a"]}
    from einfall.compiler.cache import _hash

    data["hash"] = _hash({"facts": data["facts"], "files": data["files"]})
    (entry.path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BuildError, match="outside its folder"):
        read_entry(entry.path)


def test_a_root_that_cannot_be_written_warns_and_stores_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert DiskCache(tmp_path / "file").put("artifact", key_of("a"), FACTS, {}) is None


def _put(arguments):
    root, key = arguments
    return DiskCache(root).put("artifact", key, {"pid": os.getpid()}, {"data": b"x" * 100_000}) is not None


def test_processes_that_store_the_same_entry_all_end_with_a_whole_one(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.map(_put, [(tmp_path, key_of("same"))] * 12))
    entry = DiskCache(tmp_path).get("artifact", key_of("same"))
    assert entry is not None and len(entry.file("data").read_bytes()) == 100_000
    assert [p.name for p in entry.path.parent.iterdir()] == [entry.path.name], "nothing unfinished is left behind"
