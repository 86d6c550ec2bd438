"""Rank side of test_selector.py: xDiT's USP by name under ``--sp-backend auto``, 32 calls of each of two shapes.

Reports for each shape the largest difference from xDiT's own USP and the candidates that
ran, in order; then ``explain()`` and the calls of ``stats()``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from cases import report
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, get_sequence_parallel_rank, runtime_state
from xfuser.core.distributed.attention_backend import AttentionBackendType
from xfuser.model_executor.layers import usp

import sf_xfuser
from sf_xfuser.autotune.selector import Selector
from sf_xfuser.integrations.xdit import session

B, H, D, CALLS = 1, 8, 16, 32


class AnyRuntimeState(runtime_state.RuntimeState):
    """A runtime state without a pipeline: USP uses only the groups and the attention backend."""


def tensors(tokens: int, seed: int | None = None) -> list[torch.Tensor]:
    """q, k, v of this rank; with ``seed``, the same on all ranks."""
    make = torch.Generator().manual_seed(get_sequence_parallel_rank() if seed is None else seed)
    return [torch.randn(B, tokens, H, D, generator=make).transpose(1, 2) for _ in range(3)]


def wrap_timed_calls(wrapper) -> None:
    time_call = Selector._time
    Selector._time = lambda self, name, call, device: time_call(self, name, partial(wrapper, name, call), device)


def slow_on_rank_2(parts: str, seconds: float) -> None:
    """Slow down the timed calls of candidates with one of the comma-separated ``parts`` in their name."""

    def slowed(name, call, candidate):
        out = call(candidate)  # before the sleep, so that other ranks do not wait
        time.sleep(seconds if dist.get_rank() == 2 and any(part in name for part in parts.split(",")) else 0.0)
        return out

    wrap_timed_calls(slowed)


def other_degrees_fail_on_rank_2() -> None:
    """Fail xDiT's USP in other degrees than its own."""

    def broken(name, call, candidate):
        out = call(candidate)
        if candidate.degrees is not None and dist.get_rank() == 2:
            raise ArithmeticError("planted")
        return out

    wrap_timed_calls(broken)


def skip_a_record_on_rank_2() -> None:
    """Skip recording the first call of a trial, as if the rank had been interrupted."""
    record, missed = Selector._record, []

    def miss(self, shape, seconds):
        if dist.get_rank() == 2 and shape not in missed:
            missed.append(shape)
        else:
            record(self, shape, seconds)

    Selector._record = miss


def apart() -> None:
    """Run as if ranks shared no memory."""
    original = Selector.__init__

    def init(self, own, other_degrees, use_degrees, meshes, *args, **kwargs):
        for mesh in meshes:
            mesh.one_host = False
        original(self, own, other_degrees, use_degrees, meshes, *args, **kwargs)

    Selector.__init__ = init


def main() -> None:
    if "--apart" in sys.argv:
        sys.argv.remove("--apart")
        apart()
    if "--broken" in sys.argv:
        sys.argv.remove("--broken")
        other_degrees_fail_on_rank_2()
    if "--behind" in sys.argv:
        sys.argv.remove("--behind")
        skip_a_record_on_rank_2()
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
            before = session.current.selector.calls.copy()
            worst = max(worst, (usp.USP(q, k, v, **with_text) - expected).abs().max().item())
            ran += [one for one, n in session.current.selector.calls.items() if n > before[one]]
        report(name, [worst, " then ".join(ran)])
    with contextlib.suppress(Exception):  # neither torus nor xDiT's own ring supports it
        usp.USP(*tensors(12), is_causal=True)
    if get_runtime_state().parallel_config.ring_degree == 1:  # xDiT's own ring needs a log-sum-exp
        get_runtime_state().set_attention_backend(AttentionBackendType.SDPA)
        usp.USP(*tensors(12))
    report("explain", [sf_xfuser.explain(), sf_xfuser.stats().calls])
    dist.barrier()
    get_runtime_state().destroy_distributed_env()
    assert session.current.selector is None


if __name__ == "__main__":
    main()
