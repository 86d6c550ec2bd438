"""What Torus Attention computes beside an attention library: device kernels in Triton, and for each its slow twin in
plain PyTorch, which serves CPUs."""

from sf_xfuser.kernels.attend import AttendFunction, Attention, sdpa_attend, without_weightless
from sf_xfuser.kernels.fused import (
    Chunks,
    attend_chunks_,
    attend_chunks_into,
    attend_unchecked,
    fused_unsupported_reason,
)
from sf_xfuser.kernels.merge import merge_, merge_into, merge_part
from sf_xfuser.kernels.packing import Compressed, pack, pack_compressed, place, take, unpack, unpack_compressed
from sf_xfuser.kernels.prepare import prepare

__all__ = [
    "AttendFunction",
    "Attention",
    "Chunks",
    "Compressed",
    "attend_chunks_",
    "attend_chunks_into",
    "attend_unchecked",
    "fused_unsupported_reason",
    "merge_",
    "merge_into",
    "merge_part",
    "pack",
    "pack_compressed",
    "place",
    "prepare",
    "sdpa_attend",
    "take",
    "unpack",
    "unpack_compressed",
    "without_weightless",
]
