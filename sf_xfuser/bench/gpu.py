"""Benchmarks the device kernels on this GPU: ``python -m sf_xfuser.bench.gpu``.

(a) ``chunking``: the compute of one rank in a call of Torus Attention over 4 machines, against one call of the fastest
attention library on the same queries and keys. (b) ``fused``: the fused kernel against that library. (c) ``bandwidth``:
merge and packing against a copy on the device. (d) ``enqueue``: the host's time for one call of 4 machines x 8 ranks.
(e) ``pieces``: the fused kernel on one piece, against each library and the merge kernel. Every row has the attention
library's time from the same run. Variants alternate on new random inputs, with caches flushed between them; each result
is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sf_xfuser.bench.document import new_document
from sf_xfuser.bench.loopback import Loopback, OneRank, StreamLoopback
from sf_xfuser.bench.timing import REAL, SMOKE, BadResult, Bench, Variants, fastest, libraries, poisoned, require_exact
from sf_xfuser.kernels import (
    Attention,
    attend_chunks_,
    attend_chunks_into,
    merge_,
    merge_into,
    pack,
    pack_compressed,
    sdpa_attend,
    unpack,
    unpack_compressed,
)
from sf_xfuser.kernels.packing import CompressedLayout, Format
from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus.attention import torus_attention

KERNELS: dict[str, Attention] = {"library": sdpa_attend, "fused": "fused"}

GOALS = {"chunking": 1.03, "fused": 1 / 0.75, "bandwidth": 1 / 0.85}
"""Largest allowed ratio of a row's time to its reference."""
ENQUEUE_US = 150.0


# -- (a) -------------------------------------------------------------------------------------------------------------


def chunking(bench: Bench) -> None:
    """One rank with T=4: queries and keys of all tokens, for its head group."""
    for D in bench.sizes.head_sizes:
        L, H = bench.sizes.chunking, bench.sizes.heads
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        layout = Layout(torus=4, ulysses=1, ring_across=1, ring_inside=1)
        rank = OneRank(layout, q, k, v, Loopback(bench.device))
        own_rows = sdpa_attend(rank.own[0], k, v)[0]
        rank.fill(own_rows)
        share = q[:, rank.heads], k[:, rank.heads], v[:, rank.heads]
        library_calls = libraries(*share)
        library, _ = sdpa_attend(*share)
        variants: Variants = dict(library_calls)
        errors = {}
        for kernel, attention in KERNELS.items():
            variants[f"torus, {kernel}"] = work = partial(call, rank, attention)
            got = torch.full_like(library, float("nan"))
            with poisoned():
                for rows, out in rank.outputs(work()):
                    got[:, :, rows] = out
            errors[kernel] = require_exact(f"chunking, {kernel}, D={D}", got, library, *share)
        us = bench.us(variants)
        name, library_us = fastest(us, list(library_calls))
        flops = 4 * share[0].shape[1] * L * L * D
        for variant, taken in us.items():
            bench.add(
                "chunking", variant, taken, what=f"L={L} H={H} D={D} T=4", library=name, library_us=library_us,
                ratio=statistics.median(taken) / library_us,
                goal=GOALS["chunking"] if variant == "torus, library" else None,
                rate_tflops=flops / statistics.median(taken) / 1e6,
                error=errors.get(variant.removeprefix("torus, ")),
            )  # fmt: skip


def call(rank: OneRank, attention: Attention) -> torch.Tensor:
    return torus_attention(*rank.own, mesh=rank.mesh, attention=attention, tokens=(rank.counts, rank.counts))


# -- (b) -------------------------------------------------------------------------------------------------------------


