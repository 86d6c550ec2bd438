"""NVSHMEM and symmetric memory on CPU ranks: both are refused alike on every rank; the ids of NVSHMEM's PEs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.launch import check, reports, torchrun


def nvshmem_is_missing() -> str | None:
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed"
    try:
        import nvshmem.core as core

        core.get_version()
    except Exception as error:
        return f"nvshmem4py cannot be used: {str(error).splitlines()[0]}"
    return None


MISSING = nvshmem_is_missing()
CASES = {
    "nvshmem_is_refused": (r"Unusable: nvshmem cannot be used: every rank: ",) * 3,
    "symm_mem_is_refused": (r"ValueError: --sp-transport symm_mem needs .*two_sided and nvshmem work",) * 3,
    "who_is_which_pe": ("PE 2 of 3", "PE 0 of 3", "PE 1 of 3"),
}


@pytest.fixture(scope="module")
def said():
    names = [case for case in CASES if MISSING is None or case != "who_is_which_pe"]
    return reports(torchrun("nvshmem_ranks.py", *names, nproc=3).output, names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for ranks that have no GPU")
@pytest.mark.parametrize("case", ["nvshmem_is_refused", "symm_mem_is_refused"])
def test_ranks_without_gpus_are_refused_alike(case, said):
    assert len(set(said[case].values())) == 1
    check(case, said, CASES[case])


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
@pytest.mark.skipif(torch.cuda.is_available(), reason="would leave NVSHMEM started by halves")
def test_a_position_is_a_pe(said):
    """Real ranks hand round a unique id and come as far as NVSHMEM comes without a driver: its bootstrap."""
    assert tuple(said["who_is_which_pe"][str(rank)] for rank in range(3)) == CASES["who_is_which_pe"]
