"""Pipelines that Inductor compiles, on an emulated cluster, where calls are staged.

Against one process that does not compile. On CPUs, mode="reduce-overhead" makes no CUDA graphs.
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

TESTED = {
    Row("`model.compile_repeated_blocks()`", "exact", "before or after `parallelize`, without `fullgraph=True`"): [
        *both("blocks"),
        "diffusers:blocks_first",
    ],
    Row("`model.compile()`", "exact", "after `parallelize`"): both("whole"),
    Row(
        '`model.compile(mode="reduce-overhead")`', "exact", "tested on CPUs, where Inductor makes no CUDA graphs"
    ): both("reduce_overhead"),
}
ROWS = [*TESTED, Row("xDiT's runner with `--use_torch_compile`", "exact", "`test_runner.py`")]
RESULTS = {case: row.result for row, cases in TESTED.items() for case in cases}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compilation"), "compilation", RESULTS, timeout=400)


@pytest.mark.parametrize("case", RESULTS)
def test_pipelines(case, reported):
    first = require_result(reported[case], RESULTS[case])
    assert first["calls"] == 2 * CALLS_OF_A_STEP
    assert all(rank["graphs"] > 0 for rank in reported[case].values())
