"""Step caches on an emulated cluster, where calls are staged: all ranks skip the steps that one process skips.

Against one process with the same cache, or xDiT's USP with it. Six steps.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest

from tests.settings import CALLS_OF_A_STEP, both, require_result, run
from tests.support_table import Row

pytestmark = pytest.mark.skipif(version("xfuser") < "0.7", reason="the settings are those of xDiT 0.7")

TESTED = {
    Row(
        "diffusers' `FirstBlockCacheConfig`",
        "exact",
        "the change of the first block is averaged over all ranks; diffusers alone averages over one rank's tokens",
    ): [*both("first_block", "first_block_wan"), "diffusers:first_block_first", "diffusers:first_block_uneven"],
    Row("diffusers' `MagCacheConfig`", "exact", "its calibration averages over all ranks, too"): both(
        "mag", "mag_wan", "mag_calibration"
    ),
    Row("diffusers' `PyramidAttentionBroadcastConfig`", "exact"): both("pyramid", "pyramid_wan"),
    Row("diffusers' `TaylorSeerCacheConfig`", "exact"): [
        *both("taylor"),
        "diffusers:taylor_lite",
    ],
    Row("diffusers' `SeaCacheConfig`", "exact", "Wan; every rank decides from all latents"): both("sea_wan"),
    Row("DBCache (cache-dit), with and without its TaylorSeer", "exact", "cache-dit averages over all ranks"): [
        *both("db_cache"),
        "diffusers:db_cache_taylor",
    ],
    Row("xDiT's `--cache_method teacache`", "as xDiT", "xDiT averages over all ranks"): ["xdit:tea"],
    Row("xDiT's `--cache_method fbcache`", "as xDiT", "as above"): ["xdit:fb"],
    Row("xDiT's `--cache_method dbcache`", "as xDiT", "as above"): ["xdit:db"],
    Row(
        "a cache of your own that reads hidden states, such as TeaCache's scripts for diffusers",
        "raises",
        "ranks that decide differently raise an error; decide from a mean over all ranks",
    ): ["diffusers:own"],
}
ROWS = list(TESTED)
RESULTS = {case: row.result for row, cases in TESTED.items() for case in cases}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return run(tmp_path_factory.mktemp("caches"), "caches", RESULTS)


@pytest.mark.parametrize("case", RESULTS)
def test_pipelines(case, reported):
    if RESULTS[case] == "raises":
        expected = "TransportError: ranks make different calls"
        assert len(reported[case]) == 4 and all(text.startswith(expected) for text in reported[case].values())
        return
    report = require_result(reported[case], RESULTS[case])
    if "calibration" in case:
        assert report["effect"] == 0
    else:
        assert CALLS_OF_A_STEP < report["calls"] < 6 * CALLS_OF_A_STEP, report
        assert report["effect"] > 1e-2
