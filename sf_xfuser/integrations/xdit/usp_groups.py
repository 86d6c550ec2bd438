"""xDiT's USP in other degrees than those that it was launched with, call by call.

What USP looks at when it is called is swapped around the call: the two process groups in yunchang's ``PROCESS_GROUP``,
the Ulysses and Ring entries of xDiT's sequence-parallel coordinator, and PyTorch's rotation of KV in a ring. That is a
dozen assignments (microseconds, no communication), so that calls in one configuration alternate with calls in another.

Importing this module needs no xfuser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from sf_xfuser.layout.usp_layouts import Groups, XditConfig


class XditGroups:
    """The process groups of one sequence-parallel group for any of xDiT's configurations; equal ones are made
    once. ``members[p]`` is the rank at machine-major position ``p``."""

    def __init__(self, members: Sequence[int], ranks_per_machine: int, backend: str | None = None) -> None:
        """``backend``: torch.distributed's; None: that of the whole job."""
        self._members, self._ranks_per_machine, self._backend = tuple(members), ranks_per_machine, backend
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._entries: dict[XditConfig, tuple[dict[str, Any], dict[str, Any]]] = {}

    def make(self, config: XditConfig) -> None:
        """Have the groups of ``config``. Collective over the sequence-parallel group where they are new, which their
        first use may be as well (NCCL connects then). Raises ValueError if the degrees do not make up the group."""
        if config in self._entries:
            return
        num_machines = len(self._members) // self._ranks_per_machine
        # xDiT counts ranks in ascending order, whatever machine they are on.
        ranks = sorted(self._members) if config.placement == "xdit" else self._members
        ulysses, ring = (self.mine(groups, ranks) for groups in config.groups(num_machines, self._ranks_per_machine))
        coordinator = {
            "ulysses_group": ulysses,
            "ulysses_world_size": dist.get_world_size(ulysses),
            "ulysses_rank": dist.get_rank(ulysses),
            "ring_group": ring,
            "ring_world_size": dist.get_world_size(ring),
            "ring_rank": dist.get_rank(ring),
        }
        self._entries[config] = {"ULYSSES_PG": ulysses, "RING_PG": ring}, coordinator

    @contextmanager
    def selected(self, config: XditConfig) -> Iterator[None]:
        """Inside, xDiT is laid out as ``config`` says, for whatever of xDiT's is called; then as it was. Local, but for
        what ``make`` says."""
        from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
        from xfuser.core.distributed import get_sp_group
        from yunchang.globals import PROCESS_GROUP

        self.make(config)
        # Objects that xDiT's modules hold by name: their entries are changed, the objects stay.
        changes = list(zip((PROCESS_GROUP, get_sp_group()), self._entries[config], strict=True))
        before = [(owner, {name: getattr(owner, name) for name in entries}) for owner, entries in changes]
        rotation_before = _cp_options.rotate_method
        try:
            for owner, entries in changes:
                vars(owner).update(entries)
            set_rotate_method(config.rotation)
            yield
        finally:
            for owner, entries in before:
                vars(owner).update(entries)
            _cp_options.rotate_method = rotation_before

    def mine(self, groups: Groups, ranks: Sequence[int]) -> dist.ProcessGroup:
        """That of ``groups``, which cover every position, in which this rank is; ``ranks[p]`` is at position ``p``.
        Collective over its ranks where it is new."""
        every = (tuple(sorted(ranks[p] for p in group)) for group in groups)
        mine = next(group for group in every if dist.get_rank() in group)
        if mine not in self._made:
            self._made[mine] = dist.new_group(list(mine), backend=self._backend, use_local_synchronization=True)
        return self._made[mine]
