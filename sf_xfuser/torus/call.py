"""Negotiates one attention call between the ranks of a group: shapes, dtypes, and token counts of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from sf_xfuser.layout.chunking import CallSize, choose_chunking, choose_granularity
from sf_xfuser.layout.memory_map import MemoryMap, Sizes
from sf_xfuser.layout.plan import head_ranges
from sf_xfuser.layout.recorder import Placement, record
from sf_xfuser.layout.schedule import Granularity, Schedule, build_schedule
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.torus.run import BoundProgram

_MAX_PROGRAMS = 8  # of a call: two halves of a window, and a few strides
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Joint(NamedTuple):
    """Key and value [B, H_kv, S_j, D] of tokens that every rank holds. They are attended with the first (``"front"``)
    or the last (``"rear"``) KV."""

    key: torch.Tensor
    value: torch.Tensor
    strategy: Literal["front", "rear"]


class Tokens(NamedTuple):
    """Number of queries and of keys on each rank, by position in the mesh."""

    query: Sequence[int]
    key: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Everything that calls of one shape have in common; cached in ``Mesh.calls``.

    ``digest``: the call as text, equal on all ranks. ``placement``: of its programs, except strides and the kernel of
    attention; with the memory maps of all ranks if a transport is one-sided, else of this rank. ``programs``: recorded
    and bound programs, by what they depend on besides the shape."""

    digest: str
    schedule: Schedule
    sizes: Sizes
    kv_of_q: torch.Tensor | None  # local KV head of each local query head; None if equal
    grouped: bool  # regular GQA: each local KV head belongs to the same number of consecutive query heads
    placement: Placement
    programs: dict[Any, BoundProgram] = field(default_factory=dict)

    def bound_program(
        self, mesh: Mesh, tensors: Sequence[torch.Tensor], window: torch.Tensor | None, fused: bool
    ) -> BoundProgram:
        """The program for tensors of these strides in this half of the window, recorded at its first use. Local."""
        key = _program_key(mesh, tensors, fused), 0 if window is None else window.data_ptr()
        found = self.programs.get(key)
        if found is None:
            while len(self.programs) >= _MAX_PROGRAMS:
                del self.programs[next(iter(self.programs))]
            placement = replace(self.placement, strides=tuple(x.stride() for x in tensors), fused=fused)
            of_other_half = (bound.program for (known, _), bound in self.programs.items() if known == key[0])
            program = next(of_other_half, None) or record(self.schedule, self.sizes, placement)
            kv_of_q = None if fused and self.grouped else self.kv_of_q
            memories = _memories(mesh, tensors[0], window, placement)
            found = self.programs[key] = BoundProgram(program, mesh, memories, tensors[0], kv_of_q, fused)
        return found

    def keep_programs(self, mesh: Mesh, tensors: Sequence[torch.Tensor], fused: bool) -> None:
        """Keep the programs to which a user's CUDA graph is about to refer. Raises ValueError on every rank if the
        programs have not been recorded yet, which a capture cannot do."""
        key = _program_key(mesh, tensors, fused)
        recorded = [program for (known, _), program in self.programs.items() if known == key]
        halves = 1 if mesh.window is None else mesh.window.halves
        if len(recorded) < halves:
            mesh.refuse(
                f"a CUDA graph is being captured, and this call needs {halves} call(s) of the same shapes and strides "
                f"before it: run the model once before the capture"
            )
        mesh.graphs.kept += [program for program in recorded if program not in mesh.graphs.kept]


def _program_key(mesh: Mesh, tensors: Sequence[torch.Tensor], fused: bool) -> Any:
    return tuple([x.stride() for x in tensors]), fused, mesh.scratch.data_ptr()


def _memories(
    mesh: Mesh, query: torch.Tensor, window: torch.Tensor | None, placement: Placement
) -> dict[str | int, torch.Tensor]:
    """The fixed memories of a program, in the dtypes of their views."""
    scratch = mesh.scratch
    with torch.inference_mode(False):  # calls in any mode write to it
        found: dict[str | int, torch.Tensor] = {
            "scratch": scratch.view(query.dtype),
            "sums": scratch.view(torch.promote_types(query.dtype, torch.float32)),
            "bytes": scratch,
        }
        if window is not None:
            found["window"] = window.view(query.dtype)
            for peer in placement.memory_maps if placement.host_links else ():
                if mesh.window is not None and (memory := mesh.window.peer_window(peer)) is not None:
                    found[peer] = memory.view(query.dtype)
    return found


