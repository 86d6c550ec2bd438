"""The protocol of one-sided GPU transports without a GPU: memory layout, and recorded transfers with threads as streams
(``virtual.py``). ``test_device_attention.py`` runs attention over it, ``gpu/test_one_sided.py`` runs it on a GPU."""

from __future__ import annotations

import random
import re
import threading
import time

import pytest
import torch

from sf_xfuser.transport.base import CallMismatch, Parcel, TransportError, TransportUnavailable
from sf_xfuser.transport.gpu import driver, memory
from sf_xfuser.transport.gpu.block import MAX_ROUNDS, Block, round_up_window
from sf_xfuser.transport.gpu.nccl_put import NcclPut
from sf_xfuser.transport.gpu.nvshmem import Nvshmem
from tests import virtual
from tests.virtual import launch, succeeded

# -- memory layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "half_bytes", "scratch_bytes"), [(2, 2 << 20, 0), (70, 6 << 20, 4 << 20)])
def test_regions_of_a_block_do_not_overlap(ranks, half_bytes, scratch_bytes):
    block = Block(ranks=ranks, half_bytes=half_bytes, scratch_bytes=scratch_bytes)
    flags = [block.flag(w, number, half) for w in range(ranks) for number in range(MAX_ROUNDS) for half in (0, 1)]
    assert sorted(flags) == list(range(block.num_flags))
    words = [block.expected, block.begun, block.ended, block.checked, block.others, *map(block.ready, range(ranks))]
    assert all(word % 8 == 0 for word in words) and len(set(words)) == len(words)
    assert block.poison == block.expected + 4
    assert max(words) + 8 <= block.flags and block.flags + 8 * block.num_flags <= block.head_bytes
    starts = [block.head_bytes, block.half(0), block.half(1), block.scratch]
    assert starts == [block.head_bytes, block.head_bytes, block.head_bytes + half_bytes, starts[2] + half_bytes]
    assert block.scratch + scratch_bytes == block.nbytes and all(start % 512 == 0 for start in starts)


def test_the_docstring_example_of_a_block():
    block = Block(ranks=2, half_bytes=2 << 20, scratch_bytes=2 << 20)
    assert (block.flags, block.half(0), block.half(1), block.scratch) == (1024, 33792, 2130944, 4228096)
    assert block.flag(1, 3, half=1) == 3075 and block.flags + 8 * 3075 == 25624


