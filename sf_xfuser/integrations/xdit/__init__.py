"""The plugin for xDiT."""
