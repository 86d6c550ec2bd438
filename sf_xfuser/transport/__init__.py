"""Moves chunks between the ranks of a link. It handles peers and bytes, not heads or attention."""
