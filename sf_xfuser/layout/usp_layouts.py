"""The layouts of xDiT's own USP: degrees, placement, process groups and traffic. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from sf_xfuser.layout.plan import split_degree

Rotation = Literal["allgather", "alltoall"]
Placement = Literal["xdit", "machines-first"]
Groups = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class XditConfig:
    """xDiT's ``--ulysses_degree`` and ``--ring_degree``, and two settings without a flag.

    ``rotation`` is how a ring moves KV: ``"allgather"`` (the default of PyTorch and xDiT) or ``"alltoall"`` (hop by
    hop). It has no effect where ``ring_degree`` is 1. ``placement`` ``"xdit"`` puts Ulysses on neighbouring ranks and
    Ring across them, as xDiT does. ``"machines-first"`` puts Ulysses across machines and Ring inside, without overlap.
    """

    ulysses_degree: int
    ring_degree: int
    rotation: Rotation = "allgather"
    placement: Placement = "xdit"

    def __post_init__(self) -> None:
        if self.ulysses_degree < 1 or self.ring_degree < 1:
            raise ValueError(f"degrees must be at least 1: ulysses={self.ulysses_degree}, ring={self.ring_degree}")
        if self.rotation not in get_args(Rotation) or self.placement not in get_args(Placement):
            raise ValueError(
                f"rotation {self.rotation!r} must be one of {get_args(Rotation)}, placement {self.placement!r} one "
                f"of {get_args(Placement)}"
            )

    def groups(self, num_machines: int, ranks_per_machine: int) -> tuple[Groups, Groups]:
        """Every Ulysses group and every Ring group, as machine-major positions."""
        world_size = num_machines * ranks_per_machine
        if self.ulysses_degree * self.ring_degree != world_size:
            raise ValueError(f"{self} describes {self.ulysses_degree * self.ring_degree} ranks, not {world_size}")
        if self.placement == "xdit":
            u = self.ulysses_degree
            ulysses = [tuple(range(first, first + u)) for first in range(0, world_size, u)]
            return ulysses, [tuple(range(first, world_size, u)) for first in range(u)]
        layout = split_degree(num_machines, ranks_per_machine, self.ulysses_degree)
        positions = range(world_size)
        return sorted({layout.ulysses_group(p) for p in positions}), sorted({layout.ring_group(p) for p in positions})

    def __str__(self) -> str:
        parts = [f"ulysses={self.ulysses_degree} ring={self.ring_degree}"]
        parts += [self.rotation] if self.ring_degree > 1 else []
        parts += [self.placement] if self.placement != "xdit" else []
        return " ".join(parts)


def legal_configs(
    world_size: int,
    ranks_per_machine: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    placement: Placement = "xdit",
) -> list[XditConfig]:
    """Every pair of degrees that xDiT can run, with both rotations if there is a ring.

    The Ulysses degree must divide the query heads and the KV heads, since xDiT splits KV before repeating it.
    ``"machines-first"`` omits configurations that have the same groups as with xDiT's placement.
    """
    if world_size % ranks_per_machine:
        raise ValueError(f"{world_size} ranks cannot be split into machines of {ranks_per_machine} ranks")
    grid = world_size // ranks_per_machine, ranks_per_machine
    configs = []
    for u in range(world_size, 0, -1):
        if world_size % u or heads % u or (kv_heads or heads) % u:
            continue
        own = XditConfig(ulysses_degree=u, ring_degree=world_size // u)
        placed = replace(own, placement=placement)
        if placement != "xdit" and placed.groups(*grid) == own.groups(*grid):
            continue
        for rotation in get_args(Rotation)[: 1 if u == world_size else None]:
            configs.append(replace(placed, rotation=rotation))
    return configs


def variant_name(config: XditConfig, own_ulysses: int) -> str:
    """The name of this configuration in a benchmark. ``own_ulysses``: the Ulysses degree of xDiT's own layout."""
    rotation = config.rotation if config.ring_degree > 1 else ""
    if config.placement == "machines-first":
        return f"mapping-{rotation}" if rotation else "mapping"
    if config.ulysses_degree == own_ulysses:
        return f"usp-{rotation or 'ulysses'}"
    if not rotation:
        return "ulysses"
    if config.ulysses_degree == 1:
        return f"ring-{rotation}"
    return f"xdit-u{config.ulysses_degree}r{config.ring_degree}-{rotation}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """The amount that each rank sends inside its machine and to other machines, in bytes or in units of ``B*L*H*D``."""

    inside: tuple[float, ...]
    across: tuple[float, ...]

    def egress(self, ranks_per_machine: int) -> float:
        """The amount that the busiest machine sends to other machines."""
        firsts = range(0, len(self.across), ranks_per_machine)
        return max(sum(self.across[first : first + ranks_per_machine]) for first in firsts)


@lru_cache
def ulysses_traffic(config: XditConfig, num_machines: int, ranks_per_machine: int) -> Traffic:
    """The Ulysses all-to-all of one tensor: each rank holds 1/W of it and sends every peer the peer's heads."""
    share = 1 / (config.ulysses_degree * num_machines * ranks_per_machine)
    ulysses, _ = config.groups(num_machines, ranks_per_machine)
    inside, across = [0.0] * num_machines * ranks_per_machine, [0.0] * num_machines * ranks_per_machine
    for group in ulysses:
        for rank in group:
            near = sum(other // ranks_per_machine == rank // ranks_per_machine for other in group)
            inside[rank], across[rank] = (near - 1) * share, (len(group) - near) * share
    return Traffic(tuple(inside), tuple(across))


@lru_cache
def ring_hop_traffic(config: XditConfig, num_machines: int, ranks_per_machine: int) -> Traffic:
    """One ring hop of one tensor: each rank sends its 1/W to the next. An all-gather is R - 1 hops."""
    share = 1 / (num_machines * ranks_per_machine)
    _, rings = config.groups(num_machines, ranks_per_machine)
    inside, across = [0.0] * num_machines * ranks_per_machine, [0.0] * num_machines * ranks_per_machine
    for group in rings if config.ring_degree > 1 else ():
        for rank, following in zip(group, (*group[1:], group[0]), strict=True):
            near = following // ranks_per_machine == rank // ranks_per_machine
            (inside if near else across)[rank] = share
    return Traffic(tuple(inside), tuple(across))


def call_traffic(config: XditConfig, num_machines: int, ranks_per_machine: int, kv_ratio: float = 1.0) -> Traffic:
    """One attention call: the all-to-all of Q, K, V and O, and K and V through the ring. ``kv_ratio`` = H_kv/H; xDiT
    repeats shared KV heads before the ring."""
    all_to_all = ulysses_traffic(config, num_machines, ranks_per_machine)
    hop = ring_hop_traffic(config, num_machines, ranks_per_machine)
    tensors, hops = 2 + 2 * kv_ratio, 2 * (config.ring_degree - 1)
    return Traffic(
        tuple(tensors * a + hops * b for a, b in zip(all_to_all.inside, hop.inside, strict=True)),
        tuple(tensors * a + hops * b for a, b in zip(all_to_all.across, hop.across, strict=True)),
    )


def egress(config: XditConfig, num_machines: int, ranks_per_machine: int, kv_ratio: float = 1.0) -> float:
    """``Layout.egress`` for xDiT's layouts: the elements that the busiest machine sends to other machines."""
    return call_traffic(config, num_machines, ranks_per_machine, kv_ratio).egress(ranks_per_machine)
