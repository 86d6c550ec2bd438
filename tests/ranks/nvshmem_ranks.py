"""Rank side of test_nvshmem.py: three CPU ranks; each case prints what each rank saw."""

from __future__ import annotations

import sys

import torch.distributed as dist
from cases import run_cases

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.gpu import nvshmem
from sf_xfuser.transport.rendezvous import Agreement


def mesh_of(transport):
    return build_mesh([[0, 1, 2]], TorusArgs(backend="torus", topology="1x3", transport=transport, timeout=20), heads=3)


def case_nvshmem_is_refused(rank):
    mesh_of("nvshmem")


def case_symm_mem_is_refused(rank):
    mesh_of("symm_mem")


def case_who_is_which_pe(rank):
    import nvshmem.core as core

    members = [1, 2, 0]  # rank at each position
    position = members.index(rank)
    unique_id = nvshmem.exchange_unique_id(Agreement("pe", members, 20.0), members, position)
    core.init(uid=unique_id, rank=position, nranks=3, initializer_method="uid")
    assert int(core.init_status()) == 1  # as far as it comes without a driver
    return f"PE {core.my_pe()} of {core.n_pes()}"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], (TransportError, ValueError))
    dist.destroy_process_group()
