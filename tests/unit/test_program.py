"""Programs as plain data: their launches, their chunks on both ends, their memory. Then an interpreter runs the
programs of all ranks in one process, with chunks that arrive as late or as early as possible, against float64."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_xfuser.kernels import pack_compressed, unpack_compressed
from sf_xfuser.layout import recorder
from sf_xfuser.layout.chunking import CallSize, choose_chunking
from sf_xfuser.layout.memory_map import MemoryMap, Sizes
from sf_xfuser.layout.plan import Layout, head_ranges
from sf_xfuser.layout.program import INPUTS, AttendOp, Chunk, Compress, Copy, Measure, Poison, Post, Program, View, Wait
from sf_xfuser.layout.recorder import Placement, record
from sf_xfuser.layout.schedule import Chunking, build_schedule

BOTH = ("inside", "across")


class Wires(NamedTuple):
    """``windows``: links on which peers write into windows. ``host``: whether the host of a rank writes there."""

    windows: tuple[str, ...] = ()
    host: bool = False
    head_major: bool = False


WIRES = {
    "matched": Wires(),
    "put": Wires(BOTH),
    "put inside": Wires(("inside",)),
    "shm": Wires(BOTH, host=True, head_major=True),
    "shm staged": Wires(BOTH, host=True),
    "shm inside": Wires(("inside",), host=True),
}


@dataclass(frozen=True)
class Case:
    """One call of all ranks. ``q_tokens``, ``kv_tokens``: by position, repeated."""

    layout: Layout
    chunking: Chunking
    wires: str = "put"
    heads: int = 0  # 0: one of each head group
    repeat: int = 1  # query heads of a KV head
    q_tokens: tuple[int, ...] = (4,)
    kv_tokens: tuple[int, ...] = (4,)
    joint: Literal["front", "rear"] | None = None
    batch: int = 1
    head_size: int = 2
    compressed: Literal["none", "int8", "fp8"] = "none"
    max_rows: int | None = None
    fused: bool = False
    strides: str = "SHD"
    """Order of the dimensions of inputs in memory after the batch; or "packed": K and V are slices of one tensor."""

    @property
    def ranks(self) -> range:
        return range(self.layout.world_size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.compressed == "none" else torch.float32

    @cached_property
    def sizes(self) -> Sizes:
        degree, world = self.layout.ulysses_degree, self.layout.world_size
        heads = self.repeat * math.ceil(max(self.heads, degree) / self.repeat)
        q_heads, kv_heads = head_ranges(heads, heads // self.repeat, degree)
        q_tokens, kv_tokens = ((x * world)[:world] for x in (self.q_tokens, self.kv_tokens))
        return Sizes(
            batch=self.batch,
            head_size=self.head_size,
            itemsize=self.dtype.itemsize,
            q_tokens=q_tokens,
            kv_tokens=kv_tokens,
            joint_tokens=3 if self.joint else 0,
            q_heads=q_heads,
            kv_heads=kv_heads,
        )

    @cached_property
    def tensors(self) -> list[list[torch.Tensor]]:
        """The inputs of each rank, [B, H, S, D]."""
        make = torch.Generator().manual_seed(0)
        kv_heads = self.sizes.kv_heads[-1][1]
        joint = self._inputs(make, self.sizes.joint_tokens, [kv_heads] * 2) if self.joint else []
        found = []
        for w in self.ranks:
            query = self._inputs(make, self.sizes.q_tokens[w], [self.sizes.q_heads[-1][1]])
            found.append([*query, *self._inputs(make, self.sizes.kv_tokens[w], [kv_heads] * 2), *joint])
        return found

    def _inputs(self, make: torch.Generator, tokens: int, heads: list[int]) -> list[torch.Tensor]:
        if self.strides == "packed":
            one = torch.randn(self.batch, tokens, sum(heads), self.head_size, generator=make, dtype=self.dtype)
            return list(one.transpose(1, 2).split(heads, 1))
        order = ["SHD", "HSD"].index(self.strides)
        made = []
        for count in heads:
            shape = (self.batch, tokens, count, self.head_size)
            x = torch.randn(*shape, generator=make, dtype=self.dtype).transpose(1, 2)
            made.append(x.contiguous() if order else x)
        return made

    @cached_property
    def maps(self) -> dict[int, MemoryMap]:
        wires = WIRES[self.wires]
        return {
            w: MemoryMap(self.schedule(w), self.sizes, wires.windows, head_major=wires.head_major) for w in self.ranks
        }

    def schedule(self, w: int):
        return build_schedule(self.layout, w, self.joint, self.chunking)

    def record(self, w: int) -> Program:
        wires = WIRES[self.wires]
        placement = Placement(
            memory_maps=self.maps,
            strides=[x.stride() for x in self.tensors[w]],
            window_links=wires.windows,
            host_links=wires.windows if wires.host else (),
            compressed=self.compressed,
            max_rows=self.max_rows,
            sum_itemsize=self.dtype.itemsize,
            fused=self.fused,
        )
        return record(self.schedule(w), self.sizes, placement)

    @cached_property
    def programs(self) -> list[Program]:
        return [self.record(w) for w in self.ranks]


def at(torus=1, ulysses=1, across=1, inside=1) -> Layout:
    return Layout(torus=torus, ulysses=ulysses, ring_across=across, ring_inside=inside)


SLAB, UNSTAGED = Chunking(granularity="slab"), Chunking(granularity="unstaged")


@st.composite
def cases(draw) -> Case:
    degrees = st.builds(at, *(st.integers(1, most) for most in (4, 3, 3, 3))).filter(lambda x: x.world_size <= 24)
    layout = draw(degrees)
    wires = draw(st.sampled_from(sorted(WIRES)))
    parts = st.integers(1, 3)
    chunkings = [
        st.builds(Chunking, kv_parts=parts, last_kv_parts=parts),
        st.builds(Chunking, kv_parts=parts, last_kv_parts=parts, granularity=st.just("slab"), machines_at_once=parts),
        st.just(UNSTAGED),
    ]
    counts = st.lists(st.integers(0, 5), min_size=1, max_size=5)
    tokens = counts.filter(lambda x: any(x[: layout.world_size])).map(tuple)
    compresses = "across" not in WIRES[wires].windows
    return Case(
        layout,
        draw(st.one_of(chunkings)),
        wires,
        heads=layout.ulysses_degree + draw(st.integers(0, 3)),
        repeat=draw(st.sampled_from([1, 1, 2, 3])),
        q_tokens=draw(tokens),
        kv_tokens=draw(tokens),
        joint=draw(st.sampled_from([None, "front", "rear"])),
        batch=draw(st.integers(1, 2)),
        compressed=draw(st.sampled_from(["none", "int8"])) if compresses else "none",
        max_rows=draw(st.sampled_from([None, 3])),
        fused=draw(st.booleans()),
        strides=draw(st.sampled_from(["SHD", "HSD", "packed"])),
    )


# -- an interpreter ---------------------------------------------------------------------------------------------------

Flight = tuple[int, int, str, int]  # sender, receiver, link, round


class Rank:
    """The memories of one rank as flat tensors, and its place in its program."""

    def __init__(self, case: Case, w: int, windows: list[torch.Tensor]) -> None:
        self.case, self.w, self.program = case, w, case.programs[w]
        self.ops = list(self.program.ops)
        self.posted: set[Flight] = set()
        self.after: dict[Flight, set[Flight]] = {}  # what has to arrive before a posted flight starts
        self.expected: set[Flight] = set()
        scratch = torch.full((self.program.scratch_bytes,), 0xFF, dtype=torch.uint8)  # NaN
        self.result = torch.full(self.program.result_shape, math.nan, dtype=case.dtype)
        self.memory: dict[str | int, torch.Tensor] = {
            **dict(zip(INPUTS, case.tensors[w], strict=False)),
            **dict(enumerate(windows)),
            "result": self.result,
            "window": windows[w],
            "scratch": scratch.view(case.dtype),
            "sums": scratch.view(case.dtype),
            "bytes": scratch,
        }
        group, sizes = case.layout.head_group(w), case.sizes
        first = sizes.kv_heads[group][0]
        self.kv_of_q = [head // case.repeat - first for head in range(*sizes.q_heads[group])]

    def view(self, view: View) -> torch.Tensor:
        """[S, B, H, D]; log-sum-exps [B, H, S]; bytes [n]."""
        memory = self.memory[view.memory]
        if view.memory == "output":  # the offset is the first row
            return memory[view.offset : view.offset + view.shape[0]]
        return strided(memory, view)

    def missing(self, arrived: set[Flight]) -> list[Flight]:
        """The flights for which the next operation waits."""
        if not isinstance(self.ops[0], Wait):
            return []
        return sorted(self.receives(self.ops[0].transfers) - arrived)

    def receives(self, transfers: Iterable[int]) -> set[Flight]:
        specs = [self.program.transfers[number] for number in transfers]
        return {(chunk.peer, self.w, spec.link, spec.round) for spec in specs for chunk in spec.receives}

    def step(self) -> None:
        """Run the next operation."""
        op = self.ops.pop(0)
        if isinstance(op, Post):
            spec = self.program.transfers[op.transfer]
            sent = {(self.w, chunk.peer, spec.link, spec.round) for chunk in spec.sends}
            self.after |= dict.fromkeys(sent, self.receives(op.after))
            self.posted |= sent
            self.expected |= {(chunk.peer, self.w, spec.link, spec.round) for chunk in spec.receives}
        elif isinstance(op, Copy):
            for source, target in op.copies:
                self.view(target).copy_(self.view(source))
        elif isinstance(op, Compress):
            parts = [self.view(part) for part in op.parts]
            if op.restore:
                unpack_compressed(self.view(op.chunk), parts, op.formats)
            else:
                pack_compressed(parts, self.view(op.chunk), op.formats)
        elif isinstance(op, AttendOp):
            self.attend(op)
        else:
            assert isinstance(op, Measure | Poison | Wait)

    def attend(self, op: AttendOp) -> None:
        if op.keys is None:
            for output in op.outputs:
                self.view(output.result).copy_(self.view(output.sums))
            return
        q, k, v = self.view(op.queries), *(self.view(x)[:, :, self.kv_of_q] for x in (op.keys, op.values))
        scores = torch.einsum("sbhd,tbhd->bhst", q, k) / math.sqrt(self.case.head_size)
        out, lse = torch.einsum("bhst,tbhd->sbhd", scores.softmax(3), v), scores.logsumexp(3)
        if not op.outputs:
            self.memory["output"] = out
        for start, stop, sums, sums_lse, result in op.outputs:
            part, part_lse = out[start:stop], lse[:, :, start:stop]
            if not op.first:
                before = self.view(sums_lse).clone()
                total = torch.logaddexp(before, part_lse)
                old, new = ((x - total).exp().permute(2, 0, 1)[..., None] for x in (before, part_lse))
                part, part_lse = old * self.view(sums) + new * part, total
            if result is None:
                self.view(sums).copy_(part)
                self.view(sums_lse).copy_(part_lse)
            else:
                self.view(result).copy_(part)


def strided(memory: torch.Tensor, view: View) -> torch.Tensor:
    strides = {1: (1,), 3: view.strides, 4: (*view.strides, 1)}[len(view.shape)]
    return memory.as_strided(view.shape, strides, memory.storage_offset() + view.offset)


def chunks_of(program: Program, link: str, round: int, side: str, peer: int) -> list[Chunk]:
    (spec,) = (t for t in program.transfers if (t.link, t.round) == (link, round))
    return [chunk for chunk in getattr(spec, side) if chunk.peer == peer]


class Group:
    """All ranks, which make one call."""

    def __init__(self, case: Case) -> None:
        self.case, self.window_links = case, WIRES[case.wires].windows
        sizes = [case.maps[w].window_bytes // case.dtype.itemsize for w in case.ranks]
        windows = [torch.full((size,), math.nan, dtype=case.dtype) for size in sizes]
        self.ranks = [Rank(case, w, windows) for w in case.ranks]
        self.arrived: set[Flight] = set()

    def deliver(self, flight: Flight) -> None:
        self.arrived.add(flight)
        sender, receiver, link, round = flight
        sends = chunks_of(self.case.programs[sender], link, round, "sends", receiver)
        receives = chunks_of(self.case.programs[receiver], link, round, "receives", sender)
        for sent, received in zip(sends, receives, strict=True):
            if sent.view is None:
                continue
            data = self.ranks[sender].view(sent.view)
            if link in self.window_links:
                window, start = self.ranks[receiver].memory["window"], sent.offset // self.case.dtype.itemsize
                window[start : start + data.numel()] = data.flatten()
            else:
                self.ranks[receiver].view(received.view).copy_(data)

    def flying(self) -> list[Flight]:
        """Posted, and without a window expected, but not delivered."""
        posted = {flight for rank in self.ranks for flight in rank.posted - self.arrived}
        started = {x for x in posted if self.ranks[x[0]].after[x] <= self.arrived}
        return sorted(x for x in started if x[2] in self.window_links or x in self.ranks[x[1]].expected)

    def run_in_step(self, rng: random.Random, share: float) -> None:
        """One operation of each rank in turn. ``share``: of the chunks under way arrives in each turn."""
        while any(rank.ops for rank in self.ranks):
            flights = self.flying()
            arriving = [flight for flight in flights if rng.random() < share]
            running = [rank for rank in self.ranks if rank.ops and not rank.missing(self.arrived)]
            assert flights or running, f"stuck: {[rank.ops[:1] for rank in self.ranks]}"
            for flight in arriving:
                self.deliver(flight)
            for rank in running:
                rank.step()

    def run_late(self, rng: random.Random) -> None:
        """Rank after rank: the others do only what it waits for, and chunks arrive only when they are waited for."""
        for rank in rng.sample(self.ranks, len(self.ranks)):
            while rank.ops:
                self._advance(rank)
        while flights := self.flying():
            self.deliver(flights[0])

    def _advance(self, rank: Rank) -> None:
        for flight in rank.missing(self.arrived):
            self._bring(flight)
        rank.step()

    def _bring(self, flight: Flight) -> None:
        """Deliver a flight, after what has to arrive before it."""
        sender = self.ranks[flight[0]]
        while flight not in sender.posted:
            assert sender.ops, f"nobody sends {flight}"
            self._advance(sender)  # RecursionError: ranks wait for each other
        for earlier in sorted(sender.after[flight] - self.arrived):
            self._bring(earlier)
        if flight not in self.arrived:
            self.deliver(flight)


def check_results(case: Case, arrivals: Literal["late", "early", "random"], seed: int = 0) -> None:
    """The result of every rank against one softmax in float64. ``arrivals``: when chunks arrive."""
    group, rng = Group(case), random.Random(seed)
    if arrivals == "late":
        group.run_late(rng)
    else:
        group.run_in_step(rng, 1.0 if arrivals == "early" else 0.3)
    assert not any(rank.posted - group.arrived for rank in group.ranks)
    k, v = (torch.cat([x[n] for x in case.tensors], 2) for n in (1, 2))
    if case.joint:
        k, v = (torch.cat([x, case.tensors[0][n]], 2) for x, n in ((k, 3), (v, 4)))
    k, v = (x.repeat_interleave(case.repeat, 1).double() for x in (k, v))
    for w, result in enumerate(rank.result for rank in group.ranks):
        scores = case.tensors[w][0].double() @ k.transpose(2, 3) / math.sqrt(case.head_size)
        wanted = (scores.softmax(3) @ v).transpose(1, 2)
        off = (result.double() - wanted).abs().max() if wanted.numel() else 0
        assert off < (1e-12 if case.compressed == "none" else 0.2), f"rank {w} is off by {off:.1e}"


# -- checks of plain data ---------------------------------------------------------------------------------------------


def add_one(counts: torch.Tensor, view: View, itemsize: int = 1) -> None:
    """Count the elements of a view in ``counts``, by element, or with ``itemsize`` by byte. Raises outside of it."""
    found = torch.zeros(len(counts) // itemsize, dtype=torch.int32)
    if view.numel:
        strided(found, view).add_(1)
    counts += found.repeat_interleave(itemsize)


def check_both_ends(case: Case) -> None:
    """Each send matches a receive of its peer, and lies where the peer reads it. In a window, no two chunks overlap."""
    wires, itemsize = WIRES[case.wires], case.dtype.itemsize
    for w, program in enumerate(case.programs):
        assert [op.transfer for op in program.ops if isinstance(op, Post)] == [*range(len(program.transfers))]
        for link in ("inside", "across"):
            rounds = [spec.round for spec in program.transfers if spec.link == link]
            assert rounds == [*range(len(rounds))]
        copied = {target for op in program.ops if isinstance(op, Copy) for _, target in op.copies}
        outputs = [output for op in program.ops if isinstance(op, AttendOp) for output in op.outputs]
        attended = Counter(row for output in outputs if output.result for row in rows(output.result))
        window = torch.zeros(case.maps[w].window_bytes // itemsize, dtype=torch.int32)
        for spec in program.transfers:
            for peer in {chunk.peer for chunk in spec.sends}:
                sends = chunks_of(program, spec.link, spec.round, "sends", peer)
                receives = chunks_of(case.programs[peer], spec.link, spec.round, "receives", w)
                assert [x.slot for x in sends] == [x.slot for x in receives]
                for sent, received in zip(sends, receives, strict=True):
                    there = received.view._replace(memory=peer)
                    if spec.link in wires.windows:
                        assert received.view.memory == "window" and sent.offset == there.offset * itemsize
                    if sent.view is None:
                        assert wires.host and spec.link in wires.windows
                        assert not there.numel or there in copied or all(attended[row] == 1 for row in rows(there))
                        continue
                    assert sent.view.numel == there.numel
                    for view in (sent.view, received.view) if spec.link in wires.windows else (sent.view,):
                        assert not view.numel or len(view.shape) == 1 or view.strides == packed(view)
            for chunk in spec.receives:
                assert chunks_of(case.programs[chunk.peer], spec.link, spec.round, "sends", w)
                if chunk.view.memory == "window":
                    add_one(window, chunk.view)
        for target in copied:
            if target.memory == "window":
                add_one(window, target)
        assert not (window > 1).any()


def rows(view: View) -> list[tuple[str | int, int]]:
    return [(view.memory, view.offset + row * view.strides[0]) for row in range(view.shape[0])]


def packed(view: View) -> tuple[int, int, int]:
    _, B, H, D = view.shape
    return B * H * D, H * D, D


def check_scratch(case: Case) -> None:
    """What a program writes to scratch memory is inside it, and each byte once. Only sums are written again."""
    itemsize = case.dtype.itemsize
    for program in case.programs:
        once, sums = (torch.zeros(program.scratch_bytes, dtype=torch.int32) for _ in range(2))
        written = [chunk.view for spec in program.transfers for chunk in spec.receives]
        for op in program.ops:
            if isinstance(op, Copy):
                written += [target for _, target in op.copies]
            elif isinstance(op, Compress):
                written += op.parts if op.restore else [op.chunk]
            elif isinstance(op, AttendOp):
                written += [output.result for output in op.outputs if output.result is not None]
                for output in op.outputs:
                    add_one(sums, output.sums, itemsize)
                    add_one(sums, output.lse, itemsize)
        for view in written:
            if view.memory in ("scratch", "bytes"):
                add_one(once, view, itemsize if view.memory == "scratch" else 1)
        assert not (once > 1).any() and not (once.bool() & sums.bool()).any()


def check(case: Case, seed: int = 0) -> None:
    check_both_ends(case)
    check_scratch(case)
    for arrivals in ("late", "early", "random"):
        check_results(case, arrivals, seed)


# -- tests ------------------------------------------------------------------------------------------------------------

EVERY_KIND = at(torus=3, ulysses=2, inside=2), at(torus=2, across=2, inside=2), at(torus=2, ulysses=3)
CHUNKINGS = {
    "block": Chunking(kv_parts=2, last_kv_parts=3),
    "slab": Chunking(granularity="slab", last_kv_parts=2, machines_at_once=2),
    "unstaged": UNSTAGED,
}


@pytest.mark.parametrize("wires", WIRES)
@pytest.mark.parametrize("chunking", CHUNKINGS.values(), ids=CHUNKINGS)
def test_every_granularity_over_every_link(chunking, wires):
    """Uneven heads and tokens, a rank without tokens, GQA, joint tokens, batch 2."""
    for layout, joint in zip(EVERY_KIND, (None, "front", "rear"), strict=True):
        shape = {
            "heads": layout.ulysses_degree + 3,
            "repeat": 2,
            "q_tokens": (4, 0, 5, 3, 1),
            "kv_tokens": (3, 5, 0, 4),
        }
        check(Case(layout, chunking, wires, joint=joint, batch=2, **shape))
        check(Case(layout, chunking, wires, max_rows=3, fused=True, strides="packed"))


@settings(max_examples=30)
@given(cases(), st.integers(0, 99))
def test_random_calls(case, seed):
    check(case, seed)


def wrong_offset(monkeypatch):
    destinations = MemoryMap.destinations

    def wrong(self, message):
        return tuple(
            (offset + 64 * (message.tensor == "kv"), strides) for offset, strides in destinations(self, message)
        )

    monkeypatch.setattr(MemoryMap, "destinations", wrong)


def wrong_heads(monkeypatch):
    own_chunk = recorder._Recorder._own_chunk

    def wrong(self, tensor, piece, group):
        return own_chunk(self, tensor, piece, (group + 1) % self.schedule.layout.ulysses_degree)

    monkeypatch.setattr(recorder._Recorder, "_own_chunk", wrong)


@pytest.mark.parametrize("fault", [wrong_offset, wrong_heads])
@pytest.mark.parametrize("wires", ["put", "shm"])
def test_faults_are_found(wires, fault, monkeypatch):
    case = Case(at(torus=2, ulysses=2), UNSTAGED, wires, q_tokens=(64,), kv_tokens=(64,))
    check(case)
    fault(monkeypatch)
    faulty = replace(case)  # records its programs again
    if fault is wrong_offset:
        with pytest.raises((AssertionError, RuntimeError)):
            check_both_ends(faulty)
    with pytest.raises((AssertionError, RuntimeError)):
        check_results(faulty, "late")


@pytest.mark.parametrize("wires", ["matched", "put", "shm staged"])
@pytest.mark.parametrize("chunking", CHUNKINGS.values(), ids=CHUNKINGS)
def test_no_wait_can_be_left_out(chunking, wires):
    case = Case(at(torus=2, ulysses=2, inside=2), chunking, wires)
    program = case.programs[0]
    for at_op in (n for n, op in enumerate(program.ops) if isinstance(op, Wait)):
        faulty = replace(case)
        faulty.programs[0] = replace(program, ops=program.ops[:at_op] + program.ops[at_op + 1 :])
        with pytest.raises((AssertionError, RuntimeError)):
            for seed in range(8):
                check_results(faulty, "late", seed)


@pytest.mark.parametrize("wires", WIRES)
def test_a_program_is_a_pure_value(wires):
    case = Case(at(torus=2, ulysses=2, inside=2), SLAB, wires, joint="rear")
    assert case.programs == replace(case).programs
    assert len({str(program) for program in case.programs}) == len({repr(program) for program in case.programs})
    with pytest.raises(AttributeError):
        case.programs[0].ops = ()


# Layout and granularity -> launches of a call with 16 tokens per rank, and with 2048 (4096 x 4096 pixels on 32 GPUs).
LAUNCHES = {
    (at(torus=4, ulysses=2, inside=4), "slab"): (63, 77),
    (at(torus=4, ulysses=2, inside=4), "block"): (145, 217),
    (at(torus=4, ulysses=2, inside=4), "unstaged"): (24, 24),
    (at(torus=4, ulysses=8), "slab"): (50, 64),
    (at(torus=4), "slab"): (43, 50),
    (at(torus=8, inside=8), "slab"): (104, 111),
    (at(torus=2, ulysses=4, inside=2), "slab"): (39, 39),
    (at(torus=2, ulysses=8), "slab"): (32, 32),
    (at(torus=2, ulysses=2, across=2, inside=2), "slab"): (57, 57),
    (at(across=4, ulysses=2), "unstaged"): (19, 19),
    (at(ulysses=8), "slab"): (15, 15),
    (at(inside=8), "slab"): (10, 10),
}
LIMITS = {(at(torus=4, ulysses=2, inside=4), "slab"): 90, (at(torus=4, ulysses=8), "slab"): 110}


def program_on_gpus(layout: Layout, granularity: str, tokens: int) -> Program:
    """Of a call over one-sided transfers between GPUs."""
    size = CallSize(q_tokens=tokens, kv_tokens=tokens, heads=3 * layout.ulysses_degree, head_size=128, batch=1)
    chunking = choose_chunking(layout, size, "cuda", granularity)
    case = Case(layout, chunking, heads=size.heads, q_tokens=(tokens,), kv_tokens=(tokens,), head_size=128)
    strides = [(1, 128, 128 * size.heads, 1)] * 3
    return record(
        case.schedule(0),
        case.sizes,
        Placement(memory_maps=case.maps, strides=strides, window_links=BOTH, sum_itemsize=4),
    )


@pytest.mark.parametrize(
    ("layout", "granularity", "launches"),
    [(*shape, launches) for shape, launches in LAUNCHES.items()],
    ids=[f"T{x.torus}U{x.ulysses}X{x.ring_across}R{x.ring_inside} {granularity}" for x, granularity in LAUNCHES],
)
def test_number_of_launches(layout, granularity, launches):
    programs = [program_on_gpus(layout, granularity, tokens) for tokens in (16, 2048)]
    assert tuple(program.launches for program in programs) == launches
    assert max(launches) <= LIMITS.get((layout, granularity), 220)


def test_the_table_of_a_program():
    """One row an operation, then the end of a call and the total of the rows."""
    program = program_on_gpus(at(torus=4, ulysses=2, inside=4), "slab", 16)
    header, *rows, total = str(program).splitlines()
    assert header.split() == ["operation", "launches", "bytes", "what"]
    numbers = [row.split()[:3] for row in rows]
    assert [kind for kind, *_ in numbers[:3]] == ["copy", "post", "copy"] and numbers[-1][0] == "end"
    assert len(rows) == len(program.ops) + 1
    assert total.split() == [
        "total",
        str(sum(int(row[1]) for row in numbers)),
        str(sum(int(row[2]) for row in numbers)),
    ]
    assert total.split()[1] == str(program.launches)
    alone = str(Case(at(), UNSTAGED).programs[0]).splitlines()
    assert [row.split()[:2] for row in alone[1:]] == [["attend", "1"], ["copy", "1"], ["end", "0"], ["total", "2"]]
