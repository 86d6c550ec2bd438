"""What Torus Attention computes beside an attention library: device kernels in Triton, and for each its slow twin in
plain PyTorch, which serves CPUs."""

from sf_xfuser.kernels.attend import AttendFunction, sdpa_attend
from sf_xfuser.kernels.fused import Gate, attend_chunks_, attend_chunks_into
from sf_xfuser.kernels.merge import merge_, merge_into
from sf_xfuser.kernels.packing import Compressed, pack, pack_compressed, unpack, unpack_compressed
from sf_xfuser.kernels.prepare import prepare

__all__ = [
    "AttendFunction",
    "Compressed",
    "Gate",
    "attend_chunks_",
    "attend_chunks_into",
    "merge_",
    "merge_into",
    "pack",
    "pack_compressed",
    "prepare",
    "sdpa_attend",
    "unpack",
    "unpack_compressed",
]
