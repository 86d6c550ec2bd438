"""All ranks' parts of a tensor, over a mesh's links: a model's output is put together with the guarantees of its calls.

Links join a rank with its Ulysses group and its ring only. So parts go in two rounds: to the Ulysses group, and then
what that holds to the ring. Rank ``(h, r)``, at head group h and ring index r, keeps its part in slot ``r * P + h``.
"""

from __future__ import annotations

import torch

from sf_xfuser.torus.links import link_peers
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import Parcel, window_view


@torch.no_grad()
def all_gather(part: torch.Tensor, dim: int, mesh: Mesh, *, uneven: bool = False) -> torch.Tensor:
    """The parts of all ranks of ``mesh``, in the order of global ranks, joined at dimension ``dim``. Collective.

    ``part``: floating point, any strides, alike on all ranks but for the length of ``dim``, which may differ where
    ``uneven``; ranks then tell each other. Raises as ``torus_attention``; ValueError on every rank where shapes differ.
    """
    dim %= part.dim()

    def call() -> torch.Tensor:
        return _run(part.movedim(dim, 0), dim, _lengths(part, dim, mesh, uneven), mesh).movedim(0, dim)

    with mesh.call():
        return mesh.attempt(call, call, part.device)


def _lengths(part: torch.Tensor, dim: int, mesh: Mesh, uneven: bool) -> list[int]:
    """Of ``dim``, by position; all ranks make this call, and their windows hold it."""
    length = part.shape[dim]
    known = ("all-gather", part.shape, part.dtype, part.device.type, dim)
    if not uneven and known in mesh.calls:
        return [length] * mesh.layout.world_size
    others = [*part.shape[:dim], *part.shape[dim + 1 :]]
    said = mesh.control.gather("all-gather", [others, str(part.dtype), part.device.type, dim, uneven, length])
    alike = [each if not uneven else each[:-1] for each in said]
    if any(each != alike[0] for each in alike):
        seen = "; ".join(f"rank {rank}: {each}" for rank, each in zip(mesh.members, said, strict=True))
        mesh.refuse(
            f"ranks disagree on an all-gather (other dimensions, dtype, device, dimension, uneven, length): {seen}; "
            f"give all ranks of a sequence-parallel group the same shape and dtype"
        )
    lengths = [each[-1] for each in said]
    rest = part.numel() // max(1, length)
    mesh.reserve(len(lengths) * max(lengths) * rest * part.element_size())
    if not uneven:
        mesh.cache_call(known, True)
    return lengths


def _run(part: torch.Tensor, dim: int, lengths: list[int], mesh: Mesh) -> torch.Tensor:
    """``part`` [S, ...]; returns [all S, ...]. ``dim``: where S was."""
    layout, own = mesh.layout, mesh.position
    ways = layout.ulysses_degree
    ring_index = {
        w: index for group in map(layout.ring_group, layout.ulysses_group(own)) for index, w in enumerate(group)
    }
    slot = {w: ring_index[w] * ways + layout.head_group(w) for w in range(layout.world_size)}
    longest, rest = max(lengths), part.shape[1:]
    table = part.new_empty(len(lengths), longest, *rest)
    table[slot[own], : len(part)].copy_(part)
    digest = f"all-gather of {lengths} x {list(rest)} at {dim}, {part.dtype}, {layout}"
    window = mesh.begin(object(), digest)  # like no other call: even two alike must not follow each other in one half
    slot_bytes = table[0].numel() * table.element_size()
    peers = link_peers(layout, own)
    for round, with_ring in enumerate((False, True)):
        arriving = []
        for link, transport in mesh.links.items():
            others = [peer for peer in peers[link] if (layout.head_group(peer) == layout.head_group(own)) == with_ring]
            sends, places = [], {}
            for peer in others:
                first, count = (ring_index[own] * ways, ways) if with_ring else (slot[own], 1)
                parts = table[first : first + count].flatten(0, 1)
                if with_ring and mesh.window is not None and transport.one_sided is None:
                    mesh.window.poison(parts)  # its receiver does not hear of a chunk that was lost here
                sends.append(Parcel((parts,), table.dtype, peer, slot=0, offset=first * slot_bytes))
                first = ring_index[peer] * ways if with_ring else slot[peer]
                into = table[first : first + count].flatten(0, 1)
                if transport.one_sided is not None and window is not None:
                    places[peer] = window_view(window, first * slot_bytes, into.shape, into.dtype), into
                else:
                    places[peer] = into, into
            receives = [Parcel((place,), table.dtype, peer, slot=0) for peer, (place, _) in places.items()]
            arriving.append((transport.exchange(round, sends, receives), places))
        for ticket, places in arriving:
            ticket.wait()
            for place, into in places.values():
                if place is not into:
                    into.copy_(place)
    mesh.end(mesh.links, table)
    by_rank = sorted(range(layout.world_size), key=mesh.members.__getitem__)
    return torch.cat([table[slot[w], : lengths[w]] for w in by_rank])
