"""Rank side of test_mesh_failures.py: four ranks that fail or differ, over each transport; each reports what it saw.

Every result is compared with float64 attention over the tokens of all ranks, so a case says "right" or how far off."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from fractions import Fraction
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import run_cases
from diffusers import FluxTransformer2DModel

from sf_xfuser.autotune.selector import Choice
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.diffusers import parallelize
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.torus import links as links
from sf_xfuser.torus.all_gather import all_gather
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.mesh import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.cpu import shm

shm._PREFIX = "sf-xfuser_apart-"  # apart from jobs that come and go meanwhile

TRANSPORTS = ("shm", "tcp", "two_sided")
COUNTS = {"tokens": ([16] * 4, [16] * 4)}


def mesh_of(transport, timeout=5.0, topology="2x2", heads=4):
    args = TorusArgs(backend="torus", topology=topology, transport=transport, timeout=timeout)
    return build_mesh([[0, 1, 2, 3]], args, heads=heads)


def qkv(rank, seed, tokens=16, dtype=torch.float32):
    make = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randn(1, 4, tokens, 8, generator=make).to(dtype) for _ in range(3)]


def right(out, rank, seed, tokens=16, dtype=torch.float32):
    """Whether this is attention to the keys of all ranks."""
    q, k, v = (torch.cat(x, 2).double() for x in zip(*(qkv(r, seed, tokens, dtype) for r in range(4)), strict=True))
    wanted = F.scaled_dot_product_attention(q[:, :, tokens * rank : tokens * (rank + 1)], k, v)
    off = float((out.double() - wanted).abs().max())
    return "right" if off < 30 * torch.finfo(dtype).eps else f"off by {off:.1e}"


def attempt(mesh, rank, seed, size=16, dtype=torch.float32, **changes):
    """What came of one call: "right", how far it was off, or what it raised."""
    counts = {"tokens": ([size] * 4, [size] * 4)}
    q, k, v = changes.pop("qkv", None) or qkv(rank, seed, size, dtype)
    try:
        return right(torus_attention(q, k, v, mesh=mesh, **(counts | changes)), rank, seed, size, dtype)
    except (ValueError, TypeError, RuntimeError, KeyboardInterrupt, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def over_each(work):
    return " | ".join(f"{transport}: {work(transport)}" for transport in TRANSPORTS)


def fails_alone(transport, rank, **changes):
    """Rank 1 alone makes a wrong call; what came of it, and of the three after it."""
    mesh = mesh_of(transport)
    attempt(mesh, rank, 9)
    if rank == 1 and callable(changes.get("qkv")):
        changes["qkv"] = changes["qkv"]()
    first = attempt(mesh, rank, 0, **(changes if rank == 1 else {}))
    said = [first, *(attempt(mesh, rank, seed) for seed in (1, 2, 3))]
    mesh.close()
    return ", ".join(said)


def case_a_gradient(rank):
    return over_each(lambda t: fails_alone(t, rank, qkv=lambda: [x.requires_grad_() for x in qkv(1, 0)]))


def case_no_query(rank):
    return over_each(lambda t: fails_alone(t, rank, qkv=lambda: [None, *qkv(1, 0)[1:]]))


def case_counts_of_another_type(rank):
    return over_each(lambda t: fails_alone(t, rank, tokens=16))


def case_attention_raises(rank):
    def attend(q, k, v):
        raise ZeroDivisionError("as it should")

    return over_each(lambda t: fails_alone(t, rank, attention=attend))


def goes_on(transport, rank, attend):
    """Rank 1's first call fails in its last step, when the others of a ring do not need it any more. No rank waits for
    the others before its next calls."""
    args = TorusArgs(backend="torus", topology="2x2", transport=transport, timeout=1.0, plan="ring=4")
    mesh = build_mesh([[0, 1, 2, 3]], args, heads=4)
    mesh.one_host = False  # in stages
    attempt(mesh, rank, 9)
    pieces = []
    said = [attempt(mesh, rank, 0, **({"attention": partial(attend, pieces)} if rank == 1 else {}))]
    said += [attempt(mesh, rank, seed) for seed in range(1, 6)]
    dist.barrier()
    mesh.close()
    wrong = [words for words in said if words.startswith("off")]
    return f"{sum(words == 'right' for words in said) >= 3}, {said[-1]}{wrong or ''}"


def case_goes_on_at_once(rank):
    def attend(pieces, q, k, v):
        pieces.append(None)
        if len(pieces) == 4:
            raise ZeroDivisionError("as it should")
        return sdpa_attend(q, k, v)

    return over_each(lambda t: goes_on(t, rank, attend))


def case_goes_on_late(rank):
    """The others have failed in the call after that by then."""

    def attend(pieces, q, k, v):
        pieces.append(None)
        if len(pieces) == 4:
            time.sleep(2.5)
            raise ZeroDivisionError("as it should")
        return sdpa_attend(q, k, v)

    return over_each(lambda t: goes_on(t, rank, attend))


def case_interrupted_while_counts_are_exchanged(rank):
    def work(transport):
        mesh = mesh_of(transport)
        attempt(mesh, rank, 9, tokens=None)
        if rank == 1:
            signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        if rank == 3:
            time.sleep(0.5)
        said = [attempt(mesh, rank, seed, tokens=None) for seed in range(3)]
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_interrupted_while_it_fails(rank):
    """Rank 1 has sent chunks when Ctrl-C comes, and again before it has told anybody: nobody takes its next call for
    this one."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def work(transport):
        mesh, said = mesh_of(transport, timeout=1.0, heads=2), []
        attempt(mesh, rank, 9)
        fail = mesh.control.fail
        if rank == 1:
            mesh.control.fail = interrupted
        said.append(attempt(mesh, rank, 0, **({"attention": interrupted} if rank == 1 else {})))
        mesh.control.fail = fail
        if rank == 1 or said == ["right"]:  # who has not heard of it does now
            said.append(attempt(mesh, rank, 1))
        dist.barrier()
        said = [attempt(mesh, rank, 2), *(text for text in said if "off" in text)]
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_interrupted_between_two_lines(rank):
    """Of the call's own, before it has begun: the thread is not taken for another one afterwards."""
    mesh = mesh_of("tcp", timeout=1.0)
    attempt(mesh, rank, 9)
    if rank == 1:
        mesh._user[""] = threading.get_ident()
    said = attempt(mesh, rank, 0)
    mesh.close()
    return said


