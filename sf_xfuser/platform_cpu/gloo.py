"""gloo's event loops: one for all process groups of a rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo


def share_event_loop(init: Callable[..., None]) -> Callable[..., None]:
    """``ProcessGroupGloo.__init__`` with the devices of the first group for all that follow.

    PyTorch gives each group a device of its own, with a thread that wakes a hundred times a second, used or not. xDiT
    makes some twenty groups: eight ranks on two cores spent a sixth of both on that, and on the switches it causes.
    """
    gloo: Any = ProcessGroupGloo
    devices: list[Any] = []

    @functools.wraps(init)
    def replacement(self: Any, store: Any, rank: int, size: int, *last: Any, **timeout: timedelta) -> None:
        if not devices or not timeout:
            init(self, store, rank, size, *last, **timeout)
            devices[:] = devices or self.options._devices
            return
        options = gloo._Options()
        options._devices, options._threads = devices, 2 * len(devices)  # as many as PyTorch takes
        options._timeout = timeout["timeout"]
        init(self, store, rank, size, options)

    return replacement