def test_windows_grow_rarely_and_by_an_eighth_at_most():
    sizes = [round_up_window(nbytes, 1 << 21) for nbytes in range(1, 1 << 28, 99_991)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(
        size <= max(1 << 21, nbytes * 9 / 8 + 1)
        for size, nbytes in zip(sizes[300:], range(1, 1 << 28, 99_991)[300:], strict=True)
    )


# -- recorded calls ---------------------------------------------------------------------------------------------------


class Network(virtual.Virtual):
    """Ranks 0 and 1 map each other, ranks 2 and 3 too. Other peers are reached as over NVSHMEM's network: its puts run
    on threads of their own, so chunks without an order between them arrive in any order."""

    def _allocate(self, nbytes):
        block = super()._allocate(nbytes)
        starts = dict(self._address)
        self._address = {peer: start for peer, start in starts.items() if peer // 2 == self._position // 2}
        self._bindings = CpuNvshmem(starts, block.data_ptr())
        return block

    @property
    def _reachable(self):
        return [peer for peer in range(len(self._members)) if peer != self._position]

    _put, record_network, await_network_flag = Nvshmem._put, Nvshmem.record_network, Nvshmem.await_network_flag
    _put_rounds, _put_round = Nvshmem._put_rounds, Nvshmem._put_round


class CpuNvshmem:
    """The functions of nvshmem4py's bindings that ``Nvshmem`` uses, on ``virtual.Stream`` and host memory."""

    def __init__(self, starts, base):
        self._starts, self._base = starts, base

    def _target(self, address, peer):
        return self._starts[peer] + address - self._base

    def putmem_on_stream(self, target, source, nbytes, peer, stream):
        virtual.CpuDriver().copy(self._target(target, peer), source, nbytes, stream)

    def quiet_on_stream(self, stream):
        pass

    def putmem_signal_on_stream(self, target, source, nbytes, signal, value, operation, peer, stream):
        assert operation == 9
        self.putmem_on_stream(target, source, nbytes, peer, stream)
        virtual.CpuDriver().write_64(self._target(signal, peer), value, stream)

    def signal_op_on_stream(self, signal, value, operation, peer, stream):
        assert operation == 9
        virtual.CpuDriver().write_64(self._target(signal, peer), value, stream)

    def signal_wait_until_on_stream(self, address, comparison, value, stream):
        assert (comparison, value != 0) in ((0, True), (1, False))
        batch = (driver.WordBatch.waits_for_any if comparison else driver.WordBatch.waits)([address])
        if comparison == 0:
            batch.values.fill(value)
        virtual.CpuDriver().run(batch, stream)


class NcclNetwork(Network):
    """As ``Network``, over the stand-in of NCCL."""

    def _allocate(self, nbytes):
        block = super()._allocate(nbytes)
        self._nccl = CpuNccl(self._bindings._starts)
        self._windows = self._communicators = [0, 1]
        self._lock = threading.Lock()
        return block

    sees_flags, record_network, _put = NcclPut.sees_flags, NcclPut.record_network, NcclPut._put
    _bind, _put_groups = NcclPut._bind, NcclPut._put_groups


class CpuNccl:
    """The functions of nccl4py's bindings that ``NcclPut`` uses. Of NCCL's documented semantics, only this: the puts of
    a group run at once, and the stream goes on when all have been delivered. Groups of a communicator run one after
    another on all streams, as in NCCL 2.30."""

    def __init__(self, starts):
        self._starts, self._group = starts, []
        self._last = [virtual.CpuDriver().new_event() for _ in range(2)]

    def group_start(self):
        assert not self._group

    def put_signal(self, source, nbytes, dtype, peer, window, offset, signal, context, flags, communicator, stream):
        assert (dtype, window, signal, context, flags) == (1, communicator, 0, 0, 0) and nbytes > 0
        self._group.append((self._starts[peer] + offset, source, nbytes, communicator, stream))

    def group_end(self):
        group, self._group = self._group, []
        driver = virtual.CpuDriver()
        ((communicator, stream),) = {each[3:] for each in group}
        random.shuffle(group)
        in_graph = virtual._capture() is not None  # its groups run in order as well
        if not in_graph:
            driver.wait_event(stream, self._last[communicator])
        for target, source, nbytes, *_ in group:
            driver.copy(target, source, nbytes, stream)
        if not in_graph:
            driver.record(self._last[communicator], stream)


def windows(ranks, timeout_s=20.0, kind=virtual.Virtual, pattern="pairs"):
    """A function that creates the transport of a rank, of global ranks 4, 5, ..."""
    group = virtual.ThreadGroup(ranks)
    members = range(4, 4 + ranks)

    def make(rank):
        peers = [rank ^ 1, rank ^ 2] if pattern == "grid" else [peer for peer in range(ranks) if peer != rank]
        return kind(virtual.ThreadControl(group, rank), members, rank, peers, timeout_s)

    return make


@launch
def copy(target, source):
    target.copy_(source)


@launch
def add_all(target, sources):
    target.copy_(torch.stack(list(sources)).sum(0))


class Calls:
    """Calls of one rank, on a stream of its own. Ranks exchange their inputs, and sum them. Then they exchange sums and
    inputs, and the result is the sum of all. ``pattern``: "ring": inputs reach other ranks through neighbours, in
    several rounds. "grid": rank r first exchanges inputs with r ^ 1, then sums with r ^ 2."""

    def __init__(self, link, pattern):
        self.link, self.pattern, self.stream = link, pattern, virtual.Stream()
        self.rank, self.ranks = link._position, len(link._members)
        link.reserve(1 << 12, 1 << 12)
        self.programs, self.graphs, self.user_graph = {}, {}, None
        self.input = torch.zeros(4)
        self.results, self.expected = [], []
        self.number = 0

    def _slot(self, memory, n):
        return memory[16 * n : 16 * n + 16].view(torch.float32)

    def _record(self, window):
        """(post and compute, then end), for the half of ``window``."""
        link, rank, others = self.link, self.rank, [w for w in range(self.ranks) if w != self.rank]
        first, second = ([rank ^ 1], [rank ^ 2]) if self.pattern == "grid" else (others, others)
        own, total = self._slot(link.scratch, 0), self._slot(link.scratch, 1)
        rounds = []
        if self.pattern == "ring":
            after, before = (rank + 1) % self.ranks, (rank - 1) % self.ranks
            for step in range(self.ranks - 1):
                origin = (rank - step) % self.ranks
                source = own if step == 0 else self._slot(window, origin)
                send = Parcel(source, after, 0, 16 * origin)
                rounds.append(link.record(step, [send], [Parcel(None, before, 0)]))
        else:  # two chunks per round, one of them empty
            sends = [Parcel(x, w, n, 16 * rank) for w in first for n, x in enumerate((own, own[:0]))]
            rounds.append(link.record(0, sends, [Parcel(None, w, n) for w in first for n in (0, 1)]))
        slots = [(total, 16 * (self.ranks + rank)), (own, 16 * (2 * self.ranks + rank))]
        sends = [Parcel(x, w, n, offset) for w in second for n, (x, offset) in enumerate(slots)]
        last = link.record(9, sends, [Parcel(None, w, n) for w in second for n in (0, 1)])
        wait, result, end = link.record_wait(rounds[-1:]), torch.empty(4), link.record_end()

        def run():
            copy(own, self.input)
            for before, transfer in zip([None, *rounds], rounds, strict=False):
                if before is not None:
                    before.wait()
                transfer.post()
            wait()
            add_all(total, [own, *(self._slot(window, w) for w in first)])
            last.post()
            last.wait()
            received = [self._slot(window, n * self.ranks + w) for n in (1, 2) for w in second]
            add_all(result, [total, own, *received])
            end(result)
            launch(lambda: self.results.append(result.clone()))()

        return run

    def _begin(self):
        self.number += 1
        self.link.begin_call(self.number)
        window = self.link.begin()
        if id(window) not in self.programs:
            self.programs[id(window)] = self._record(window)
        return id(window)

    def _inputs(self):
        """The next call sums these."""
        start = 100.0 * len(self.expected)
        copy(self.input, torch.full((4,), start + self.rank))
        total = sum(start + w for w in range(self.ranks))
        grid = total + 2 * start + self.rank + (self.rank ^ 2)
        self.expected.append(grid if self.pattern == "grid" else (self.ranks + 1) * total)

    def make(self, kinds):
        """Enqueue calls of these kinds: "host", "replay" (its own graph), "graph" (a user's graph of three calls)."""
        with virtual.on_stream(self.stream):
            for kind in kinds:
                self._inputs()
                if kind == "graph":
                    self._replay_user_graph()
                    continue
                half = self._begin()
                if kind == "replay":
                    if half not in self.graphs:
                        graph = virtual.Graph()
                        with self.link.capture() as end, graph.capture():
                            self.programs[half]()
                        self.graphs[half] = graph, end
                    graph, end = self.graphs[half]
                    graph.replay()
                    end()
                else:
                    self.programs[half]()

    def check(self):
        virtual.synchronize(self.stream)
        assert [float(x[0]) for x in self.results] == self.expected
        assert all((x == x[0]).all() for x in self.results)

    def _replay_user_graph(self):
        if self.user_graph is None:
            self.user_graph = virtual.Graph()
            with self.user_graph.capture():
                for _ in range(3):
                    self.programs[self._begin()]()
        self.user_graph.replay()
        self.expected += self.expected[-1:] * 2  # three calls of the same inputs


KINDS = {
    "host": ["host"],
    "replays": ["host", "replay", "replay"],
    "graphs": ["host", "graph", "graph"],
    "all": ["host", "replay", "graph"],
}


@pytest.mark.parametrize(("ranks", "pattern"), [(3, "pairs"), (3, "ring"), (4, "grid")])
@pytest.mark.parametrize("kinds", KINDS)
def test_calls_with_delays_are_correct(kinds, ranks, pattern, monkeypatch):
    """Calls of the host and replays of CUDA graphs in any order, with delays on streams and on the host."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    make, rng = windows(ranks, pattern=pattern), random.Random(kinds)
    order = ["host", "host"] + [rng.choice(KINDS[kinds]) for _ in range(60)]

    def rank(position):
        calls = Calls(make(position), pattern)
        calls.make(order)
        calls.check()
        head = calls.link._read_head()
        assert not any(head.flags) and not head.aborted and head.begun == head.ended
        assert head.checked == calls.link._checks
        calls.link.close()

    succeeded(virtual.run_ranks(ranks, rank))


@pytest.mark.parametrize("network", [Network, NcclNetwork])
@pytest.mark.parametrize("kinds", KINDS)
def test_calls_over_a_network_are_correct(kinds, network, monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    make, rng = windows(4, kind=network), random.Random(kinds)
    order = ["host", "host"] + [rng.choice(KINDS[kinds]) for _ in range(30)]

    def rank(position):
        calls = Calls(make(position), "pairs")
        calls.make(order)
        calls.check()
        calls.link.close()

    succeeded(virtual.run_ranks(4, rank))


def test_flags_reach_other_hosts_as_copies(monkeypatch):
    """In an NVLink domain, stream memory operations write local memory only."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Virtual, "other_hosts", range(3))
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    make = windows(3)

    def rank(position):
        calls = Calls(make(position), "pairs")
        run, remote = calls.link.driver.run, []

        def local_only(batch, stream):
            block = range(calls.link._base, calls.link._base + calls.link._block.nbytes)
            remote.extend(x for x in batch.table["address"].tolist() if x not in block)
            run(batch, stream)

        calls.link.driver.run = local_only
        calls.make(["host"] * 20)
        calls.check()
        calls.link.close()
        assert not remote

    succeeded(virtual.run_ranks(3, rank))


def test_a_round_is_one_copy_operation_one_flag_operation_and_one_wait(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(3)

    def rank(position):
        link, others = make(position), [w for w in range(3) if w != position]
        link.reserve(1 << 12, 1 << 12)
        link.begin()
        chunks = [Parcel(link.scratch[:8], w, n, 8 * n) for w in others for n in (0, 1)]
        receives = [Parcel(None, w, n) for w in others for n in (0, 1)]
        first, second, empty = (link.record(n, sends, receives) for n, sends in enumerate((chunks, chunks, [])))
        both = link.record_wait([first, second])
        assert [x.post_launches for x in (first, second, empty)] == [2, 2, 0]
        assert [x.wait_launches for x in (first, second, empty)] == [both.launches] * 3 == [1] * 3
        seen = []
        for operation in (first.post, second.post, both):
            link.driver.calls.clear()
            operation()
            seen.append(list(link.driver.calls))
        link.close()
        return seen

    assert succeeded(virtual.run_ranks(3, rank)) == [[["copies", "batch"], ["copies", "batch"], ["batch"]]] * 3


def test_a_batch_has_at_most_255_operations():
    batch = driver.WordBatch.writes(range(0, 8 * 600, 8))
    assert [count for _, count in batch.parts] == [255, 255, 90] and batch.launches == 3
    assert [address - batch.parts[0][0] for address, _ in batch.parts] == [0, 48 * 255, 48 * 510]


def test_the_window_is_the_same_tensor_in_every_second_call(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(2)

    def rank(position):
        link = make(position)
        seen = []
        for _ in range(4):
            seen.append(link.begin())
            link.exchange(0, [byte(1 - position)], [byte(1 - position)]).wait()
            link.drain()
        assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]
        link.close()

    succeeded(virtual.run_ranks(2, rank))


def byte(peer, value=0, offset=0):
    return Parcel(torch.full((1,), value, dtype=torch.uint8), peer, 0, offset)


def test_strided_tensors_for_peers_that_are_not_mapped_go_through_scratch(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(4, kind=Network)

    def rank(position):
        link, others = make(position), [w for w in range(4) if w != position]
        link.reserve(1 << 10, 1 << 10)
        for _ in range(3):
            sent = torch.stack([torch.full((64,), position, dtype=torch.uint8)] * 2, 1)
            window = link.begin()
            sends = [Parcel(sent[:, 0], w, 0, 64 * position) for w in others]
            link.exchange(0, sends, [Parcel(None, w, 0) for w in others]).wait()
            assert all((window[64 * w : 64 * w + 64] == w).all() for w in others)
            link.drain()
        link.begin()
        with pytest.raises(ValueError, match="the chunks for other machines need 6291456 bytes of scratch memory"):
            link.exchange(0, [Parcel(torch.zeros(3 << 20, 2, dtype=torch.uint8), w, 0) for w in others], [])
        link.drain()
        link.close()

    succeeded(virtual.run_ranks(4, rank))


def test_a_window_grows_and_a_new_transport_replaces_it(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make, streams = windows(2), []

    def rank(position):
        for _ in range(3):
            link = make(position)
            streams.append(link.streams)
            for nbytes, scratch in ((1, 0), (3 << 20, 1), (2 << 20, 5 << 20), (9 << 20, 3)):
                link.reserve(nbytes, scratch)
                assert link.begin().numel() >= nbytes and link.scratch.numel() >= scratch
                link.exchange(0, [byte(1 - position, 9, nbytes - 1)], [byte(1 - position)]).wait()
                link.drain()
            assert link.window_bytes == 2 * (10 << 20) and link.scratch.numel() == 6 << 20
            link.close()
            link.close()
            with pytest.raises(TransportError, match=f"rank {4 + position}: the virtual transport is closed"):
                link.begin()

    succeeded(virtual.run_ranks(2, rank))
    assert len(set(map(id, streams))) == 4  # of two ranks: the second window replaces the first, the third reuses it


def test_ranks_that_request_different_windows_raise_the_same_error(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(2)
    errors = virtual.run_ranks(2, lambda position: make(position).reserve((4 + 4 * position) << 20, 0))
    assert len(set(map(str, errors))) == 1 and isinstance(errors[0], TransportError)
    assert re.search(
        r"virtual cannot be used: rank 4: requests 4194304 \+ 2097152 .*rank 5: requests 8388608", str(errors[0])
    )


def test_ranks_that_share_a_gpu_need_memory_for_all_of_them(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    free = Block(ranks=2, half_bytes=2 << 20, scratch_bytes=2 << 20).nbytes * 3 // 2
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda: (free, free))
    make = windows(2)
    for link in succeeded(virtual.run_ranks(2, make)):
        link.close()
    monkeypatch.setattr(virtual.Virtual, "_ranks_on_gpu", 2)
    monkeypatch.setattr(memory, "closed_windows", [])  # no memory that could be freed
    errors = virtual.run_ranks(2, windows(2))
    assert all(re.search(rf"virtual cannot be used: .*the GPU has {free} bytes free", str(each)) for each in errors)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_missing_chunk_poisons_the_result_and_the_next_call_raises(mode, monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make, silent = windows(2, timeout_s=0.1), threading.Event()

    def rank(position):
        with mode():
            link = make(position)
        link.begin()
        if position == 1:
            silent.wait()
            link.close()
            return
        result = torch.ones(3)
        transfer = link.record(5, [byte(1)], [byte(1)])
        end = link.record_end()
        transfer.post()
        transfer.wait()  # returns when the watchdog releases it
        link.poison(result)
        assert result.isnan().all()
        late = r"rank 4 on .*: no data from rank 5 in round 5: waited .* flag 0 of call 1: identity=0.*: not raised"
        for operation in (lambda: end(result), transfer.post, transfer.wait, link.begin):
            with pytest.raises(TransportError, match=late):
                operation()
        link.close()
        silent.set()

    succeeded(virtual.run_ranks(2, rank))


@pytest.mark.parametrize("network", [virtual.Virtual, Network, NcclNetwork])
@pytest.mark.parametrize("kind", ["host", "replay", "graph"])
def test_a_rank_that_stops_turns_all_later_results_into_nan(kind, network, monkeypatch):
    """Rank 1 stops before a call. The others have already enqueued theirs, and more of them."""
    virtual.use_cpu_streams(monkeypatch)
    make, stopped = windows(3, timeout_s=0.2, kind=network), threading.Barrier(3, timeout=20)

    def rank(position):
        calls = Calls(make(position), "pairs")
        calls.make(["host"] * 2 + [kind] * 3)
        calls.check()
        valid = len(calls.results)
        stopped.wait()
        if position != 1:
            with pytest.raises(TransportError, match=r"rank 5 |did not complete|aborted"):
                calls.make([kind] * 4)
                virtual.synchronize(calls.stream)
                calls.link.begin()
            virtual.synchronize(calls.stream)
            assert len(calls.results) > valid and all(x.isnan().all() for x in calls.results[valid:])
        stopped.wait()
        calls.link.close()

    succeeded(virtual.run_ranks(3, rank))


@pytest.mark.parametrize("network", [virtual.Virtual, Network, NcclNetwork])
@pytest.mark.parametrize("kind", ["host", "replay"])
def test_a_call_with_another_identity_turns_results_into_nan_everywhere(kind, network, monkeypatch):
    """Rank 0 makes another call. Rank 3 exchanges nothing with it, but its result depends on it."""
    virtual.use_cpu_streams(monkeypatch)
    make, ended = windows(4, timeout_s=2.0, kind=network, pattern="grid"), threading.Barrier(4, timeout=20)

    def rank(position):
        calls = Calls(make(position), "grid")
        calls.make(["host"] * 2 + [kind] * 3)
        calls.check()
        valid = len(calls.results)
        calls.number += position == 0
        calls.make([kind])
        virtual.synchronize(calls.stream)
        assert len(calls.results) == valid + 1 and calls.results[-1].isnan().all()
        ended.wait()
        try:
            with pytest.raises(TransportError, match=r"another call|aborted") as raised:
                calls.make([kind] * 3)
        finally:
            ended.wait()
            calls.link.close()
        return raised.type

    assert CallMismatch in succeeded(virtual.run_ranks(4, rank))


def test_a_rank_that_closes_during_a_call_is_detected(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(2, timeout_s=60.0)

    def rank(position):
        link = make(position)
        link.begin()
        if position == 1:
            link.close()
            return
        started = time.monotonic()
        link.exchange(0, [], [byte(1)]).wait()
        assert time.monotonic() - started < 10
        link.drain()

    error, _ = virtual.run_ranks(2, rank)
    assert isinstance(error, TransportError) and "a rank of its group aborted" in str(error)


def test_memory_of_a_user_graph_neither_grows_nor_is_freed(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = windows(2)

    def rank(position):
        calls = Calls(make(position), "pairs")
        calls.make(["host", "host", "graph"])
        with pytest.raises(TransportUnavailable, match="a CUDA graph refers to its window"):
            calls.link.reserve(64 << 20, 0)
        calls.link.close()
        make(position).close()

    succeeded(virtual.run_ranks(2, rank))
    assert len(memory.kept_windows) == 2 and all(window._memory is not None for window in memory.kept_windows)


def test_what_a_capture_rejects(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    link = succeeded(virtual.run_ranks(2, windows(2)))[0]
    link.begin()
    with link.capture(), virtual.Graph().capture():
        assert link.unavailable_reason() is None
        with pytest.raises(ValueError, match="make the same calls once before the capture"):
            link.reserve(64 << 20, 0)
        with pytest.raises(ValueError, match="make the same calls once before the capture"):
            link.record(0, [], [byte(1)])
        with pytest.raises(ValueError, match="cannot allocate memory while a CUDA graph is captured"):
            windows(2)(0)


@pytest.mark.parametrize("queues", ["8", "unset"])
def test_few_hardware_queues_warn(queues, monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    if queues == "unset":
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    make = windows(2)
    with pytest.warns(UserWarning, match=f"CUDA_DEVICE_MAX_CONNECTIONS={queues}: --sp-transport virtual can deadlock"):
        succeeded(virtual.run_ranks(2, lambda position: make(position).close()))


def test_one_hardware_queue_is_refused_on_every_rank(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    errors = virtual.run_ranks(2, windows(2))
    assert all(isinstance(each, TransportUnavailable) for each in errors) and len(set(map(str, errors))) == 1
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in str(errors[0]) and "set it to 32 before CUDA starts" in str(errors[0])
