"""Kernels that Torus Attention needs besides an attention library: each in Triton for GPUs, and as a reference in plain
PyTorch, which CPUs use."""

from sf_xfuser.kernels.attend import AttendFunction, fix_fully_masked_lse, sdpa_attend, sdpa_backend
from sf_xfuser.kernels.choice import Kernel, Verdict, choose, may_fuse, why_not_fused
from sf_xfuser.kernels.fused import Chunks, attend_chunks_, attend_chunks_into, attend_unchecked
from sf_xfuser.kernels.merge import merge_, merge_into, merge_partial
from sf_xfuser.kernels.packing import (
    CompressedLayout,
    pack,
    pack_compressed,
    pack_unchecked,
    unpack,
    unpack_compressed,
    unpack_unchecked,
)
from sf_xfuser.kernels.prepare import prepare

__all__ = [
    "AttendFunction",
    "Chunks",
    "CompressedLayout",
    "Kernel",
    "Verdict",
    "attend_chunks_",
    "attend_chunks_into",
    "attend_unchecked",
    "choose",
    "fix_fully_masked_lse",
    "may_fuse",
    "merge_",
    "merge_into",
    "merge_partial",
    "pack",
    "pack_compressed",
    "pack_unchecked",
    "prepare",
    "sdpa_attend",
    "sdpa_backend",
    "unpack",
    "unpack_compressed",
    "unpack_unchecked",
    "why_not_fused",
]
