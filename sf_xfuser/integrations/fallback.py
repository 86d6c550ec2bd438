"""What stands in for a function of another package: it serves the calls that it can serve exactly and hands the others
back to the function itself, with a reason that is logged once and counted."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist

from sf_xfuser.kernels import AttendFunction, Attention
from sf_xfuser.torus.mesh import Mesh


def log_on_rank_0(message: str) -> None:
    """For programs without xDiT, whose logger the plugin uses."""
    if dist.get_rank() == 0:
        logging.getLogger("sf_xfuser").warning(message)


@dataclass(eq=False, kw_only=True)
class DropIn:
    """``strict``: raise instead of handing back. ``kernel``: that of ``--sp-kernel``.

    ``served`` and ``handed_back`` count calls; the latter by reason. ``log`` receives each new reason once.
    """

    cannot: ClassVar[str]
    """What is said where a call is refused, before the reason."""
    owner: ClassVar[str]
    """To whom calls are handed back."""
    handing: ClassVar[str]
    """What is logged where one is, before the reason."""

    mesh: Mesh
    strict: bool
    log: Callable[[str], None]
    kernel: str = "library"
    served: int = 0
    handed_back: Counter[str] = field(default_factory=Counter)

    def attention(self, library: AttendFunction, scale: float | None, head_size: int) -> Attention:
        """What computes a piece. ``library`` applies ``scale`` itself; the fused kernel has the default one only."""
        if self.kernel != "fused":
            return library
        if scale is not None and not math.isclose(scale, head_size**-0.5):
            raise ValueError(
                f"the fused kernel does not support this call: its scale is 1/sqrt({head_size}), got {scale}; use "
                f"--sp-kernel library"
            )
        return "fused"

    def note(self, reason: str) -> None:
        """A call is about to be handed back. Raises RuntimeError where that is not wanted."""
        if self.strict:
            raise RuntimeError(f"--sp-strict: {self.cannot}: {reason}. Without --sp-strict it goes to {self.owner}")
        if torch.compiler.is_compiling():
            return
        if reason not in self.handed_back:
            self.log(f"{self.handing}: {reason}")
        self.handed_back[reason] += 1
