"""Replacements for yunchang's attention layer and all-to-all."""
