"""Rank side of test_bench.py: ``sf-xfuser bench`` with two wrong variants. Takes the arguments of the command.

The variant torus is off by 0.01 on one rank, torus-no-overlap has one NaN. The peer torch-alltoall is off by 1,
torch-allgather raises.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from sf_xfuser import cli
from sf_xfuser.bench import peers, variants


def main() -> int:
    right = variants._torus

    def wrong(case, mesh, granularity, attend):
        call = right(case, mesh, granularity, attend)
        blocking = any(isinstance(link, variants._Blocking) for link in mesh.links.values())

        def changed(query, key, value):
            out = call(query, key, value)
            if os.environ["RANK"] == "1":
                if blocking:
                    out[0, 0, 0, 0] = float("nan")
                else:
                    out += 0.01
            return out

        return changed

    def wrong_peer(case, config, rotation):
        def call(query, key, value):
            if rotation == "allgather":
                raise NotImplementedError("no kernel for this device")
            return torch.nn.functional.scaled_dot_product_attention(query, key, value) + 1

        return call

    variants._torus = wrong
    peers.PEERS = tuple(replace(peer, open=wrong_peer) for peer in peers.PEERS if peer.package == "torch")
    return cli.main(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
