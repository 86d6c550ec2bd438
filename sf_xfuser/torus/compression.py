"""Compression of chunks between machines, where bandwidth limits a call.

Q, V and O chunks are sent as one byte per element and a scale per token and head (``kernels.packing``). K keeps its
dtype, since an error in K changes every weight of every query. Partial results are merged in fp32. Unlike xDiT's
compressed all-to-all, this supports joint tokens and grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sf_xfuser.kernels.packing import CompressedLayout, Format, pack_compressed, unpack_compressed
from sf_xfuser.transport.base import Parcel, Ticket, Transport

EPS = {"int8": 2.0**-7, "fp8": 2.0**-3}
"""Step between two values, relative to the largest element of a block (int8) or of each element (fp8)."""


class Compression:
    """The format of a mesh, and the relative RMS error of the chunks that this rank sent. The error is measured on the
    first chunk of each tensor in every call. Local."""

    def __init__(self, format: Format) -> None:
        self.format: Format = format
        self.calls = 0
        self._last: torch.Tensor | None = None  # stays on the device, so that no call waits for it
        self._worst: torch.Tensor | None = None

    def over(self, link: Transport) -> CompressedLink:
        """``link`` with compressed chunks, for one call."""
        return CompressedLink(link, self)

    def add_errors(self, errors: Sequence[torch.Tensor]) -> None:
        """Add the errors of one call."""
        if errors:
            self.calls += 1
            self._last = torch.stack(list(errors)).amax()
            self._worst = self._last if self._worst is None else torch.maximum(self._worst, self._last)

    def __str__(self) -> str:
        text = f"Q, V and O are sent between machines in {self.format}, K in the input dtype"
        if self._last is None or self._worst is None:
            return text
        last, worst = float(self._last), float(self._worst)
        error = f"{last:.2%} in the last call, {worst:.2%} in the worst of {self.calls}"
        return f"{text}; relative RMS error of a chunk: {error}"


class CompressedLink(Transport):
    """A link that compresses chunks before ``exchange`` and restores them at the first ``wait``."""

    def __init__(self, link: Transport, compression: Compression) -> None:
        assert link.one_sided is None, "windows hold uncompressed chunks"
        self._link = link
        self._compression = compression
        self._errors: dict[int, torch.Tensor] = {}  # by slot, of the first chunk

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        packed = [Parcel((self._compress(parcel),), torch.uint8, parcel.peer, parcel.slot) for parcel in sends]
        arriving = [(parcel, self._bytes_for(parcel)) for parcel in receives]
        into = [Parcel((chunk,), torch.uint8, parcel.peer, parcel.slot) for parcel, chunk in arriving]
        return _Restored(self._link.exchange(round, packed, into), self, arriving)

    def drain(self) -> None:
        self._link.drain()
        self._compression.add_errors(list(self._errors.values()))

    def restore(self, parcel: Parcel, chunk: torch.Tensor) -> None:
        """Unpack received bytes into the parcel."""
        if parcel.nbytes:
            unpack_compressed(chunk, _tensors(parcel), self._formats(parcel))

    def _formats(self, parcel: Parcel) -> list[Format]:
        """Of each tensor. A parcel of two tensors is K and V."""
        return [self._compression.format] if len(_tensors(parcel)) == 1 else ["none", self._compression.format]

    def _bytes_for(self, parcel: Parcel) -> torch.Tensor:
        first = _tensors(parcel)[0]
        if not parcel.nbytes:
            return first.new_empty(0, dtype=torch.uint8)
        S, B, H, D = first.shape
        layout = CompressedLayout(shape=(S, B, H, D), dtype=parcel.dtype, formats=tuple(self._formats(parcel)))
        return first.new_empty(layout.nbytes, dtype=torch.uint8)

    def _compress(self, parcel: Parcel) -> torch.Tensor:
        chunk = self._bytes_for(parcel)
        if parcel.nbytes:
            tensors = [x if x.dtype == parcel.dtype else x.to(parcel.dtype) for x in _tensors(parcel)]
            tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
            pack_compressed(tensors, chunk, self._formats(parcel))
            if parcel.slot not in self._errors:
                back = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
                unpack_compressed(chunk, back, self._formats(parcel))
                exact = tensors[-1].float()
                off = (back[-1].float() - exact).square().mean().sqrt()
                self._errors[parcel.slot] = off / exact.square().mean().sqrt().clamp_min(1e-30)
        return chunk


class _Restored(Ticket):
    def __init__(self, ticket: Ticket, link: CompressedLink, arriving: list[tuple[Parcel, torch.Tensor]]) -> None:
        self._ticket, self._link, self._arriving = ticket, link, arriving

    @property
    def arrived_s(self) -> float | None:  # type: ignore[override]
        return self._ticket.arrived_s

    def wait(self) -> None:
        self._ticket.wait()
        arriving, self._arriving = self._arriving, []
        for parcel, chunk in arriving:
            self._link.restore(parcel, chunk)


def _tensors(parcel: Parcel) -> tuple[torch.Tensor, ...]:
    """Each [S, B, H, D]."""
    first = parcel.parts[0]
    return parcel.parts if first.dim() == 4 else first.unbind(1)
