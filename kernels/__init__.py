"""What Torus Attention computes beside an attention library: device kernels in Triton, and for each its slow twin in
plain PyTorch, which serves CPUs."""

from sf_xfuser.kernels.attend import AttendFunction, sdpa_attend
from sf_xfuser.kernels.merge import merge_, merge_into
from sf_xfuser.kernels.packing import Compressed, pack, pack_compressed, unpack, unpack_compressed

__all__ = [
    "AttendFunction",
    "Compressed",
    "merge_",
    "merge_into",
    "pack",
    "pack_compressed",
    "sdpa_attend",
    "unpack",
    "unpack_compressed",
]