def fused(bench: Bench) -> None:
    L, H = bench.sizes.fused, bench.sizes.heads
    for D in bench.sizes.head_sizes:
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        library_calls = libraries(q, k, v)
        library, _ = sdpa_attend(q, k, v)
        variants: Variants = dict(library_calls)
        errors = {}
        for parts in (1, 4):
            lists = [list(x.chunk(parts, 2)) for x in (q, k, v)]
            result = torch.full_like(q, float("nan"))
            out = [torch.full(x.shape, float("nan"), device=bench.device) for x in lists[0]]
            lse = [torch.full(x.shape[:3], float("-inf"), device=bench.device) for x in lists[0]]
            variant = f"fused, {parts} x {parts} chunks"
            variants[variant] = work = partial(attend_chunks_into, list(result.chunk(parts, 2)), *lists, out, lse)
            work()
            errors[variant] = require_exact(f"{variant}, D={D}", result, library, q, k, v)
        us = bench.us(variants)
        name, library_us = fastest(us, list(library_calls))
        for variant, taken in us.items():
            median_us = statistics.median(taken)
            bench.add(
                "fused", variant, taken, what=f"L={L} H={H} D={D}", library=name, library_us=library_us,
                ratio=median_us / library_us, goal=GOALS["fused"] if variant in errors and D == 128 else None,
                rate_tflops=4 * H * L * L * D / median_us / 1e6, error=errors.get(variant),
            )  # fmt: skip


# -- (c) -------------------------------------------------------------------------------------------------------------


