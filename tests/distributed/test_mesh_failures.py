"""Ranks that fail or differ: a failure of one rank becomes the same error on all, and the next call works.

No case may end with a wrong result: ``ranks/mesh_failures.py`` compares each with float64."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

TRANSPORTS = ("shm", "tcp", "two_sided")


def alone(reason):
    """What ranks print where rank 1 alone fails for this reason: the others name it, and then all is right."""
    others = rf"TransportError: rank 1 on \S+ failed: {reason}[^|]*, right, right, right"
    own = rf"{reason}[^|]*, right, right, right"
    return tuple(" \\| ".join(f"{t}: {own if rank == 1 else others}" for t in TRANSPORTS) for rank in range(4))


def each(*words):
    return (" \\| ".join(f"{t}: {', '.join(words)}" for t in TRANSPORTS),) * 4


OTHER_CALLS = r"TransportError: ranks make different calls[^|]*?"
# case -> what ranks 0 to 3 print
CASES = {
    "a_gradient": alone("ValueError: a gradient is asked for"),
    "no_query": alone("TypeError: query must be a dense tensor"),
    "counts_of_another_type": alone("TypeError: tokens must be two lists"),
    "attention_raises": alone("ZeroDivisionError: as it should"),
    "goes_on_at_once": each("True", "right"),
    "goes_on_late": each("True", "right"),
    "interrupted_while_counts_are_exchanged": tuple(
        " \\| ".join(
            f"{t}: {'' if rank == 1 else 'TransportError: rank 1 on .* failed: '}KeyboardInterrupt(: )?, right, right"
            for t in TRANSPORTS
        )
        for rank in range(4)
    ),
    "interrupted_while_it_fails": each("right"),
    "interrupted_between_two_lines": ("right",) * 4,
    "a_forked_child_uses_the_mesh": tuple(
        " \\| ".join(rf"{t}: right{', RuntimeError: this process was forked.*' * (rank == 1)}" for t in TRANSPORTS)
        for rank in range(4)
    ),
    "use_after_close": (r"(RuntimeError: this mesh has been closed[^,]*, and no call[^,]*(, |$)){2}",) * 4,
    "two_known_calls_in_another_order": each(
        OTHER_CALLS, "ValueError: tokens must be the same[^|]*?", "right",
        OTHER_CALLS, "ValueError: ranks disagree on shape, dtype[^|]*?", "right",
    ),
    "counts_that_contradict": each(
        "ValueError: tokens must be the same on all ranks[^|]*?", "right",
        r"(TransportError|ValueError): [^|]*?", "right",
    ),
    "another_request": each(
        "right", rf"{OTHER_CALLS}a dog[^|]*?a cow[^|]*?", "right", "right", rf"{OTHER_CALLS}third[^|]*?", "right"
    ),
    "requests_without_links": ("right, ValueError: ranks are in different requests: .*rank 3: a cow.*, right",) * 4,
    "two_threads": (
        *[r"\[\], (right|TransportError: rank 2 on \S+ failed: RuntimeError: two threads use one mesh.*), right"] * 2,
        r"RuntimeError: two threads use one mesh.*, (right|TransportError: rank 2 on \S+ failed: .*), right",
        r"\[\], (right|TransportError: rank 2 on \S+ failed: RuntimeError: two threads use one mesh.*), right",
    ),
    "meet_after_failing_at_different_times": ("right",) * 4,
    "one_rank_cannot_make_a_transport": (
        *[r"TransportError: rank 2 on \S+ failed: .*as it should, right, (shm|tcp)$"] * 2,
        r"TransportError: as it should, right, (shm|tcp)$",
        r"TransportError: rank 2 on \S+ failed: .*as it should, right, (shm|tcp)$",
    ),
    "one_rank_cannot_build": each(
        "right", r"[^|,]*Error: (rank 2 on \S+ failed: OSError: )?as it should", "nothing left"
    ),
    "closing_keeps_nothing": ("nothing",) * 4,
    "a_model_output": (r"\{True\}",) * 4,
    "a_model_output_of_other_shape": (r"ValueError: ranks disagree on an all-gather.*, \[8, 3\]",) * 4,
    "a_model_output_at_another_dimension": (rf"{OTHER_CALLS}at 0[^|]*?at 1.*",) * 4,
    "inputs_compared_on_some_ranks_only": tuple(
        rf"{'' if rank == 1 else r'TransportError: rank 1 on .* failed: '}KeyboardInterrupt(: )?, right"
        for rank in range(4)
    ),
    "a_trial_fails": tuple(
        rf"right, {why}, right, right, right"
        for why in (
            "ArithmeticError: planted" if rank == 1 else r"RuntimeError: [^,]* failed: rank 1: .*" for rank in range(4)
        )
    ),
    "labels_in_place_of_tags": (r"right, off by nan, TransportError: .*ranks .*different calls.*, right",) * 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("mesh_failures.py", *CASES, nproc=4, timeout=300).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_fail_or_differ(case, said):
    check(case, said, [rf"({expected})\Z" for expected in CASES[case]])
