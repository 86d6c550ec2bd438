"""Base class of the drop-in replacements for functions of other packages.

A replacement runs the calls that it computes exactly. Other calls fall back to the original function. Each reason is
counted, and logged once.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakSet

import torch
import torch.distributed as dist

from sf_xfuser.kernels import AttendFunction, Attention
from sf_xfuser.torus.mesh import Mesh


def log_on_rank_0(message: str) -> None:
    """Log a warning on rank 0, for programs without xDiT's logger."""
    if dist.get_rank() == 0:
        logging.getLogger("sf_xfuser").warning(message)


@dataclass(eq=False, kw_only=True)
class DropIn:
    """``strict``: raise instead of falling back. ``kernel``: the value of ``--sp-kernel``. ``handled`` counts the calls
    that ran here, ``fallbacks`` those that fell back, by reason."""

    unsupported: ClassVar[str]
    """First part of the error text for a call that cannot run here; the reason follows."""
    original_name: ClassVar[str]
    """Name of the original function in messages."""

    mesh: Mesh
    strict: bool
    log: Callable[[str], None]
    kernel: str = "library"
    handled: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        drop_ins.add(self)

    def calls(self) -> dict[str, int]:
        """Number of calls by the path that ran them."""
        return {"torus": self.handled, self.original_name: self.fallbacks.total()}

    def attention(self, library: AttendFunction, scale: float | None, head_size: int) -> Attention:
        """The local attention under ``kernel``. ``library`` applies ``scale`` itself; the fused kernel supports the
        default scale only."""
        if self.kernel != "fused":
            return library
        if scale is not None and not math.isclose(scale, head_size**-0.5):
            raise ValueError(
                f"the fused kernel does not support this call: its scale is 1/sqrt({head_size}), got {scale}; use "
                f"--sp-kernel library"
            )
        return "fused"

    def count_fallback(self, reason: str) -> None:
        """Count a call that is about to fall back. Raises RuntimeError under ``strict``."""
        if self.strict:
            raise RuntimeError(
                f"--sp-strict: {self.unsupported}: {reason}. Without --sp-strict it falls back to {self.original_name}"
            )
        if torch.compiler.is_compiling():
            return
        if reason not in self.fallbacks:
            self.log(f"call falls back to {self.original_name}: {reason}")
        self.fallbacks[reason] += 1


drop_ins: WeakSet[DropIn] = WeakSet()
"""All of this process, for ``sf_xfuser.stats``."""
