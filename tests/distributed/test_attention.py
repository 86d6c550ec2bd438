"""torus_attention on real ranks: exact in every layout, and bad input raises the same error on all ranks."""

from __future__ import annotations

import re

import pytest

from tests.launch import check, reports, torchrun


@pytest.mark.parametrize(("nproc", "sizes"), [(4, "1,2,4"), (6, "3,6"), (8, "8")])
def test_error_is_within_twice_single_process_sdpa(nproc, sizes):
    """Every (T, U, R) with T, U, R in 1..4 and W <= 8, every placement of the ring; every granularity; uneven heads and
    tokens, batch 2, GQA, joint tokens, fp32 and bf16. A repeated call gives the same bits."""
    finished = torchrun("attention_accuracy.py", sizes, nproc=nproc)
    assert "worst error" in finished.output


def test_every_transport_gives_the_same_bits():
    """In every layout, case and granularity, each rank gets the same result over shared memory, TCP and gloo."""
    outputs = [torchrun("attention_accuracy.py", "4", name, nproc=4).output for name in ("shm", "tcp", "two_sided")]
    bits = [re.search(r"worst error .*, bits (\[.*\])", output)[1] for output in outputs]
    assert bits[0] == bits[1] == bits[2]


def test_error_of_the_fused_kernel():
    """Every layout and case: first, middle and last pieces. On CPU ranks, its PyTorch reference."""
    finished = torchrun("attention_accuracy.py", "1,2,4", "fused", nproc=4)
    assert "worst error" in finished.output


NUMBERS = [
    "keys_of_one_rank_without_weight",
    "keys_of_one_rank_without_weight_bf16",
    "keys_of_one_rank_are_nan_to_the_library",
    "no_key_has_a_weight",
    "a_weight_of_one",
    "infinite_values",
    "values_near_overflow",
    "float64",
    "negated_views",
    "mixed_dtypes_under_autocast",
]


@pytest.fixture(scope="module")
def numbers() -> dict[str, dict[str, str]]:
    return reports(torchrun("attention_numbers.py", "tcp", *NUMBERS, nproc=4).output, NUMBERS)


@pytest.mark.parametrize("case", NUMBERS)
def test_extreme_numbers_match_one_process(case, numbers):
    """In every granularity, with and without a ring, against float64 or SDPA on one process."""
    assert numbers[case] == dict.fromkeys("0123", "nothing was raised")


REFUSALS = {
    "disagree_on_dtype": ("ValueError", "ranks disagree on shape, dtype"),
    "disagree_on_heads": ("ValueError", "ranks disagree on shape, dtype"),
    "bad_shape_on_one_rank": ("ValueError", r"rank 1: query must have 4 dimensions"),
    "integers": ("ValueError", "rank 0: query is torch.int64, but must be one of float16, .*: convert it"),
    "no_value": ("TypeError", "value must be a dense tensor .*, got NoneType"),
    "sparse": ("TypeError", "query must be a dense tensor .*, got one of torch.sparse_coo on cpu"),
    "without_data": ("TypeError", "key must be a dense tensor .* with data, got one of torch.strided on meta"),
    "count_in_place_of_counts": ("TypeError", r"tokens must be two lists of integers .*, got \(8, \[8"),
    "counts_of_queries_alone": ("TypeError", r"tokens must be two lists of integers .*, got \(.*, None\)"),
    "other_batch": ("ValueError", r"rank 0: key \(2, 4, 8, 16\) and query \(1, 4, 8, 16\) differ in batch"),
    "float64_compressed": ("ValueError", "--sp-compress takes float16, bfloat16 or float32, got float64: convert"),
    "too_few_heads": ("ValueError", "2 heads cannot be split over torus=2 x ulysses=2"),
    "kv_heads_do_not_divide": ("ValueError", "4 query heads are not a multiple of 3 key heads"),
    "counts_that_do_not_fit": ("ValueError", r"rank 3: tokens=.* differs from this rank's 8 queries and 8 keys"),
    "fused_head_size": ("ValueError", "the fused kernel does not support this call: its head sizes are .*, got 16"),
    "fused_dtype": ("ValueError", "its dtypes are .*, got torch.float64; use --sp-kernel library"),
    "unknown_attention": ("TypeError", "attention must be a function .* or 'fused', got 'flash'"),
    "unknown_joint_strategy": ("ValueError", "joint.strategy must be 'front' or 'rear', got 'middle'"),
    "heads_that_no_plan_splits": ("ValueError", r"6 heads cannot be split over torus=2 x ulysses=2.*legal for 4 ranks"),
    "product_is_not_the_world": ("ValueError", "describes 2 ranks, but the sequence-parallel group has 4"),
    "topology_does_not_match": ("ValueError", "describes 6 ranks, but the job has 4"),
    "different_flags": ("ValueError", r"different flags: --sp-plan by rank: .*1: 'paper'"),
    "degrees_are_not_the_world": ("ValueError", r"ulysses_degree=3 x ring_degree=1 = 3, but .* has 4 ranks"),
    "device_mesh_of_three_dimensions": (
        "ValueError",
        r"rank 0: a DeviceMesh must have one dimension or .*, got \('dp', 'ring', 'ulysses'\): pass a slice",
    ),
    "device_mesh_without_names": (
        "ValueError",
        "rank 0: a DeviceMesh must have one dimension .*, got 2 without names",
    ),
    "device_meshes_that_overlap": (
        "ValueError",
        r"each of the 4 ranks must be in one group, got .* \[\(0, 1\), \(1, 2",
    ),
    "a_rank_is_missing": ("TransportError", r"rank 1 on \S+ did not reach 'attention call'"),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, dict[str, str]]:
    """case -> rank -> the error, from one launch of four ranks."""
    return reports(torchrun("attention_refusals.py", *REFUSALS, nproc=4, timeout=120).output, REFUSALS)


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_raises_the_same_error_on_every_rank(case, refusals):
    kind, text = REFUSALS[case]
    reported = refusals[case]
    assert set(reported) == {"0", "1", "2", "3"}
    if case == "a_rank_is_missing":
        del reported["1"]
    assert len(set(re.sub(r"rank \d waited", "rank w waited", message) for message in reported.values())) == 1, reported
    check(case, refusals, [rf"{kind}: .*{text}"])


def test_an_error_ends_every_process():
    finished = torchrun(
        "attention_refusals.py", "--uncaught", "disagree_on_dtype", nproc=4, timeout=60, expect_failure=True
    )
    assert finished.output.count("ValueError: ranks disagree on shape, dtype") == 4, finished.output


def test_killing_a_rank_ends_the_others_within_the_timeout():
    finished = torchrun("killed_rank.py", nproc=4, timeout=60, expect_failure=True)
    assert set(reports(finished.output, ["survivor"])["survivor"]) == {"0", "2", "3"}, finished.output
