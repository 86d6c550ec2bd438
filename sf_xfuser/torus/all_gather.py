"""All-gather over the links of a mesh, for a model's outputs: with the timeouts and failure reports of its other calls.

Links connect a rank only with its Ulysses group and its ring. So parts are sent in two rounds: to the Ulysses group,
then everything the Ulysses group has to the ring. Rank ``(h, r)``, at head group h and ring index r, has slot
``r * P + h`` of P Ulysses ranks.
"""

from __future__ import annotations

import torch

from sf_xfuser.torus.links import link_peers
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import Parcel, window_view


@torch.no_grad()
def all_gather(part: torch.Tensor, dim: int, mesh: Mesh, *, uneven: bool = False) -> torch.Tensor:
    """Concatenate the parts of all ranks of ``mesh`` along ``dim``, in ascending order of global ranks. Collective.

    ``part``: floating point, any strides, the same dtype and shape on all ranks. With ``uneven`` the length of ``dim``
    may differ; ranks then exchange their lengths in every call. Raises ValueError on every rank if shapes differ, else
    as ``torus_attention``.
    """
    dim %= part.dim()

    def call() -> torch.Tensor:
        return _run(part.movedim(dim, 0), dim, _lengths(part, dim, mesh, uneven), mesh).movedim(0, dim)

    with mesh.call():
        return mesh.attempt(call, call, part.device)


def _lengths(part: torch.Tensor, dim: int, mesh: Mesh, uneven: bool) -> list[int]:
    """Length of ``dim`` by position. Checks that all ranks make this call, and reserves window memory for it."""
    length = part.shape[dim]
    known = ("all-gather", part.shape, part.dtype, part.device.type, dim)
    if not uneven and known in mesh.calls:
        return [length] * mesh.layout.world_size
    others = [*part.shape[:dim], *part.shape[dim + 1 :]]
    reports = mesh.control.gather("all-gather", [others, str(part.dtype), part.device.type, dim, uneven, length])
    compared = [report[:-1] if uneven else report for report in reports]
    if any(report != compared[0] for report in compared):
        found = "; ".join(f"rank {rank}: {report}" for rank, report in zip(mesh.members, reports, strict=True))
        mesh.refuse(
            f"ranks disagree on an all-gather (other dimensions, dtype, device, dimension, uneven, length): {found}; "
            f"give all ranks of a sequence-parallel group the same shape and dtype"
        )
    lengths = [report[-1] for report in reports]
    rest = part.numel() // max(1, length)
    mesh.reserve(len(lengths) * max(lengths) * rest * part.element_size(), 0, part.device)
    if not uneven:
        mesh.cache_call(known, True)
    return lengths


def _run(part: torch.Tensor, dim: int, lengths: list[int], mesh: Mesh) -> torch.Tensor:
    """``part`` [S, ...] -> [sum of S, ...]. ``dim``: the dimension of S in the caller's tensor."""
    layout, own = mesh.layout, mesh.position
    degree = layout.ulysses_degree
    ring_index = {
        w: index for group in map(layout.ring_group, layout.ulysses_group(own)) for index, w in enumerate(group)
    }
    slot = {w: ring_index[w] * degree + layout.head_group(w) for w in range(layout.world_size)}
    longest, rest = max(lengths), part.shape[1:]
    table = part.new_empty(len(lengths), longest, *rest)
    table[slot[own], : len(part)].copy_(part)
    digest = f"all-gather of {lengths} x {list(rest)} at {dim}, {part.dtype}, {layout}"
    window = mesh.begin(object(), digest)  # a unique key: two equal calls must not use the same half
    slot_bytes = table[0].numel() * table.element_size()
    peers = link_peers(layout, own)
    for round, with_ring in enumerate((False, True)):
        pending = []
        for link, transport in mesh.links.items():
            others = [peer for peer in peers[link] if (layout.head_group(peer) == layout.head_group(own)) == with_ring]
            sends, buffers = [], {}
            for peer in others:
                first, count = (ring_index[own] * degree, degree) if with_ring else (slot[own], 1)
                parts = table[first : first + count].flatten(0, 1)
                if with_ring and mesh.window is not None and transport.one_sided is None:
                    mesh.window.poison(parts)  # so that a lost chunk reaches the receiver as NaN
                sends.append(Parcel(parts, peer, slot=0, offset=first * slot_bytes))
                first = ring_index[peer] * degree if with_ring else slot[peer]
                into = table[first : first + count].flatten(0, 1)
                if transport.one_sided is not None and window is not None:
                    buffers[peer] = window_view(window, first * slot_bytes, into.shape, into.dtype), into
                else:
                    buffers[peer] = into, into
            receives = [Parcel(buffer, peer, slot=0) for peer, (buffer, _) in buffers.items()]
            pending.append((transport.exchange(round, sends, receives), buffers))
            mesh.received_bytes[link] += sum(parcel.nbytes for parcel in receives)
        for transfer, buffers in pending:
            transfer.wait()
            for buffer, into in buffers.values():
                if buffer is not into:
                    into.copy_(buffer)
    mesh.end_exchanges(table)
    by_rank = sorted(range(layout.world_size), key=mesh.members.__getitem__)
    return torch.cat([table[slot[w], : lengths[w]] for w in by_rank])
