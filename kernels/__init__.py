"""Kernels that Torus Attention needs besides an attention library: each in Triton for GPUs, and as a reference in plain
PyTorch, which CPUs use."""

from sf_xfuser.kernels.attend import AttendFunction, Attention, fix_fully_masked_lse, sdpa_attend
from sf_xfuser.kernels.copies import Copies, Copy, Side
from sf_xfuser.kernels.flags import check_flags, poison_result
from sf_xfuser.kernels.fused import (
    Chunks,
    FusedAttention,
    attend_chunks_,
    attend_chunks_into,
    fused_unsupported_reason,
)
from sf_xfuser.kernels.merge import merge_, merge_into, merge_partial
from sf_xfuser.kernels.packing import (
    CompressedLayout,
    pack_compressed,
    unpack_compressed,
)
from sf_xfuser.kernels.prepare import prepare

__all__ = [
    "AttendFunction",
    "Attention",
    "Chunks",
    "CompressedLayout",
    "Copies",
    "Copy",
    "FusedAttention",
    "Side",
    "attend_chunks_",
    "attend_chunks_into",
    "check_flags",
    "fix_fully_masked_lse",
    "fused_unsupported_reason",
    "merge_",
    "merge_into",
    "merge_partial",
    "pack_compressed",
    "poison_result",
    "prepare",
    "sdpa_attend",
    "unpack_compressed",
]
