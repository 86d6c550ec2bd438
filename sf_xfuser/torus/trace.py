"""Traces one attention call on one rank: spans of compute, waiting, and transfers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """``link``: ``"compute"``, ``"wait"`` or a link of the mesh. Times are seconds of the host's ``time.perf_counter``;
    on CUDA, of the device since the start of the trace. ``bytes``: 0 for spans without a transfer."""

    link: str
    name: str
    start_s: float
    end_s: float
    bytes: int = 0


@dataclass(eq=False)
class Trace:
    """Collects the spans of a mesh while it is set as ``Mesh.trace``, and counts its calls."""

    calls: int = 0
    spans: list[Span] = field(default_factory=list)
    _pending: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _origin: torch.cuda.Event | None = None

    @contextmanager
    def span(self, link: str, name: str, device: torch.device) -> Iterator[None]:
        """A span around the enclosed work, timed on the CUDA device, else on the host."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.spans.append(Span(link, name, start, time.perf_counter()))
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._origin = self._origin or begin
        yield
        end.record()
        self._pending.append((link, name, begin, end))

    def add(self, link: str, name: str, start_s: float, end_s: float, bytes: int = 0) -> None:
        self.spans.append(Span(link, name, start_s, end_s, bytes))

    def finished(self, start_s: float) -> list[dict[str, Any]]:
        """The spans as plain data, in seconds after ``start_s`` (host clock). Synchronizes with the device."""
        spans = [Span(s.link, s.name, s.start_s - start_s, s.end_s - start_s, s.bytes) for s in self.spans]
        if self._origin is not None:
            torch.cuda.synchronize()
            for link, name, begin, end in self._pending:
                spans.append(
                    Span(link, name, self._origin.elapsed_time(begin) / 1e3, self._origin.elapsed_time(end) / 1e3)
                )
        return [asdict(span) for span in sorted(spans, key=lambda span: span.start_s)]
