"""Rank side of test_yunchang_all_to_all.py: layers that call the hooked all-to-all, against yunchang's own function.

    torchrun --nproc-per-node 4 all_to_all_layers.py FLAGS OF XDIT... | groups ULYSSES RING

``groups``: make them without xFuserArgs, like scripts that use only the layers; SF_XFUSER_ARGS has the other flags.
Reports for each case whether the result has the same bits, and how many all-to-alls ran on the mesh.
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
    """xDiT's class, imported as if there were an NPU: its modules import yunchang only with a GPU or NPU, and its ring
    package imports a function that yunchang 0.6.4 lacks and only an NPU calls."""
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
    """(name, function () -> tensor)."""
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
    """torch.compile traces yunchang's own function."""
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
    """All-to-alls that ran on the mesh so far, and those that fell back, by reason."""
    text = sf_xfuser.explain()
    handled = re.search(r"yunchang all-to-all calls handled by the mesh: (\d+)", text)
    fallbacks = re.findall(r"fell back to yunchang (\d+) times: (.*)", text)
    return int(handled[1]) if handled else 0, {reason: int(n) for n, reason in fallbacks}


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
        wanted, own_error = with_yunchangs_own(call)
        handled, fallbacks = counts()
        found, error = outcome(call)
        handled_after, fallbacks_after = counts()
        reasons = [reason for reason, n in fallbacks_after.items() if n > fallbacks.get(reason, 0)]
        on_mesh = f"{handled_after - handled} on mesh" if handled_after > handled else "unchanged"
        how = "; ".join(reasons) or on_mesh
        if error is not None or wanted is None:
            report(name, f"{'same error' if error == own_error else error} | {how}")
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
