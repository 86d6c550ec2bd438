"""Ulysses' all-to-all over the links of a mesh, and its drop-in replacement for yunchang's ``all_to_all_4D``.

Tensors are [B, S, H, D]: B batch, S tokens, H heads, D head size. Imports nothing of yunchang.
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
from sf_xfuser.transport.base import Parcel, Transfer, window_view

_TOKENS, _HEADS = 1, 2  # dimensions of [B, S, H, D]
_LINKS: tuple[Link, ...] = ("across", "inside")  # the slower link first


@torch.no_grad()
def all_to_all_4d(input: torch.Tensor, scatter_dim: int, gather_dim: int, mesh: Mesh) -> torch.Tensor:
    """Split one dimension of ``input`` over the P ranks of the Ulysses group and gather another. Collective over the
    whole sequence-parallel group: all its ranks pass the same shape, dtype and direction.

    Scatter 2, gather 1: [B, S, H, D] -> [B, P*S, H/P, D]; scatter 1, gather 2: [B, S, H, D] -> [B, S/P, P*H, D]. P must
    divide the split dimension. Parts are in ascending order of global ranks. ``input`` may have any strides; the result
    is contiguous. On CUDA the work is on the current stream, and one-sided transports need a floating-point dtype of 16
    bits or more, because a lost chunk makes the result NaN. No gradient flows through.

    Only the first call of a shape exchanges control messages. Raises ValueError on every rank if ranks disagree,
    RuntimeError if a rank is missing, TransportError if a transfer times out.
    """
    with mesh.call(lambda: input.resolve_conj().resolve_neg()) as resolved:  # transports copy raw memory

        def call() -> torch.Tensor:
            _require_same_call(mesh, resolved, scatter_dim, gather_dim)
            return _run(resolved, scatter_dim, gather_dim, mesh)

        return mesh.attempt(call, call, resolved.device)


def _require_same_call(mesh: Mesh, input: torch.Tensor, scatter_dim: int, gather_dim: int) -> None:
    """Check that all ranks make this call, and reserve window memory for it."""
    call = ("all-to-all", input.shape, input.dtype, input.device.type, scatter_dim, gather_dim)
    if call in mesh.calls:
        return
    description = [list(input.shape), str(input.dtype), input.device.type, scatter_dim, gather_dim]
    reports = mesh.control.gather("all-to-all", description)
    if any(report != reports[0] for report in reports):
        per_rank = "; ".join(f"rank {rank}: {report}" for rank, report in zip(mesh.members, reports, strict=True))
        mesh.refuse(
            f"ranks disagree on an all-to-all; give all ranks of a sequence-parallel group the same shape and dtype: "
            f"{per_rank} (shape, dtype, device, scattered dimension, gathered dimension)"
        )
    mesh.reserve(input.numel() * input.element_size(), 0, input.device)
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

    # Every window has one slot of equal size per group member, in the order of the group.
    digest = f"all-to-all of {list(input.shape)}, {input.dtype}, scattered {scatter_dim}, gathered {gather_dim}"
    window = mesh.begin(object(), digest)  # a unique key: two equal calls must not use the same half
    chunk_bytes = outgoing[own].numel() * input.element_size()
    slot = {peer: index * chunk_bytes for index, peer in enumerate(group)}

    def buffer(peer: int, one_sided: bool) -> torch.Tensor:
        """Receives the chunk of ``peer``: in the window, in the result, or a temporary if the result is strided."""
        if one_sided and window is not None:
            return window_view(window, slot[peer], incoming[peer].shape, input.dtype)
        return incoming[peer] if incoming[peer].is_contiguous() else incoming[peer].new_empty(incoming[peer].shape)

    # Ring neighbours write into each other's windows in attention calls, so they get an empty chunk. Its arrival proves
    # that the sender has finished its previous call, which one-sided links rely on (transport/cpu/shm.py).
    empty = input.new_empty(0)
    pending: list[tuple[Link, Transfer, dict[int, torch.Tensor]]] = []
    peers = link_peers(layout, own)
    for link in _LINKS:
        transport = mesh.links[link]
        buffers = {peer: buffer(peer, transport.one_sided is not None) for peer in peers[link] if peer in slot}
        sends = [Parcel(outgoing.get(peer, empty), peer, slot=0, offset=slot[own]) for peer in peers[link]]
        receives = [Parcel(buffers.get(peer, empty), peer, slot=0) for peer in peers[link]]
        pending.append((link, transport.exchange(0, sends, receives), buffers))
    incoming[own].copy_(outgoing[own])
    for link, transfer, buffers in pending:
        transfer.wait()
        for peer, chunk in buffers.items():
            if chunk is not incoming[peer]:
                incoming[peer].copy_(chunk)
        mesh.received_bytes[link] += sum(chunk.nbytes for chunk in buffers.values())
    mesh.end_exchanges(out)
    return out


@dataclass(eq=False, kw_only=True)
class MeshAllToAll4D(DropIn):
    """Replaces yunchang's ``all_to_all_4D`` (``original``), which ``SeqAllToAll4D`` calls in forward and backward."""

    unsupported = "the mesh cannot run this all-to-all"
    original_name = "yunchang's own all-to-all"

    original: Callable[..., torch.Tensor]

    def calls(self) -> dict[str, int]:
        return {"all-to-all over the mesh": self.handled, self.original_name: self.fallbacks.total()}

    def __call__(
        self, input: torch.Tensor, scatter_idx: int = 2, gather_idx: int = 1, group: Any = None, use_sync: bool = False
    ) -> torch.Tensor:
        """Bitwise equal to ``original``, by :func:`all_to_all_4d`. ``use_sync``: synchronize the GPU before return."""
        reason = self.fallback_reason(input, scatter_idx, gather_idx, group)
        if reason is not None:
            self.count_fallback(reason)
            return self.original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)
        self.handled += 1
        out = all_to_all_4d(input, scatter_idx, gather_idx, self.mesh)
        if use_sync and out.is_cuda:
            torch.cuda.synchronize()
        return out

    def fallback_reason(self, input: torch.Tensor, scatter_idx: int, gather_idx: int, group: Any) -> str | None:
        """Why this call falls back to ``original``; None if it runs on the mesh. Local; the same on all ranks."""
        if (reason := self.mesh.unavailable_reason()) is not None:
            return reason
        if torch.compiler.is_compiling():
            return "torch.compile traces collectives, not links"
        if group is not self.mesh.ulysses_group:
            return "its process group is not the mesh's Ulysses group"
        if input.dim() != 4 or {scatter_idx, gather_idx} != {_TOKENS, _HEADS}:
            return f"not Ulysses: {input.dim()} dimensions, scattered {scatter_idx}, gathered {gather_idx}"
        if input.is_cuda and self.mesh.window is not None and not (input.is_floating_point() and input.itemsize > 1):
            return f"a result of {input.dtype} cannot be set to NaN if a chunk is lost"
        degree, length = self.mesh.layout.ulysses_degree, input.shape[scatter_idx]
        if length % degree:
            return f"{length} {'heads' if scatter_idx == _HEADS else 'tokens'} are not divisible by {degree} ranks"
        return None
