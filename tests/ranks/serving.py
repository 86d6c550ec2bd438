"""A server: N requests of changing size, steps and batch in one process group, with bad ones in between, then requests
from two threads, calls of attention backends without log-sum-exp, and the counts of ``stats()``.

    sf-xfuser cluster run --cluster 2x2 -- python tests/ranks/serving.py FOLDER N --sp-backend torus ...

FOLDER has a small Flux. xDiT returns results on the last rank only, which compares them with plain diffusers.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import sys
import threading
from pathlib import Path

import prometheus_client
import run_pipeline  # the directory of a script is on its path
import torch
import torch.distributed as dist
from cases import report
from diffusers import FluxPipeline
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import attention_backend, get_runtime_state

import sf_xfuser
from sf_xfuser.integrations.xdit import session
from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS
from sf_xfuser.metrics import Collector
from sf_xfuser.torus import mesh as mesh_module

WARM = 8  # requests after which memory may grow no more
mesh_module._MAX_CACHED_CALLS = 12  # so that some tens of shapes evict each other


def request_of(number: int) -> dict[str, object]:
    """Request 0 is the largest, so that buffers have their final size after it."""
    draw = random.Random(number)
    height, width, batch = (16 * draw.randint(4, 12), 16 * draw.randint(4, 12), draw.randint(1, 2)) if number else (
        192, 192, 2)  # fmt: skip
    return {
        "prompt": [f"a {colour} chair" for colour in ("red", "green")[:batch]],
        "height": -(-height // 64) * 64,  # xDiT requires a height that the ranks divide
        "width": width,
        "num_inference_steps": draw.randint(1, 2),
        "seed": number,
    }


class Server:
    def __init__(self, folder: str, flags: list[str]) -> None:
        parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
        arguments = parser.parse_args(["--model", folder, "--attention_backend", "SDPA_FLASH", *flags])
        arguments.family, arguments.wrapper = "flux", "pipeline"
        engine_config, _ = xFuserArgs.from_cli_args(arguments).create_config()
        engine_config.runtime_config.dtype = torch.float32
        self.pipe = run_pipeline.xdit_pipeline(arguments, engine_config)
        self.plain = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for pipe in (self.pipe, self.plain):
            pipe.set_progress_bar_config(disable=True)

    def run(self, **changes: object) -> torch.Tensor | None:
        """The latents on the last rank."""
        request = dict(changes)
        generator = torch.Generator("cpu").manual_seed(request.pop("seed"))
        found = self.pipe(**request, max_sequence_length=16, generator=generator, output_type="latent")
        return None if found is None else found.images

    def difference(self, out: torch.Tensor, **request: object) -> float:
        """From plain diffusers."""
        request["generator"] = torch.Generator("cpu").manual_seed(request.pop("seed"))
        request.pop("callback_on_step_end", None)
        call = type(self.plain).__call__
        plain = getattr(call, "__wrapped__", call)
        return (
            (out - plain(self.plain, **request, max_sequence_length=16, output_type="latent").images).abs().max().item()
        )

    def outcome(self, **request: object) -> str:
        """The error of a request, "exact" or "done" without a result."""
        try:
            out = self.run(**request)
            difference = None if out is None else self.difference(out, **request)
            return "done" if out is None else "exact" if difference < 1e-4 else f"differs by {difference}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def held() -> dict[str, int]:
    """What this process and its mesh hold."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/sf-xfuser-" in line]
    sizes = [int(end, 16) - int(start, 16) for start, end in (fields[0].split("-") for fields in maps)]
    calls = [call for call in session.current.mesh.calls.values() if call is not True]
    return {
        "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "shared_memory_bytes": sum(sizes),
        "shared_memory_files": len({fields[4] for fields in maps}),  # by inode
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "calls": len(calls),
        "programs": sum(len(call.programs) for call in calls),
    }


def fail_on_rank(rank: int, step: int):
    """A callback that fails on one rank, outside of attention."""

    def callback(pipe, at, timestep, tensors):
        if (dist.get_rank(), at) == (rank, step):
            raise MemoryError("planted")
        return tensors

    return callback


def no_memory() -> None:
    raise MemoryError("planted")