def bandwidth(bench: Bench) -> None:
    """Merges and packings, each against a copy that reads and writes as many bytes."""
    L, H = bench.sizes.bandwidth, bench.sizes.heads
    for D in bench.sizes.head_sizes:
        q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
        library_calls = libraries(q, k, v)
        new_out, new_lse = sdpa_attend(q, k, v)
        calls = _merges(bench, new_out, new_lse) | _packings(bench, q, k, v)
        variants: Variants = {name: work for name, (work, _) in calls.items()}
        for name, (_, nbytes) in calls.items():
            source = torch.randint(255, (nbytes // 2,), dtype=torch.uint8, device=bench.device)
            variants[f"copy for {name}"] = partial(torch.empty_like(source).copy_, source)
        us = bench.us(variants | library_calls)
        library, library_us = fastest(us, list(library_calls))
        for name, (_, nbytes) in calls.items():
            copy_us, median_us = (statistics.median(us[key]) for key in (f"copy for {name}", name))
            bench.add(
                "bandwidth", name, us[name], what=f"S={L} H={H} D={D}", library=library, library_us=library_us,
                copy_us=copy_us, ratio=median_us / copy_us, goal=GOALS["bandwidth"],
                rate_gbps=nbytes / median_us / 1e3,
            )  # fmt: skip


def _merges(bench: Bench, new_out: torch.Tensor, new_lse: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (function, bytes read and written). The accumulator has the layout of a real call."""
    B, H, S, D = new_out.shape
    out = torch.randn(S, B, H, D, device=bench.device).permute(1, 2, 0, 3)
    lse = new_lse + torch.randn_like(new_lse)
    result = torch.full((B, S, H, D), float("nan"), dtype=new_out.dtype, device=bench.device).transpose(1, 2)
    weight = torch.sigmoid(new_lse.double() - lse.double()).unsqueeze(-1)
    expected = out + weight * (new_out.double() - out)
    merged, merged_lse = out.clone(), lse.clone()
    merge_(merged, merged_lse, new_out, new_lse)
    merge_into(result, out.clone(), lse.clone(), new_out, new_lse)
    _require_close("merge", merged, expected, 1e-5)
    _require_close("merge, the last", result, expected, torch.finfo(result.dtype).eps)
    _require_close("merge, log-sum-exp", merged_lse, torch.logaddexp(lse.double(), new_lse.double()), 1e-5)
    rows, elements = lse.numel(), out.numel()
    return {
        "merge": (partial(merge_, merged, merged_lse, new_out, new_lse), 10 * elements + 12 * rows),
        "merge, the last": (partial(merge_into, result, out, lse, new_out, new_lse), 8 * elements + 8 * rows),
    }


def _packings(
    bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[Callable[[], object], int]]:
    """Like ``_merges``, for packing and unpacking half of the heads."""
    half = slice(0, q.shape[1] // 2)
    kv = [x[:, half].permute(2, 0, 1, 3) for x in (k, v)]
    dest = [torch.full_like(x, float("nan")) for x in kv]
    S, B, H, D = kv[0].shape
    chunk = torch.full((S, 2, B, H, D), float("nan"), dtype=k.dtype, device=bench.device)
    pack(kv, chunk)
    unpack(chunk, dest)
    for name, got, expected in (("pack", chunk, torch.stack(kv, 1)), ("unpack", torch.stack(dest), torch.stack(kv))):
        if not torch.equal(got, expected):
            raise BadResult(f"{name}: the result differs from the input")
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "pack K, V": (partial(pack, kv, chunk), 2 * chunk.nbytes),
        "unpack K, V": (partial(unpack, chunk, dest), 2 * chunk.nbytes),
    }
    own, returned = q[:, half].permute(2, 0, 1, 3), torch.full_like(kv[0], float("nan"))
    formats: tuple[tuple[Format, float], ...] = (("fp8", 2.0**-3), ("int8", 2.0**-6))
    for format, step in formats:
        layout = CompressedLayout(shape=(S, B, H, D), dtype=q.dtype, formats=(format,))
        packed = torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=bench.device)
        pack_compressed((own,), packed, (format,))
        unpack_compressed(packed, (returned,), (format,))
        _require_close(f"{format} round trip", returned, own.double(), step)
        nbytes = own.nbytes + layout.nbytes
        calls[f"pack Q to {format}"] = (partial(pack_compressed, (own,), packed, (format,)), nbytes)
        calls[f"unpack Q from {format}"] = (partial(unpack_compressed, packed, (returned,), (format,)), nbytes)
    return calls


def _require_close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """``tolerance``: allowed error relative to the largest element."""
    error, largest = float((got.double() - expected).abs().max()), float(expected.abs().max())
    if not error <= tolerance * largest:  # also raises for NaN
        raise BadResult(f"{what}: error {error:.3g} of {largest:.3g}")


# -- (d) -------------------------------------------------------------------------------------------------------------


def enqueue(bench: Bench) -> None:
    """The host's time for one call with T=4, U=2, R=4; on a GPU it includes the transport."""
    L, H = bench.sizes.enqueue, bench.sizes.heads
    D = bench.sizes.head_sizes[0]
    q, k, v = (bench.tokens(1, H, L, D, dtype=torch.bfloat16) for _ in range(3))
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=4)
    peers = range(1, layout.world_size)
    link = StreamLoopback(layout.world_size, 0, peers, bench.device) if bench.on_gpu else Loopback(bench.device)
    rank = OneRank(layout, q, k, v, link)
    own_rows = sdpa_attend(rank.own[0], k, v)[0]
    rank.fill(own_rows)
    library_calls = libraries(rank.own[0], k, v)
    variants: Variants = dict(library_calls)
    errors = {}
    for kernel, attention in KERNELS.items():
        variants[f"torus, {kernel}"] = work = partial(call, rank, attention)
        with poisoned():
            errors[kernel] = require_exact(f"enqueue, {kernel}", work(), own_rows, rank.own[0], k, v)
    us = bench.host_us(variants)
    name, library_us = fastest(us, list(library_calls))
    for kernel in KERNELS:
        taken = us[f"torus, {kernel}"]
        bench.add(
            "enqueue", f"torus, {kernel}", taken, what=f"L={L} H={H} D={D} T=4 U=2 R=4, host", library=name,
            library_us=library_us, ratio=statistics.median(taken) / ENQUEUE_US, goal=1.0, error=errors[kernel],
        )  # fmt: skip
    rank.mesh.close()


# -- (e) -------------------------------------------------------------------------------------------------------------


def pieces(bench: Bench) -> None:
    """Attention and merge of one piece: by each library with the merge kernel, and by the fused kernel."""
    H = bench.sizes.piece_heads
    for dtype in bench.sizes.dtypes:
        for D in bench.sizes.piece_head_sizes:
            for S_q in bench.sizes.pieces:
                for S_kv in bench.sizes.pieces:
                    _piece(bench, dtype, D, H, S_q, S_kv)


def _piece(bench: Bench, dtype: torch.dtype, D: int, H: int, S_q: int, S_kv: int) -> None:
    q, k, v = (bench.tokens(1, H, S, D, dtype=dtype) for S in (S_q, S_kv, S_kv))
    out = torch.full((S_q, 1, H, D), float("nan"), device=bench.device).permute(1, 2, 0, 3)
    lse = torch.full((1, H, S_q), float("-inf"), device=bench.device)
    library_calls = libraries(q, k, v)
    attend_chunks_([q], [k], [v], [out], [lse])
    what = f"{S_q} x {S_kv} tokens H={H} D={D} {str(dtype).removeprefix('torch.')}"
    library, _ = sdpa_attend(q, k, v)
    error = require_exact(f"piece of {what}", out.to(dtype), library, q, k, v)

    def and_merge(attend: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        new_out, new_lse = attend()
        merge_(out, lse, new_out, new_lse)

    variants: Variants = {name: partial(and_merge, attend) for name, attend in library_calls.items()}
    us = bench.us(variants | {"fused": partial(attend_chunks_, [q], [k], [v], [out], [lse])})
    fused_us = statistics.median(us["fused"])
    for name in library_calls:
        library_us = statistics.median(us[name])
        bench.add(
            "pieces",
            "fused",
            us["fused"],
            what=what,
            library=name,
            library_us=library_us,
            ratio=fused_us / library_us,
            error=error,
        )


# -- the command -----------------------------------------------------------------------------------------------------


PARTS = {part.__name__: part for part in (chunking, fused, bandwidth, enqueue, pieces)}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table("part", "variant", "what", "median, us", "library, us", "compared with", "rate", "goal")
    for row in rows:
        rate = f"{row['rate_tflops']:.0f} TFLOP/s" if "rate_tflops" in row else ""
        rate = f"{row['rate_gbps']:.0f} GB/s" if "rate_gbps" in row else rate
        goal = row.get("goal")
        goal_text = "" if goal is None else f"<= {goal:.2f}x: {'met' if row['ratio'] <= goal else 'missed'}"
        against = {"bandwidth": "a copy", "enqueue": f"{ENQUEUE_US:.0f} us"}.get(row["part"], row["library"])
        library = f"{row['library']} {row['library_us']:.4g}"
        cells = row["part"], row["variant"], row["what"], f"{row['median_us']:.4g}", library
        result.add_row(*cells, f"{row['ratio']:.3f}x {against}", rate, goal_text)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.gpu", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated. Default: %(default)s")
    parser.add_argument("--repeat", type=int, default=21, help="timed runs of each variant. Default: 21")
    parser.add_argument("--warmup", type=int, default=5, help="untimed runs before them. Default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a bench document")
    parser.add_argument(
        "--smoke", action="store_true", help="run everything with tiny sizes, also on a CPU; the times are meaningless"
    )
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    if options.repeat < 1 or options.warmup < 0:
        parser.error("--repeat must be at least 1 and --warmup at least 0")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 without a GPU, 1 if a result was wrong."""
    options = parse(argv)
    if not torch.cuda.is_available() and not options.smoke:
        print("no GPU: PyTorch finds no CUDA device (--smoke runs tiny sizes on the CPU)", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    bench = Bench(device, SMOKE if options.smoke else REAL, options.repeat, options.warmup)
    document = new_document("python -m sf_xfuser.bench.gpu") | {"smoke": options.smoke}
    failures = []
    with torch.no_grad():
        for name in options.parts:
            try:
                PARTS[name](bench)
            except BadResult as wrong:
                failures.append(f"{name}: {wrong}")
    Console(width=None if sys.stdout.isatty() else 160).print(table(bench.rows))
    document.update(rows=bench.rows, failures=failures)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    for failure in failures:
        print(f"wrong result, not timed: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
