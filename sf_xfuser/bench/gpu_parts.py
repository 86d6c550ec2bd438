"""The parts of ``bench.gpu``, each run by ``python -m sf_xfuser.bench.gpu_parts PART``, which prints its rows.

A result is checked against float64 before it is timed. Variants alternate, with caches flushed between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch

from sf_xfuser.bench import gpu_ranks
from sf_xfuser.bench.document import installed_version, print_row
from sf_xfuser.bench.gpu import GOALS
from sf_xfuser.bench.loopback import Loopback, OneRank, StreamLoopback
from sf_xfuser.bench.timing import (
    REAL,
    SMOKE,
    Bench,
    Variants,
    error_ratio,
    fastest,
    libraries,
    poisoned,
    require_exact,
    summary,
)
from sf_xfuser.config import set_defaults
from sf_xfuser.kernels import (
    Attention,
    CompressedLayout,
    attend_chunks_,
    attend_chunks_into,
    merge_,
    merge_into,
    pack_compressed,
    sdpa_attend,
    unpack_compressed,
)
from sf_xfuser.kernels.fused import DTYPES, HEAD_SIZES
from sf_xfuser.kernels.packing import MAX_STORED, Format
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.graphs import EAGER_CALLS
from sf_xfuser.transport.gpu.driver import Driver, WordBatch

KERNELS: dict[str, Attention] = {"library": sdpa_attend, "fused": "fused"}
GRANULARITIES = get_args(Granularity)
_STAGED: Granularity = "slab"
LAYOUTS = {"T4U2R4": (4, 2, 1, 4), "T4U8R1": (4, 8, 1, 1), "T4U1R1": (4, 1, 1, 1), "T8U1R8": (8, 1, 1, 8)}
"""Torus, Ulysses, ring across and inside."""


def machine(bench: Bench) -> None:
    """The GPU, and what is installed."""
    row: dict[str, Any] = {"name": "facts", "gpu": None, "torch": torch.__version__, "cuda": torch.version.cuda}
    row |= {name: installed_version(name) for name in ("triton", "nccl4py", "nvshmem4py-cu13", "nvshmem4py-cu12")}
    if bench.on_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            row["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            row["driver"] = None
        row |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    row |= {name: reason() or "available" for name, reason in gpu_ranks.UNAVAILABLE.items()}
    print_row(row)


# -- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(bench: Bench) -> None:
    """Merges against float64, with SDPA's error as the measure; copies bitwise; quantization against its step."""
    kinds = [(D, torch.bfloat16) for D in (128, *(D for D in HEAD_SIZES if D != 128))]
    for D, dtype in bench.cases([*kinds, (128, torch.float16), (128, torch.float32)]):
        what = f"D={D} {_name(dtype)}"
        q, k, v = (bench.tokens(1, 4, bench.sizes.accuracy, D, dtype=dtype) for _ in range(3))
        with bench.attempt(f"merge, {what}"):
            ratio = error_ratio(_merged(q, k, v), sdpa_attend(q, k, v)[0], q, k, v)
            bench.row("merge of 4 pieces", what, ratio, "x SDPA's error", "error")
        with bench.attempt(f"packing, {what}"):
            _check_packing(bench, what, k)
        with bench.attempt(f"copies, {what}"):
            kv = [x[:, ::2].permute(2, 0, 1, 3) for x in (k, v)]
            work, chunk = _copies(kv)
            work()
            bench.row("copies", what, int((chunk != torch.stack(kv, 1)).sum()), "elements", "exact")
    with bench.attempt("flags"):
        _check_flags(bench)


