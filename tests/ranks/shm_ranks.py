"""Rank side of test_shm.py: four ranks of one host; each case prints what each rank saw."""

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
from sf_xfuser.torus import links as links
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.mesh import build_mesh
from sf_xfuser.transport.base import Parcel, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu import shm
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.rendezvous import Agreement

shm._PREFIX = "sf-xfuser_ranks-"  # apart from jobs that come and go meanwhile


def mesh_of(transport, topology="2x2", timeout=20.0, heads=4):
    return build_mesh(
        [[0, 1, 2, 3]], TorusArgs(backend="torus", topology=topology, transport=transport, timeout=timeout), heads=heads
    )


def inputs(rank, seed, tokens=8, heads=4):
    make = torch.Generator().manual_seed(seed * 4 + rank)
    return [torch.randn(1, heads, tokens, 8, generator=make) for _ in range(3)]


def call(mesh, tensors, tokens=8):
    return torus_attention(*tensors, mesh=mesh, tokens=([tokens] * 4, [tokens] * 4))


def case_the_same_bits_as_over_tcp(rank):
    for topology in ("1x4", "2x2", "4x1"):
        for heads in (4, 2):  # 2: a ring, whose blocks are passed on
            over = {name: mesh_of(name, topology, heads=heads) for name in ("shm", "tcp", "auto")}
            q, k, v = inputs(rank, 0, 300, heads)
            found = {name: call(mesh, (q, k, v), 300) for name, mesh in over.items()}
            assert torch.equal(found["shm"], found["tcp"])
            assert torch.equal(found["auto"], found["tcp"])
            assert over["auto"].transport in ("shm", "tcp") and "the fastest of shm" in over["auto"].chosen
            assert any(line.startswith("transport ") and " ms, tcp " in line for line in over["auto"].lines())
            for mesh in over.values():
                mesh.close()
    return "equal"


