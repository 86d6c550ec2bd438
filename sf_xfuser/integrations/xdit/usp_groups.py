"""Runs single calls of xDiT's USP in other degrees than those of the launch.

At each call USP reads the two process groups in yunchang's ``PROCESS_GROUP``, the Ulysses and Ring entries of xDiT's
sequence-parallel coordinator, and PyTorch's KV rotation of a ring. Replacing them for one call is a dozen assignments
(microseconds, no communication).

Importing this module needs no xfuser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from sf_xfuser.layout.usp_layouts import Groups, XditConfig


class XditGroups:
    """The Ulysses and Ring process groups of one sequence-parallel group for several degrees; equal groups are created
    once. ``members[p]`` is the rank at machine-major position ``p``."""

    def __init__(self, members: Sequence[int], ranks_per_machine: int, backend: str | None = None) -> None:
        """``backend`` of torch.distributed; None: the default group's."""
        self._members, self._ranks_per_machine, self._backend = tuple(members), ranks_per_machine, backend
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._entries: dict[XditConfig, tuple[dict[str, Any], dict[str, Any]]] = {}

    def make(self, config: XditConfig) -> None:
        """Create the groups of ``config`` if they are new: collective over the sequence-parallel group, as their first
        use may be (NCCL connects then). Raises ValueError if the degrees do not fit the group."""
        if config in self._entries:
            return
        num_machines = len(self._members) // self._ranks_per_machine
        # xDiT orders ranks ascending, regardless of machines.
        ranks = sorted(self._members) if config.placement == "xdit" else self._members
        ulysses, ring = (
            self.own_group(groups, ranks) for groups in config.groups(num_machines, self._ranks_per_machine)
        )
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
    def use(self, config: XditConfig) -> Iterator[None]:
        """Run xDiT's USP in ``config`` inside the block. Local, except for ``make``."""
        from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
        from xfuser.core.distributed import get_sp_group
        from yunchang.globals import PROCESS_GROUP

        self.make(config)
        # Modules of xDiT hold these objects by name: change their attributes, do not replace them.
        changes = list(zip((PROCESS_GROUP, get_sp_group()), self._entries[config], strict=True))
        saved = [(owner, {name: getattr(owner, name) for name in entries}) for owner, entries in changes]
        saved_rotation = _cp_options.rotate_method
        try:
            for owner, entries in changes:
                vars(owner).update(entries)
            set_rotate_method(config.rotation)
            yield
        finally:
            for owner, entries in saved:
                vars(owner).update(entries)
            _cp_options.rotate_method = saved_rotation

    def own_group(self, groups: Groups, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of this rank among ``groups``, which hold every position once; ``ranks[p]`` is the rank at position
        ``p``. Collective over its ranks if it is new."""
        sorted_groups = (tuple(sorted(ranks[p] for p in group)) for group in groups)
        own = next(group for group in sorted_groups if dist.get_rank() in group)
        if own not in self._groups:
            self._groups[own] = dist.new_group(list(own), backend=self._backend, use_local_synchronization=True)
        return self._groups[own]