def bad_requests(good: dict[str, object]) -> dict[str, dict[str, object]]:
    """The front end of a server sends a request when all ranks have answered the one before."""
    two = {**good, "num_inference_steps": 2}
    return {
        "too large": {**good, "height": 1 << 24, "width": 1 << 24},
        "prompt of a wrong type": {**good, "prompt": 7},
        "height of a wrong type": {**good, "height": "tall"},
        "one rank between its calls": {**two, "callback_on_step_end": fail_on_rank(1, 0)},
        "one rank after its calls": good,
        "other seed on one rank": {**good, "seed": 7 if dist.get_rank() == 2 else 8},
    }


def from_two_threads(server: Server, first: dict[str, object], second: dict[str, object]) -> list[str]:
    """The outcomes of both requests, of which the second comes while the first encodes its prompt."""
    begun, tried, found = threading.Event(), threading.Event(), {}

    def wait(*_: object) -> None:
        begun.set()
        tried.wait(30)

    def other() -> None:
        begun.wait(30)
        found["second"] = server.outcome(**second)
        tried.set()

    hook = server.pipe.text_encoder.register_forward_pre_hook(wait)
    thread = threading.Thread(target=other)
    thread.start()
    found["first"] = server.outcome(**first)
    thread.join()
    hook.remove()
    return [found["first"], found["second"]]


def banded(query, key, value, dropout_p, is_causal, attention_kwargs=None):
    """Stands for a sparse kernel: needs the tokens of the whole sequence in order, and returns no log-sum-exp."""
    rows, columns = (torch.arange(x.shape[2]) for x in (query, key))
    mask = (rows[:, None] - columns).abs() < 24
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), None


def backends(server: Server, request: dict[str, object]) -> None:
    """Every attention backend without log-sum-exp: its differences from xDiT's own USP and, if it runs here, from plain
    diffusers; how many calls torus handled, how many fell back, and why."""
    registry, usp, expected = attention_backend.ATTENTION_FUNCTION_REGISTRY, session.current.usp, {}
    for backend in attention_backend.AttentionBackendType:
        if backend.name in LSE_BACKENDS:
            continue
        real = backend.name in ("SDPA", "SDPA_MATH", "FLEX_VSA_H3")  # the others need packages and GPUs
        if not real:
            registry[backend] = banded
        get_runtime_state().attention_backend = backend
        session.require_lse(backend)  # in RuntimeState.set_attention_backend, which would look for the package first
        before = usp.handled, usp.fallbacks.total()
        out = server.run(**request)
        ran = usp.handled - before[0], usp.fallbacks.total() - before[1]
        if registry[backend] not in expected:
            with session.without_torus():
                expected[registry[backend]] = server.run(**request)
        differences = []
        if out is not None:
            differences.append((out - expected[registry[backend]]).abs().max().item())
            differences += [server.difference(out, **request)] if real else []
        report(f"backend {backend.name}", [differences, *ran, list(usp.fallbacks)[-1]])


def counts(server: Server, request: dict[str, object]) -> None:
    before = sf_xfuser.stats()
    with sf_xfuser.tracing():
        server.run(**request)
    found = sf_xfuser.stats()
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    text = prometheus_client.generate_latest(registry).decode()
    report("counts", [dataclasses.asdict(before), dataclasses.asdict(found), sf_xfuser.explain(), text])


def main() -> None:
    folder, number, *flags = sys.argv[1:]
    server = Server(folder, flags)
    exact = []
    for each in range(int(number)):
        request = request_of(each)
        out = server.run(**request)
        if out is not None and each % 16 == 0:
            exact.append(server.difference(out, **request) < 1e-4)
        if each == WARM:
            report("warm", held())
    report("end", held())
    report("exact", exact)
    good = request_of(1)
    for name, request in bad_requests(good).items():
        dist.barrier()
        if name == "one rank after its calls":
            server.pipe.maybe_free_model_hooks = no_memory  # at the end, on the last rank
        found = server.outcome(**request)
        vars(server.pipe).pop("maybe_free_model_hooks", None)
        dist.barrier()
        report(f"bad: {name}", [found, server.outcome(**good)])
    dist.barrier()
    report("two threads", from_two_threads(server, request_of(2), request_of(3)))
    dist.barrier()
    order = (4, 5) if dist.get_rank() < 2 else (5, 4)
    report("two threads in other order", from_two_threads(server, *map(request_of, order)))
    dist.barrier()
    report("after threads", server.outcome(**good))
    counts(server, good)
    backends(server, good | {"num_inference_steps": 1})
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main()
