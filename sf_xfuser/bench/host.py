"""Measures the host time of one attention call, and counts its launches: ``python -m sf_xfuser.bench.host``.

One rank of each layout makes whole calls of ``torus_attention``, over one-sided transfers to GPUs that it maps. Kernels
and driver calls are replaced by functions that count and return at once, so no GPU is needed. What remains is the host
time of this package: the checks of a call, its program, and one Python call for each launch and event. In the row
``nccl_put``, chunks for other machines go to NCCL's one-sided operations, replaced in the same way.

``launches`` are attention kernels, merges, copies, flags and waits. A batch that the driver takes in one call counts
once, and so does a group of NCCL. Events do not count. ``puts`` are those of all groups.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from sf_xfuser.bench.document import new_document
from sf_xfuser.bench.loopback import OneRank, StreamLoopback
from sf_xfuser.bench.outputs import Outputs
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.torus import run
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Tokens
from sf_xfuser.transport.gpu import device, driver, memory
from sf_xfuser.transport.gpu.nccl_put import NcclPut

UNSTAGED, NCCL_PUT = "unstaged", "nccl_put"
LAYOUTS = ("T4U2R4", "T4U8R1", "T4U1R1", "T8U1R8", UNSTAGED, NCCL_PUT)
"""Torus, Ulysses and inside-ring degrees. ``unstaged``: T4U2R4, with one attention call after all inputs are here.
``nccl_put``: T4U2R4, with NCCL between machines."""

_LAUNCHING = re.compile(r"cu(Memcpy|Stream(BatchMemOp|Write|Wait)Value|StreamBatchMemOp|StreamWrite)")
_HEADS, _HEAD_SIZE, _TOKENS = 3, 64, 16  # per head group; of a rank. They do not change the host time
_WARMUP = 20  # calls, which record the programs of both halves of the window


class _Library:
    """Replaces the CUDA driver. Every function returns 0, success."""

    def __init__(self, launches: Counter[str]) -> None:
        self._launches = launches

    def __getattr__(self, name: str) -> Callable[..., int]:
        launches, counts = self._launches, _LAUNCHING.match(name) is not None

        def function(*arguments: object) -> int:
            if counts:
                launches[name] += 1
            return 0

        setattr(self, name, function)
        return function


class _Torch:
    """PyTorch for the modules of GPU transports, with a ``torch.cuda`` that has nothing to do."""

    cuda = SimpleNamespace(
        current_device=lambda: 0,
        empty_cache=lambda: None,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: False,
        mem_get_info=lambda: (1 << 40, 1 << 40),
        set_device=lambda index: None,
        synchronize=lambda: None,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def no_gpu() -> Iterator[Counter[str]]:
    """A context in which kernels and driver calls do nothing. Yields the number of launches by name."""
    launches: Counter[str] = Counter()

    def kernel(name: str) -> Callable[..., None]:
        def launch(*arguments: object) -> None:
            launches[name] += 1

        return launch

    copy = kernel("copies")
    copies = SimpleNamespace(run=copy)
    with ExitStack() as patches:
        for module, names in (
            (run, {"Copies": lambda *given: copies, "merge_partial": kernel("merge")}),
            (run, {"fix_fully_masked_lse": lambda q, k, out, lse: lse}),
            (device, {"check_flags": kernel("check_flags"), "poison_result": kernel("poison_result")}),
            (device, {"torch": _Torch(), "environment": lambda names: dict.fromkeys(names, "32")}),
            (memory, {"torch": _Torch()}),
            (ctypes, {"CDLL": lambda name: _Library(launches)}),
            (driver.Driver, {"current_stream": lambda self, device: 0}),
        ):
            patches.enter_context(mock.patch.multiple(module, **names))
        yield launches


class NcclLoopback(StreamLoopback, NcclPut):
    """As ``StreamLoopback``, for rank 0. NCCL reaches other machines: its functions count and return at once."""

    def __init__(self, layout: Layout, device: torch.device, launches: Counter[str]) -> None:
        def put_signal(*arguments: object) -> None:
            launches["puts"] += 1

        def group_end() -> None:
            launches["groups"] += 1

        self._nccl = SimpleNamespace(group_start=lambda: None, put_signal=put_signal, group_end=group_end)
        self._communicators, self._lock, self._machine_of = [None], threading.Lock(), layout.machine
        super().__init__(layout.world_size, 0, range(1, layout.world_size), device)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        block, self._windows = super()._allocate(nbytes), [None]
        self._address = {peer: address for peer, address in self._address.items() if self._machine_of(peer) == 0}
        return block


def parse_layout(name: str) -> tuple[Layout, Granularity]:
    """The layout and granularity of a name such as ``T4U2R4`` or ``unstaged``. Raises ValueError."""
    found = re.fullmatch(r"T(\d+)U(\d+)R(\d+)", "T4U2R4" if name in (UNSTAGED, NCCL_PUT) else name)
    if found is None or min(degrees := [int(digits) for digits in found.groups()]) < 1:
        raise ValueError(f"a layout is TxUyRz, for instance T4U2R4, {UNSTAGED} or {NCCL_PUT}; got {name!r}")
    layout = Layout(torus=degrees[0], ulysses=degrees[1], ring_across=1, ring_inside=degrees[2])
    return layout, "unstaged" if name == UNSTAGED else "slab"


def open_link(name: str, layout: Layout, launches: Counter[str]) -> StreamLoopback:
    """The transport of rank 0 for a layout of this name."""
    cpu, ranks = torch.device("cpu"), layout.world_size
    return NcclLoopback(layout, cpu, launches) if name == NCCL_PUT else StreamLoopback(ranks, 0, range(1, ranks), cpu)


def measure(
    name: str, calls: int, granularity: Granularity | None = None, *, print_program: bool = False
) -> dict[str, Any]:
    """The row of a layout: ``host_us`` (median of ``calls``), ``launches`` and ``puts`` of one call. Local."""
    layout, usual = parse_layout(name)
    granularity = granularity or usual
    outputs: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
    with no_gpu() as launches, torch.no_grad():

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            launches["attend"] += 1
            if q.shape not in outputs:
                outputs[q.shape] = torch.empty_like(q), torch.empty(q.shape[:3])
            return outputs[q.shape]

        ranks = layout.world_size
        x = torch.zeros(1, _HEADS * layout.ulysses_degree, ranks * _TOKENS, _HEAD_SIZE, dtype=torch.bfloat16)
        link = open_link(name, layout, launches)
        rank = OneRank(layout, x, x, x, link, granularity)
        tokens = Tokens(rank.counts, rank.counts)
        query, key, value = rank.own

        def call() -> None:
            torus_attention(query, key, value, mesh=rank.mesh, attention=attend, tokens=tokens, granularity=granularity)

        for _ in range(_WARMUP):
            call()
        launches.clear()
        call()
        puts, counted = launches.pop("puts", 0), Counter(launches)
        seconds = []
        for _ in range(calls):
            started_s = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started_s)
        if print_program:
            (program, *_) = (bound.program for bound in rank.call_shape.programs.values())
            print(f"{name}, {granularity}, rank 0, {_TOKENS} tokens per rank\n{program}\n")
        rank.mesh.close()
    return {
        "layout": name,
        "granularity": granularity,
        "host_us": round(1e6 * statistics.median(seconds), 1),
        "launches": counted.total(),
        "puts": puts,
        "launches_by_kind": dict(sorted(counted.items())),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.host", description=__doc__)
    parser.add_argument(
        "--layout", action="append", metavar="TxUyRz", help=f"may be repeated. Default: {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--granularity", choices=get_args(Granularity), help="of the schedule. Default: slab")
    parser.add_argument("--calls", type=int, default=300, help="calls of which the median is taken. Default: 300")
    parser.add_argument("--programs", action="store_true", help="print the operations of each call")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file; -: to standard output")
    options = parser.parse_args(argv)
    try:
        for name in options.layout or ():
            parse_layout(name)
        if options.calls < 1:
            raise ValueError(f"--calls must be at least 1, got {options.calls}")
        if options.programs and options.json == "-":
            raise ValueError("--programs and --json - both print to standard output: use one of them")
        outputs = Outputs(parser.prog, options)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    document = new_document("python -m sf_xfuser.bench.host", accelerator="none: kernels and driver calls do nothing")
    document["rows"] = [
        measure(name, options.calls, options.granularity, print_program=options.programs)
        for name in options.layout or LAYOUTS
    ]
    outputs.json(document)
    if not outputs.on_stdout:
        table = Table("layout", "granularity", "host us", "launches")
        for row in document["rows"]:
            table.add_row(row["layout"], row["granularity"], f"{row['host_us']:.0f}", str(row["launches"]))
        Console(width=None if sys.stdout.isatty() else 100).print(table)
    return int(outputs.failed)


if __name__ == "__main__":
    sys.exit(main())
