"""What transports between GPUs share, without a GPU: places, the watchdog, and the whole protocol with threads in place
of streams (``virtual.py``). ``gpu/test_one_sided.py`` runs it where there is one."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from sf_xfuser.integrations.xdit import usp
from sf_xfuser.integrations.yunchang import all_to_all
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Joint
from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError
from sf_xfuser.transport.gpu import device
from sf_xfuser.transport.gpu.block import CHUNKS, Block, Staging, grown
from sf_xfuser.transport.gpu.watchdog import Awaited, Seen, Watchdog
from tests import virtual

# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "half_bytes"), [(2, 2 << 20), (7, 6 << 20)])
def test_nothing_in_a_block_overlaps(ranks, half_bytes):
    block = Block(ranks=ranks, half_bytes=half_bytes)
    flags = [block.flag(w, number, epoch) for w in range(ranks) for number in range(CHUNKS) for epoch in (1, 2)]
    assert all(flag % 8 == 0 for flag in flags) and len(set(flags)) == len(flags)
    assert block.poison + 4 <= min(flags) and max(flags) + 8 <= block.head_bytes
    starts = [block.head_bytes, *sorted({block.half(1), block.half(2)}), block.staging]
    assert starts == [block.head_bytes, block.head_bytes, block.head_bytes + half_bytes, starts[-1]]
    assert block.half(3) == block.half(1) and block.staging + half_bytes == block.nbytes
    assert all(start % 512 == 0 for start in starts)


def test_staged_chunks_do_not_overlap_until_it_starts_over():
    staging = Staging(10_240)
    places = [(*staging.take(nbytes), nbytes) for nbytes in (1, 5000, 513, 512, 10_240, 7)]
    assert [(at, over) for at, over, _ in places] == [
        (0, False), (512, False), (5632, False), (6656, False), (0, True), (0, True)
    ]  # fmt: skip
    staging.restart()
    assert staging.take(10_240) == (0, False)
    with_ends = [(at, at + nbytes) for at, _, nbytes in places[:4]]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(with_ends))


def test_windows_grow_seldom_and_by_an_eighth_at_most():
    sizes = [grown(nbytes, 1 << 21) for nbytes in range(1, 1 << 28, 99_991)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(
        size <= max(1 << 21, nbytes * 9 / 8 + 1)
        for size, nbytes in zip(sizes[300:], range(1, 1 << 28, 99_991)[300:], strict=True)
    )


# -- the choice -------------------------------------------------------------------------------------------------------


def test_auto_keeps_the_fastest_and_the_others_let_go_of_their_memory(monkeypatch):
    virtual.stand_in(monkeypatch)
    freed: list[tuple[str, int]] = []

    class Fast(virtual.Virtual):
        name = "fast"

        def _free(self):
            freed.append((self.name, self._position))

    class Slow(Fast):
        name = "slow"

        def exchange(self, *args):
            time.sleep(0.02)
            return super().exchange(*args)

    class Absent(Fast):
        name = "absent"

        def _allocate(self, nbytes):
            raise RuntimeError("no such memory")

    make = virtual.meshes(2, 1, heads=2)
    q = torch.randn(1, 2, 12, 8)

    def work(rank):
        mesh = make[rank]()
        mesh.window.close()

        def way(kind):
            return lambda control: dict.fromkeys(("inside", "across"), kind(control, range(2), rank, [1 - rank], 30.0))

        mesh.transports, mesh.transport_reason = {kind.name: way(kind) for kind in (Slow, Absent, Fast)}, ""
        own = q[:, :, 6 * rank : 6 * rank + 6]
        return mesh, torus_attention(own, own, own, mesh=mesh)

    found = virtual.together(2, work)
    out = torch.cat([each[1] for each in found], 2)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-6)
    for mesh, _ in found:
        assert mesh.transport == "fast" and isinstance(mesh.window, Fast) and not isinstance(mesh.window, Slow)
        assert re.match(
            r"the fastest of slow [\d.]+ ms, fast [\d.]+ ms, .*; absent cannot be used: .*no such",
            mesh.transport_reason,
        )
    assert {("slow", 0), ("slow", 1)} <= set(freed) and freed.count(("slow", 0)) == freed.count(("slow", 1)) == 1
    assert not [window for window in device._kept if window.window_bytes and window._memory is not None]
    for mesh, _ in found:
        mesh.close()


# -- the watchdog -----------------------------------------------------------------------------------------------------


class Stage:
    """Two ranks; this one waits for the other's chunk 0. What the watchdog did, in order."""

    def __init__(self, flag=0, gave_up=False, timeout_s=0.2, stubborn=False):
        self.did: list[str] = []
        self.ended = threading.Event()
        self.suspects = ()
        self.verdict = None

        def tell(suspects):
            self.suspects = suspects
            self.did.append("told")

        def release(stuck):
            self.did.append("released")
            if not stubborn and all(each.done is not None for each in stuck):
                self.ended.set()

        self.dog = Watchdog(
            [4, 5],
            0,
            timeout_s,
            enter=lambda: self.did.append("entered"),
            hopeless=lambda peers: self.verdict,
            look=lambda: Seen([[[0] * 3] * 2, [[0] * 3, [flag << 32 | 0xAB] * 3]], gave_up),
            tell=tell,
            release=release,
        )

    def wait(self, **others):
        usual = {"epoch": 7, "value": 7 << 32 | 0xAB, "round": 3, "chunks": ((1, 0),), "done": self.ended.is_set}
        awaited = Awaited(**usual | others)
        self.dog.watch(awaited)
        return awaited

    def settled(self, limit_s=5.0):
        deadline = time.monotonic() + limit_s
        while self.dog._watched and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.dog._watched
        return str(self.dog.error)


