"""Many strided copies in one launch, such as all chunks of a round. Shapes: S tokens, B batch, H heads, D head size.

A ``Copies`` is made once per call shape and run in every call. It refers to tensors by index, since the inputs and the
result change from call to call. Example: rows 8 to 11 and heads 2 to 3 of Q [B=1, S=16, H=6, D=64] go to the start of a
window, as [S, B, H, D]:

    Copy(Side(0, 8 * 384 + 2 * 64, (384, 6144, 64)), Side(1, 0, (128, 128, 64)), (4, 1, 2, 64))

It is one launch on a GPU with Triton (``triton_copies``), else one PyTorch copy each.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from sf_xfuser.kernels.checks import uses_triton

MAX_BASES = 8
"""Tensors that one ``Copies`` may refer to on a GPU."""


class Side(NamedTuple):
    """One end of a copy, in the tensor with index ``tensor``. ``offset``: from the tensor's data pointer; ``strides``:
    of S, B and H; both in elements. D is contiguous."""

    tensor: int
    offset: int
    strides: tuple[int, int, int]


class Copy(NamedTuple):
    """``shape``: [S, B, H, D]."""

    source: Side
    target: Side
    shape: tuple[int, int, int, int]


class Copies:
    """Copies that run at once, between tensors of one ``dtype`` on one ``device``. No target overlaps another source or
    target. Copies without elements are dropped.

    ``launches``: kernels per ``run`` on a GPU with Triton, else the number of copies. Local. Making one uploads a table
    to the GPU. Raises ValueError for more than ``MAX_BASES`` tensors on a GPU.
    """

    def __init__(self, copies: Sequence[Copy], dtype: torch.dtype, device: torch.device) -> None:
        copies = [copy for copy in copies if prod(copy.shape)]
        num_bases = 1 + max((side.tensor for copy in copies for side in copy[:2]), default=-1)
        self.launches = len(copies)
        self._launch = None
        if copies and uses_triton(torch.empty(0, device=device)):
            from sf_xfuser.kernels.triton_copies import record

            if num_bases > MAX_BASES:
                raise ValueError(f"copies between {num_bases} tensors: use at most {MAX_BASES}")

            self.launches = 1
            self._launch = record(copies, dtype, device)
            return
        self._views: tuple[list[Any], list[Any]] = [None] * len(copies), [None] * len(copies)  # targets, sources
        self._kept: list[torch.Tensor | None] = [None] * num_bases
        self._last: list[Any] = [None] * num_bases
        # By tensor: each of its views as (list in _views, index in the list, shape, strides, offset).
        self._uses: list[list[Any]] = [[] for _ in range(num_bases)]
        for i, copy in enumerate(copies):
            for views, side in zip(self._views, (copy.target, copy.source), strict=True):
                self._uses[side.tensor].append((views, i, copy.shape, (*side.strides, 1), side.offset))

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy. ``tensors[i]``: the tensor with index ``i``, of any shape. Local; on the current stream.

        On a CPU, the views of a tensor are kept from its second run in a row until another tensor takes its index. So
        the views of a window are made once, and no input or result stays alive."""
        if self._launch is not None:
            self._launch(tensors)
        elif self.launches:
            changed = []
            for index, kept in enumerate(self._kept):
                base = tensors[index]
                if base is not kept:
                    last = self._last[index]
                    if last is not None and last() is base:
                        self._kept[index] = base
                    else:
                        self._kept[index], self._last[index] = None, weakref.ref(base)
                        changed.append(index)
                    start = base.storage_offset()
                    for views, i, shape, strides, offset in self._uses[index]:
                        views[i] = base.as_strided(shape, strides, start + offset)
            torch._foreach_copy_(*self._views)
            for index in changed:
                for views, i, *_ in self._uses[index]:
                    views[i] = None
