"""Base class of the drop-in replacements for functions of other packages.

A replacement runs the calls that it computes exactly. Other calls fall back to the original function; each reason is
counted, and logged once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist

from sf_xfuser.torus.mesh import Mesh


def log_on_rank_0(message: str) -> None:
    """For programs without xDiT. With xDiT the plugin uses its logger."""
    if dist.get_rank() == 0:
        logging.getLogger("sf_xfuser").warning(message)


@dataclass(eq=False, kw_only=True)
class DropIn:
    """``strict``: raise instead of falling back. ``handled`` counts the calls that did not fall back, ``fallbacks`` the
    others by reason."""

    unsupported: ClassVar[str]
    """Error text of a call that this replacement cannot run, before the reason."""
    original_name: ClassVar[str]
    """Name of the function that calls fall back to, for messages."""

    mesh: Mesh
    strict: bool
    log: Callable[[str], None]
    handled: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def count_fallback(self, reason: str) -> None:
        """Count a call that is about to fall back. Raises RuntimeError under ``strict``."""
        if self.strict:
            raise RuntimeError(
                f"--sp-strict: {self.unsupported}: {reason}. Without --sp-strict it falls back to {self.original_name}"
            )
        if torch.compiler.is_compiling():
            return
        if reason not in self.fallbacks:
            self.log(f"falls back to {self.original_name}: {reason}")
        self.fallbacks[reason] += 1
