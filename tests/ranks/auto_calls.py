"""Rank side of test_selector.py: xDiT's USP by name under ``--sp-backend auto``, 32 calls of each of two shapes.

Reports for each shape the largest difference from xDiT's own and the candidates that ran, in
turn; for calls that torus cannot compute, why; and all that ``explain()`` says.
"""

from __future__ import annotations

import contextlib
import sys
import time

import torch
import torch.distributed as dist
from cases import report
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, get_sequence_parallel_rank, runtime_state
from xfuser.core.distributed.attention_backend import AttentionBackendType
from xfuser.model_executor.layers import usp

import sf_xfuser
from sf_xfuser.autotune import selector as choice
from sf_xfuser.integrations.xdit import session

B, H, D, CALLS = 1, 8, 16, 32


class AnyRuntimeState(runtime_state.RuntimeState):
    """A runtime state without a pipeline: groups and attention backend are all that USP asks for."""


def tensors(tokens: int, seed: int | None = None) -> list[torch.Tensor]:
    """Of this rank; with a ``seed``, the same on all."""
    make = torch.Generator().manual_seed(get_sequence_parallel_rank() if seed is None else seed)
    return [torch.randn(B, tokens, H, D, generator=make).transpose(1, 2) for _ in range(3)]


def slow_on_rank_2(parts: str, seconds: float) -> None:
    """There the calls of candidates whose names hold one of ``parts``, which commas separate, take so much longer."""
    call = choice.Choice._call

    def slowed(self, name, **ways):
        out = call(self, name, **ways)  # first: other ranks wait for nothing
        time.sleep(seconds if dist.get_rank() == 2 and any(part in name for part in parts.split(",")) else 0.0)
        return out

    choice.Choice._call = slowed


def others_broken_on_rank_2() -> None:
    """There xDiT fails in other degrees than its own."""
    call = choice.Choice._call

    def broken(self, name, **ways):
        out = call(self, name, **ways)
        if name in self.others and dist.get_rank() == 2:
            raise ArithmeticError("planted")
        return out

    choice.Choice._call = broken


def behind_on_rank_2() -> None:
    """There the time of a trial's first call is not taken, as if the rank had been interrupted before it was."""
    took, missed = choice.Choice._took, []

    def miss(self, known, seconds):
        if dist.get_rank() == 2 and known not in missed:
            missed.append(known)
        else:
            took(self, known, seconds)

    choice.Choice._took = miss


def apart() -> None:
    """As if ranks shared no memory."""
    make = choice.Choice.__init__

    def init(self, own, others, groups, meshes, *args, **kwargs):
        for mesh in meshes:
            mesh.one_host = False
        make(self, own, others, groups, meshes, *args, **kwargs)

    choice.Choice.__init__ = init


def main() -> None:
    if "--apart" in sys.argv:
        sys.argv.remove("--apart")
        apart()
    if "--broken" in sys.argv:
        sys.argv.remove("--broken")
        others_broken_on_rank_2()
    if "--behind" in sys.argv:
        sys.argv.remove("--behind")
        behind_on_rank_2()
    joint = "--joint" in sys.argv
    if joint:
        sys.argv.remove("--joint")
    if "--slow" in sys.argv:
        at = sys.argv.index("--slow")
        slow_on_rank_2(sys.argv[at + 1], 0.5)
        del sys.argv[at : at + 2]
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args([*sys.argv[1:]])).create_config()
    runtime_state._RUNTIME = AnyRuntimeState(engine_config)
    get_runtime_state().patch_mode = False
    for name, tokens in (("short", 12), ("long", 256)):
        q, k, v = tensors(tokens)
        text = dict(zip(("joint_query", "joint_key", "joint_value"), tensors(5, seed=99), strict=True))
        with_text = {**text, "joint_strategy": "rear"} if joint else {}
        expected = usp.USP.__wrapped__(q, k, v, **with_text)
        worst, ran = 0.0, []
        for _ in range(CALLS):
            before = session.current.choice.calls.copy()
            worst = max(worst, (usp.USP(q, k, v, **with_text) - expected).abs().max().item())
            ran += [one for one, n in session.current.choice.calls.items() if n > before[one]]
        report(name, [worst, " then ".join(ran)])
    with contextlib.suppress(Exception):  # torus cannot compute it, and xDiT's own ring cannot either
        usp.USP(*tensors(12), is_causal=True)
    if get_runtime_state().parallel_config.ring_degree == 1:  # xDiT's own ring needs a log-sum-exp, too
        get_runtime_state().set_attention_backend(AttentionBackendType.SDPA)
        usp.USP(*tensors(12))
    report("explain", [sf_xfuser.explain(), ""])
    dist.barrier()
    get_runtime_state().destroy_distributed_env()
    assert session.current.choice is None


if __name__ == "__main__":
    main()
