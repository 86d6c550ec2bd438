"""sf-xfuser: StreamFusion's topology-aware sequence parallelism and Torus Attention as a backend for xDiT."""

__version__ = "0.1.0"