def _merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention to 4 chunks of keys, each merged into an accumulator, the last into the result."""
    parts = [sdpa_attend(q, *chunk) for chunk in zip(k.chunk(4, 2), v.chunk(4, 2), strict=True)]
    out, lse = parts[0][0].float().contiguous(), parts[0][1].contiguous()
    for part in parts[1:-1]:
        merge_(out, lse, *part)
    result = torch.full_like(q, float("nan"))
    merge_into(result, out, lse, *parts[-1])
    return result


def _check_packing(bench: Bench, what: str, k: torch.Tensor) -> None:
    part = k[:, ::2].permute(2, 0, 1, 3)  # strided [S, B, H, D]
    back = torch.full_like(part, float("nan"))
    for format in ("fp8", "int8"):
        layout = CompressedLayout(shape=(*part.shape,), dtype=k.dtype, formats=(format,))
        packed = torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=bench.device)
        pack_compressed((part,), packed, (format,))
        unpack_compressed(packed, (back,), (format,))
        exact = part.double()
        scale = exact.abs().amax(-1, keepdim=True) / MAX_STORED[format]
        # fp8 has 3 bits of mantissa, and 2**-9 is its smallest number.
        half_step = scale / 2 if format == "int8" else (exact.abs() / 16).maximum(scale * 2.0**-10)
        bound = half_step * (1 + 2.0**-8) + exact.abs() * torch.finfo(k.dtype).eps
        bench.row(f"{format} round trip", what, float(((back - exact).abs() / bound).max()), "x the step", "rounding")


def _copies(kv: Sequence[torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """One launch that copies strided K and V [S, B, H, D] to the chunk [S, 2, B, H, D], and the chunk."""
    from sf_xfuser.kernels.copies import Copies, Copy, Side

    S, B, H, D = kv[0].shape
    chunk = torch.full((S, 2, B, H, D), float("nan"), dtype=kv[0].dtype, device=kv[0].device)
    targets = [Side(2, i * B * H * D, (2 * B * H * D, H * D, D)) for i in range(2)]
    copies = [Copy(Side(i, 0, x.stride()[:3]), targets[i], (S, B, H, D)) for i, x in enumerate(kv)]
    return partial(Copies(copies, chunk.dtype, chunk.device).run, (*kv, chunk)), chunk


def _check_flags(bench: Bench) -> None:
    """Calls whose flags are right, and one with a wrong flag: only that one poisons its result."""
    from sf_xfuser.kernels.flags import check_flags, poison_result

    def tensor(value: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype, device=bench.device)

    for wrong in (None, 6, 0):
        flags, index = torch.full((1000,), 7, device=bench.device), torch.arange(0, 1000, 3, device=bench.device)
        expected_flags = flags.clone()
        expected_flags[index] = 0
        if wrong is not None:
            flags[999] = wrong
        poison, ended, result = tensor(1.0, torch.float32), tensor(3), torch.ones(5, 2000, device=bench.device)
        check_flags(flags, index, tensor(7), poison, ended)
        poison_result(result, poison)
        differing = int((flags != expected_flags).sum()) + int(ended != 4)
        differing += int((result != 1).sum() if wrong is None else (~result.isnan()).sum())
        what = "right flags" if wrong is None else f"flag {wrong} instead of 7"
        bench.row("flags and poison", what, differing, "elements", "exact")


def accuracy_fused(bench: Bench) -> None:
    """Lists of Q and KV chunks, some empty, with grouped heads, in two launches."""
    kinds = [(128, torch.bfloat16), *((D, dtype) for dtype in DTYPES for D in HEAD_SIZES)]
    for D, dtype in bench.cases(dict.fromkeys(kinds)):
        what = f"D={D} {_name(dtype)}"
        S = bench.sizes.accuracy
        with bench.attempt(f"fused, {what}"):
            q = [bench.tokens(2, 4, n, D, dtype=dtype) for n in (S, 0, 1)]
            k, v = ([bench.tokens(2, 2, n, D, dtype=dtype) for n in (S - 3, 0, 2 * S)] for _ in range(2))
            out = [torch.full(x.shape, float("nan"), device=bench.device) for x in q]
            lse = [torch.full(x.shape[:3], float("-inf"), device=bench.device) for x in q]
            results = [torch.full_like(x, float("nan")) for x in q]
            attend_chunks_(q, k[:1], v[:1], out, lse)
            attend_chunks_into(results, q, k[1:], v[1:], out, lse)
            all_q, got = torch.cat(q, 2), torch.cat(results, 2)
            all_k, all_v = (torch.cat(x, 2).repeat_interleave(2, 1) for x in (k, v))
            ratio = error_ratio(got, sdpa_attend(all_q, all_k, all_v)[0], all_q, all_k, all_v)
            bench.row("fused", what, ratio, "x SDPA's error", "error")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- host time and launches ------------------------------------------------------------------------------------------


def host(bench: Bench) -> None:
    """The rows of ``bench.host``: host time and launches of a call, with kernels and driver calls that do nothing."""
    command = [sys.executable, "-m", "sf_xfuser.bench.host", "--json", "-"]
    for row in json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)["rows"]:
        layout, launches = row.pop("layout"), row.pop("launches")
        bench.row(f"{layout}, host", "", row.pop("host_us"), "us", _goal(f"host {layout}"), **row)
        bench.row(f"{layout}, launches", "", launches, "launches", _goal(f"launches {layout}"), **row)


def _goal(name: str) -> str | None:
    return name if name in GOALS else None


def launches(bench: Bench) -> None:
    """Host time and launches of one rank's call over the transport between GPUs, without peers."""
    for layout_name in bench.cases(LAYOUTS):
        for granularity in GRANULARITIES if layout_name == "T4U2R4" else (_STAGED,):
            name = f"{layout_name}, {granularity}"
            with bench.attempt(name):
                rank, work, _ = _one_rank(bench, LAYOUTS[layout_name], granularity, bench.sizes.per_rank)
                us = bench.host_us({name: work})[name]
                has_goal = bench.on_gpu and granularity == _STAGED
                goal = _goal(f"enqueue {layout_name}") if has_goal else None
                bench.row(f"{name}, host", "", statistics.median(us), "us", goal, **summary(us))
                if bench.on_gpu:
                    kernels, copies = bench.launches(work)
                    bench.row(f"{name}, on the GPU", "", kernels, "kernels", copies=copies)
                else:
                    bench.skip(f"{name}, on the GPU", "no GPU")
                rank.mesh.close()
    name = "T4U2R4, slab, CUDA graph"
    if not bench.on_gpu:
        return bench.skip(f"{name}, host", "no GPU")
    with bench.attempt(name):
        rank, work, _ = _one_rank(bench, LAYOUTS["T4U2R4"], "slab", bench.sizes.per_rank, graphs=True)
        for _ in range(2 * EAGER_CALLS + 2):  # both halves of the window
            work()
        us = bench.host_us({name: work})[name]
        bench.row(f"{name}, host", "", statistics.median(us), "us", **summary(us))
        kernels, copies = bench.launches(work)
        bench.row(f"{name}, on the GPU", "", kernels, "kernels", copies=copies, captured=rank.mesh.graphs.captured)
        rank.mesh.close()


