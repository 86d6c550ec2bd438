"""What Torus Attention computes beside an attention library: device kernels in Triton, and for each its slow twin in
plain PyTorch, which serves CPUs."""

from sf_xfuser.kernels.attend import AttendFunction, sdpa_attend, sdpa_backend, without_weightless
from sf_xfuser.kernels.choice import Kernel, Verdict, choose, may_fuse, why_not_fused
from sf_xfuser.kernels.fused import Chunks, attend_chunks_, attend_chunks_into, attend_unchecked
from sf_xfuser.kernels.merge import merge_, merge_into, merge_part
from sf_xfuser.kernels.packing import Compressed, pack, pack_compressed, place, take, unpack, unpack_compressed
from sf_xfuser.kernels.prepare import prepare

__all__ = [
    "AttendFunction",
    "Chunks",
    "Compressed",
    "Kernel",
    "Verdict",
    "attend_chunks_",
    "attend_chunks_into",
    "attend_unchecked",
    "choose",
    "may_fuse",
    "merge_",
    "merge_into",
    "merge_part",
    "pack",
    "pack_compressed",
    "place",
    "prepare",
    "sdpa_attend",
    "sdpa_backend",
    "take",
    "unpack",
    "unpack_compressed",
    "why_not_fused",
    "without_weightless",
]
