"""Rank side of test_shm.py: four ranks of one host. Each case prints what the rank saw."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from cases import report, run_cases

from sf_xfuser import kernels
from sf_xfuser.config import TorusArgs
from sf_xfuser.torus import links
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import Parcel, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu import segment, shm
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.rendezvous import StoreGroup

segment.PREFIX = "sf-xfuser_ranks-"  # distinct from other jobs on this host


def mesh_of(transport, topology="2x2", timeout=20.0, heads=4):
    return build_mesh(
        [[0, 1, 2, 3]], TorusArgs(backend="torus", topology=topology, transport=transport, timeout=timeout), heads=heads
    )


def inputs(rank, seed, tokens=8, heads=4):
    make = torch.Generator().manual_seed(seed * 4 + rank)
    return [torch.randn(1, heads, tokens, 8, generator=make) for _ in range(3)]


def call(mesh, tensors, tokens=8):
    return torus_attention(*tensors, mesh=mesh, tokens=([tokens] * 4, [tokens] * 4))


def case_bitwise_equal_to_tcp(rank):
    for topology in ("1x4", "2x2", "4x1"):
        for heads in (4, 2):  # 2: a ring, which forwards blocks
            over = {name: mesh_of(name, topology, heads=heads) for name in ("shm", "tcp", "auto")}
            q, k, v = inputs(rank, 0, 300, heads)
            found = {name: call(mesh, (q, k, v), 300) for name, mesh in over.items()}
            assert torch.equal(found["shm"], found["tcp"])
            assert torch.equal(found["auto"], found["tcp"])
            assert over["auto"].transport in ("shm", "tcp") and "the fastest of shm" in over["auto"].transport_reason
            assert any(line.startswith("transport ") and " ms, tcp " in line for line in over["auto"].lines())
            for mesh in over.values():
                mesh.close()
    return "equal"


NUM_CALLS = int(os.environ.get("NUM_CALLS", "3000"))


def case_random_pauses(rank):
    """Calls with random pauses before accesses to shared memory, first unstaged, then staged. Each is bitwise equal to
    the same call over TCP."""
    over_tcp, mesh, rng = mesh_of("tcp"), mesh_of("shm"), random.Random(rank)
    batches = [inputs(rank, seed) for seed in range(7)]
    paused = dict.fromkeys(("put", "flag", "wait", "read"), 0)

    def pause(where):
        if rng.random() < 0.004:
            paused[where] += 1
            time.sleep(rng.random() * 2e-3)

    mesh.window.pause = pause
    for unstaged in (True, False):
        over_tcp.one_host = mesh.one_host = unstaged
        over_tcp.calls.clear()
        mesh.calls.clear()
        wanted = [call(over_tcp, tensors) for tensors in batches]
        for number in range(NUM_CALLS // 2):
            assert torch.equal(call(mesh, batches[number % 7]), wanted[number % 7]), f"call {number} {unstaged=}"
    assert min(paused.values()) > 0, paused
    return f"{NUM_CALLS} calls equal"


def case_changing_shapes_in_a_single_half(rank):
    """As between machines: shared memory inside, TCP across. Before a rank reads an output, its sender may have started
    a call with other offsets."""
    shared, links.shared_links = links.shared_links, lambda *_: ["inside"]
    try:
        mesh = mesh_of("auto")
    finally:
        links.shared_links = shared
    mesh.one_host = False
    mesh.use_transport("shm inside, tcp across")
    mesh.transport_reason = "it has a single half"
    assert mesh.window.halves == 1
    over_tcp = mesh_of("tcp")
    over_tcp.one_host = False
    sizes, rng = [8, 40, 24, 8, 8, 56], random.Random(rank)
    batches = {tokens: inputs(rank, tokens, tokens) for tokens in sizes}
    wanted = {tokens: call(over_tcp, batches[tokens], tokens) for tokens in batches}
    mesh.window.pause = lambda where: time.sleep(1e-3) if where == "read" and rng.random() < 0.2 else None
    for number in range(300):
        tokens = sizes[number % len(sizes)]
        assert torch.equal(call(mesh, batches[tokens], tokens), wanted[tokens]), f"call {number} of {tokens} tokens"
    return "300 calls equal"


def case_inference_mode_first(rank):
    """Views of the window are cached across calls, together with the mode in which they were created."""
    mesh, over_tcp, tensors = mesh_of("shm"), mesh_of("tcp"), inputs(rank, 0)
    wanted = call(over_tcp, tensors)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            found = [call(mesh, tensors) for _ in range(4)]
        assert all(torch.equal(x, wanted) for x in found), mode
    return "equal"


def mapped() -> int:
    """Segments that this process has mapped."""
    return sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def case_memory(rank):
    """600 calls of 300 shapes: memory grows only with the largest shape, and windows are replaced rarely."""
    gc.collect()
    others = mapped()
    mesh = mesh_of("shm")
    sizes = [8, 40, 24, 8, 56]
    grown = []
    for number in range(600):
        tokens = sizes[number % 5] + number // 10
        call(mesh, inputs(rank, 0, tokens), tokens)
        if mesh.window.window_bytes not in grown:
            grown.append(mesh.window.window_bytes)
        if number == 300:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
    assert after[1] == before[1] and mapped() - others == 4, (before, after, mapped(), others)
    assert after[0] - before[0] < 8 << 10, (before, after)  # KiB
    assert len(grown) <= 16 and len(mesh.calls) <= 64, (grown, len(mesh.calls))
    # Q and KV of 4 ranks, O from 3: 115 tokens x 32 bytes each.
    exact = 2 * sum(-(-rows * 115 * 32 // 64) * 64 for rows in (4, 4 * 2, 1, 1, 1))
    assert exact <= mesh.window.window_bytes <= exact * 9 / 8 + 2 * 4096, (exact, mesh.window.window_bytes)
    return "bounded"


def transport(timeout_s=20.0):
    rank = dist.get_rank()
    control = ControlPlane(StoreGroup.world(timeout_s), [0, 1, 2, 3], rank, timeout_s)
    return Shm(control, [0, 1, 2, 3], rank, [p for p in range(4) if p != rank], timeout_s)


def byte(peer, value=0, offset=0):
    return Parcel(torch.full((1,), value, dtype=torch.uint8), peer, 0, offset)


def case_file_mode(rank):
    modes = []
    create = segment.Segment.create

    def create_and_record(*sizes):
        segment = create(*sizes)
        modes.append(oct(os.stat(segment.path).st_mode & 0o7777))
        return segment

    segment.Segment.create = create_and_record
    try:
        link = transport()
    finally:
        segment.Segment.create = create
    link.close()
    return " ".join(modes)


def case_no_name_remains(rank):
    link = transport()
    dist.barrier()
    names = [name for name in os.listdir("/dev/shm") if name.startswith(segment.PREFIX)]
    link.close()
    return f"names: {names}"


def case_stale_segments_are_removed(rank):
    mine = segment.Segment.create(1, 4096, 2)
    dist.barrier()
    if rank == 0:
        child = os.fork()
        if child == 0:
            segment.Segment.create(1, 4096, 2)
            os._exit(0)
        os.waitpid(child, 0)
    plain = Path(f"/dev/shm/{segment.PREFIX}{os.geteuid()}-{rank:032x}")  # a file with a segment's name
    plain.write_text("not a segment")
    dist.barrier()
    before = {name for name in os.listdir("/dev/shm") if name.startswith(segment.PREFIX)}
    dist.barrier()
    transport().close()  # removes stale segments
    dist.barrier()
    removed = before - set(os.listdir("/dev/shm"))
    kept = os.path.exists(mine.path), plain.exists()
    dist.barrier()
    mine.unlink()
    mine.close()
    plain.unlink(missing_ok=True)
    return f"removed {len(removed)} of {len(before)}, kept live and plain files: {kept}"


def case_timeout(rank):
    link = transport(timeout_s=0.3)
    link.begin()
    if rank == 3:
        dist.barrier()
        return "silent"
    try:
        link.exchange(5, [], [byte(3)]).wait()
    finally:
        dist.barrier()
    return "no error"


def case_peer_aborts(rank):
    """Rank 0 times out on rank 3. The others wait for rank 0 and fail long before their own timeout."""
    link = transport(timeout_s=0.2 if rank == 0 else 30.0)
    link.begin()
    started = time.monotonic()
    if rank == 3:
        dist.barrier()
        return "silent"
    try:
        link.exchange(0, [], [byte(3 if rank == 0 else 0)]).wait()
    finally:
        assert time.monotonic() - started < 5
        dist.barrier()
    return "no error"


def case_peer_is_ahead(rank):
    """Rank 3 has made three calls alone, so its flags are beyond any value of this call."""
    link = transport(timeout_s=1.0)
    for _ in range(3 if rank == 3 else 1):
        link.begin()
        if rank == 3:
            link.exchange(0, [byte(peer) for peer in range(3)], [])
    dist.barrier()
    if rank == 3:
        return "silent"
    link.exchange(0, [], [byte(3)]).wait()
    return "no error"


def case_attention_fails_on_one_rank(rank):
    """The peers fail at once, and do not use chunks of its next call for this one."""
    mesh, tensors = mesh_of("shm"), inputs(rank, 0)
    wanted = call(mesh, tensors)

    def attend(*qkv):
        if rank == 1:
            raise MemoryError("planted")
        return kernels.sdpa_attend(*qkv)

    started, outcome = time.monotonic(), "no error"
    try:
        torus_attention(*tensors, mesh=mesh, attention=attend, tokens=([8] * 4, [8] * 4))
    except (MemoryError, TransportError) as error:
        outcome = f"{type(error).__name__}: {error}"
    assert time.monotonic() - started < 10
    assert torch.equal(call(mesh, inputs(rank, 0)), wanted)
    return outcome


def case_trial_fails(rank):
    """A transport fails during trials. The next call repeats them."""
    mesh, tensors = mesh_of("auto"), inputs(rank, 0)
    connect = mesh.transports["tcp"]

    def fail(control):
        raise TransportError("planted")

    mesh.transports["tcp"] = fail
    try:
        call(mesh, tensors)
    except TransportError as error:
        mesh.transports["tcp"] = connect
        assert torch.equal(call(mesh, tensors), call(mesh_of("tcp"), tensors))
        assert "shm" in mesh.transport_reason and "tcp" in mesh.transport_reason
        return f"TransportError: {error}"
    return "no error"


def case_use_after_close(rank):
    link = transport()
    link.close()
    link.close()
    link.begin()
    return "no error"


def case_different_windows(rank):
    link = transport()
    link.reserve(1 << 20 if rank == 2 else 1 << 22, 0)
    return "no error"


def case_too_little_memory(rank):
    link = transport()
    free = os.statvfs("/dev/shm")
    link.reserve(free.f_bavail * free.f_frsize, 0)
    return "no error"


def with_memory_of(pages, rank, tokens):
    """What ``auto`` selects, and why, if rank 2 sees this many free pages in /dev/shm."""
    kept = os.fstatvfs
    if rank == 2:
        os.fstatvfs = lambda file: SimpleNamespace(f_bavail=pages, f_frsize=4096)
    try:
        mesh = mesh_of("auto")
        call(mesh, inputs(rank, 0, tokens), tokens)
        assert not mesh.failed
        return f"{mesh.transport}, {mesh.transport_reason}"
    finally:
        os.fstatvfs = kept


def case_auto_with_too_little_memory(rank):
    """Rank 2 detects it when the first call reserves its window."""
    return with_memory_of(16, rank, tokens=600)


def case_auto_selects_again(rank):
    """shm is selected; then a call needs a window that does not fit on rank 2, and the next call one that would fit."""
    mesh = mesh_of("auto")
    call(mesh, inputs(rank, 0))
    mesh.use_transport("shm")
    logged = []
    mesh.log = logged.append
    kept = os.fstatvfs
    if rank == 2:
        os.fstatvfs = lambda file: SimpleNamespace(f_bavail=16, f_frsize=4096)
    try:
        out = call(mesh, inputs(rank, 1, 600), 600)
    finally:
        os.fstatvfs = kept
    assert torch.equal(out, call(mesh_of("tcp"), inputs(rank, 1, 600), 600))
    call(mesh, inputs(rank, 0))
    return f"{mesh.transport}, {mesh.transport_reason}; {logged[0]}"


def case_auto_without_memory(rank):
    """Rank 2 detects it when links are first created."""
    return with_memory_of(0, rank, tokens=8)


def case_no_shared_memory(rank):
    """Rank 2 reports another memory domain: auto uses tcp, and shm is refused on every rank."""
    if rank == 2:
        shm.identity, kept = (lambda: "elsewhere"), shm.identity
    try:
        report("selected_by_auto", mesh_of("auto").transport)
        mesh_of("shm")
    finally:
        if rank == 2:
            shm.identity = kept
    return "no error"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], (TransportError, ValueError))
    dist.destroy_process_group()
