"""A call that fails or differs on one rank fails on all ranks with the same reason, and the next call succeeds.

No case may return a wrong result: ``ranks/mesh_failures.py`` compares each result with float64."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

TRANSPORTS = ("shm", "tcp", "two_sided")


def fails_on_rank_1(reason):
    """What ranks print if only rank 1 fails: the others name it, and the next three calls are correct."""
    others = rf"TransportError: rank 1 on \S+ failed: {reason}[^|]*, correct, correct, correct"
    own = rf"{reason}[^|]*, correct, correct, correct"
    return tuple(" \\| ".join(f"{t}: {own if rank == 1 else others}" for t in TRANSPORTS) for rank in range(4))


def each(*texts):
    return (" \\| ".join(f"{t}: {', '.join(texts)}" for t in TRANSPORTS),) * 4


MISMATCH = r"TransportError: ranks make different calls[^|]*?"
# case -> what each rank prints
CASES = {
    "requires_grad": fails_on_rank_1("ValueError: autograd records this call"),
    "query_is_none": fails_on_rank_1("TypeError: query must be a dense tensor"),
    "counts_of_wrong_type": fails_on_rank_1("TypeError: tokens must be two lists"),
    "attention_raises": fails_on_rank_1("ZeroDivisionError: planted"),
    "failure_in_the_last_step": each("True", "correct"),
    "late_failure_in_the_last_step": each("True", "correct"),
    "interrupt_during_gather_of_counts": tuple(
        " \\| ".join(
            f"{t}: {'' if rank == 1 else 'TransportError: rank 1 on .* failed: '}KeyboardInterrupt(: )?(, correct){{2}}"
            for t in TRANSPORTS
        )
        for rank in range(4)
    ),
    "interrupt_during_failure_report": each("correct"),
    "interrupt_before_call_begins": ("correct",) * 4,
    "forked_child_uses_the_mesh": tuple(
        " \\| ".join(rf"{t}: correct{', RuntimeError: this process was forked.*' * (rank == 1)}" for t in TRANSPORTS)
        for rank in range(4)
    ),
    "use_after_close": (r"(RuntimeError: this mesh has been closed[^,]*, and no call[^,]*(, |$)){2}",) * 4,
    "calls_in_different_order": each(
        MISMATCH, "ValueError: tokens must be the same[^|]*?", "correct",
        MISMATCH, "ValueError: ranks disagree on shape, dtype[^|]*?", "correct",
    ),
    "different_counts": each(
        "ValueError: tokens must be the same on all ranks[^|]*?", "correct",
        r"(TransportError|ValueError): [^|]*?", "correct",
    ),
    "different_requests": each(
        "correct", rf"{MISMATCH}a dog[^|]*?a cow[^|]*?", "correct", "correct", rf"{MISMATCH}third[^|]*?", "correct"
    ),
    "different_requests_without_links": ("correct, ValueError: ranks are in different .*rank 3: a cow.*, correct",) * 4,
    "request_fails_outside_its_calls": tuple(
        " \\| ".join(
            f"{t}: {failed}, {failed}, correct, {failed}, correct, {late}, correct" for t in TRANSPORTS
        )
        for failed, late in [
            ("MemoryError: planted",) * 2 if rank == 1
            else (r"TransportError: rank 1 on \S+ failed: MemoryError: planted", "correct")
            for rank in range(4)
        ]
    ),
    "request_of_another_thread": each(
        "correct", r"RuntimeError: a request is running in another thread \(ours\)[^|]*?", "correct", "began"
    ),
    "forward_fails_outside_attention": tuple(
        rf"{'' if rank == 1 else r'TransportError: rank 1 on .* failed: '}ZeroDivisionError: [^,]*, "
        r"RuntimeError: a request is running in another thread.*, correct, correct"
        for rank in range(4)
    ),
    "two_threads": (
        *[r"\[\], (correct|TransportError: rank 2 on \S+ failed: RuntimeError: two threads use .*), correct"] * 2,
        r"RuntimeError: two threads use one mesh.*, (correct|TransportError: rank 2 on \S+ failed: .*), correct",
        r"\[\], (correct|TransportError: rank 2 on \S+ failed: RuntimeError: two threads use one mesh.*), correct",
    ),
    "reconnect_after_timeouts": ("correct",) * 4,
    "trial_fails_on_one_rank": (
        *[r"TransportError: rank 2 on \S+ failed: .*planted, correct, (shm|tcp)$"] * 2,
        r"TransportError: planted, correct, (shm|tcp)$",
        r"TransportError: rank 2 on \S+ failed: .*planted, correct, (shm|tcp)$",
    ),
    "build_fails_on_one_rank": each(
        "correct", r"[^|,]*Error: (rank 2 on \S+ failed: OSError: )?planted", "no leak"
    ),
    "close_frees_everything": ("no leak",) * 4,
    "all_gather": (r"\{True\}",) * 4,
    "all_gather_of_different_shapes": (r"ValueError: ranks disagree on an all-gather.*, \[8, 3\]",) * 4,
    "all_gather_of_different_dimensions": (rf"{MISMATCH}at 0[^|]*?at 1.*",) * 4,
    "interrupt_during_comparison_of_inputs": tuple(
        rf"{'' if rank == 1 else r'TransportError: rank 1 on .* failed: '}KeyboardInterrupt(: )?, correct"
        for rank in range(4)
    ),
    "usp_trial_fails": tuple(
        rf"correct, {reason}, correct, correct, correct"
        for reason in (
            "ArithmeticError: planted" if rank == 1 else r"RuntimeError: [^,]* failed: rank 1: .*" for rank in range(4)
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("mesh_failures.py", *CASES, nproc=4, timeout=300).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_failures_and_differences(case, output):
    check(case, output, [rf"({expected})\Z" for expected in CASES[case]])
