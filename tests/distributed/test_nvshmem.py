"""NVSHMEM and symmetric memory on CPU ranks: the same error on every rank, and the ids of NVSHMEM's PEs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.launch import check, reports, torchrun


def nvshmem_problem() -> str | None:
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed"
    try:
        import nvshmem.core as core

        core.get_version()
    except Exception as error:
        return f"nvshmem4py cannot be used: {str(error).splitlines()[0]}"
    return None


PROBLEM = nvshmem_problem()
CASES = {
    "nvshmem_unsupported": (r"TransportUnavailable: nvshmem cannot be used: every rank: ",) * 3,
    "symm_mem_unsupported": (r"ValueError: --sp-transport symm_mem needs .*two_sided, nccl_put or nvshmem, which work",)
    * 3,
    "pe_of_each_rank": ("PE 2 of 3", "PE 0 of 3", "PE 1 of 3"),
}


@pytest.fixture(scope="module")
def outputs():
    """case -> rank -> its output, from one launch."""
    names = [case for case in CASES if PROBLEM is None or case != "pe_of_each_rank"]
    return reports(torchrun("nvshmem_ranks.py", *names, nproc=3).output, names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for ranks without a GPU")
@pytest.mark.parametrize("case", ["nvshmem_unsupported", "symm_mem_unsupported"])
def test_ranks_without_gpus_raise_the_same_error(case, outputs):
    assert len(set(outputs[case].values())) == 1
    check(case, outputs, CASES[case])


@pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or "")
@pytest.mark.skipif(torch.cuda.is_available(), reason="would leave NVSHMEM partly started")
def test_a_position_is_a_pe(outputs):
    """Real ranks exchange a unique id and run NVSHMEM's bootstrap, the last step that needs no driver."""
    assert tuple(outputs["pe_of_each_rank"][str(rank)] for rank in range(3)) == CASES["pe_of_each_rank"]
