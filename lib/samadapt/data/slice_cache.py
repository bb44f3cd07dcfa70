"""What is computed from slices, on disk: made once, found again by every process of the project, within a budget."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diskcache
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from samadapt.errors import StateError

logger = logging.getLogger(__name__)

LEAST_FREE = 2 * 2**30
"""Bytes that stay free on the disk."""

FULL = 0.9
"""Share of the budget beyond which what is put soon pushes out what was put before."""

_PROBE = "probe"

_UNUSABLE = (sqlite3.Error, diskcache.Timeout, OSError)


class SliceCache:
    """Tensors by key. Beyond the budget, those that were used longest ago are dropped.

    Safe for several processes and threads. An entry that was damaged counts as missing; so does everything while the
    disk cannot be used, because all entries can be computed again.

    Args:
        folder: of the entries; made with the first one.
        gib: GiB that they may take together.
    """

    def __init__(self, folder: Path, gib: float) -> None:
        self._folder = folder
        self._budget = int(gib * 2**30)
        self._lock = threading.Lock()
        self._opened: diskcache.Cache | None = None

    def get(self, key: str) -> Tensor | None:
        """The tensor of an entry, as it was put; None where there is none."""
        if self._opened is None and not self._folder.is_dir():
            return None
        try:
            data, checksum = self._store().get(key, tag=True)
            if not isinstance(data, bytes) or zlib.crc32(data) != checksum:
                return None
            return load(data)["tensor"]
        except (SafetensorError, KeyError, ValueError):
            return None
        except _UNUSABLE as error:
            self._give_up(error)
            return None

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor, if there is room on the disk."""
        data = save({"tensor": tensor.contiguous()})
        try:
            store = self._store()
            if shutil.disk_usage(self._folder).free > LEAST_FREE + len(data):
                store.set(key, data, tag=zlib.crc32(data))
        except _UNUSABLE as error:
            self._give_up(error)

    def gather(self, keys: Sequence[str], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """The tensors of ``keys``, in their order; what is missing is computed, once for each key, and put.

        Args:
            keys: may repeat.
            compute: positions in ``keys`` -> the tensors that belong there.
        """
        positions = {key: n for n, key in reversed(list(enumerate(keys)))}
        found = {key: tensor for key in positions if (tensor := self.get(key)) is not None}
        if missing := [key for key in positions if key not in found]:
            for key, tensor in zip(missing, compute([positions[key] for key in missing]), strict=True):
                self.put(key, tensor)
                found[key] = tensor
        return [found[key] for key in keys]

    def drop(self, unwanted: Callable[[str], bool]) -> None:
        """Make room: drop the entries whose key is unwanted."""
        if not self._folder.is_dir():
            return
        try:
            store = self._store()
            for key in [key for key in store.iterkeys() if unwanted(key)]:
                store.delete(key)
        except ValueError as error:
            logger.warning("%s: %s", self._folder, error)
        except _UNUSABLE as error:
            self._give_up(error)

    def reader(self) -> SliceCache:
        """The same entries for whoever must not push out any: what they put is not kept."""
        return _Reader(self)

    def require(self) -> None:
        """Make sure that entries are kept and found again, for those who compute only to keep.

        Raises:
            StateError: the folder cannot be used, or the disk is nearly full.
        """
        probe = torch.zeros(1)
        self.put(_PROBE, probe)
        if self.get(_PROBE) is None:
            raise StateError(
                "nothing can be kept there",
                where=self._folder,
                remedy=f"It needs a folder that can be written to, and {LEAST_FREE / 2**30:g} GiB free on its disk.",
            )

    def bytes_used(self) -> int:
        """Bytes of all entries together."""
        try:
            return self._store().volume() if self._folder.is_dir() else 0
        except _UNUSABLE as error:
            self._give_up(error)
            return 0

    def filled(self) -> float:
        """Share of the budget that is used."""
        return self.bytes_used() / self._budget

    def full(self) -> bool:
        """Whether older entries have to go soon."""
        return self.filled() >= FULL

    def _store(self) -> diskcache.Cache:
        with self._lock:
            if self._opened is None:
                self._opened = diskcache.Cache(
                    str(self._folder),
                    disk=_BytesAlone,
                    size_limit=self._budget,
                    eviction_policy="least-recently-used",
                )
            return self._opened

    def _give_up(self, error: Exception) -> None:
        """A damaged index, or a folder that was removed, begins anew; anything else (a full disk, a lock) may pass."""
        if self._opened is not None and not self._folder.is_dir():
            with self._lock:
                self._opened = None
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        logger.warning("%s: %s%s", self._folder, error, "; it is made anew" if damaged else "")
        if damaged:
            with self._lock:
                self._opened = None
                shutil.rmtree(self._folder, ignore_errors=True)


class _Reader(SliceCache):
    """Gets what another one holds, and keeps nothing."""

    def __init__(self, cache: SliceCache) -> None:
        super().__init__(cache._folder, cache._budget / 2**30)
        self._cache = cache

    def get(self, key: str) -> Tensor | None:
        return self._cache.get(key)

    def put(self, key: str, tensor: Tensor) -> None:
        """Nothing."""


class _BytesAlone(diskcache.Disk):
    """Bytes under text keys and nothing else, so that what somebody else put into the index is never unpickled."""

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise ValueError("a key that is no text")
        return super().get(key, raw)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
            raise ValueError("an entry that is no bytes")
        return super().fetch(mode, filename, value, read)
