"""The cache on disk: exact, bounded, shared by processes, and never worse than empty when something is damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import diskcache
import pytest
import torch

from samadapt.data.slice_cache import SliceCache
from samadapt.errors import StateError

LIB = Path(__file__).resolve().parents[2] / "lib"
MIB = 2**20


def tensor(seed: int, mib: float = 0.25) -> torch.Tensor:
    return torch.randn(int(mib * MIB / 2), generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def cache(tmp_path):
    return SliceCache(tmp_path / "cache", gib=1)


@pytest.mark.parametrize(
    "value", [tensor(0), torch.arange(6, dtype=torch.uint8).view(2, 3), tensor(0, 0.1).view(2, -1).t()]
)
def test_what_is_put_is_got_exactly(cache, tmp_path, value):
    assert cache.get("a") is None
    cache.put("a", value)
    for found in (cache, SliceCache(tmp_path / "cache", gib=1)):
        assert torch.equal(found.get("a"), value)
        assert found.get("a").dtype == value.dtype
        assert found.get("b") is None


def test_looking_makes_no_folder(cache, tmp_path):
    assert cache.get("a") is None
    assert cache.bytes_used() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_budget_holds_and_what_was_used_last_stays(tmp_path):
    cache = SliceCache(tmp_path / "cache", gib=4 / 1024)
    for number in range(60):
        cache.put(f"{number}", tensor(number))
        assert cache.get("0") is not None
    kept = [number for number in range(60) if cache.get(f"{number}") is not None]
    assert cache.bytes_used() <= 5 * MIB
    assert {0, 58, 59} <= set(kept)
    assert 1 not in kept


def test_a_damaged_entry_counts_as_missing_until_it_is_made_again(cache, tmp_path):
    cache.put("a", tensor(0))
    (file,) = (tmp_path / "cache").rglob("*.val")
    whole = file.read_bytes()
    for damaged in (whole[:-5], b"", whole[:-5] + b"12345"):
        file.write_bytes(damaged)
        assert cache.get("a") is None
    cache.put("a", tensor(0))
    assert torch.equal(cache.get("a"), tensor(0))


def test_after_a_damaged_index_it_begins_anew(cache, tmp_path):
    cache.put("a", tensor(0))
    for file in (tmp_path / "cache").glob("cache.db*"):
        file.write_bytes(b"no database" * 1000)
    other = SliceCache(tmp_path / "cache", gib=1)
    assert other.get("a") is None
    other.put("a", tensor(1))
    assert torch.equal(other.get("a"), tensor(1))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(cache, tmp_path):
    cache.put("a", tensor(0))
    diskcache.Cache(str(tmp_path / "cache")).set("b", Trap(tmp_path / "sprung"))
    assert cache.get("b") is None
    assert not (tmp_path / "sprung").exists()


def test_what_is_unwanted_is_dropped(cache):
    for name in ("old 1", "old 2", "new 1"):
        cache.put(name, tensor(0))
    used = cache.bytes_used()
    cache.drop(lambda key: key.startswith("old"))
    assert [cache.get(name) is None for name in ("old 1", "old 2", "new 1")] == [True, True, False]
    assert cache.bytes_used() < used


def test_a_reader_gets_and_keeps_nothing(cache):
    cache.put("a", tensor(0))
    reader = cache.reader()
    found = reader.gather(["a", "b"], lambda missing: [tensor(1) for _ in missing])
    assert torch.equal(found[0], tensor(0))
    assert torch.equal(found[1], tensor(1))
    assert cache.get("b") is None


def test_a_nearly_full_disk_is_left_alone(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("samadapt.data.slice_cache.LEAST_FREE", 2**60)
    cache.put("a", tensor(0))
    assert cache.get("a") is None


def test_a_folder_that_cannot_be_written_is_reported_not_raised(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = SliceCache(tmp_path / "cache", gib=1)
    cache.put("a", tensor(0))
    assert cache.get("a") is None
    assert "cache" in caplog.text


def test_a_folder_that_was_removed_is_made_again(cache, tmp_path):
    cache.put("a", torch.ones(3))
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):  # the first one finds out
        cache.put("b", torch.ones(3))
    assert cache.get("a") is None
    assert torch.equal(cache.get("b"), torch.ones(3))


def test_who_computes_only_to_keep_is_told_that_nothing_can_be_kept(cache, tmp_path):
    cache.require()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateError, match="nothing can be kept there"):
        SliceCache(tmp_path / "file", gib=1).require()


def test_several_processes_write_and_read_at_once(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(LIB)!r})
import torch
from pathlib import Path
from samadapt.data.slice_cache import SliceCache
cache, own = SliceCache(Path({str(tmp_path / "cache")!r}), 1), int(sys.argv[1])
for number in range(40):
    cache.put(f"{{own}} {{number}}", torch.full((40000,), own * 100 + number))
    found = cache.get(f"{{(own + 1) % 3}} {{number}}")
    assert found is None or int(found[0]) == (own + 1) % 3 * 100 + number
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    cache = SliceCache(tmp_path / "cache", gib=1)
    assert all(int(cache.get(f"{own} {n}")[0]) == own * 100 + n for own in range(3) for n in range(40))