def case_a_forked_child_uses_the_mesh(rank):
    """Its chunks would look like those of rank 1's next call."""

    def work(transport):
        mesh = mesh_of(transport, timeout=2.0)
        attempt(mesh, rank, 9)
        if rank == 1:
            read, write = os.pipe()
            if (child := os.fork()) == 0:
                os.write(write, attempt(mesh, rank, 5).encode())
                mesh.close()
                os._exit(0)
            os.waitpid(child, 0)
        said = [attempt(mesh, rank, 0)]
        if rank == 1:
            said.append(os.read(read, 1000).decode())
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_use_after_close(rank):
    mesh = mesh_of("tcp")
    attempt(mesh, rank, 9)
    dist.barrier()
    mesh.close()
    return f"{attempt(mesh, rank, 0)}, {attempt(mesh, rank, 1)}"


def case_two_known_calls_in_another_order(rank):
    """Of other sizes, and of other dtypes of one size."""

    def work(transport):
        mesh, said = mesh_of(transport, timeout=1.0), []
        for kinds in (({"size": 16}, {"size": 32}), ({"dtype": torch.float16}, {"dtype": torch.bfloat16})):
            for kind in kinds:
                attempt(mesh, rank, 9, **kind)
            said += [attempt(mesh, rank, 0, **kind) for kind in (kinds if rank != 1 else kinds[::-1])]
            said.append(attempt(mesh, rank, 1))
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_counts_that_contradict(rank):
    """Each rank's own count is right; rank 2 says that rank 0 has a token more."""

    def work(transport):
        mesh = mesh_of(transport, timeout=1.0)
        wrong = {"tokens": ([16] * 4, [17, 16, 16, 16])} if rank == 2 else {}
        said = [attempt(mesh, rank, 0, **wrong), attempt(mesh, rank, 1), attempt(mesh, rank, 2, **wrong)]
        said.append(attempt(mesh, rank, 3))
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_another_request(rank):
    """Rank 3 has left out a request, and one layer of the next: nothing but what was said of them differs."""

    def work(transport):
        mesh, said = mesh_of(transport, timeout=1.0), []
        for seed, what in enumerate(["a cat", "a dog" if rank != 3 else "a cow"]):
            mesh.begin_request(what)
            said.append(attempt(mesh, rank, seed))
        mesh.begin_request("a cow")
        said.append(attempt(mesh, rank, 2))  # ranks meet
        for place in ("first", "second" if rank != 3 else "third"):
            mesh.place = place
            said.append(attempt(mesh, rank, 3))
        mesh.place = ""
        said.append(attempt(mesh, rank, 4))
        mesh.close()
        return ", ".join(said)

    return over_each(work)


