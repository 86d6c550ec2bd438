"""Makes the step caches of diffusers decide from the tokens of all ranks, as one process does.

They compare means of hidden states. A rank has only a part of the tokens, so ranks would skip different steps and make
different attention calls. xDiT's caches and cache-dit average over ranks themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sf_xfuser.integrations.hooks import Hook, HookSet, wrapper
from sf_xfuser.integrations.xdit import session

if TYPE_CHECKING:
    from sf_xfuser.torus.mesh import Mesh

_uncompiled: Any = torch.compiler.disable


def _mesh(hook: Any) -> Mesh | None:
    """The mesh that splits the tokens of the block of a hook of diffusers; None: every rank has all tokens."""
    for module in hook.fn_ref.forward.args[0].modules():  # diffusers binds the block to the hook's new_forward
        if hasattr(module, "sf_xfuser"):  # set by diffusers/attention.py
            mesh: Mesh = module.sf_xfuser[0].mesh
            return mesh
        if type(getattr(module, "processor", module)).__module__.startswith("xfuser."):
            return session.current.mesh
    return None


def _averages(mesh: Mesh, weight: int, *tensors: torch.Tensor) -> list[float]:
    """The mean magnitude of each tensor over all ranks, of which this one counts ``weight``. Collective."""
    means = [x.abs().mean(dtype=torch.float32).item() for x in tensors]
    with mesh.call():
        weights, *columns = zip(*mesh.control.gather("step cache", [weight, *means]), strict=True)
    return [sum(w * mean for w, mean in zip(weights, column, strict=True)) / sum(weights) for column in columns]


@wrapper
def _should_compute(original: Any, self: Any, residual: torch.Tensor) -> bool:
    """Of the first-block cache: whether the residual of the first block has changed."""
    mesh, previous = _mesh(self), self.state_manager.get_state().head_block_residual
    if mesh is None or previous is None:
        return bool(original(self, residual))
    change, size = _averages(mesh, residual.numel(), residual - previous, previous)
    return bool(change > self.threshold * size)


@wrapper
def _calibrate(original: Any, self: Any, state: Any, residual: torch.Tensor) -> None:
    """Of MagCache: append the mean over tokens of how much the residual has grown."""
    original(self, state, residual)
    ratios, mesh = state.calibration_ratios, _mesh(self)
    if mesh is not None:
        ratios[-1:] = _averages(mesh, residual.numel(), torch.tensor(ratios[-1]))


def _hook(module: str, name: str, wrap: Any) -> Hook:
    return Hook(
        module=f"diffusers.hooks.{module}",
        name=name,
        wrap=lambda original: _uncompiled(wrap(original)),
        why="averages over the tokens of one rank, so that ranks skip different steps",
        remove_when="diffusers averages over the ranks of its context parallelism",
        required=False,
    )


install = HookSet(
    (
        _hook("first_block_cache", "FBCHeadBlockHook._should_compute_remaining_blocks", _should_compute),
        _hook("mag_cache", "MagCacheBlockHook._perform_calibration_step", _calibrate),
    ),
    roots=("diffusers",),
).install
"""Hook the caches, once per process. Without a mesh they are unchanged."""
