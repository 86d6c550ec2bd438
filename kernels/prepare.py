"""Compiles and loads the kernels of an attention call before it begins."""

from __future__ import annotations

from functools import cache

import torch

from sf_xfuser.kernels.checks import runs_kernel
from sf_xfuser.kernels.fused import attend_chunks_, attend_chunks_into
from sf_xfuser.kernels.merge import merge_, merge_into
from sf_xfuser.kernels.packing import Compressed, Format, pack, pack_compressed, unpack, unpack_compressed


@cache
def prepare(device: torch.device, dtype: torch.dtype, D: int, format: Format = "none", fused: bool = False) -> None:
    """Run each kernel once, on one token, as calls of this dtype and head size will, with chunks compressed in
    ``format``; with ``fused``, the fused kernel, too. Local; waits for the GPU; nothing on a CPU.

    Loading a kernel may wait for all streams of the GPU. Inside a call one of them may be waiting for a peer that loads
    a kernel itself.
    """
    for heads in (1, 2):  # Triton compiles strides of 1 and multiples of 16 apart
        some = torch.zeros(1, 1, heads, D, device=device, dtype=dtype)
        if not runs_kernel(some):
            return
        part, result = some.transpose(1, 2), torch.empty_like(some).transpose(1, 2)
        out, lse = torch.zeros(1, heads, 1, D, device=device), torch.zeros(1, heads, 1, device=device)
        merge_(out, lse, part, lse.clone())
        for into in {dtype: result, torch.float32: out}.values():
            merge_into(into, out, lse, part, lse.clone())
        for parts in ((some,), (some, some.clone())):
            chunk = torch.empty(some.shape if len(parts) == 1 else (1, 2, 1, heads, D), device=device, dtype=dtype)
            pack(parts, chunk)
            unpack(chunk, parts)
        if fused:
            attend_chunks_([part], [part], [part], [out], [lse])
            attend_chunks_into([result], [part], [part], [part], [out], [lse])
        for formats in [(format,), ("none", format)] if format != "none" else []:
            stored = [some.clone() for _ in formats]
            layout = Compressed(shape=(1, 1, heads, D), dtype=dtype, formats=formats)
            chunk = torch.empty(layout.nbytes, device=device, dtype=torch.uint8)
            pack_compressed(stored, chunk, formats)
            unpack_compressed(chunk, stored, formats)
    torch.cuda.synchronize(device)
