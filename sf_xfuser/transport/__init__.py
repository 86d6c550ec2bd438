"""Moves chunks between the ranks of a lane. Knows peers and bytes; knows nothing of heads or attention."""

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
from sf_xfuser.transport.device import captures
from sf_xfuser.transport.nvshmem import Nvshmem
from sf_xfuser.transport.shm import Shm
from sf_xfuser.transport.symm_mem import SymmMem
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
