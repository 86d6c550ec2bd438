"""Rank side of test_attention.py: rank 1 is killed during a run, and the others must raise instead of hanging."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from cases import report

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError


def main() -> None:
    # torchrun terminates the other ranks when one dies; here they must end by themselves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = build_mesh([[0, 1, 2, 3]], TorusArgs(backend="torus", topology="2x2", timeout=10), heads=4)
    q, k, v = (torch.randn(1, 4, 64, 16) for _ in range(3))
    try:
        for call in range(1000):
            if rank == 1 and call == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            torus_attention(q, k, v, mesh=mesh, tokens=([64] * 4, [64] * 4))
    except TransportError as error:
        report("survivor", str(error))
        os._exit(3)


if __name__ == "__main__":
    main()
