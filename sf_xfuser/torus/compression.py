"""Compression of chunks between machines, where bandwidth limits a call.

Q, V and O chunks are sent as one byte per element and a scale per token and head (``kernels.packing``). K keeps its
dtype, since an error in K changes every weight of every query. Partial results are merged in fp32. Unlike xDiT's
compressed all-to-all, this supports joint tokens and grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sf_xfuser.kernels.packing import Format, unpack_compressed

EPS = {"int8": 2.0**-7, "fp8": 2.0**-3}
"""Step between two values, relative to the largest element of a block (int8) or of each element (fp8)."""


_MEASURE_EVERY = 16  # calls


class Compression:
    """The format of a mesh, and the relative RMS error of the chunks that this rank sent. Local.

    The error is measured on the first chunk of each tensor, after it has been sent, in one of ``_MEASURE_EVERY`` calls.
    """

    def __init__(self, format: Format) -> None:
        self.format: Format = format
        self.calls = 0
        self._errors: list[torch.Tensor] = []  # of this call; they stay on the device, so that no call waits for them
        self._last: torch.Tensor | None = None
        self._worst: torch.Tensor | None = None

    def measure(self, chunk: torch.Tensor, parts: Sequence[torch.Tensor], formats: Sequence[Format]) -> None:
        """Add the error of a chunk with these ``parts``, each [S, B, H, D]."""
        if self.calls % _MEASURE_EVERY:
            return
        back = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts]
        unpack_compressed(chunk, back, formats)
        exact = parts[-1].float()
        error = (back[-1].float() - exact).square().mean().sqrt()
        self._errors.append(error / exact.square().mean().sqrt().clamp_min(1e-30))

    def end_call(self) -> None:
        self.calls += 1
        if self._errors:
            self._last = torch.stack(self._errors).amax()
            self._worst = self._last if self._worst is None else torch.maximum(self._worst, self._last)
            self._errors = []

    def __str__(self) -> str:
        text = f"Q, V and O are sent between machines in {self.format}, K in the input dtype"
        if self._last is None or self._worst is None:
            return text
        last, worst = float(self._last), float(self._worst)
        measured = -(-self.calls // _MEASURE_EVERY)
        error = f"{last:.2%} in the last of {measured} measured, {worst:.2%} in the worst"
        return f"{text}; relative RMS error of a chunk: {error}"
