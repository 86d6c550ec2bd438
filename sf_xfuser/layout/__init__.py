"""Topology, plan, schedule and memory map of a sequence-parallel group. Pure: integers only, no tensors."""
