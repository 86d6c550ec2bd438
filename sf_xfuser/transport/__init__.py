"""Moves chunks between the ranks of a link. Knows peers and bytes; knows nothing of heads or attention."""

from sf_xfuser.transport.base import (
    OneSided,
    OtherCall,
    Parcel,
    Ticket,
    Transport,
    TransportError,
    Unusable,
    window_view,
)
from sf_xfuser.transport.gpu.device import captures
from sf_xfuser.transport.gpu.nvshmem import Nvshmem
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.gpu.symm_mem import SymmMem
from sf_xfuser.transport.two_sided import TwoSided

__all__ = [
    "Nvshmem",
    "OneSided",
    "OtherCall",
    "Parcel",
    "Shm",
    "SymmMem",
    "Ticket",
    "Transport",
    "TransportError",
    "TwoSided",
    "Unusable",
    "captures",
    "window_view",
]
