"""Compiled pipelines on an emulated cluster, where calls are staged, against one process that compiles alike.

By Inductor with C++ kernels. On a CPU, mode="reduce-overhead" makes no CUDA graphs.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version

import pytest

from tests.settings import CALLS_OF_A_STEP, both, require_result, run
from tests.support_table import Row

pytestmark = [
    pytest.mark.skipif(version("xfuser") < "0.7", reason="the settings are those of xDiT 0.7"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
    pytest.mark.slow,
]

GRAPHS = "CUDA graphs are not tested ([CUDA graphs](graphs.md))"
TESTED = {
    Row("`model.compile_repeated_blocks()`", "exact", "the blocks once; `parallelize`: without `fullgraph=True`"): both(
        "blocks"
    ),
    Row("`model.compile()`, `torch.compile(model)`", "exact", "as above"): both("whole"),
    Row('`mode="reduce-overhead"`', "exact", GRAPHS): ["xdit:reduce_overhead"],
    Row(
        "xDiT's runner with `--use_torch_compile`",
        "exact to rounding",
        f'Flux in bfloat16, `mode="reduce-overhead"`; {GRAPHS}',
    ): ["runner:torch_compile"],
    Row("compiled, under `torch.autocast`", "exact to rounding"): ["xdit:autocast"],
}
ROWS = list(TESTED)
RESULTS = {case: row.result for row, cases in TESTED.items() for case in cases}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compilation"), "compilation", RESULTS)


@pytest.mark.parametrize("case", RESULTS)
def test_pipelines(case, reported):
    assert require_result(reported[case], RESULTS[case])["calls"] == 2 * CALLS_OF_A_STEP
