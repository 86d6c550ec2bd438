"""Rank side of test_mesh_failures.py: four ranks, of which one fails or differs, over each transport. Each case
reports what the rank saw.

Every result is compared with float64 attention over the tokens of all ranks: "correct", or the error."""

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

from sf_xfuser.autotune.selector import Selector
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.diffusers.parallelize import parallelize
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.torus import links
from sf_xfuser.torus.all_gather import all_gather
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.cpu import segment

segment.PREFIX = "sf-xfuser_apart-"  # distinct from other jobs on this host

TRANSPORTS = ("shm", "tcp", "two_sided")
COUNTS = {"tokens": ([16] * 4, [16] * 4)}


def mesh_of(transport, timeout=5.0, topology="2x2", heads=4):
    args = TorusArgs(backend="torus", topology=topology, transport=transport, timeout=timeout)
    return build_mesh([[0, 1, 2, 3]], args, heads=heads)


def qkv(rank, seed, tokens=16, dtype=torch.float32):
    make = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randn(1, 4, tokens, 8, generator=make).to(dtype) for _ in range(3)]


def compare(out, rank, seed, tokens=16, dtype=torch.float32):
    """Compare with attention to the keys of all ranks."""
    q, k, v = (torch.cat(x, 2).double() for x in zip(*(qkv(r, seed, tokens, dtype) for r in range(4)), strict=True))
    wanted = F.scaled_dot_product_attention(q[:, :, tokens * rank : tokens * (rank + 1)], k, v)
    off = float((out.double() - wanted).abs().max())
    return "correct" if off < 30 * torch.finfo(dtype).eps else f"off by {off:.1e}"


