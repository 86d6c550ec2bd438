"""What one chunk costs: ``torchrun --nproc-per-node 2 -m sf_xfuser.bench.puts``.

Rank 0 puts a chunk into rank 1's window and raises its flag, as in an attention call; beside it, in turn, a copy of the
same size within rank 0's own memory. The time is rank 0's, from the call to the chunk being in place. Rank 1 reads each
chunk afterwards, so that a put writes to memory that another core has in its cache, and a copy does not.
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

from sf_xfuser.agreement import Agreement
from sf_xfuser.transport import Parcel, Shm

SIZES = tuple(1 << n for n in range(12, 25, 2))


def measure(sizes: tuple[int, ...], repeat: int, timeout_s: float) -> list[dict[str, Any]]:
    """One row per size: medians in seconds of ``repeat`` puts and of as many copies. Collective over two ranks."""
    rank = dist.get_rank()
    lane = Shm(Agreement.of_world(timeout_s), [0, 1], rank, [1 - rank], timeout_s)
    lane.reserve(max(sizes))
    rows = []
    for size in sizes:
        source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        puts, copies = [], []
        for number in range(repeat + 3):
            window = lane.begin()
            dist.barrier()
            if rank == 0:
                started = time.perf_counter()
                lane.exchange(0, [Parcel((source,), source.dtype, 1, 0)], [])
                put = time.perf_counter()
                target.copy_(source)
                copied = time.perf_counter()
            dist.barrier()
            if rank == 0:
                if number >= 3:
                    puts.append(put - started)
                    copies.append(copied - put)
            else:
                lane.exchange(0, [], [Parcel((window,), source.dtype, 0, 0)]).wait()
                assert bool(window[:size].all()), "the chunk is not there"
        if rank == 0:
            put_s, copy_s = statistics.median(puts), statistics.median(copies)
            rows.append({"bytes": size, "put_s": put_s, "copy_s": copy_s, "ratio": put_s / copy_s})
    lane.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.puts", description=__doc__)
    parser.add_argument("--repeat", type=int, default=101, help="puts of each size. Default: 101")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        raise SystemExit(f"two ranks are needed, got {dist.get_world_size()}: torchrun --nproc-per-node 2 -m ...")
    rows = measure(SIZES, options.repeat, timeout_s=60.0)
    if rows:
        table = Table("bytes", "put and flag, us", "copy, us", "ratio", title="shm: rank 0 to rank 1")
        for row in rows:
            table.add_row(
                f"{row['bytes']:,}", f"{row['put_s'] * 1e6:.1f}", f"{row['copy_s'] * 1e6:.1f}", f"{row['ratio']:.2f}x"
            )
        Console().print(table)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
