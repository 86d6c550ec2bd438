"""Many strided copies in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Side(NamedTuple):
    """One end of a copy: a tensor by index, an offset and strides of S, B, H in elements; D is contiguous."""

    tensor: int
    offset: int
    strides: tuple[int, int, int]


class Copy(NamedTuple):
    source: Side
    target: Side
    shape: tuple[int, int, int, int]


class Copies:
    def __init__(self, copies: Sequence[Copy], dtype: torch.dtype, device: torch.device) -> None:
        self._copies = [copy for copy in copies if 0 not in copy.shape]
        self.launches = len(self._copies)
        self._last: list[Any] = []
        self._views: list[Any] = []

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        for source, target, shape in self._copies:
            _view(tensors[target.tensor], target, shape).copy_(_view(tensors[source.tensor], source, shape))


def _view(x: torch.Tensor, side: Side, shape: tuple[int, ...]) -> torch.Tensor:
    return x.as_strided(shape, (*side.strides, 1), x.storage_offset() + side.offset)