def attempt(mesh, rank, seed, size=16, dtype=torch.float32, **changes):
    """The result of one call: "correct", its error, or the exception."""
    counts = {"tokens": ([size] * 4, [size] * 4)}
    q, k, v = changes.pop("qkv", None) or qkv(rank, seed, size, dtype)
    try:
        return compare(torus_attention(q, k, v, mesh=mesh, **(counts | changes)), rank, seed, size, dtype)
    except (ValueError, TypeError, RuntimeError, KeyboardInterrupt, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def over_each(work):
    return " | ".join(f"{transport}: {work(transport)}" for transport in TRANSPORTS)


def fail_on_rank_1(transport, rank, **changes):
    """Only rank 1 makes a wrong call. The results of this call and the next three."""
    mesh = mesh_of(transport)
    attempt(mesh, rank, 9)
    if rank == 1 and callable(changes.get("qkv")):
        changes["qkv"] = changes["qkv"]()
    first = attempt(mesh, rank, 0, **(changes if rank == 1 else {}))
    results = [first, *(attempt(mesh, rank, seed) for seed in (1, 2, 3))]
    mesh.close()
    return ", ".join(results)


def case_requires_grad(rank):
    return over_each(lambda t: fail_on_rank_1(t, rank, qkv=lambda: [x.requires_grad_() for x in qkv(1, 0)]))


def case_query_is_none(rank):
    return over_each(lambda t: fail_on_rank_1(t, rank, qkv=lambda: [None, *qkv(1, 0)[1:]]))


def case_counts_of_wrong_type(rank):
    return over_each(lambda t: fail_on_rank_1(t, rank, tokens=16))


def case_attention_raises(rank):
    def attend(q, k, v):
        raise ZeroDivisionError("planted")

    return over_each(lambda t: fail_on_rank_1(t, rank, attention=attend))


def fail_in_last_step(transport, rank, attend):
    """Rank 1's first call fails in its last step, when the other ranks of the ring no longer need it. No rank waits for
    the others before its next calls."""
    args = TorusArgs(backend="torus", topology="2x2", transport=transport, timeout=0.4, plan="ring=4")
    mesh = build_mesh([[0, 1, 2, 3]], args, heads=4)
    mesh.one_host = False  # staged
    attempt(mesh, rank, 9)
    pieces = []
    results = [attempt(mesh, rank, 0, **({"attention": partial(attend, pieces)} if rank == 1 else {}))]
    results += [attempt(mesh, rank, seed) for seed in range(1, 6)]
    dist.barrier()
    mesh.close()
    wrong = [words for words in results if words.startswith("off")]
    return f"{sum(words == 'correct' for words in results) >= 3}, {results[-1]}{wrong or ''}"


def case_failure_in_the_last_step(rank):
    def attend(pieces, q, k, v):
        pieces.append(None)
        if len(pieces) == 4:
            raise ZeroDivisionError("planted")
        return sdpa_attend(q, k, v)

    return over_each(lambda t: fail_in_last_step(t, rank, attend))


def case_late_failure_in_the_last_step(rank):
    """By then the others have failed in the next call."""

    def attend(pieces, q, k, v):
        pieces.append(None)
        if len(pieces) == 4:
            time.sleep(2.5)
            raise ZeroDivisionError("planted")
        return sdpa_attend(q, k, v)

    return over_each(lambda t: fail_in_last_step(t, rank, attend))


def case_interrupt_during_gather_of_counts(rank):
    def work(transport):
        mesh = mesh_of(transport)
        attempt(mesh, rank, 9, tokens=None)
        if rank == 1:
            signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        if rank == 3:
            time.sleep(0.5)
        results = [attempt(mesh, rank, seed, tokens=None) for seed in range(3)]
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_interrupt_during_failure_report(rank):
    """Rank 1 is interrupted after it has sent chunks, and again before it reports the failure. No rank uses chunks of
    its next call for this one."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def work(transport):
        mesh, results = mesh_of(transport, timeout=0.4, heads=2), []
        attempt(mesh, rank, 9)
        fail = mesh.control.report_failure
        if rank == 1:
            mesh.control.report_failure = interrupted
        results.append(attempt(mesh, rank, 0, **({"attention": interrupted} if rank == 1 else {})))
        mesh.control.report_failure = fail
        if rank == 1 or results == ["correct"]:  # a rank that was not notified fails in this call
            results.append(attempt(mesh, rank, 1))
        dist.barrier()
        results = [attempt(mesh, rank, 2), *(text for text in results if "off" in text)]
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_interrupt_before_call_begins(rank):
    """An interrupt in ``Mesh.call`` before the call begins: the next call is not refused as one of a second thread."""
    mesh = mesh_of("tcp", timeout=0.4)
    attempt(mesh, rank, 9)
    if rank == 1:
        mesh.guard._caller[""] = threading.get_ident()
    result = attempt(mesh, rank, 0)
    mesh.close()
    return result


def case_forked_child_uses_the_mesh(rank):
    """The child's chunks would look like those of rank 1's next call."""

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
        results = [attempt(mesh, rank, 0)]
        if rank == 1:
            results.append(os.read(read, 1000).decode())
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_use_after_close(rank):
    mesh = mesh_of("tcp")
    attempt(mesh, rank, 9)
    dist.barrier()
    mesh.close()
    return f"{attempt(mesh, rank, 0)}, {attempt(mesh, rank, 1)}"


def case_calls_in_different_order(rank):
    """Two cached calls of different sizes, then of different dtypes of the same size."""

    def work(transport):
        mesh, results = mesh_of(transport, timeout=0.4), []
        for kinds in (({"size": 16}, {"size": 32}), ({"dtype": torch.float16}, {"dtype": torch.bfloat16})):
            for kind in kinds:
                attempt(mesh, rank, 9, **kind)
            results += [attempt(mesh, rank, 0, **kind) for kind in (kinds if rank != 1 else kinds[::-1])]
            results.append(attempt(mesh, rank, 1))
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_different_counts(rank):
    """Each rank gives its own count correctly; rank 2 gives one token too many for rank 0."""

    def work(transport):
        mesh = mesh_of(transport, timeout=0.4)
        wrong = {"tokens": ([16] * 4, [17, 16, 16, 16])} if rank == 2 else {}
        results = [attempt(mesh, rank, 0, **wrong), attempt(mesh, rank, 1), attempt(mesh, rank, 2, **wrong)]
        results.append(attempt(mesh, rank, 3))
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_different_requests(rank):
    """Rank 3 skips a request, and a layer of the next one: only the descriptions differ."""

    def work(transport):
        mesh, results = mesh_of(transport, timeout=0.4), []
        for seed, what in enumerate(["a cat", "a dog" if rank != 3 else "a cow"]):
            mesh.begin_request(what)
            results.append(attempt(mesh, rank, seed))
        mesh.begin_request("a cow")
        results.append(attempt(mesh, rank, 2))  # ranks reconnect
        for place in ("first", "second" if rank != 3 else "third"):
            mesh.layer = place
            results.append(attempt(mesh, rank, 3))
        mesh.layer = ""
        results.append(attempt(mesh, rank, 4))
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_different_requests_without_links(rank):
    """--sp-backend usp: xDiT's own collectives do not send the identity of a call."""
    mesh = build_mesh([[0, 1, 2, 3]], TorusArgs(backend="usp", topology="2x2", timeout=5.0), heads=4)
    results = []
    for what in ("a cat", "a dog" if rank != 3 else "a cow", "a cow"):
        try:
            mesh.begin_request(what)
            results.append("correct")
        except ValueError as error:
            results.append(f"ValueError: {error}")
    mesh.close()
    return ", ".join(results)


def case_request_fails_outside_its_calls(rank):
    """Rank 1 fails before the calls of requests 0 and 1, between those of 3, and after those of 5. A request begins
    when all ranks have answered the one before."""

    def work(transport):
        mesh, results = mesh_of(transport, timeout=3.0), []
        for number in range(7):
            dist.barrier()
            started = time.monotonic()
            try:
                with mesh.request(f"request {number}"):
                    for step in range(2):
                        if rank == 1 and (number, step) in ((0, 0), (1, 0), (3, 1)):
                            raise MemoryError("planted")
                        out = torus_attention(*qkv(rank, step), mesh=mesh, **COUNTS)
                    if rank == 1 and number == 5:
                        raise MemoryError("planted")
                results.append(compare(out, rank, step))
            except (MemoryError, TransportError) as error:
                results.append(f"{type(error).__name__}: {error}")
            assert time.monotonic() - started < 3.0
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_request_of_another_thread(rank):
    """A second thread begins a request, and makes a call without one, between two calls of a request."""

    def work(transport):
        mesh, results = mesh_of(transport), []

        def other():
            try:
                with mesh.request("theirs"):
                    results.append("began")
            except RuntimeError as error:
                results.append(f"{type(error).__name__}: {error}")

        with mesh.request("ours"):
            results.append(attempt(mesh, rank, 0))
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            results.append(attempt(mesh, rank, 1))
        thread = threading.Thread(target=other)  # afterwards it may
        thread.start()
        thread.join()
        mesh.close()
        return ", ".join(results)

    return over_each(work)


def case_forward_fails_outside_attention(rank):
    """One rank of a parallelized model fails in a feed-forward layer. During the next forward, another thread calls the
    model."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=0, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    parallelize(model, args=TorusArgs(backend="torus", topology="2x2", timeout=3.0))
    fail = rank == 1
    in_second_forward = False

    def after_feed_forward(*_):
        nonlocal in_second_forward
        if fail:
            raise ZeroDivisionError("planted")
        if in_second_forward:
            in_second_forward = False
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()

    model.transformer_blocks[0].ff.register_forward_hook(after_feed_forward)
    inputs = {
        "hidden_states": torch.ones(1, 16, 16), "encoder_hidden_states": torch.ones(1, 8, 32),
        "pooled_projections": torch.ones(1, 32), "timestep": torch.ones(1), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    results = []

    def forward():
        started = time.monotonic()
        try:
            with torch.no_grad():
                results.append("correct" if model(**inputs).sample.isfinite().all() else "not finite")
        except (ArithmeticError, RuntimeError) as error:
            results.append(f"{type(error).__name__}: {error}")
        assert time.monotonic() - started < 3.0

    forward()
    fail, in_second_forward = False, True
    forward()
    forward()
    return ", ".join(results)


def case_two_threads(rank):
    """A second thread makes a call while the first one computes."""
    mesh = mesh_of("tcp")
    attempt(mesh, rank, 9)
    computing, results = threading.Event(), []

    def attend(q, k, v):
        computing.set()
        time.sleep(0.3)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), q.new_zeros(q.shape[:3])

    other = threading.Thread(target=lambda: (computing.wait(), results.append(attempt(mesh, rank, 1))))
    if rank == 2:
        other.start()
    first = attempt(mesh, rank, 0, attention=attend)
    if rank == 2:
        other.join()
    dist.barrier()
    if first == "correct":  # a rank that had finished its call fails in the next one
        first = attempt(mesh, rank, 2)
    dist.barrier()
    text = f"{results and results[0]}, {first}, {attempt(mesh, rank, 3)}"
    mesh.close()
    return text


def case_reconnect_after_timeouts(rank):
    """Rank 0 is absent while the others time out twice in reconnecting. Then all ranks reconnect."""
    mesh = mesh_of("tcp", timeout=0.3)
    attempt(mesh, rank, 9)
    attempt(mesh, rank, 0, **({"attention": lambda *_: 1 / 0} if rank == 1 else {}))
    tries = 0
    while rank != 0 and tries < 2:
        tries += "correct" not in attempt(mesh, rank, 1)
    dist.barrier()  # rank 0 waits here
    result = attempt(mesh, rank, 2)
    mesh.close()
    return result


def case_trial_fails_on_one_rank(rank):
    """During the trials of auto. The next call repeats them on all ranks."""
    mesh = mesh_of("auto")
    connect = mesh.transports["tcp"]

    def fail(control):
        raise TransportError("planted")

    if rank == 2:
        mesh.transports["tcp"] = fail
    results = [attempt(mesh, rank, 0)]
    if rank == 2:
        mesh.transports["tcp"] = connect
    results += [
        attempt(mesh, rank, 1),
        mesh.transport if "fastest of shm" in mesh.transport_reason else mesh.transport_reason,
    ]
    mesh.close()
    return ", ".join(results)


def case_build_fails_on_one_rank(rank):
    """Rank 2 fails three times to create the links of a mesh, then succeeds. Descriptors must not leak."""
    gc.freeze()  # the libraries, which a collection would take a second to visit

    def fail(*_):
        raise OSError("planted")

    def work(transport):
        name = "_connect_groups" if transport == "two_sided" else "_connect_cpus"
        connect, results, seen = getattr(links, name), [], []
        for n in range(5):
            setattr(links, name, fail if rank == 2 and n in (1, 2, 3) else connect)
            try:
                mesh = mesh_of(transport, timeout=0.4)
                results.append(attempt(mesh, rank, 0))
                dist.barrier()
                mesh.close()
            except (RuntimeError, OSError) as error:
                results.append(f"{type(error).__name__}: {error}")
            dist.barrier()
            gc.collect()  # tracebacks hold references
            time.sleep(0.1)
            seen.append(len(os.listdir("/proc/self/fd")))
        more = seen[3] - seen[0]
        return ", ".join([*dict.fromkeys(results), f"{more} descriptors more" if more > 9 else "no leak"])

    return over_each(work)


def case_close_frees_everything(rank):
    """Descriptors and threads after one mesh of each transport, and after eleven."""
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
    return f"{more[0]} descriptors and {more[1]} threads more" if max(more) > 2 else "no leak"


def case_all_gather(rank):
    """Different lengths, layouts with and without a ring, each transport."""
    results = set()
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
                        results.add(bool(torch.equal(out, torch.cat(parts, dim))))
            mesh.close()
    return f"{results}"


def case_all_gather_of_different_shapes(rank):
    mesh = mesh_of("shm")
    results = []
    for shape in ((2, 3 + (rank == 1)), (2, 3)):
        try:
            results.append(str(list(all_gather(torch.ones(shape), 0, mesh).shape)))
        except ValueError as error:
            results.append(f"ValueError: {error}")
    mesh.close()
    return ", ".join(results)


def case_all_gather_of_different_dimensions(rank):
    """All parts are square, and both gathers are cached."""
    mesh, part = mesh_of("shm", timeout=0.4), torch.ones(3, 3)
    for dim in (0, 1):
        all_gather(part, dim, mesh)
    try:
        result = str(all_gather(part, int(rank == 1), mesh).shape)
    except TransportError as error:
        result = f"TransportError: {error}"
    mesh.close()
    return result


def case_interrupt_during_comparison_of_inputs(rank):
    """Rank 1 is interrupted while the others continue. The next call compares the inputs again."""
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
    results = []
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
                results.append("correct" if off < 1e-5 else f"off by {off:.1e}")
            except (KeyboardInterrupt, TransportError) as error:
                results.append(f"{type(error).__name__}: {error}")
            dist.barrier()
    torus.mesh.close()
    return ", ".join(results)


def case_usp_trial_fails(rank):
    """--sp-backend auto: xDiT's own attention fails on rank 1 the first time it is called."""
    mesh, results, failures = mesh_of("shm"), [], iter([True])
    config = XditConfig(ulysses_degree=4, ring_degree=1)
    selector = Selector(config, [], None, [mesh], kv_ratio=Fraction(1), log=lambda _: None)

    for seed in range(5):
        q, k, v = qkv(rank, seed)
        torus = partial(torus_attention, q, k, v, **COUNTS)

        def xdits(q=q, seed=seed):
            if rank == 1 and next(failures, False):
                raise ArithmeticError("planted")
            k, v = (torch.cat(x, 2) for x in list(zip(*(qkv(r, seed) for r in range(4)), strict=True))[1:])
            return F.scaled_dot_product_attention(q, k, v)

        def run_on(mesh, granularity, torus=torus):
            return torus(mesh=mesh, granularity=granularity)

        try:
            results.append(compare(selector.run(q, k, None, "kind", run_on, xdits)[1], rank, seed))
        except (RuntimeError, ArithmeticError) as error:
            results.append(f"{type(error).__name__}: {error}")
    mesh.close()
    return ", ".join(results)


def main() -> None:
    dist.init_process_group("gloo")
    with contextlib.suppress(KeyboardInterrupt):
        run_cases(globals(), sys.argv[1:], ())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
