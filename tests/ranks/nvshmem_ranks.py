"""Rank side of test_nvshmem.py: three CPU ranks, each printing the outcome of each case."""

from __future__ import annotations

import sys

import torch.distributed as dist
from cases import run_cases

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.gpu import nvshmem
from sf_xfuser.transport.rendezvous import StoreGroup


def mesh_of(transport):
    return build_mesh([[0, 1, 2]], TorusArgs(backend="torus", topology="1x3", transport=transport, timeout=20), heads=3)


def case_nvshmem_unsupported(rank):
    mesh_of("nvshmem")


def case_symm_mem_unsupported(rank):
    mesh_of("symm_mem")


def case_pe_of_each_rank(rank):
    import nvshmem.core as core

    members = [1, 2, 0]  # rank at each position
    position = members.index(rank)
    unique_id = nvshmem.exchange_unique_id(StoreGroup("pe", members, 20.0), members, position)
    core.init(uid=unique_id, rank=position, nranks=3, initializer_method="uid")
    assert int(core.init_status()) == 1  # bootstrapped; more needs a driver
    return f"PE {core.my_pe()} of {core.n_pes()}"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], (TransportError, ValueError))
    dist.destroy_process_group()
