"""Measures the time of a put over shared memory: ``torchrun --nproc-per-node 2 -m sf_xfuser.bench.puts``.

Rank 0 puts a round of chunks into rank 1's window and raises the flags, as in an attention call. In every other round
it copies the same bytes within its own memory instead. Rank 1 clears its window after every round, so all rounds start
in the same state. The time per chunk is rank 0's, from the call until the chunks are in place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sf_xfuser.transport.base import Parcel
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.rendezvous import StoreGroup

SIZES = tuple(1 << n for n in range(12, 23, 2))
_WARMUP = 3


def measure(sizes: tuple[int, ...], chunks: int, repeat: int, timeout_s: float) -> list[dict[str, Any]]:
    """One row per size: median seconds per chunk over ``repeat`` rounds of each kind. Collective over two ranks."""
    rank = dist.get_rank()
    control = ControlPlane(StoreGroup.world(timeout_s), [0, 1], rank, timeout_s)
    link = Shm(control, [0, 1], rank, [1 - rank], timeout_s)
    link.reserve(chunks * max(sizes), 0)
    rows = []
    for size in sizes:
        source = torch.ones(chunks, size, dtype=torch.uint8)
        own = torch.zeros_like(source)
        parcels = [Parcel(source[n], 1, n, n * size) for n in range(chunks)]
        seconds: dict[str, list[float]] = {"put": [], "copy": []}
        for number in range(repeat + _WARMUP):
            for kind, times in seconds.items():
                window = link.begin()
                if rank == 0:
                    link.exchange(0, [], [Parcel(None, 1, 0)]).wait()  # wait until rank 1 is ready
                    started = time.perf_counter()
                    if kind == "put":
                        link.exchange(1, parcels, [])
                    else:
                        for n in range(chunks):
                            own[n].copy_(source[n])
                    ended = time.perf_counter()
                    if number >= _WARMUP:
                        times.append((ended - started) / chunks)
                    if kind == "copy":
                        link.exchange(1, [Parcel(None, 1, n) for n in range(chunks)], [])
                else:
                    link.exchange(0, [Parcel(None, 0, 0)], [])
                    link.exchange(1, [], [Parcel(None, 0, n) for n in range(chunks)]).wait()
                    if kind == "put":
                        assert bool(window[: chunks * size].all()), "a chunk is missing"
                    window[: chunks * size] = 0
        if rank == 0:
            medians = {f"{kind}_s": statistics.median(times) for kind, times in seconds.items()}
            rows.append({"bytes": size, "chunks": chunks, **medians, "ratio": medians["put_s"] / medians["copy_s"]})
    link.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.puts", description=__doc__)
    parser.add_argument("--chunks", type=int, default=8, help="chunks per round. Default: 8")
    parser.add_argument("--repeat", type=int, default=101, help="rounds per kind and size. Default: 101")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        raise SystemExit(
            f"needs two ranks, got {dist.get_world_size()}: torchrun --nproc-per-node 2 -m sf_xfuser.bench.puts"
        )
    rows = measure(SIZES, options.chunks, options.repeat, timeout_s=60.0)
    if rows:
        heads = ("bytes", "put and flag, us", "copy, us", "put / copy")
        table = Table(*heads, title=f"shm, rank 0 to rank 1: time per chunk, {options.chunks} chunks per round")
        for row in rows:
            us = (f"{row[name] * 1e6:.1f}" for name in ("put_s", "copy_s"))
            table.add_row(f"{row['bytes']:,}", *us, f"{row['ratio']:.2f}x")
        Console().print(table)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
