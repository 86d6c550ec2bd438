"""Torus Attention on real ranks: the mesh with its links and buffers, and the call that runs a schedule."""
