"""Who computes what, and when: topology, plan, schedule and memory map. Pure: integers only, no tensors."""