def negotiate_call(
    mesh: Mesh,
    tensors: Sequence[torch.Tensor],
    joint_strategy: str | None,
    counts: Tokens | None,
    granularity: Granularity | None,
) -> Call:
    """The call that all ranks make. ``tensors``: query, key and value of this rank, then key and value of the joint
    tokens, if any. Collective, except for a cached shape with ``counts``. Raises ValueError on every rank if ranks
    disagree or the call is not possible."""
    options = joint_strategy, granularity
    shapes = (*((x.shape, x.dtype, x.device.type) for x in tensors), options)
    cached: Call | None = mesh.calls.get((shapes, counts))
    if cached is not None:
        return cached
    error = _argument_error(mesh, tensors, joint_strategy, counts)
    described = [[list(x.shape), str(x.dtype), x.device.type] for x in tensors]
    report = {"error": error, "tensors": described, "options": options, "counts": counts}
    reports = mesh.control.gather("attention call", report | {"request": mesh.guard.request})
    mesh.require_same_request([each["request"] for each in reports])
    if reason := _refusal(mesh, reports):
        mesh.refuse(reason)
    gathered = tuple(r["tensors"][0][0][2] for r in reports), tuple(r["tensors"][1][0][2] for r in reports)
    if (shapes, gathered) not in mesh.calls:
        mesh.cache_call((shapes, gathered), _make_call(mesh, reports, gathered, tensors[0]))
    call: Call = mesh.calls[shapes, gathered]
    return call


def _argument_error(
    mesh: Mesh, tensors: Sequence[torch.Tensor], joint_strategy: str | None, counts: Tokens | None
) -> str | None:
    """The error in this rank's arguments, or None. Local."""
    query, key, value, *joint = tensors
    for name, x in zip(("query", "key", "value", "joint.key", "joint.value"), tensors, strict=False):
        if x.dim() != 4:
            return f"{name} must have 4 dimensions [batch, heads, tokens, head size], got shape {tuple(x.shape)}"
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            return f"{name} is {x.dtype}, but must be one of {allowed}: convert it"
        if (x.dtype, x.device) != (query.dtype, query.device):
            return f"{name} is {x.dtype} on {x.device}, but query is {query.dtype} on {query.device}; convert it"
        if (x.shape[0], x.shape[3]) != (query.shape[0], query.shape[3]):
            shapes = f"{name} {tuple(x.shape)} and query {tuple(query.shape)}"
            return f"{shapes} differ in batch or head size: give both the same [batch, heads, tokens, head size]"
    if mesh.compression is not None and query.dtype == torch.float64:
        return "--sp-compress takes float16, bfloat16 or float32, got float64: convert the tensors, or remove the flag"
    if key.shape != value.shape:
        return f"key and value must have the same shape, got {tuple(key.shape)} and {tuple(value.shape)}"
    if counts is not None and any(len(tokens) != mesh.layout.world_size for tokens in counts):
        return f"tokens needs one count for each of {mesh.layout.world_size} positions, got {counts}"
    if counts is not None and (counts[0][mesh.position], counts[1][mesh.position]) != (query.shape[2], key.shape[2]):
        held = f"{query.shape[2]} queries and {key.shape[2]} keys"
        return f"tokens={counts} differs from this rank's {held}: pass the count of each rank, or omit it"
    heads, kv_heads, head_degree = query.shape[1], key.shape[1], mesh.layout.ulysses_degree
    if kv_heads == 0 or heads % kv_heads:
        return f"{heads} query heads are not a multiple of {kv_heads} key heads: key heads must divide query heads"
    if heads < head_degree:
        split = f"torus={mesh.layout.torus} x ulysses={mesh.layout.ulysses} ranks"
        return f"{heads} heads cannot be split over {split}: use a --sp-plan with torus x ulysses of at most {heads}"
    if not joint:
        return None
    if joint_strategy not in ("front", "rear"):
        return f"joint.strategy must be 'front' or 'rear', got {joint_strategy!r}"
    if joint[0].shape != joint[1].shape or joint[0].shape[1] != kv_heads:
        shapes = f"{tuple(joint[0].shape)} and {tuple(joint[1].shape)}"
        return f"joint.key and joint.value must have the same shape and {kv_heads} heads like key, got {shapes}"
    return None


def _refusal(mesh: Mesh, reports: list[dict[str, Any]]) -> str | None:
    """Why no rank can make this call, with the same text on every rank; None if they can."""
    errors = [f"rank {mesh.members[w]}: {r['error']}" for w, r in enumerate(reports) if r["error"]]
    if errors:
        return "; ".join(errors)

    def without_counts(report: dict[str, Any]) -> Any:  # drops the token counts of query, key and value
        return [
            [x[0][:2] + (x[0][2:] if index > 2 else x[0][3:]), *x[1:]] for index, x in enumerate(report["tensors"])
        ], report["options"]

    counts = [r["counts"] for r in reports]
    if any(each != counts[0] for each in counts):
        seen = "; ".join(f"rank {mesh.members[w]}: {each}" for w, each in enumerate(counts))
        return f"tokens must be the same on all ranks (or left out on all), got {seen}"
    if any(without_counts(r) != without_counts(reports[0]) for r in reports):
        seen = "; ".join(
            f"rank {mesh.members[w]}: {r['tensors']} joint {r['options'][0]}, granularity {r['options'][1]}"
            for w, r in enumerate(reports)
        )
        return f"ranks disagree on shape, dtype, joint tokens or granularity (only token counts may differ): {seen}"
    if not sum(r["tensors"][1][0][2] for r in reports) + sum(x[0][2] for x in reports[0]["tensors"][3:]):
        return "no rank holds any key; at least one rank must"
    return None


