"""What Torus Attention computes beside an attention library. Plain PyTorch here: the slow twins of device kernels."""

from sf_xfuser.kernels.attend import AttendFunction, sdpa_attend
from sf_xfuser.kernels.merge import merge_

__all__ = ["AttendFunction", "merge_", "sdpa_attend"]