def _one_rank(
    bench: Bench,
    degrees: Sequence[int],
    granularity: Granularity,
    tokens: int,
    D: int = 128,
    attention: Attention = sdpa_attend,
    graphs: bool = False,
) -> tuple[OneRank, Callable[[], torch.Tensor], float]:
    """Rank 0 of a group with ``tokens`` each, its call, and the error of that call."""
    layout = Layout(**dict(zip(("torus", "ulysses", "ring_across", "ring_inside"), degrees, strict=True)))
    heads = max(bench.sizes.heads, layout.torus * layout.ulysses)
    q, k, v = (bench.tokens(1, heads, tokens * layout.world_size, D, dtype=torch.bfloat16) for _ in range(3))
    peers = range(1, layout.world_size)
    link = StreamLoopback(layout.world_size, 0, peers, bench.device) if bench.on_gpu else Loopback(bench.device)
    rank = OneRank(layout, q, k, v, link, granularity, graphs)
    own_rows = sdpa_attend(rank.own[0], k, v)[0]
    rank.fill(own_rows)
    work = partial(call, rank, attention, granularity)
    with poisoned():
        error = require_exact("the call", work(), own_rows, rank.own[0], k, v)
    return rank, work, error


def call(rank: OneRank, attention: Attention, granularity: Granularity) -> torch.Tensor:
    tokens = rank.counts, rank.counts
    return torus_attention(*rank.own, mesh=rank.mesh, attention=attention, tokens=tokens, granularity=granularity)


# -- pieces ----------------------------------------------------------------------------------------------------------


