"""Compiles and loads the kernels of an attention call before it begins."""

from __future__ import annotations

from functools import cache

import torch

from sf_xfuser.kernels.checks import runs_kernel
from sf_xfuser.kernels.merge import merge_
from sf_xfuser.kernels.packing import Compressed, Format, pack_compressed, unpack_compressed


@cache
def prepare(device: torch.device, dtype: torch.dtype, D: int, format: Format = "none") -> None:
    """Run each kernel once, on one token, as calls of this dtype and head size will, with chunks compressed in
    ``format``. Local; waits for the GPU; nothing on a CPU.

    Loading a kernel may wait for all streams of the GPU. Inside a call one of them may be waiting for a peer that loads
    a kernel itself.
    """
    for heads in (1, 2):  # Triton compiles strides of 1 and multiples of 16 apart
        some = torch.zeros(1, 1, heads, D, device=device, dtype=dtype)
        if not runs_kernel(some):
            return
        new_out = some.transpose(1, 2)
        out, lse = torch.zeros(1, heads, 1, D, device=device), torch.zeros(1, heads, 1, device=device)
        merge_(out, lse, new_out, lse.clone())
        for formats in [(format,), ("none", format)] if format != "none" else []:
            parts = [some.clone() for _ in formats]
            layout = Compressed(shape=(1, 1, heads, D), dtype=dtype, formats=formats)
            chunk = torch.empty(layout.nbytes, device=device, dtype=torch.uint8)
            pack_compressed(parts, chunk, formats)
            unpack_compressed(chunk, parts, formats)
    torch.cuda.synchronize(device)