def test_a_late_chunk_is_named_and_peers_are_told_before_the_wait_is_released():
    stage = Stage(flag=6)
    stage.wait()
    words = stage.settled()
    assert re.search(r"rank 4 on \S+: nothing came from rank 5 in round 3: waited [\d.]+ s", words)
    assert "Expected flag of chunk 0: call=7, identity=000000ab, got: call=6, identity=000000ab" in words
    assert stage.did[:3] == ["entered", "told", "released"] and stage.suspects == [1]


def test_a_peer_that_gave_up_is_noticed_long_before_the_time_out():
    stage = Stage(gave_up=True, timeout_s=60)
    stage.wait()
    assert "a rank of its group gave up" in stage.settled()


def test_what_the_control_plane_knows_ends_a_wait_long_before_the_time_out():
    stage = Stage(timeout_s=60)
    stage.verdict = "rank 7 failed: KeyError"
    stage.wait()
    assert "rank 7 failed: KeyError" in stage.settled()


def test_what_arrives_in_time_is_no_failure():
    stage = Stage(timeout_s=1.0)
    for _ in range(20):
        stage.wait()
    stage.wait(chunks=())
    stage.ended.set()
    assert stage.settled() == "None" and stage.did == ["entered"]


def test_the_end_of_a_call_is_bounded_too():
    stage = Stage()
    stage.wait(chunks=())
    assert "the end of call 7 did not come: waited" in stage.settled()


def test_a_wait_that_is_enqueued_after_the_failure_is_released_as_well():
    stage = Stage()
    stage.dog.fail(TransportError("first"))
    stage.dog.fail(TransportError("second"))
    late = stage.wait(done=None)
    time.sleep(0.1)
    assert stage.did.count("released") > 1
    late.done = stage.ended.is_set
    assert stage.settled() == "first"


def test_nothing_is_released_while_peers_are_being_told():
    stage = Stage(timeout_s=60)
    tell = stage.dog._tell

    def slowly(suspects):
        time.sleep(0.2)
        tell(suspects)

    stage.dog._tell = slowly
    stage.wait()
    stage.dog.fail(TransportError("from the host's thread"))
    assert stage.settled() == "from the host's thread"
    assert stage.did.index("told") < stage.did.index("released")


def test_a_gpu_that_cannot_be_asked_is_a_failure():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    stage = Stage()
    stage.wait(done=broken)
    stage.dog._thread.join(5)
    assert "illegal memory access" in str(stage.dog.error) and "told" in stage.did


def test_waits_are_let_go_where_flags_cannot_be_read():
    def broken():
        raise RuntimeError("no such memory")

    stage = Stage(timeout_s=60)
    stage.dog._look = broken
    stage.wait()
    stage.dog._thread.join(5)
    assert "cannot be read any more: no such memory" in str(stage.dog.error) and stage.ended.is_set()


