"""Writing files so that a crash never leaves a half-written one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on an exception it is removed.

    The temporary name keeps the suffixes of ``path``, because image writers choose the format by suffix. Whoever may
    read a file that is made in this folder may read this one, even if the writer makes it its owner's alone.
    """
    with _beside(Path(path)) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)


@contextmanager
def cache_path(path: str | Path) -> Iterator[Path]:
    """``atomic_path`` without waiting for the disk, for files that are made again when found damaged."""
    with _beside(Path(path)) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp.{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_of(path: Path) -> tuple[int, int]:
    """Time in nanoseconds and size of a file: others when it is written anew, or another file takes its name."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def known_sha256(path: Path) -> str:
    """``sha256_of`` a file that is asked for again and again: it is read only when its state has changed."""
    return _sha256_in(state_of(path), path)


@functools.lru_cache(maxsize=1 << 16)
def _sha256_in(state: tuple[int, int], path: Path) -> str:
    return sha256_of(path)
