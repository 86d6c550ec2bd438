"""Compiles and loads the kernels of an attention call before the call."""

from __future__ import annotations

from functools import cache

import torch

from sf_xfuser.kernels.checks import uses_triton
from sf_xfuser.kernels.copies import Copies, Copy, Side
from sf_xfuser.kernels.flags import check_flags, poison_result
from sf_xfuser.kernels.fused import attend_chunks_, attend_chunks_into
from sf_xfuser.kernels.merge import merge_partial
from sf_xfuser.kernels.packing import CompressedLayout, Format, pack_compressed, unpack_compressed


@cache
def prepare(device: torch.device, dtype: torch.dtype, D: int, format: Format = "none", fused: bool = False) -> None:
    """Run each kernel once on one token, for this dtype, head size and compression ``format``; with ``fused`` also the
    fused kernel. Local; synchronizes the GPU; does nothing on a CPU.

    Loading a kernel may synchronize all streams of the GPU. During a call that can deadlock: a stream may wait for a
    peer that loads a kernel too.
    """
    for heads in (1, 2):  # Triton specializes strides of 1 and multiples of 16
        x = torch.zeros(1, 1, heads, D, device=device, dtype=dtype)
        if not uses_triton(x):
            return
        part, result = x.transpose(1, 2), torch.empty_like(x).transpose(1, 2)
        total_dtype = torch.promote_types(dtype, torch.float32)
        out, lse = (torch.zeros(1, heads, 1, *size, device=device, dtype=total_dtype) for size in ((D,), ()))
        for target in (None, result):
            for first in (True, False):
                merge_partial(out, lse, part, lse.clone(), target, first)
        for formats in [(format,), ("none", format)] if format != "none" else []:
            values = [x.clone() for _ in formats]
            layout = CompressedLayout(shape=(1, 1, heads, D), dtype=dtype, formats=formats)
            chunk = torch.empty(layout.nbytes, device=device, dtype=torch.uint8)
            pack_compressed(values, chunk, formats)
            unpack_compressed(chunk, values, formats)
    for start in (0, 1) if fused else ():  # aligned to 16 bytes or not
        part = torch.zeros(D + 1, device=device, dtype=dtype)[start : start + D].view(1, 1, 1, D)
        attend_chunks_([part], [part], [part], [out[:, :1]], [lse[:, :1]])
        attend_chunks_into([torch.empty_like(part)], [part], [part], [part], [out[:, :1]], [lse[:, :1]])
    source, target = torch.zeros(D + 16, device=device, dtype=dtype), torch.empty(D, device=device, dtype=dtype)
    for offset in (1, 2, 4, 8):  # copies specialize the width of loads
        copy = Copy(Side(0, offset, (D, D, D)), Side(1, 0, (D, D, D)), (1, 1, 1, D))
        Copies([copy], dtype, device).run((source, target))
    words, poison = torch.zeros(3, device=device, dtype=torch.int64), torch.ones((), device=device)
    check_flags(words[:1], words[:1], words[1], poison, words[2])
    poison_result(target, poison)
    torch.cuda.synchronize(device)