def case_requests_without_links(rank):
    """--sp-backend usp: xDiT's own collectives carry nothing of ours."""
    mesh = build_mesh([[0, 1, 2, 3]], TorusArgs(backend="usp", topology="2x2", timeout=5.0), heads=4)
    said = []
    for what in ("a cat", "a dog" if rank != 3 else "a cow", "a cow"):
        try:
            mesh.begin_request(what)
            said.append("right")
        except ValueError as error:
            said.append(f"ValueError: {error}")
    mesh.close()
    return ", ".join(said)


def case_two_threads(rank):
    """The second thread's call comes while the first one computes."""
    mesh = mesh_of("tcp")
    attempt(mesh, rank, 9)
    computing, told = threading.Event(), []

    def attend(q, k, v):
        computing.set()
        time.sleep(0.3)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), q.new_zeros(q.shape[:3])

    other = threading.Thread(target=lambda: (computing.wait(), told.append(attempt(mesh, rank, 1))))
    if rank == 2:
        other.start()
    first = attempt(mesh, rank, 0, attention=attend)
    if rank == 2:
        other.join()
    dist.barrier()
    if first == "right":  # a rank whose own call was over hears of it at its next
        first = attempt(mesh, rank, 2)
    dist.barrier()
    said = f"{told and told[0]}, {first}, {attempt(mesh, rank, 3)}"
    mesh.close()
    return said


def case_meet_after_failing_at_different_times(rank):
    """Rank 0 stays away while the others try in vain to meet, more often than it does; then all live and meet."""
    mesh = mesh_of("tcp", timeout=0.3)
    attempt(mesh, rank, 9)
    tries = 0
    attempt(mesh, rank, 0, **({"attention": lambda *_: 1 / 0} if rank == 1 else {}))
    if rank == 0:
        time.sleep(4.0)
    else:
        while tries < 2:
            tries += "right" not in attempt(mesh, rank, 1)
    dist.barrier()
    said = attempt(mesh, rank, 2)
    mesh.close()
    return said


def case_one_rank_cannot_make_a_transport(rank):
    """While auto tries them: the next call tries again on all ranks."""
    mesh = mesh_of("auto")
    connect = mesh.transports["tcp"]

    def fail(control):
        raise TransportError("as it should")

    if rank == 2:
        mesh.transports["tcp"] = fail
    said = [attempt(mesh, rank, 0)]
    if rank == 2:
        mesh.transports["tcp"] = connect
    said += [attempt(mesh, rank, 1), mesh.transport if "fastest of shm" in mesh.chosen else mesh.chosen]
    mesh.close()
    return ", ".join(said)


def case_one_rank_cannot_build(rank):
    """A mesh, three times, whose links rank 2 cannot make; then it can. What is left of them afterwards."""

    def fail(*_):
        raise OSError("as it should")

    def work(transport):
        name = "_connect_groups" if transport == "two_sided" else "_connect_cpus"
        connect, said, seen = getattr(links, name), [], []
        for n in range(5):
            setattr(links, name, fail if rank == 2 and n in (1, 2, 3) else connect)
            try:
                mesh = mesh_of(transport, timeout=1.0)
                said.append(attempt(mesh, rank, 0))
                dist.barrier()
                mesh.close()
            except (RuntimeError, OSError) as error:
                said.append(f"{type(error).__name__}: {error}")
            dist.barrier()
            gc.collect()  # tracebacks hold what they saw
            time.sleep(0.1)
            seen.append(len(os.listdir("/proc/self/fd")))
        more = seen[3] - seen[0]
        return ", ".join([*dict.fromkeys(said), f"{more} descriptors more" if more > 9 else "nothing left"])

    return over_each(work)


def case_closing_keeps_nothing(rank):
    """Descriptors and threads after one mesh of each transport, and after ten."""
    seen = []
    for n in range(11):
        for transport in TRANSPORTS:
            mesh = mesh_of(transport)
            attempt(mesh, rank, 0)
            mesh.close()
            mesh.close()
        dist.barrier()
        if n in (0, 10):
            seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    more = [after - before for before, after in zip(*seen, strict=True)]
    return f"{more[0]} descriptors and {more[1]} threads more" if max(more) > 2 else "nothing"