def chunking(bench: Bench) -> None:
    """The compute of one of 32 ranks (T=4 U=2 R=4, its inputs already here), in the pieces of each granularity, against
    one attention call on the same queries and keys."""
    D, H = bench.sizes.head_sizes[0], bench.sizes.heads
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=4)
    for model in bench.cases(bench.sizes.models):
        L = bench.sizes.models[model]
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        heads = slice(0, H // layout.ulysses_degree)
        share = q[:, heads, : L // layout.ring_degree], k[:, heads], v[:, heads]
        library_calls = libraries(*share)
        variants: Variants = dict(library_calls)
        own_rows: torch.Tensor | None = None
        for granularity in GRANULARITIES:
            for kernel, attention in KERNELS.items():
                with bench.attempt(f"{model}, {granularity}, {kernel}"):
                    rank = OneRank(layout, q, k, v, Loopback(bench.device), granularity)
                    own_rows = sdpa_attend(rank.own[0], k, v)[0] if own_rows is None else own_rows
                    rank.fill(own_rows)
                    work = partial(call, rank, attention, granularity)
                    with poisoned():
                        rows, outs = zip(*rank.outputs(work()), strict=True)
                        got, queries = torch.cat(outs, 2), torch.cat([q[:, heads, each] for each in rows], 2)
                    library_out = sdpa_attend(queries, *share[1:])[0]
                    require_exact("the call", got, library_out, queries, *share[1:])
                    variants[f"{granularity}, {kernel}"] = work
        us = bench.us(variants)
        library, library_us = fastest(us, library_calls)
        flops = 4 * share[0].numel() * L
        for variant in [name for name in variants if name not in library_calls]:
            granularity, kernel = variant.split(", ")
            median_us = statistics.median(us[variant])
            goal = "chunking" if kernel == "library" and granularity != "block" and bench.on_gpu else None
            bench.row(
                variant, model, median_us / library_us, "x one call", goal, library=library, library_us=library_us,
                tflops=flops / median_us / 1e6, **summary(us[variant]),
            )  # fmt: skip


def fused(bench: Bench) -> None:
    """The fused kernel against the fastest attention library."""
    L, H = bench.sizes.fused, bench.sizes.heads
    for D in bench.cases(bench.sizes.head_sizes):
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        library_calls = libraries(q, k, v)
        library_out = next(iter(library_calls.values()))()[0]
        variants: Variants = dict(library_calls)
        for parts in (1, 4):
            lists = [list(x.chunk(parts, 2)) for x in (q, k, v)]
            result = torch.full_like(q, float("nan"))
            out = [torch.full(x.shape, float("nan"), device=bench.device) for x in lists[0]]
            lse = [torch.full(x.shape[:3], float("-inf"), device=bench.device) for x in lists[0]]
            name = f"fused, {parts} x {parts} chunks"
            with bench.attempt(f"{name}, D={D}"):
                work = partial(attend_chunks_into, list(result.chunk(parts, 2)), *lists, out, lse)
                work()
                require_exact(name, result, library_out, q, k, v)
                variants[name] = work
        us = bench.us(variants)
        library, library_us = fastest(us, library_calls)
        for name in variants:
            median_us = statistics.median(us[name])
            goal = "fused" if name not in library_calls and D == 128 else None
            bench.row(
                name, f"L={L} H={H} D={D}", median_us / library_us, "x the library", goal, library=library,
                library_us=library_us, tflops=4 * H * L * L * D / median_us / 1e6, **summary(us[name]),
            )  # fmt: skip


def bandwidth(bench: Bench) -> None:
    """Merges and packings, each against a copy that reads and writes as many bytes."""
    L, H = bench.sizes.bandwidth, bench.sizes.heads
    for D in bench.cases(bench.sizes.head_sizes):
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        for name, (work, nbytes) in (_merges(bench, q, k, v) | _packings(bench, q, k, v)).items():
            with bench.attempt(f"{name}, D={D}"):
                source = torch.randint(255, (nbytes // 2,), dtype=torch.uint8, device=bench.device)
                us = bench.us({name: work, "copy": partial(torch.empty_like(source).copy_, source)})
                median_us, copy_us = (statistics.median(us[key]) for key in (name, "copy"))
                goal = "bandwidth" if bench.on_gpu else None
                bench.row(
                    name, f"S={L} H={H} D={D}", median_us / copy_us, "x a copy", goal, copy_us=copy_us,
                    gbps=nbytes / median_us / 1e3, **summary(us[name]),
                )  # fmt: skip


def _merges(
    bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (function, bytes read and written). The accumulator has the layout of a real call."""
    new_out, new_lse = next(iter(libraries(q, k, v).values()))()
    B, H, S, D = new_out.shape
    out = torch.randn(S, B, H, D, device=bench.device).permute(1, 2, 0, 3)
    lse = new_lse + torch.randn_like(new_lse)
    result = torch.empty((B, S, H, D), dtype=new_out.dtype, device=bench.device).transpose(1, 2)
    rows, elements = lse.numel(), out.numel()
    return {
        "merge": (partial(merge_, out, lse, new_out, new_lse), 10 * elements + 12 * rows),
        "merge, the last": (partial(merge_into, result, out, lse, new_out, new_lse), 8 * elements + 8 * rows),
    }


def _packings(
    bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[Callable[[], object], int]]:
    """Like ``_merges``, for copies, compression and its reverse, of half of the heads."""
    half = slice(0, q.shape[1] // 2)
    kv = [x[:, half].permute(2, 0, 1, 3) for x in (k, v)]
    S, B, H, D = kv[0].shape
    copies, chunk = _copies(kv)
    calls: dict[str, tuple[Callable[[], object], int]] = {"copies of K, V": (copies, 2 * chunk.nbytes)}
    own = q[:, half].permute(2, 0, 1, 3)
    formats: tuple[Format, ...] = ("fp8", "int8")
    for format in formats:
        layout = CompressedLayout(shape=(S, B, H, D), dtype=q.dtype, formats=(format,))
        packed = torch.empty((layout.nbytes,), dtype=torch.uint8, device=bench.device)
        nbytes = own.nbytes + layout.nbytes
        calls[f"pack Q to {format}"] = (partial(pack_compressed, (own,), packed, (format,)), nbytes)
        calls[f"unpack Q from {format}"] = (
            partial(unpack_compressed, packed, (torch.empty_like(own),), (format,)), nbytes,
        )  # fmt: skip
    return calls


def flags(bench: Bench) -> None:
    """A copy and a flag on one stream, and another stream that waits for the flag: stream memory operations alone."""
    if not bench.on_gpu:
        return bench.skip("flags", "no GPU")
    driver, word = Driver(), torch.zeros(1, dtype=torch.int64, device=bench.device)
    sender, receiver = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    write, wait = WordBatch.writes([word.data_ptr()]), WordBatch.waits([word.data_ptr()])
    write.values.fill(1)
    for nbytes in bench.cases([0, *(1 << n for n in range(12, 31, 3))]):
        source = torch.ones(max(1, nbytes), dtype=torch.uint8, device=bench.device)
        target, taken = torch.zeros_like(source), []
        for _ in range(bench.warmup + bench.repeat):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            word.zero_()
            torch.cuda.synchronize()
            start.record(sender)
            if nbytes:
                driver.copy(target.data_ptr(), source.data_ptr(), nbytes, sender.cuda_stream)
            driver.run(write, sender.cuda_stream)
            driver.run(wait, receiver.cuda_stream)
            end.record(receiver)
            end.synchronize()
            taken.append(1e3 * start.elapsed_time(end))
        us = taken[bench.warmup :]
        gbps = nbytes / statistics.median(us) / 1e3
        bench.row("copy, flag and wait", f"{nbytes} bytes", statistics.median(us), "us", gbps=gbps, **summary(us))


# -- the command -----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], None]] = {
    part.__name__.replace("_", "-"): part
    for part in (machine, accuracy, host, launches, chunking, accuracy_fused, bandwidth, fused, flags)
}
for _transport in gpu_ranks.UNAVAILABLE:
    PARTS[f"{_transport}-2"] = partial(gpu_ranks.attention, transport=_transport, ranks=2)
    PARTS[f"{_transport}-4"] = partial(gpu_ranks.attention, transport=_transport, ranks=4)
    PARTS[f"{_transport}-graph"] = partial(gpu_ranks.graph, transport=_transport)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=60.0, help="leave out the cases after this time. Default: 60")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args(argv)
    set_defaults(gpu_ranks.ENVIRONMENT)  # before CUDA starts
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    repeat, warmup = (2, 1) if options.smoke else (21, 5)
    with torch.no_grad():
        PARTS[options.part](Bench(device, SMOKE if options.smoke else REAL, repeat, warmup, options.seconds))


if __name__ == "__main__":
    main()
