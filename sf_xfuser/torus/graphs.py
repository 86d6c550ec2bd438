"""CUDA graphs of programs: after a few calls of a shape, a call is one launch, and two copies of its tensors.

A graph fixes the addresses of its inputs and of its result, so the inputs are copied to memory of the graph, and the
result out of it. Every rank decides for itself: to its peers, a replay is the same call (``transport/gpu/device.py``).
A graph is captured inside a call, which it then runs. If a capture fails, nothing has run, and the rank makes this call
and all later calls of the program without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sf_xfuser.kernels import Attention
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.gpu.device import DeviceWindow

if TYPE_CHECKING:
    from sf_xfuser.torus.mesh import Mesh
    from sf_xfuser.torus.run import BoundProgram

EAGER_CALLS = 3
"""Calls with the same attention function before a program is captured. They compile and load all kernels."""


class Graph:
    """A captured program, for one half of the window. Made inside a call, after ``Mesh.begin``. Local."""

    def __init__(
        self, program: BoundProgram, window: DeviceWindow, inputs: Sequence[torch.Tensor], attention: Attention
    ) -> None:
        """``inputs``: tensors of the program. Raises if the capture fails."""
        self.attention = attention
        with torch.inference_mode(False):  # calls in any mode write to them
            self._inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
            self._result = inputs[0].new_empty(program.program.result_shape)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as the watchdog, may use CUDA during the capture.
        with window.capture() as self._end, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            program.run(self._inputs, attention, self._result)
            for end in program.ends:
                end(self._result)

    def replay(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of the call, [B, S, H, D]. After ``Mesh.begin``, in the same half."""
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        self._end()
        return self._result.clone()


@dataclass(eq=False)
class Graphs:
    """The CUDA graphs of a mesh. ``enabled``: the value of ``--sp-graphs``. ``captured``: their number. ``problem``:
    why a capture failed last. ``kept``: programs that a user's own graphs refer to."""

    enabled: bool = True
    captured: int = 0
    problem: str = ""
    kept: list[BoundProgram] = field(default_factory=list)

    def capture(
        self, mesh: Mesh, program: BoundProgram, inputs: Sequence[torch.Tensor], attention: Attention
    ) -> Graph | None:
        """The graph of a program; None if it cannot be captured. Raises TransportError if the transport has failed."""
        assert isinstance(mesh.window, DeviceWindow)
        try:
            graph = Graph(program, mesh.window, inputs, attention)
        except TransportError:
            raise
        except Exception as error:
            self.problem = (str(error) or type(error).__name__).splitlines()[0]
            rank = mesh.grid.members[mesh.position]
            own = f"rank {rank} makes a call without a CUDA graph, whose capture has failed: {self.problem}"
            logging.getLogger("sf_xfuser").warning(own)  # the other ranks may have theirs
            return None
        self.captured += 1
        return graph

    def unavailable_reason(self, mesh: Mesh, device: torch.device) -> str | None:
        """Why calls of ``mesh`` are not captured, or None. Local."""
        if not self.enabled:
            return "--sp-graphs off"
        if device.type != "cuda":
            return "its ranks are not on GPUs"
        if len(set(mesh.links.values())) > 1 or not isinstance(mesh.window, DeviceWindow):
            return f"transport {mesh.transport} is not one-sided on all links"
        return None

    def line(self, mesh: Mesh) -> str:
        """The graphs of calls on GPUs, as text."""
        reason = self.unavailable_reason(mesh, torch.device("cuda"))
        text = f"{self.captured} captured" if reason is None else f"none ({reason})"
        return f"CUDA graphs of calls: {text}" + (f"; a capture failed: {self.problem}" if self.problem else "")
