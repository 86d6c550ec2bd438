"""Transports between CPU ranks: shared memory and TCP."""
