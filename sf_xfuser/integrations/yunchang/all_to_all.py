"""Ulysses' all-to-all over a mesh's links, and the drop-in for yunchang's ``all_to_all_4D`` that is made of it.

Tensors are [B, S, H, D]: B batch, S tokens, H heads, D head size. Knows the contract of that function and nothing of
where it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sf_xfuser.integrations.fallback import DropIn
from sf_xfuser.layout.schedule import Link
from sf_xfuser.torus.links import link_peers
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import Parcel, Ticket, window_view

_TOKENS, _HEADS = 1, 2  # dimensions
_LINKS: tuple[Link, ...] = ("across", "inside")  # the longer way first


@torch.no_grad()
def all_to_all_4d(input: torch.Tensor, scatter_dim: int, gather_dim: int, mesh: Mesh) -> torch.Tensor:
    """Among the P ranks of this one's Ulysses group, split one dimension of ``input`` and gather another. Collective
    over the whole sequence-parallel group, with one shape, dtype and direction on all of its ranks.

    Scatter 2, gather 1: [B, S, H, D] of any strides -> [B, P*S, H/P, D]; scatter 1, gather 2: -> [B, S/P, P*H, D]. The
    dimension that is split has to divide by P. Parts are in the order of global ranks. The result is contiguous, and
    nothing stays posted. On CUDA the work is on the current stream, and over a one-sided transport the dtype has to be
    one of floating point with 16 bits or more: where a chunk is lost the result becomes NaN. No gradient flows through.

    Once a shape has been seen, nothing but chunks is exchanged. Raises ValueError on every rank when ranks disagree,
    RuntimeError when a rank is missing and TransportError when a transfer is not done in time.
    """
    with mesh.call(lambda: input.resolve_conj().resolve_neg()) as given:  # transports move memory as it is

        def call() -> torch.Tensor:
            _agree(mesh, given, scatter_dim, gather_dim)
            return _run(given, scatter_dim, gather_dim, mesh)

        return mesh.attempt(call, call, given.device)


def _agree(mesh: Mesh, input: torch.Tensor, scatter_dim: int, gather_dim: int) -> None:
    """That all ranks make this call, and that their windows hold it."""
    call = ("all-to-all", input.shape, input.dtype, input.device.type, scatter_dim, gather_dim)
    if call in mesh.calls:
        return
    described = [list(input.shape), str(input.dtype), input.device.type, scatter_dim, gather_dim]
    reports = mesh.control.gather("all-to-all", described)
    if any(report != reports[0] for report in reports):
        seen = "; ".join(f"rank {rank}: {report}" for rank, report in zip(mesh.members, reports, strict=True))
        mesh.refuse(
            f"ranks disagree on an all-to-all; all ranks of a sequence-parallel group have to give it one shape and "
            f"dtype: {seen} (shape, dtype, device, scattered dimension, gathered dimension)"
        )
    mesh.reserve(input.numel() * input.element_size())
    mesh.cache_call(call, True)


def _run(input: torch.Tensor, scatter_dim: int, gather_dim: int, mesh: Mesh) -> torch.Tensor:
    layout, own = mesh.layout, mesh.position
    group = sorted(layout.ulysses_group(own), key=mesh.members.__getitem__)
    shape = list(input.shape)
    shape[scatter_dim] //= len(group)
    shape[gather_dim] *= len(group)
    out = input.new_empty(shape)
    outgoing = dict(zip(group, input.tensor_split(len(group), scatter_dim), strict=True))
    incoming = dict(zip(group, out.tensor_split(len(group), gather_dim), strict=True))

    # Each member has a slot in the window of each other, of one size and in the order of the group.
    digest = f"all-to-all of {list(input.shape)}, {input.dtype}, scattered {scatter_dim}, gathered {gather_dim}"
    window = mesh.begin(object(), digest)  # like no other call: even two alike must not follow each other in one half
    chunk_bytes = outgoing[own].numel() * input.element_size()
    slot = {peer: index * chunk_bytes for index, peer in enumerate(group)}

    def landing(peer: int, one_sided: bool) -> torch.Tensor:
        """Where the chunk of this member arrives: in the window, in the result, or beside it where that is strided."""
        if one_sided and window is not None:
            return window_view(window, slot[peer], incoming[peer].shape, input.dtype)
        return incoming[peer] if incoming[peer].is_contiguous() else incoming[peer].new_empty(incoming[peer].shape)

    # Ring neighbours, who write into each other's windows in attention calls, are sent a chunk of no tokens: that it is
    # here says that its sender has finished the call before, which one-sided links rely on (transport/shm.py).
    nothing = input.new_empty(0)
    arriving: list[tuple[Ticket, dict[int, torch.Tensor]]] = []
    peers = link_peers(layout, own)
    for link in _LINKS:
        transport = mesh.links[link]
        places = {peer: landing(peer, transport.one_sided is not None) for peer in peers[link] if peer in slot}
        sends = [
            Parcel((outgoing.get(peer, nothing),), input.dtype, peer, slot=0, offset=slot[own]) for peer in peers[link]
        ]
        receives = [Parcel((places.get(peer, nothing),), input.dtype, peer, slot=0) for peer in peers[link]]
        arriving.append((transport.exchange(0, sends, receives), places))
    incoming[own].copy_(outgoing[own])
    for ticket, places in arriving:
        ticket.wait()
        for peer, chunk in places.items():
            if chunk is not incoming[peer]:
                incoming[peer].copy_(chunk)
    mesh.end(mesh.links, out)
    return out


@dataclass(eq=False, kw_only=True)
class MeshAllToAll4D(DropIn):
    """The replacement: call it as ``all_to_all_4D`` is called. ``original`` is yunchang's own.

    It is what yunchang's ``SeqAllToAll4D`` calls forward and backward, so gradients go the same way.
    """

    cannot = "the mesh cannot serve this all-to-all"
    owner = "yunchang's own"
    handing = "all-to-all handed back to yunchang"

    original: Callable[..., torch.Tensor]

    def __call__(
        self, input: torch.Tensor, scatter_idx: int = 2, gather_idx: int = 1, group: Any = None, use_sync: bool = False
    ) -> torch.Tensor:
        """As :func:`all_to_all_4d`, to the bit what ``original`` returns. ``use_sync``: return when it is done."""
        reason = self.why_not(input, scatter_idx, gather_idx, group)
        if reason is not None:
            self.note(reason)
            return self.original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)
        self.served += 1
        out = all_to_all_4d(input, scatter_idx, gather_idx, self.mesh)
        if use_sync and out.is_cuda:
            torch.cuda.synchronize()
        return out

    def why_not(self, input: torch.Tensor, scatter_idx: int, gather_idx: int, group: Any) -> str | None:
        """Why this call goes to yunchang's own function; None if the links serve it. No communication; alike on all
        ranks, because everything it looks at is."""
        if (reason := self.mesh.unavailable_reason()) is not None:
            return reason
        if torch.compiler.is_compiling():
            return "torch.compile traces collectives, not links"
        if group is not self.mesh.ulysses_group:
            return "its process group is not the mesh's Ulysses group"
        if input.dim() != 4 or {scatter_idx, gather_idx} != {_TOKENS, _HEADS}:
            return f"{input.dim()} dimensions, scattered {scatter_idx} and gathered {gather_idx}, are not Ulysses'"
        if input.is_cuda and self.mesh.window is not None and not (input.is_floating_point() and input.itemsize > 1):
            return f"a result of {input.dtype} cannot be made NaN where a chunk is lost"
        ways, length = self.mesh.layout.ulysses_degree, input.shape[scatter_idx]
        if length % ways:
            return f"{length} {'heads' if scatter_idx == _HEADS else 'tokens'} do not divide by {ways} ranks"
        return None
