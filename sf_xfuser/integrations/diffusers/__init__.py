"""Torus Attention as the context parallelism of plain diffusers models, without xDiT."""
