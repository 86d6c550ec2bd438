"""Moves chunks between the ranks of a lane. Knows peers and bytes; knows nothing of heads or attention."""

from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError
from sf_xfuser.transport.two_sided import TwoSided

__all__ = ["Parcel", "Ticket", "Transport", "TransportError", "TwoSided"]