def _make_call(
    mesh: Mesh, reports: list[dict[str, Any]], counts: tuple[tuple[int, ...], tuple[int, ...]], query: torch.Tensor
) -> Call:
    joint_strategy, requested = reports[0]["options"]
    heads, kv_heads = reports[0]["tensors"][0][0][1], reports[0]["tensors"][1][0][1]
    repeat = heads // kv_heads
    q_heads, kv_ranges = head_ranges(heads, kv_heads, mesh.layout.ulysses_degree)
    group = mesh.layout.head_group(mesh.position)
    kv_of_q = [head // repeat - kv_ranges[group][0] for head in range(*q_heads[group])]
    each, left = divmod(len(kv_of_q), kv_ranges[group][1] - kv_ranges[group][0])
    sizes = Sizes(
        batch=query.shape[0],
        head_size=query.shape[3],
        itemsize=query.element_size(),
        q_tokens=counts[0],
        kv_tokens=counts[1],
        joint_tokens=reports[0]["tensors"][3][0][2] if joint_strategy else 0,
        q_heads=q_heads,
        kv_heads=kv_ranges,
    )
    on_cpu = query.device.type == "cpu"
    one_cpu_host = mesh.one_host and on_cpu  # transfers are too fast to overlap
    size = CallSize(
        q_tokens=max(counts[0]), kv_tokens=max(counts[1]), heads=heads, head_size=query.shape[3], batch=query.shape[0]
    )
    granularity = choose_granularity(mesh.layout, size, query.device.type, one_host=mesh.one_host)
    if requested is not None and not one_cpu_host:
        granularity = requested
    chunking = choose_chunking(mesh.layout, size, query.device.type, granularity)
    positions = [mesh.position] if mesh.window is None else range(mesh.layout.world_size)
    schedules = {w: build_schedule(mesh.layout, w, joint_strategy, chunking) for w in positions}
    memory_maps = {w: MemoryMap(s, sizes, mesh.window_links, head_major=one_cpu_host) for w, s in schedules.items()}
    placement = Placement(
        memory_maps=memory_maps,
        strides=((0, 0, 0, 1),) * 5,
        window_links=tuple(mesh.window_links),
        host_links=tuple(mesh.window_links) if mesh.window is not None and mesh.window.host_writes else (),
        compressed="none" if mesh.compression is None else mesh.compression.format,
        max_rows=_max_rows(memory_maps[mesh.position].queries.total) if on_cpu else None,
        sum_itemsize=torch.promote_types(query.dtype, torch.float32).itemsize,
    )
    schedule = schedules[mesh.position]
    scratch_bytes = record(schedule, sizes, replace(placement, fused=True)).scratch_bytes  # of the larger program
    if mesh.window is not None:
        scratch_bytes = max(mesh.control.gather("scratch memory", scratch_bytes))
    mesh.reserve(max(memory_map.window_bytes for memory_map in memory_maps.values()), scratch_bytes, query.device)
    joint = f", {sizes.joint_tokens} joint tokens in {joint_strategy}" if joint_strategy else ""
    return Call(
        digest=f"attention of {heads} heads ({kv_heads} of keys) of size {sizes.head_size}, batch {sizes.batch}, "
        f"{query.dtype}, over {_format_counts(counts[0])} queries and {_format_counts(counts[1])} keys{joint}, "
        f"{mesh.layout}, {chunking}",
        schedule=schedule,
        sizes=sizes,
        kv_of_q=None if repeat == 1 else torch.tensor(kv_of_q, device=query.device),
        grouped=not left and kv_of_q == [head // each for head in range(len(kv_of_q))],
        placement=placement,
    )


def _max_rows(queries: int) -> int:
    """On a CPU, queries are attended in blocks of rows, to keep partial results small. PyTorch's kernel is slower on
    blocks of fewer than 768 rows, and not faster on blocks of more than 1024."""
    return max(768, min(1024, queries // 4))


def _format_counts(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} x {tokens[0]}" if len(set(tokens)) == 1 else "+".join(map(str, tokens))
