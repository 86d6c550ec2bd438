"""Rank side of test_yunchang_all_to_all.py: the hooked layers of yunchang against yunchang's own.

    torchrun --nproc-per-node 4 all_to_all_layers.py FLAGS OF XDIT... | groups ULYSSES RING

``groups``: they are made without xFuserArgs, as scripts do that use the layers alone; SF_XFUSER_ARGS says the rest.
Reports for each case whether the result has the same bits, and whether the mesh served its all-to-alls.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading

import torch
import torch.distributed as dist
import yunchang
import yunchang.ring.utils
from cases import report
from usp_calls import AnyRuntimeState
from xfuser import envs, xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import (
    get_sequence_parallel_rank,
    init_distributed_environment,
    initialize_model_parallel,
    runtime_state,
)
from yunchang.comm import all_to_all
from yunchang.comm.all_to_all import SeqAllToAll4D, SeqAllToAll5D
from yunchang.globals import PROCESS_GROUP
from yunchang.kernels import AttnType

import sf_xfuser

B, S, H, D = 2, 8, 8, 16
JOINT = 3


def xfusers_layer():
    """xDiT's class. Its modules take yunchang in only where there is a GPU or an NPU, and its ring package asks for a
    function that yunchang 0.6.4 has not (and that only an NPU calls): they are imported here as if both were there."""
    yunchang.ring.utils.update_npu_out = None
    envs._is_npu, kept = (lambda: True), envs._is_npu
    try:
        layers = importlib.reload(sys.modules["xfuser.core.long_ctx_attention.hybrid.attn_layer"])
        importlib.import_module("xfuser.core.long_ctx_attention.ring")
    finally:
        envs._is_npu = kept
    return layers.xFuserLongContextAttention(attn_type=AttnType.TORCH_MATH)


def tensors(heads=H, number=3, tokens=S, seed=None):
    make = torch.Generator().manual_seed(1000 + get_sequence_parallel_rank() if seed is None else seed)
    return [torch.randn(B, tokens, heads, D, generator=make) for _ in range(number)]


def joint(strategy):
    names = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")
    return dict(zip(names, tensors(tokens=JOINT, seed=7), strict=True)) | {"joint_strategy": strategy}


def cases():
    """(name, a function without arguments that computes a tensor)."""
    layer = xfusers_layer()
    yield "xfusers_layer", lambda: layer(None, *tensors())
    yield "xfusers_layer_causal", lambda: layer(None, *tensors(), causal=True)
    yield "xfusers_layer_front", lambda: layer(None, *tensors(), **joint("front"))
    yield "xfusers_layer_rear", lambda: layer(None, *tensors(), **joint("rear"))
    for use_sync in (False, True):
        own = yunchang.LongContextAttention(attn_type=AttnType.TORCH_MATH, use_sync=use_sync)
        yield f"yunchangs_layer{'_sync' if use_sync else ''}", lambda own=own: own(*tensors())
    yield "gradient", gradient
    yield "by_its_name", lambda: yunchang.comm.all_to_all_4D(tensors()[0], group=PROCESS_GROUP.ULYSSES_PG)
    group = dist.new_group()
    for again in ("", "_again"):
        yield f"another_group{again}", lambda: SeqAllToAll4D.apply(group, tensors()[0], 2, 1)
    yield "heads_do_not_divide", lambda: SeqAllToAll4D.apply(PROCESS_GROUP.ULYSSES_PG, tensors(heads=5)[0], 2, 1)
    yield (
        "five_dimensions",
        lambda: SeqAllToAll5D.apply(PROCESS_GROUP.ULYSSES_PG, torch.stack(tensors(), dim=2), 3, 1, False),
    )
    yield "compiled", compiled


def gradient():
    given = tensors()[0].requires_grad_()
    out = SeqAllToAll4D.apply(PROCESS_GROUP.ULYSSES_PG, given, 2, 1)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    (out * weights).sum().backward()
    return given.grad


def compiled():
    """What torch.compile sees is yunchang's own function."""
    seen = []

    def look(graph, example_inputs):
        seen.append(graph)
        return graph

    call = torch.compile(lambda x: all_to_all.all_to_all_4D(x, 2, 1, group=PROCESS_GROUP.ULYSSES_PG), backend=look)
    out = call(tensors()[0])
    assert any("all_to_all_single" in str(graph.graph) for graph in seen), [str(graph.graph) for graph in seen]
    return out


def outcome(call):
    try:
        return call(), None
    except RuntimeError as error:
        return None, str(error).splitlines()[0]


def counts() -> tuple[int, dict[str, int]]:
    """All-to-alls that were served, and those handed back with the reason, so far."""
    text = sf_xfuser.explain()
    served = re.search(r"yunchang served by the mesh: (\d+)", text)
    handed_back = re.findall(r"handed back to yunchang (\d+) times: (.*)", text)
    return int(served[1]) if served else 0, {why: int(n) for n, why in handed_back}


def with_yunchangs_own(call):
    hooked = all_to_all.all_to_all_4D
    all_to_all.all_to_all_4D = yunchang.comm.all_to_all_4D = hooked.__wrapped__
    try:
        return outcome(call)
    finally:
        all_to_all.all_to_all_4D = yunchang.comm.all_to_all_4D = hooked


def with_xfuser_args() -> None:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args(["--model", "m", *sys.argv[1:]])).create_config()
    runtime_state._RUNTIME = AnyRuntimeState(engine_config)


def main() -> None:
    if sys.argv[1] == "groups":
        ulysses, ring = map(int, sys.argv[2:])
        init_distributed_environment()
        initialize_model_parallel(sequence_parallel_degree=ulysses * ring, ulysses_degree=ulysses, ring_degree=ring)
    else:
        with_xfuser_args()
    hooked = all_to_all.all_to_all_4D

    for name, call in cases():
        wanted, its_error = with_yunchangs_own(call)
        served, handed_back = counts()
        found, error = outcome(call)
        now_served, now_handed_back = counts()
        new = [why for why, n in now_handed_back.items() if n > handed_back.get(why, 0)]
        how = "; ".join(new) or (f"{now_served - served} served" if now_served > served else "untouched")
        if error is not None or wanted is None:
            report(name, f"{'same error' if error == its_error else error} | {how}")
        else:
            report(name, f"{'equal' if torch.equal(found, wanted) else 'DIFFERENT'} | {how}")
    links = sorted({thread.name for thread in threading.enumerate() if thread.name.startswith("sf-xfuser tcp")})
    report("links", f"{next((x for x in sf_xfuser.explain().splitlines() if x.startswith('transport ')), '')} {links}")
    dist.barrier()
    sf_xfuser.disable()
    assert all_to_all.all_to_all_4D is yunchang.comm.all_to_all_4D is hooked.__wrapped__ is not hooked
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