def case_a_model_output(rank):
    """Parts of all ranks in their order: lengths that differ, layouts with and without a ring, each transport."""
    said = set()
    for transport in TRANSPORTS:
        for topology, heads in (("2x2", 4), ("1x4", 2), ("4x1", 2), ("2x2", 1)):
            args = TorusArgs(backend="torus", topology=topology, transport=transport, timeout=5.0)
            mesh = build_mesh([[0, 1, 2, 3]], args, heads=heads)
            for dim in (0, 1, -1):
                for lengths in ([3, 3, 3, 3], [3, 2, 0, 5]):
                    parts = [torch.randn(*(2, 4, 6)[:2], n).movedim(2, dim) for n in lengths]
                    parts = [torch.arange(x.numel()).view(x.shape) + 100.0 * r for r, x in enumerate(parts)]
                    uneven = len(set(lengths)) > 1
                    for _ in range(2):
                        out = all_gather(parts[rank], dim, mesh, uneven=uneven)
                        said.add(bool(torch.equal(out, torch.cat(parts, dim))))
            mesh.close()
    return f"{said}"


def case_a_model_output_of_other_shape(rank):
    mesh = mesh_of("shm")
    said = []
    for shape in ((2, 3 + (rank == 1)), (2, 3)):
        try:
            said.append(str(list(all_gather(torch.ones(shape), 0, mesh).shape)))
        except ValueError as error:
            said.append(f"ValueError: {error}")
    mesh.close()
    return ", ".join(said)


def case_a_model_output_at_another_dimension(rank):
    """All parts are square, and both gathers known."""
    mesh, part = mesh_of("shm", timeout=1.0), torch.ones(3, 3)
    for dim in (0, 1):
        all_gather(part, dim, mesh)
    try:
        said = str(all_gather(part, int(rank == 1), mesh).shape)
    except TransportError as error:
        said = f"TransportError: {error}"
    mesh.close()
    return said


def case_inputs_compared_on_some_ranks_only(rank):
    """Rank 1 is interrupted where the others go on: they compare again."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    dims = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **dims).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    said = []
    with torch.no_grad():
        wanted = model(**inputs)[0]
        torus = parallelize(model, args=TorusArgs(backend="torus", topology="2x2", timeout=5.0))
        gather = torus.mesh.control.gather

        def interrupted(topic, value):
            gather(topic, value)
            torus.mesh.control.gather = gather
            raise KeyboardInterrupt

        if rank == 1:
            torus.mesh.control.gather = interrupted
        for _ in range(2):
            try:
                off = float((model(**inputs)[0] - wanted).abs().max())
                said.append("right" if off < 1e-5 else f"off by {off:.1e}")
            except (KeyboardInterrupt, TransportError) as error:
                said.append(f"{type(error).__name__}: {error}")
            dist.barrier()
    torus.mesh.close()
    return ", ".join(said)


def case_a_trial_fails(rank):
    """--sp-backend auto: on rank 1 xDiT's own fails, the first time it is called."""
    mesh, said, failures = mesh_of("shm"), [], iter([True])
    config = XditConfig(ulysses_degree=4, ring_degree=1)
    choice = Choice(config, [], None, [mesh], kv_ratio=Fraction(1), log=lambda _: None)

    for seed in range(5):
        q, k, v = qkv(rank, seed)
        torus = partial(torus_attention, q, k, v, **COUNTS)

        def xdits(q=q, seed=seed):
            if rank == 1 and next(failures, False):
                raise ArithmeticError("planted")
            k, v = (torch.cat(x, 2) for x in list(zip(*(qkv(r, seed) for r in range(4)), strict=True))[1:])
            return F.scaled_dot_product_attention(q, k, v)

        def run_on(mesh, overlap, torus=torus):
            return torus(mesh=mesh, overlap=overlap)

        try:
            said.append(right(choice.serve(q, k, None, "kind", run_on, xdits)[1], rank, seed))
        except (RuntimeError, ArithmeticError) as error:
            said.append(f"{type(error).__name__}: {error}")
    mesh.close()
    return ", ".join(said)


def case_labels_in_place_of_tags(rank):
    """As over NCCL, which has no tags: chunks of the same sizes that belong to another call."""
    mesh = mesh_of("two_sided")
    for link in mesh.links.values():
        link._labels = True
    said = [attempt(mesh, rank, 9)]
    mesh.place = "here" if rank != 3 else "there"
    said += [attempt(mesh, rank, 0), attempt(mesh, rank, 1)]
    mesh.place = ""
    said.append(attempt(mesh, rank, 2))
    mesh.close()
    return ", ".join(said)


def main() -> None:
    dist.init_process_group("gloo")
    with contextlib.suppress(KeyboardInterrupt):
        run_cases(globals(), sys.argv[1:], ())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
