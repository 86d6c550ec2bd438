"""gloo in place of NCCL: one event loop for all process groups of a rank, and full-duplex exchanges.

gloo announces a receive on the connection that it also sends on, and its collectives post sends first, so the
announcement may queue behind a whole tensor. Depending on timing, two ranks then send simultaneously or in turn. With
receives posted first they always send simultaneously, as with NCCL (times in docs/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo
from torch.distributed import _functional_collectives as functional

from sf_xfuser.integrations.hooks import wrapper

_TAG = 0x5F5  # gloo's own sends and receives use 0


def share_event_loop(init: Callable[..., None]) -> Callable[..., None]:
    """``ProcessGroupGloo.__init__`` that gives the devices of the first group to all later groups.

    PyTorch creates a device per group, with a thread that wakes a hundred times a second. xDiT creates about twenty
    groups: with eight ranks on two cores that took a sixth of the CPU time.
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
        options._devices, options._threads = devices, 2 * len(devices)  # PyTorch's default
        options._timeout = timeout["timeout"]
        init(self, store, rank, size, options)

    return replacement


@wrapper
def all_to_all_both_ways(
    all_to_all: Any,
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """``torch.distributed.all_to_all_single`` over gloo with receives posted before sends."""
    members = dist.group.WORLD if group is None else group
    if members is None or not (_is_supported(members, output) and _is_supported(members, input)):
        return all_to_all(output, input, output_split_sizes, input_split_sizes, group, async_op)
    sends, receives = _split(input, input_split_sizes, members), _split(output, output_split_sizes, members)
    work = _exchange(sends, receives, members)
    if async_op:
        return work
    work.wait()
    return None


@wrapper
def functional_all_to_all_both_ways(
    all_to_all: Any,
    self: torch.Tensor,
    output_split_sizes: list[int] | None,
    input_split_sizes: list[int] | None,
    group: Any,
    tag: str = "",
) -> Any:
    """The functional ``all_to_all_single`` (xDiT's Ulysses, PyTorch's ring) with receives posted before sends."""
    if not _is_supported(group, self):
        return all_to_all(self, output_split_sizes, input_split_sizes, group, tag)
    rows = sum(output_split_sizes) if output_split_sizes else self.shape[0]
    output = self.new_empty(rows, *self.shape[1:])
    sends, receives = _split(self, input_split_sizes, group), _split(output, output_split_sizes, group)
    return _wait_on_use(output, _exchange(sends, receives, group))


@wrapper
def pair_gathers_both_ways(all_gather: Any, self: torch.Tensor, gather_dim: int, group: Any, tag: str = "") -> Any:
    """The functional all-gather (PyTorch's ring) with receives posted before sends, for two ranks; others as before."""
    if gather_dim or not _is_supported(group, self) or group.size() != 2:
        return all_gather(self, gather_dim, group, tag)
    output = self.new_empty(2 * self.shape[0], *self.shape[1:])
    return _wait_on_use(output, _exchange([self, self], output.chunk(2), group))


def _is_supported(group: Any, tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` can be sent by ``_exchange``. The same on all ranks of a call."""
    if torch.compiler.is_compiling() or not isinstance(group, dist.ProcessGroup) or type(tensor) is not torch.Tensor:
        return False
    needs_grad = torch.is_grad_enabled() and tensor.requires_grad
    if tensor.device.type != "cpu" or needs_grad:
        return False
    return isinstance(group._get_backend(tensor.device), ProcessGroupGloo)


def _split(tensor: torch.Tensor, sizes: list[int] | None, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """The rows of each rank. Raises ValueError or RuntimeError if the sizes do not fit."""
    rows, size = tensor.shape[0], group.size()
    if not sizes and rows % size:
        raise ValueError(f"{rows} rows do not split evenly over {size} ranks; give split sizes")
    return torch.split(tensor, sizes or [rows // size] * size)


def _exchange(sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], group: dist.ProcessGroup) -> _Works:
    """Send ``sends[r]`` (any strides) to rank ``r`` of the group and receive ``receives[r]`` from it. Collective.

    Raises ValueError if a receive buffer is not contiguous.
    """
    rank, size = group.rank(), group.size()
    if not all(x.is_contiguous() for x in receives):
        raise ValueError("the output of an all-to-all must be contiguous")
    works = []
    for peer in ((rank - i) % size for i in range(1, size)):
        if receives[peer].numel():
            works.append(group.recv([receives[peer]], peer, _TAG))
    for peer in ((rank + i) % size for i in range(1, size)):
        if sends[peer].numel():
            works.append(group.send([sends[peer].contiguous()], peer, _TAG))
    receives[rank].copy_(sends[rank])
    return _Works(works)


class _Works(dist.Work):
    """Several transfers as one ``Work``."""

    # Keeps the Python objects alive until ``wait``: PyTorch's C++ code may keep only the C++ object.
    _pending: ClassVar[set[_Works]] = set()

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = list(works)
        self._pending.add(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """``timeout`` 0: that of the group."""
        works, self._works = self._works, []
        self._pending.discard(self)
        for work in works:
            work.wait(timeout)
        return True


def _wait_on_use(output: torch.Tensor, work: _Works) -> torch.Tensor:
    """``output`` as functional collectives return it: its first use waits for ``work``."""
    torch._C._distributed_c10d._register_work(output, work)
    return functional._maybe_wrap_tensor(output)
