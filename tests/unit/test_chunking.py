"""How a call is cut: granularity, parts, and machines whose queries are attended at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sf_xfuser.layout.chunking import CallSize, choose_chunking, choose_granularity, granularities_to_try
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Chunking

PAPER = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=4)
FLUX_4096 = CallSize(q_tokens=2064, kv_tokens=2064, heads=24, head_size=128, batch=1)  # on 32 GPUs
FLUX_1024 = replace(FLUX_4096, q_tokens=144, kv_tokens=144)


def test_waves_are_tiles_over_multiprocessors():
    assert FLUX_4096.waves(PAPER, 1) == 3 * 33 / 132  # 2 x 2064 rows are 33 tiles of 128, for 3 heads
    assert replace(FLUX_4096, heads=25, batch=2).waves(PAPER, 3) == 2 * 4 * 97 / 132  # the most heads of a rank


def test_on_cuda_only_long_attention_calls_are_staged():
    """All queries of a rank to one slab: 4 x 16512 rows x 16512 keys x 3 heads x 128 take 698 us at 600 TFLOP/s."""
    assert choose_granularity(PAPER, FLUX_4096, "cuda") == "slab"
    assert choose_granularity(PAPER, FLUX_1024, "cuda") == "unstaged"
    few_queries = replace(FLUX_4096, q_tokens=128, kv_tokens=16512)  # fill 0.18 waves for 347 us
    assert choose_granularity(PAPER, few_queries, "cuda") == "unstaged"
    at_600 = 4 * 387 * 128 * 8 * 128 / 600e12  # seconds per key token of a rank
    for us, granularity in ((149, "unstaged"), (151, "slab")):
        assert choose_granularity(PAPER, replace(FLUX_4096, kv_tokens=int(us * 1e-6 / at_600)), "cuda") == granularity


def test_on_a_cpu_only_ranks_of_one_host_are_unstaged():
    for size in (FLUX_1024, FLUX_4096):
        assert choose_granularity(PAPER, size, "cpu") == "block"
        assert choose_granularity(PAPER, size, "cpu", one_host=True) == "unstaged"


def test_granularities_that_auto_tries():
    assert granularities_to_try("cuda", one_host=True) == ["slab", "unstaged"]
    assert granularities_to_try("cpu", one_host=False) == [None, "unstaged"]
    assert granularities_to_try("cpu", one_host=True) == [None]  # a call is always unstaged


@pytest.mark.parametrize(
    ("q_tokens", "machines"),
    [(2064, 1), (128, 3), (1024, 2), (3720, 3)],  # a machine's queries are 0.75, 0.05, 0.36 and 1.34 waves
)
def test_queries_of_several_machines_fill_whole_waves(q_tokens, machines):
    size = replace(FLUX_4096, q_tokens=q_tokens)
    assert choose_chunking(PAPER, size, "cuda", "slab") == Chunking(granularity="slab", machines_at_once=machines)


def test_parts_of_kv():
    two = Layout(torus=2, ulysses=4, ring_across=1, ring_inside=2)
    assert choose_chunking(two, FLUX_4096, "cuda", "block") == Chunking(last_kv_parts=4)
    assert choose_chunking(PAPER, FLUX_4096, "cuda", "block") == Chunking(kv_parts=2, last_kv_parts=2)
    assert choose_chunking(PAPER, FLUX_4096, "cpu", "block") == Chunking()
    assert choose_chunking(PAPER, FLUX_4096, "cuda", "unstaged") == Chunking(granularity="unstaged")
