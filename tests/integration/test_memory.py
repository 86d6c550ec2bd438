"""Pipelines that save memory, or run in another precision or mode, on an emulated cluster, where calls are staged.

Against one process with the same setting.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest

from tests.settings import CALLS_OF_A_STEP, both, require_result, run
from tests.support_table import Row

pytestmark = [
    pytest.mark.skipif(version("xfuser") < "0.7", reason="the settings are those of xDiT 0.7"),
    pytest.mark.slow,
]

ROUNDING = "exact to rounding"
TESTED = {
    Row(
        "`enable_group_offload` by blocks or by leaves, to memory or to disk",
        "exact",
        "tested with the CPU as the device that computes; `use_stream=True` needs a GPU and is not tested",
    ): [
        *both("group_offload_blocks", "group_offload_leaves", "group_offload_in_memory"),
        "diffusers:group_offload_leaves_first",
    ],
    Row(
        "`pipe.enable_model_cpu_offload()`",
        "exact",
        'give each rank its own GPU, `device=f"cuda:{local_rank}"`: the default is the first one',
    ): both("model_offload"),
    Row("`pipe.enable_sequential_cpu_offload()`", "exact", "as above"): [
        *both("sequential_offload"),
        "diffusers:sequential_offload_first",
    ],
    Row("`enable_layerwise_casting`, weights in FP8", "exact"): [
        *both("layerwise_casting"),
        "diffusers:layerwise_casting_first",
    ],
    Row("torchao, INT8 weights", "exact"): both("torchao_weights"),
    Row(
        "torchao, INT8 weights and activations",
        ROUNDING,
        "within 2 % of the largest value: a rounding difference can move an activation by one step of INT8",
    ): both("torchao_activations"),
    Row("bitsandbytes, NF4", "exact", "its layers for CPUs; its GPU kernels are not tested"): both("bitsandbytes_nf4"),
    Row(
        "bitsandbytes, INT8 without columns of outliers",
        "exact",
        "as above. Ranks find these columns in their own tokens, so with them the result differs from one process",
    ): both("bitsandbytes_int8"),
    Row("a first call under `torch.inference_mode()`, the next under `no_grad`, and the reverse", "exact"): both(
        "inference_mode_first", "inference_mode_afterwards"
    ),
    Row(
        "`torch.autocast` to bfloat16",
        ROUNDING,
        "within 2 % of the largest value, the precision of bfloat16; Q, K and V are cast before they are sent",
    ): both("autocast", "autocast_wan"),
}
ROWS = list(TESTED)
RESULTS = {case: row.result for row, cases in TESTED.items() for case in cases}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return run(tmp_path_factory.mktemp("memory"), "memory", RESULTS)


@pytest.mark.parametrize("case", RESULTS)
def test_pipelines(case, reported):
    report = require_result(reported[case], RESULTS[case])
    assert report["calls"] == 2 * CALLS_OF_A_STEP
    assert report["effect"] > 1e-3 or not any(word in case for word in ("casting", "torchao", "bits", "autocast"))