def case_chaos(rank):
    """Thousands of calls with pauses before any access to shared memory, without overlap and then with it; each has the
    bits of the same call over TCP."""
    over_tcp, mesh, wait = mesh_of("tcp"), mesh_of("shm"), random.Random(rank)
    given = [inputs(rank, seed) for seed in range(7)]
    paused = dict.fromkeys(("put", "flag", "wait", "read"), 0)

    def pause(where):
        if wait.random() < 0.004:
            paused[where] += 1
            time.sleep(wait.random() * 2e-3)

    mesh.window.pause = pause
    for overlap in (False, True):
        over_tcp.one_host = mesh.one_host = not overlap
        over_tcp.calls.clear()
        mesh.calls.clear()
        wanted = [call(over_tcp, tensors) for tensors in given]
        for number in range(EPOCHS // 2):
            assert torch.equal(call(mesh, given[number % 7]), wanted[number % 7]), f"call {number} {overlap=}"
    assert min(paused.values()) > 0, paused
    return f"{EPOCHS} calls equal"


def case_shapes_that_change_in_a_single_half(rank):
    """As between machines that share nothing: shared memory inside, TCP across. Before an output is read its sender may
    have gone on to a call whose chunks lie elsewhere."""
    shared, links.shared_links = links.shared_links, lambda *_: ["inside"]
    try:
        mesh = mesh_of("auto")
    finally:
        links.shared_links = shared
    mesh.one_host = False
    mesh.use("shm inside, tcp across")
    mesh.chosen = "the one with a single half"
    assert mesh.window.halves == 1
    over_tcp = mesh_of("tcp")
    over_tcp.one_host = False
    sizes, wait = [8, 40, 24, 8, 8, 56], random.Random(rank)
    given = {tokens: inputs(rank, tokens, tokens) for tokens in sizes}
    wanted = {tokens: call(over_tcp, given[tokens], tokens) for tokens in given}
    mesh.window.pause = lambda where: time.sleep(1e-3) if where == "read" and wait.random() < 0.2 else None
    for number in range(300):
        tokens = sizes[number % len(sizes)]
        assert torch.equal(call(mesh, given[tokens], tokens), wanted[tokens]), f"call {number} of {tokens} tokens"
    return "300 calls equal"


def case_first_in_inference_mode(rank):
    """Views of the window are kept from call to call, and with them the mode in which they were made."""
    mesh, over_tcp, tensors = mesh_of("shm"), mesh_of("tcp"), inputs(rank, 0)
    wanted = call(over_tcp, tensors)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            found = [call(mesh, tensors) for _ in range(4)]
        assert all(torch.equal(x, wanted) for x in found), mode
    return "equal"


def mapped() -> int:
    """Segments of shared memory that this process still sees, its own and others'."""
    return sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def case_memory(rank):
    """A thousand calls, 500 shapes: memory grows no more than the largest shape does, and windows seldom."""
    gc.collect()
    others = mapped()
    mesh = mesh_of("shm")
    sizes = [8, 40, 24, 8, 56]
    grown = []
    for number in range(1000):
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
    # Q and KV of 4 ranks, O from 3: 155 tokens x 32 bytes each.
    exact = 2 * sum(-(-rows * 155 * 32 // 64) * 64 for rows in (4, 4 * 2, 1, 1, 1))
    assert exact <= mesh.window.window_bytes <= exact * 9 / 8 + 2 * 4096, (exact, mesh.window.window_bytes)
    return "as small as they should be"


def transport(timeout_s=20.0):
    rank = dist.get_rank()
    control = ControlPlane(Agreement.of_world(timeout_s), [0, 1, 2, 3], rank, timeout_s)
    return Shm(control, [0, 1, 2, 3], rank, [p for p in range(4) if p != rank], timeout_s)


def byte(peer, value=0, offset=0):
    return Parcel((torch.full((1,), value, dtype=torch.uint8),), torch.uint8, peer, 0, offset)


def case_only_the_user_may_open_it(rank):
    modes = []
    create = shm._Segment.create

    def look(*sizes):
        segment = create(*sizes)
        modes.append(oct(os.stat(segment.path).st_mode & 0o7777))
        return segment

    shm._Segment.create = look
    try:
        link = transport()
    finally:
        shm._Segment.create = create
    link.close()
    return " ".join(modes)


def case_no_name_is_left(rank):
    link = transport()
    dist.barrier()
    names = [name for name in os.listdir("/dev/shm") if name.startswith(shm._PREFIX)]
    link.close()
    return f"names: {names}"


def case_what_the_dead_left_is_removed(rank):
    mine = shm._Segment.create(64, 4096, 2)
    dist.barrier()
    if rank == 0:
        child = os.fork()
        if child == 0:
            shm._Segment.create(64, 4096, 2)
            os._exit(0)
        os.waitpid(child, 0)
    plain = Path(f"/dev/shm/{shm._PREFIX}{os.geteuid()}-{rank:032x}")  # a file of this user's that looks like one
    plain.write_text("somebody's")
    dist.barrier()
    before = {name for name in os.listdir("/dev/shm") if name.startswith(shm._PREFIX)}
    dist.barrier()
    transport().close()  # sees to it
    dist.barrier()
    removed = before - set(os.listdir("/dev/shm"))
    kept = os.path.exists(mine.path), plain.exists()
    dist.barrier()
    mine.unlink()
    mine.close()
    plain.unlink(missing_ok=True)
    return f"removed {len(removed)} of {len(before)}, kept the living and the plain: {kept}"


def case_nothing_comes(rank):
    link = transport(timeout_s=1.0)
    link.begin()
    if rank == 3:
        dist.barrier()
        return "silent"
    try:
        link.exchange(5, [], [byte(3)]).wait()
    finally:
        dist.barrier()
    return "went unnoticed"


def case_one_gives_up(rank):
    """Rank 0 waits in vain for rank 3; the others, who wait for rank 0, hear of it long before their own time-out."""
    link = transport(timeout_s=1.0 if rank == 0 else 30.0)
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
    return "went unnoticed"


def case_one_is_ahead(rank):
    """Rank 3 has made calls alone: its flags say more than any of this call's can."""
    link = transport(timeout_s=1.0)
    for _ in range(3 if rank == 3 else 1):
        link.begin()
        if rank == 3:
            link.exchange(0, [byte(peer) for peer in range(3)], [])
    dist.barrier()
    if rank == 3:
        return "silent"
    link.exchange(0, [], [byte(3)]).wait()
    return "went unnoticed"


def case_attention_fails_on_one_rank(rank):
    """Its peers hear of it at once, and cannot take chunks of its next call for those of this one."""
    mesh, tensors = mesh_of("shm"), inputs(rank, 0)
    wanted = call(mesh, tensors)

    def attend(*qkv):
        if rank == 1:
            raise MemoryError("as it should")
        return kernels.sdpa_attend(*qkv)

    started, said = time.monotonic(), "went unnoticed"
    try:
        torus_attention(*tensors, mesh=mesh, attention=attend, tokens=([8] * 4, [8] * 4))
    except (MemoryError, TransportError) as error:
        said = f"{type(error).__name__}: {error}"
    assert time.monotonic() - started < 10
    assert torch.equal(call(mesh, inputs(rank, 0)), wanted)
    return said


def case_a_transport_cannot_be_tried(rank):
    """The next call tries again."""
    mesh, tensors = mesh_of("auto"), inputs(rank, 0)
    connect = mesh.transports["tcp"]

    def fail(control):
        raise TransportError("as it should")

    mesh.transports["tcp"] = fail
    try:
        call(mesh, tensors)
    except TransportError as error:
        mesh.transports["tcp"] = connect
        assert torch.equal(call(mesh, tensors), call(mesh_of("tcp"), tensors))
        assert "shm" in mesh.chosen and "tcp" in mesh.chosen
        return f"TransportError: {error}"
    return "went unnoticed"


def case_use_after_close(rank):
    link = transport()
    link.close()
    link.close()
    link.begin()
    return "went unnoticed"


def case_different_windows(rank):
    link = transport()
    link.reserve(1 << 20 if rank == 2 else 1 << 22)
    return "went unnoticed"


def case_too_little_memory(rank):
    link = transport()
    free = os.statvfs("/dev/shm")
    link.reserve(free.f_bavail * free.f_frsize)
    return "went unnoticed"


def with_memory_of(pages, rank, tokens):
    """``auto`` where rank 2 sees so many pages free in /dev/shm: what it takes, and why."""
    kept = os.fstatvfs
    if rank == 2:
        os.fstatvfs = lambda file: SimpleNamespace(f_bavail=pages, f_frsize=4096)
    try:
        mesh = mesh_of("auto")
        call(mesh, inputs(rank, 0, tokens), tokens)
        assert not mesh.failed
        return f"{mesh.transport}, {mesh.chosen}"
    finally:
        os.fstatvfs = kept


def case_auto_does_without_too_little_memory(rank):
    """Which rank 2 says once it knows how large a window the first call needs."""
    return with_memory_of(16, rank, tokens=600)


def case_auto_chooses_again(rank):
    """shm was chosen, and then comes a call whose window does not fit on rank 2; and one that would fit again."""
    mesh = mesh_of("auto")
    call(mesh, inputs(rank, 0))
    mesh.use("shm")
    said = []
    mesh.log = said.append
    kept = os.fstatvfs
    if rank == 2:
        os.fstatvfs = lambda file: SimpleNamespace(f_bavail=16, f_frsize=4096)
    try:
        out = call(mesh, inputs(rank, 1, 600), 600)
    finally:
        os.fstatvfs = kept
    assert torch.equal(out, call(mesh_of("tcp"), inputs(rank, 1, 600), 600))
    call(mesh, inputs(rank, 0))
    return f"{mesh.transport}, {mesh.chosen}; {said[0]}"


def case_auto_does_without_any_memory(rank):
    """Which rank 2 says when links are first made."""
    return with_memory_of(0, rank, tokens=8)


def case_shared_memory_is_not_there(rank):
    """Rank 2 says that it lives elsewhere: auto does without, shm is refused on every rank."""
    if rank == 2:
        shm.identity, kept = (lambda: "elsewhere"), shm.identity
    try:
        report("what_auto_takes", mesh_of("auto").transport)
        mesh_of("shm")
    finally:
        if rank == 2:
            shm.identity = kept
    return "went unnoticed"


EPOCHS = int(os.environ.get("CHAOS_EPOCHS", "3000"))

if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], (TransportError, ValueError))
    dist.destroy_process_group()
