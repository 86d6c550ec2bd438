"""Bounded gathers over the c10d key-value store, which every launcher provides. Used only while meshes are built.

Collectives are not used: a gather over the store can name the missing ranks, and its timeout does not depend on the
backend. A built mesh uses the connections of ``control_plane`` instead.
"""

from __future__ import annotations

import itertools
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

_world_groups = itertools.count()
_GRACE_S = 5.0  # added to a gather's timeout, for a store that answers late

_SILENT_STORE = "the store of torch.distributed did not answer; its host (MASTER_ADDR) is down or cannot be reached"

_T = TypeVar("_T")


def run_with_timeout(work: Callable[[], _T], timeout_s: float, description: str, silent: str = _SILENT_STORE) -> _T:
    """Return the result of ``work`` or raise its error. Raises RuntimeError after ``timeout_s``; ``work`` then runs on
    in a daemon thread, because an operation that waits for another process cannot be interrupted. ``silent``: what this
    means."""
    results: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, name="sf-xfuser set-up", daemon=True).start()
    try:
        value, error = results.get(timeout=timeout_s)
    except queue.Empty:
        raise RuntimeError(f"{description}: waited {timeout_s:g} s, {silent}") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


class StoreGroup:
    """Gathers JSON values of ``ranks`` (global ranks, this one included) over the store.

    ``scope`` separates the keys of different groups; it is the same on all ranks of a group. Gathers are numbered, so
    all ranks must make them in the same order.
    """

    def __init__(self, scope: str, ranks: Sequence[int], timeout_s: float) -> None:
        # Private, but the same object in every torch since 1.13. The default store has no public accessor.
        self._store = dist.distributed_c10d._get_default_store()
        self._scope = scope
        self._ranks = tuple(ranks)
        self._rank = dist.get_rank()
        self.timeout_s = timeout_s
        self._num_gathers = 0

    @classmethod
    def world(cls, timeout_s: float) -> StoreGroup:
        """A new group of all ranks. Collective: all ranks create such groups in the same order."""
        return cls(f"world{next(_world_groups)}", range(dist.get_world_size()), timeout_s)

    def subgroup(self, index: int, ranks: Sequence[int]) -> StoreGroup:
        """Create the ``index``-th of several disjoint groups. Local."""
        return StoreGroup(f"{self._scope}/group{index}", ranks, self.timeout_s)

    @property
    def store_host(self) -> str:
        """The host of the store; this host if the store has none."""
        store = self._store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return getattr(store, "host", None) or socket.gethostname()

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON), in the order of ``ranks``. Collective. Raises RuntimeError, which names the
        missing ranks, after the timeout."""
        number, self._num_gathers = self._num_gathers, self._num_gathers + 1
        timeout_s = self.timeout_s + _GRACE_S
        return run_with_timeout(lambda: self._gather(number, topic, value), timeout_s, f"waiting for {topic!r}")

    def _gather(self, number: int, topic: str, value: Any) -> list[Any]:
        prefix = self._prefix(number)
        if number >= 2:
            # Every rank entered the previous gather, so every rank had read all values of the one before that.
            self._store.delete_key(f"{self._prefix(number - 2)}/{self._rank}")
        self._store.set(f"{prefix}/{self._rank}", json.dumps([topic, value]))
        deadline = time.monotonic() + self.timeout_s
        values: list[Any] = []
        for rank in self._ranks:
            key = f"{prefix}/{rank}"
            pause_s = 0.0005
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise RuntimeError(self._missing(prefix, topic))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            other_topic, other_value = json.loads(self._store.get(key))
            if other_topic != topic:
                raise RuntimeError(
                    f"rank {self._rank} is at {topic!r} while rank {rank} is at {other_topic!r}: all ranks of "
                    f"{self._ranks} must make the same calls in the same order"
                )
            values.append(other_value)
        return values

    def require_same(self, topic: str, flags: dict[str, Any]) -> None:
        """Raise ValueError, with the same text on every rank, if ``flags`` differ between ranks. Collective."""
        gathered = self.gather(topic, flags)
        by_rank = {name: {rank: g.get(name) for rank, g in zip(self._ranks, gathered, strict=True)} for name in flags}
        differing = [f"{name} by rank: {values}" for name, values in by_rank.items() if len(set(values.values())) > 1]
        if differing:
            raise ValueError(
                f"ranks were started with different flags: {'; '.join(differing)}. Give all ranks the same flags"
            )

    def _prefix(self, number: int) -> str:
        return f"sf_xfuser/{self._scope}/{number}"

    def _missing(self, prefix: str, topic: str) -> str:
        missing = [rank for rank in self._ranks if not self._store.check([f"{prefix}/{rank}"])]
        return (
            f"rank {self._rank} waited {self.timeout_s:g} s for {topic!r}, but rank(s) {missing} of {self._ranks} did "
            f"not reach it: they failed, were started without the same --sp-* flags, or need a longer --sp-timeout"
        )
