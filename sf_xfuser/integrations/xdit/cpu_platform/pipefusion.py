"""PipeFusion over gloo.

gloo delivers a send once the receiver has posted its receive (rendezvous), and loses the send if its Work is deleted.
xDiT deletes the Work of every asynchronous send, and may overwrite the tensor. So each send uses a copy, stored with
its Work under a *slot*: (name, segment), the key of the peer's receive buffer. A stage reuses a slot one denoising
step later, when it has received a result that the peer computed from the slot's previous tensor. So waiting for the old
Work returns immediately, and memory is bounded by the number of receive buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sf_xfuser.integrations.hooks import wrapper

_SENDS = "_sf_gloo_sends"  # attribute of a PipelineGroupCoordinator: {slot: (Work, tensor)}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


def _store(pipeline_group: Any, slot: tuple[Any, ...], work: Any, tensor: torch.Tensor) -> None:
    sends: dict[Any, Any] = vars(pipeline_group).setdefault(_SENDS, {})
    previous = sends.get(slot)
    sends[slot] = (work, tensor)
    if previous is not None:
        previous[0].wait()


def pipeline_isend(_: Callable[..., None]) -> Callable[..., None]:
    def pipeline_isend(self: Any, tensor: torch.Tensor, name: str = "latent", segment_idx: int = -1) -> None:
        copy = tensor.clone(memory_format=torch.contiguous_format)
        self._check_shape_and_buffer(tensor_send_to_next=copy, name=name, segment_idx=segment_idx)
        _store(self, (name, segment_idx), self._pipeline_isend(copy), copy)

    return pipeline_isend


def pipeline_isend_skip(_: Callable[..., None]) -> Callable[..., None]:
    def pipeline_isend_skip(self: Any, tensor: torch.Tensor) -> None:
        from xfuser.core.distributed import get_runtime_state

        copy = tensor.clone(memory_format=torch.contiguous_format)
        _store(self, ("skip", get_runtime_state().pipeline_patch_idx), self._pipeline_isend_skip(copy), copy)

    return pipeline_isend_skip


def communicate_shapes(_: Callable[..., torch.Size]) -> Callable[..., torch.Size]:
    """xDiT's handshake before the first tensor of a slot. It also sends the dtype, and the sender does not wait.

    The receiver allocates its buffer with ``self.dtype``, which xDiT sets to the configured dtype, not the model's.
    """

    def communicate_shapes(
        self: Any, tensor_send_to_next: torch.Tensor | None = None, recv_prev: bool = False
    ) -> torch.Size:
        if tensor_send_to_next is not None:
            handshake = sum(len(shapes) for shapes in self.send_shape.values())  # includes this one
            header = torch.tensor([tensor_send_to_next.dim(), _DTYPES.index(tensor_send_to_next.dtype)])
            shape = torch.tensor(tensor_send_to_next.shape, dtype=torch.int64)
            for part, message in (("header", header), ("shape", shape)):
                work = torch.distributed.isend(message, dst=self.next_rank, group=self.device_group)
                _store(self, (part, handshake), work, message)
        if not recv_prev:
            return torch.Size([0, 0, 0])
        header = torch.empty(2, dtype=torch.int64)
        torch.distributed.recv(header, src=self.prev_rank, group=self.device_group)
        dim, dtype = header.tolist()
        shape = torch.empty(dim, dtype=torch.int64)
        torch.distributed.recv(shape, src=self.prev_rank, group=self.device_group)
        self.dtype = _DTYPES[dtype]
        return torch.Size(shape.tolist())

    return communicate_shapes


@wrapper
def destroy_after_delivery(destroy: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wait for pending sends before a stage exits (on CUDA a stream synchronization does this)."""
    for work, _ in vars(self).pop(_SENDS, {}).values():
        work.wait()
    destroy(self, *args, **kwargs)
