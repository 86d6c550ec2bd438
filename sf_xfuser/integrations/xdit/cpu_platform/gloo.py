"""gloo, as a stand-in for NCCL: one event loop for all process groups of a rank, and both directions at once.

A rank of gloo says that it is ready to receive on the connection on which it sends, and gloo's collectives send first:
what the other end waits for then comes behind a whole tensor. So two ranks that exchange tensors do it at once, or one
after the other, as they happen to come; NCCL has no such luck in it. With receives posted first it is always at once
(docs/performance.md has the times).
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

_TAG = 0x5F5  # of these sends and receives: a group's others have 0


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


def all_to_all_both_ways(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.distributed.all_to_all_single`` with receives posted before sends, where gloo serves it."""

    @functools.wraps(all_to_all)
    def replacement(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        among = dist.group.WORLD if group is None else group
        if among is None or not (_served(among, output) and _served(among, input)):
            return all_to_all(output, input, output_split_sizes, input_split_sizes, group, async_op)
        work = _exchange(_split(input, input_split_sizes, among), _split(output, output_split_sizes, among), among)
        if async_op:
            return work
        work.wait()
        return None

    return replacement


def functional_all_to_all_both_ways(all_to_all: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The functional ``all_to_all_single`` (xDiT's Ulysses, PyTorch's ring) likewise."""

    @functools.wraps(all_to_all)
    def replacement(
        self: torch.Tensor,
        output_split_sizes: list[int] | None,
        input_split_sizes: list[int] | None,
        group: Any,
        tag: str = "",
    ) -> torch.Tensor:
        if not _served(group, self):
            return all_to_all(self, output_split_sizes, input_split_sizes, group, tag)
        rows = sum(output_split_sizes) if output_split_sizes else self.shape[0]
        output = self.new_empty(rows, *self.shape[1:])
        given = _split(self, input_split_sizes, group)
        return _waited_for_when_read(output, _exchange(given, _split(output, output_split_sizes, group), group))

    return replacement


def pair_gathers_both_ways(all_gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The functional all-gather (PyTorch's ring) likewise, among two ranks: a ring of more is at once by itself."""

    @functools.wraps(all_gather)
    def replacement(self: torch.Tensor, gather_dim: int, group: Any, tag: str = "") -> torch.Tensor:
        if gather_dim or not _served(group, self) or group.size() != 2:
            return all_gather(self, gather_dim, group, tag)
        output = self.new_empty(2 * self.shape[0], *self.shape[1:])
        return _waited_for_when_read(output, _exchange([self, self], output.chunk(2), group))

    return replacement


def _served(group: Any, tensor: torch.Tensor) -> bool:
    """Alike on all ranks that make the same call."""
    if torch.compiler.is_compiling() or not isinstance(group, dist.ProcessGroup) or type(tensor) is not torch.Tensor:
        return False
    recorded = torch.is_grad_enabled() and tensor.requires_grad
    if tensor.device.type != "cpu" or recorded:
        return False
    return isinstance(group._get_backend(tensor.device), ProcessGroupGloo)


def _split(tensor: torch.Tensor, sizes: list[int] | None, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """The rows of each rank. Raises ValueError or RuntimeError where they do not come out even."""
    rows, size = tensor.shape[0], group.size()
    if not sizes and rows % size:
        raise ValueError(f"{rows} rows do not split evenly over {size} ranks; give split sizes")
    return torch.split(tensor, sizes or [rows // size] * size)


def _exchange(given: Sequence[torch.Tensor], taken: Sequence[torch.Tensor], group: dist.ProcessGroup) -> _Works:
    """``given[r]``, any strides, goes to rank ``r`` of the group, ``taken[r]`` comes from it. Collective. Raises
    ValueError where what is to be taken is not contiguous."""
    rank, size = group.rank(), group.size()
    if not all(x.is_contiguous() for x in taken):
        raise ValueError("the output of an all-to-all must be contiguous")
    works = []
    for peer in ((rank - i) % size for i in range(1, size)):
        if taken[peer].numel():
            works.append(group.recv([taken[peer]], peer, _TAG))
    for peer in ((rank + i) % size for i in range(1, size)):
        if given[peer].numel():
            works.append(group.send([given[peer].contiguous()], peer, _TAG))
    taken[rank].copy_(given[rank])
    return _Works(works)


class _Works(dist.Work):
    """Several transfers as one."""

    # Until they are waited for: PyTorch's C++ keeps a Work, and not everywhere the Python object that can wait for it.
    _begun: ClassVar[set[_Works]] = set()

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = list(works)
        self._begun.add(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Without a ``timeout`` the group's holds."""
        works, self._works = self._works, []
        self._begun.discard(self)
        for work in works:
            work.wait(timeout)
        return True


def _waited_for_when_read(output: torch.Tensor, work: _Works) -> torch.Tensor:
    """As functional collectives return their results."""
    torch._C._distributed_c10d._register_work(output, work)
    return functional._maybe_wrap_tensor(output)
