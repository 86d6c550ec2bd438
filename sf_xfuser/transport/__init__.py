"""Moves chunks between the ranks of a link: peers and bytes only, no heads, no attention."""
