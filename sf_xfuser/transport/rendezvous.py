"""Small values exchanged over the c10d key-value store that every launcher already provides, while meshes are made.

Not through a collective: a rank that never comes can then be named, and the wait is bounded whatever the backend. Once
a mesh stands, its ranks use the connections of ``control_plane`` instead.
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

_worlds = itertools.count()
_GRACE_S = 5.0  # beyond its time-out, for a store that answers late

_T = TypeVar("_T")


def bounded(work: Callable[[], _T], limit_s: float, what: str) -> _T:
    """What ``work`` returns or raises; RuntimeError if that takes longer. It then goes on in a thread that nobody waits
    for: an operation on a store whose host is silent cannot be interrupted."""
    done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="sf-xfuser store", daemon=True).start()
    try:
        value, error = done.get(timeout=limit_s)
    except queue.Empty:
        raise RuntimeError(
            f"{what}: the store of torch.distributed did not answer within {limit_s:g} s; its host (MASTER_ADDR) is "
            f"down or cannot be reached"
        ) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


class Agreement:
    """Bounded all-gather of JSON values among ``ranks`` (global ranks; this process is one of them).

    ``scope`` separates groups that share the store: all ranks of the group construct with the same scope, and each
    ``gather`` is collective over the group. Keys are numbered, so calls must come in the same order on all ranks.
    """

    def __init__(self, scope: str, ranks: Sequence[int], timeout_s: float) -> None:
        # Private, but the same object in every torch since 1.13; there is no public accessor for the default store.
        self._store = dist.distributed_c10d._get_default_store()
        self._scope = scope
        self._ranks = tuple(ranks)
        self._rank = dist.get_rank()
        self.timeout_s = timeout_s
        self._count = 0

    @classmethod
    def of_world(cls, timeout_s: float) -> Agreement:
        """One among all ranks of the job, with a scope of its own. Collective: made in the same order on all ranks."""
        return cls(f"world{next(_worlds)}", range(dist.get_world_size()), timeout_s)

    def of_group(self, index: int, ranks: Sequence[int]) -> Agreement:
        """One among ``ranks``, the ``index``-th group of this one's. Local."""
        return Agreement(f"{self._scope}/group{index}", ranks, self.timeout_s)

    @property
    def store_host(self) -> str:
        """The host of the store; this one where the store is not a server."""
        store = self._store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return getattr(store, "host", None) or socket.gethostname()

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON), in the order of ``ranks``. Collective.

        Raises RuntimeError, naming the ranks that did not come, after the timeout.
        """
        count, self._count = self._count, self._count + 1
        return bounded(lambda: self._gather(count, topic, value), self.timeout_s + _GRACE_S, f"waiting for {topic!r}")

    def _gather(self, count: int, topic: str, value: Any) -> list[Any]:
        prefix = self._prefix(count)
        if count >= 2:
            # The last gather ended, so every rank had come to it, and had read all of the one before.
            self._store.delete_key(f"{self._prefix(count - 2)}/{self._rank}")
        self._store.set(f"{prefix}/{self._rank}", json.dumps([topic, value]))
        deadline = time.monotonic() + self.timeout_s
        values: list[Any] = []
        for rank in self._ranks:
            key = f"{prefix}/{rank}"
            pause = 0.0005
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise RuntimeError(self._absent(prefix, topic))
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            seen_topic, seen = json.loads(self._store.get(key))
            if seen_topic != topic:
                raise RuntimeError(
                    f"rank {self._rank} is at {topic!r} while rank {rank} is at {seen_topic!r}: all ranks of "
                    f"{self._ranks} must make the same calls in the same order"
                )
            values.append(seen)
        return values

    def require_same(self, topic: str, flags: dict[str, Any]) -> None:
        """Raise ValueError, with the same text on every rank, unless all ranks have the same ``flags``. Collective."""
        reports = self.gather(topic, flags)
        by_rank = {name: {rank: r.get(name) for rank, r in zip(self._ranks, reports, strict=True)} for name in flags}
        differing = [f"{name} by rank: {seen}" for name, seen in by_rank.items() if len(set(seen.values())) > 1]
        if differing:
            raise ValueError(
                f"ranks were started with different flags: {'; '.join(differing)}. Give all ranks the same flags"
            )

    def _prefix(self, count: int) -> str:
        return f"sf_xfuser/{self._scope}/{count}"

    def _absent(self, prefix: str, topic: str) -> str:
        absent = [rank for rank in self._ranks if not self._store.check([f"{prefix}/{rank}"])]
        return (
            f"rank {self._rank} waited {self.timeout_s:g} s for {topic!r}, but rank(s) {absent} of {self._ranks} did "
            f"not come: they failed, were started without the same --sp-* flags, or need a longer --sp-timeout"
        )