def test_its_thread_ends_once_closed():
    stage = Stage(timeout_s=60)
    stage.wait()
    stage.dog.close()
    assert stage.dog._thread.is_alive()
    stage.ended.set()
    stage.dog._thread.join(5)
    assert not stage.dog._thread.is_alive()


def test_streams_that_cannot_be_released_end_the_process():
    program = (
        "import time; from sf_xfuser.transport.gpu import watchdog; from tests.unit.test_device import Stage\n"
        "watchdog._GRACE_S = 0.1; stage = Stage(stubborn=True); stage.wait(); time.sleep(20)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (
        ended.returncode == 70 and "nothing came from rank 5" in ended.stderr and "cannot be released" in ended.stderr
    )


# -- the protocol, with threads for streams ---------------------------------------------------------------------------


def inputs(rank, seed, tokens, heads, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed * 16 + rank)
    return [torch.randn(1, heads, tokens, 8, generator=make).to(dtype) for _ in range(3)]


def whole(world, seed, tokens, heads):
    """The same attention on one rank, cut into the ranks' parts."""
    q, k, v = (
        torch.cat(parts, dim=2) for parts in zip(*(inputs(w, seed, tokens, heads) for w in range(world)), strict=True)
    )
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).split(tokens, dim=2)


@pytest.mark.parametrize(
    ("machines", "ranks_per_machine", "heads"),
    [(1, 2, 2), (2, 1, 2), (2, 2, 4), (2, 2, 2), (3, 1, 3), (1, 3, 1), (4, 1, 2)],  # fewer heads than ranks: a ring
)
def test_attention_is_right_and_repeatable(machines, ranks_per_machine, heads, monkeypatch):
    virtual.stand_in(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    world = machines * ranks_per_machine
    make = virtual.meshes(machines, ranks_per_machine, heads)

    def rank(position):
        mesh = make[position]()
        first = [torus_attention(*inputs(position, seed, 40 + 8 * seed, heads), mesh=mesh) for seed in range(4)]
        again = [torus_attention(*inputs(position, seed, 40 + 8 * seed, heads), mesh=mesh) for seed in range(4)]
        mesh.close()
        return first, again

    for position, (first, again) in enumerate(unraised(virtual.together(world, rank))):
        for seed in range(4):
            assert torch.equal(first[seed], again[seed])
            expected = whole(world, seed, 40 + 8 * seed, heads)[position]
            assert (first[seed] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("machines", "ranks_per_machine", "heads", "kv_heads", "split"),
    [(2, 2, 8, 4, 4), (2, 2, 12, 3, 2), (2, 2, 9, 3, 2), (3, 1, 6, 6, 3), (1, 3, 4, 2, 1), (1, 1, 4, 1, 1)],
)
def test_the_fused_kernel_computes_the_same(machines, ranks_per_machine, heads, kv_heads, split, dtype, monkeypatch):
    """By its twin: with and without a ring, grouped queries also where head groups cut them, joint tokens at either
    end, tokens that differ from rank to rank, one without any."""
    virtual.stand_in(monkeypatch)
    world = machines * ranks_per_machine
    make = virtual.meshes(machines, ranks_per_machine, split)
    tokens = [0 if w == 1 else 17 + 5 * w for w in range(world)]

    def rank(position):
        some = torch.Generator().manual_seed(position)
        joint = torch.Generator().manual_seed(99)
        q, k, v = (
            torch.randn(2, tokens[position], H, 64, generator=some).to(dtype).transpose(1, 2)
            for H in (heads, kv_heads, kv_heads)
        )
        more = torch.randn(2, 2, kv_heads, 5, 64, generator=joint).to(dtype)
        mesh, found = make[position](), []
        for given in (None, Joint(*more, "front"), Joint(*more, "rear")):
            kernels = sdpa_attend, "fused"
            found.append([torus_attention(q, k, v, mesh=mesh, attention=x, joint=given) for x in kernels])
        mesh.close()
        return found

    rounding = max(4 * torch.finfo(dtype).eps, 1e-5)
    for position, found in enumerate(unraised(virtual.together(world, rank))):
        for library, fused in found:
            assert fused.shape == (2, heads, tokens[position], 64) and fused.isfinite().all()
            torch.testing.assert_close(fused, library, rtol=rounding, atol=rounding)


def test_many_calls_under_delays_have_the_same_bits(monkeypatch):
    """Delays before whatever a stream does, and on the host; ranks run up to two calls apart."""
    virtual.stand_in(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 3e-3)
    make = virtual.meshes(2, 2, 4)

    def rank(position):
        mesh, wait = make[position](), random.Random(position)
        given = [inputs(position, seed, 24 + 8 * seed, 4) for seed in range(3)]
        first = [torus_attention(*each, mesh=mesh) for each in given]
        for number in range(200):
            if wait.random() < 0.1:
                time.sleep(wait.random() * 1e-2)
            counts = [24 + 8 * (number % 3)] * 4
            out = torus_attention(*given[number % 3], mesh=mesh, tokens=(counts, counts))
            assert torch.equal(out, first[number % 3]), number
        mesh.close()

    unraised(virtual.together(4, rank))


def test_flags_reach_ranks_of_another_host_as_copies(monkeypatch):
    """Within an NVLink domain: no stream memory operation writes to memory elsewhere."""
    virtual.stand_in(monkeypatch)
    monkeypatch.setattr(virtual.Virtual, "_elsewhere", range(4))
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    make = virtual.meshes(2, 2, 2)

    def rank(position):
        mesh, written = make[position](), []
        write = mesh.window._driver.write_64
        mesh.window._driver.write_64 = lambda into, *rest: (written.append(into), write(into, *rest))
        out = [torus_attention(*inputs(position, seed, 40, 2), mesh=mesh) for seed in range(4)]
        mesh.close()
        return out, set(written) - {word.data_ptr() for word in mesh.window._words.values()}

    for position, (out, others) in enumerate(unraised(virtual.together(4, rank))):
        assert not others
        for seed in range(4):
            assert (out[seed] - whole(4, seed, 40, 2)[position]).abs().max() < 1e-5


class Post(Transport):
    """Another way between threads: chunks in a dictionary of them all."""

    def __init__(self, rank, box):
        self._rank, self._box, self._round = rank, box, 0

    def exchange(self, round, sends, receives):
        self._round += 1
        for parcel in sends:
            self._box[self._round, self._rank, parcel.peer, parcel.slot] = parcel.packed().clone()
        return Taken(self._box, {(self._round, parcel.peer, self._rank, parcel.slot): parcel for parcel in receives})

    def drain(self):
        pass


class Taken(Ticket):
    def __init__(self, box, due):
        self._box, self._due = box, due

    def wait(self):
        while self._due:
            key, parcel = self._due.popitem()
            while key not in self._box:
                time.sleep(1e-3)
            parcel.parts[0].copy_(self._box.pop(key))


@pytest.mark.parametrize("heads", [4, 2])  # 2: keys stay split inside machines
def test_what_a_failed_window_computed_is_nan_on_other_machines_too(heads, monkeypatch):
    """Windows inside machines, something else between them: whoever is over there hears of no failure."""
    virtual.stand_in(monkeypatch)
    make, box = virtual.meshes(2, 2, heads), {}

    def rank(position):
        mesh = make[position]()
        mesh.links["across"] = Post(position, box)
        out = [torus_attention(*inputs(position, 0, 40, heads), mesh=mesh)]
        if position < 2:  # machine 0
            mesh.window._poison_of(mesh.window._memory).fill_(float("nan"))
        out.append(torus_attention(*inputs(position, 0, 40, heads), mesh=mesh))
        mesh.close()
        return out

    for position, (right, lost) in enumerate(unraised(virtual.together(4, rank))):
        assert (right - whole(4, 0, 40, heads)[position]).abs().max() < 1e-5
        assert lost.isnan().all() if position < 2 else lost.isnan().any()


def test_all_to_alls_are_right_and_turn_to_nan_as_attention_does(monkeypatch):
    virtual.stand_in(monkeypatch)
    make = virtual.meshes(2, 2, 4)
    given = [torch.randn(1, 6, 8, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]

    def rank(position):
        mesh = make[position]()
        out = [all_to_all.all_to_all_4d(given[position], 2, 1, mesh) for _ in range(3)]
        mesh.window._poison_of(mesh.window._memory).fill_(float("nan"))  # as a peer does that gives up
        lost = all_to_all.all_to_all_4d(given[position], 2, 1, mesh)
        mesh.close()
        return out, lost

    for position, (out, lost) in enumerate(unraised(virtual.together(4, rank))):
        wanted = torch.cat([x.chunk(4, dim=2)[position] for x in given], dim=1)
        assert all(torch.equal(x, wanted) for x in out) and lost.isnan().all()


def unraised(found):
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


def links(timeout_s=20.0):
    """Two ranks and what makes the transport of each."""
    meeting = virtual.Meeting(2)
    return lambda rank: virtual.Virtual(virtual.ThreadControl(meeting, rank), [4, 5], rank, [1 - rank], timeout_s)


def byte(peer, value=0, offset=0):
    return Parcel((torch.full((1,), value, dtype=torch.uint8),), torch.uint8, peer, 0, offset)


def test_sends_may_exceed_the_staging_area(monkeypatch):
    """More strided chunks than fit: the area starts over once what was there has left."""
    virtual.stand_in(monkeypatch)
    make, tokens = links(), 1 << 19

    def rank(position):
        link = make(position)
        for call in range(3):
            window = link.begin()
            sent = [torch.full((tokens, 2), 1 + call + n, dtype=torch.uint8) for n in range(4)]
            parcels = [Parcel((x[:, 0],), torch.uint8, 1 - position, 0, n * tokens) for n, x in enumerate(sent)]
            parcels += [Parcel((x[:, 1],), torch.uint8, 1 - position, 0, n * tokens) for n, x in enumerate(sent)]
            arrival = link.exchange(0, parcels, [byte(1 - position)] * 8)
            arrival.wait()
            arrival.wait()
            link.drain()
            for n in range(4):
                assert (window[n * tokens : (n + 1) * tokens] == 1 + call + n).all()
        assert link.window_bytes == 2 * (2 << 20)
        link.close()

    unraised(virtual.together(2, rank))


def test_staging_starts_over_only_when_all_streams_have_let_go_of_it(monkeypatch):
    """Two peers, on two streams, of which one is slow; each is sent as much as the area holds."""
    virtual.stand_in(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_chance", 1.0)
    meeting, nbytes = virtual.Meeting(3), 2 << 20

    def rank(position):
        others = [peer for peer in range(3) if peer != position]
        link = virtual.Virtual(virtual.ThreadControl(meeting, position), [0, 1, 2], position, others, 20.0)
        link._puts[0].pause_s = 0.05
        for call in range(8):
            window = link.begin()
            chunks = {peer: torch.full((nbytes, 2), 10 * call + peer, dtype=torch.uint8)[:, 0] for peer in (1, 2)}
            sends = [Parcel((chunks[peer],), torch.uint8, peer, 0) for peer in others] if position == 0 else []
            link.exchange(0, sends, [] if position == 0 else [byte(0)]).wait()
            link.drain()
            assert position == 0 or (window == 10 * call + position).all()
        link.close()

    unraised(virtual.together(3, rank))


def test_a_window_grows_and_a_new_transport_takes_over(monkeypatch):
    virtual.stand_in(monkeypatch)
    make = links()

    def rank(position):
        for _ in range(2):
            link = make(position)
            for nbytes in (1, 3 << 20, 2 << 20, 9 << 20):
                link.reserve(nbytes)
                assert link.begin().numel() >= nbytes
                link.exchange(0, [byte(1 - position, 9, nbytes - 1)], [byte(1 - position)]).wait()
                link.drain()
            link.close()
            link.close()
            with pytest.raises(TransportError, match=f"rank {4 + position}: the virtual transport was closed"):
                link.begin()

    unraised(virtual.together(2, rank))


def test_ranks_that_want_different_windows_are_refused_alike(monkeypatch):
    virtual.stand_in(monkeypatch)
    make = links()
    found = virtual.together(2, lambda position: make(position).reserve((4 + 4 * position) << 20))
    assert len(set(map(str, found))) == 1 and isinstance(found[0], TransportError)
    assert re.search(r"virtual cannot be used: rank 4: wants 4194304 .*rank 5: wants 8388608", str(found[0]))


def test_ranks_that_share_a_gpu_need_room_for_all_of_them(monkeypatch):
    virtual.stand_in(monkeypatch)
    free = Block(ranks=2, half_bytes=2 << 20).nbytes * 3 // 2
    monkeypatch.setattr(device.torch.cuda, "mem_get_info", lambda: (free, free))
    make = links()
    for link in unraised(virtual.together(2, make)):
        link.close()
    monkeypatch.setattr(virtual.Virtual, "_sharing", 2)
    monkeypatch.setattr(device, "_kept", [])  # nothing that could be let go of
    make = links()
    found = virtual.together(2, make)
    assert all(re.search(rf"virtual cannot be used: .*the GPU has {free} bytes left", str(each)) for each in found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_does_not_come_turns_the_result_to_nan_and_the_next_call_raises(mode, monkeypatch):
    virtual.stand_in(monkeypatch)
    make, silent = links(timeout_s=0.5), threading.Event()

    def rank(position):
        with mode():
            link = make(position)
        link.begin()
        if position == 1:
            link.exchange(0, [], [])
            silent.wait()
            return link
        result = torch.ones(3)
        link.exchange(5, [byte(1)], [byte(1)]).wait()  # returns as a stream would go on: when it is released
        with pytest.raises(TransportError, match="nothing came from rank 5 in round 5: waited"):
            link.drain()
        link.poison(result)
        assert result.isnan().all()
        with pytest.raises(TransportError, match="nothing came from rank 5"):
            link.begin()
        link.close()
        silent.set()

    _, peer = unraised(virtual.together(2, rank))
    result = torch.ones(3)
    peer.poison(result)  # the other rank knows, too
    assert result.isnan().all()


def test_a_rank_that_closes_within_a_call_is_noticed(monkeypatch):
    virtual.stand_in(monkeypatch)
    make = links(timeout_s=60.0)

    def rank(position):
        link = make(position)
        link.begin()
        if position == 1:
            link.close()
            return
        started = time.monotonic()
        link.exchange(0, [], [byte(1)]).wait()
        assert time.monotonic() - started < 10
        link.begin()

    found, _ = virtual.together(2, rank)
    assert isinstance(found, TransportError) and "a rank of its group gave up" in str(found)


def test_no_capture(monkeypatch):
    virtual.stand_in(monkeypatch, capturing=True)
    with pytest.raises(ValueError, match="over virtual cannot be captured in a CUDA graph"):
        links()(0)


def test_calls_in_a_capture_are_handed_back(monkeypatch):
    """To xDiT's own USP, and to yunchang's own all-to-all: both are decided alike on all ranks."""
    virtual.stand_in(monkeypatch)
    make = virtual.meshes(1, 2, 4)
    mesh = unraised(virtual.together(2, lambda position: make[position]()))[0]
    served = usp.TorusUSP(original=None, host=Unasked(), mesh=mesh, ring_degree=1, strict=False, log=print)
    exchanged = all_to_all.MeshAllToAll4D(original=None, mesh=mesh, strict=False, log=print)
    plain = ("FLASH", 0.0, False, None, None, None, 1, {})
    assert served.why_not(*plain) is None
    monkeypatch.setattr(device, "captures", lambda: True)
    assert served.why_not(*plain) == "a CUDA graph is being captured, and the flags of virtual count calls"
    assert exchanged.why_not(torch.empty(1, 4, 4, 8), 2, 1, None) == served.why_not(*plain)


class Unasked:
    """An xDiT that runs nothing special."""

    def fp8_communication(self):
        return False

    def cached_by_pipefusion(self, layer):
        return False


@pytest.mark.parametrize("queues", ["1", "unset"])
def test_few_hardware_queues_are_warned_about(queues, monkeypatch):
    virtual.stand_in(monkeypatch)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    if queues == "unset":
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    make = links()
    with pytest.warns(UserWarning, match=f"CUDA_DEVICE_MAX_CONNECTIONS={queues}.*for --sp-transport virtual"):
        unraised(virtual.together(2, lambda position: make(position).close()))
