"""xDiT's own runner with a tiny Flux on 3, 5 and 6 ranks, at any height, against one process of diffusers.

xDiT as installed starts none of them, because its runner splits the rows of a default height. Each case makes two
requests, which the mesh compares between ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import on_cluster, reports, torchrun
from tests.patched import copy_of_xdit

pytestmark = pytest.mark.skipif(version("xfuser") < "0.7", reason="repairs are for xDiT 0.7")

EXACT = 1e-4
PROMPT, TEXT = "a red chair", 16
CANNOT = "ValueError: The height of the input is not divisible by the number of sequence parallel devices"
PIPEFUSION = "--pipefusion_parallel_degree 2 --num_inference_steps 1"  # later steps use stale keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 heads, as Flux has them."""
    folder = tmp_path_factory.mktemp("runner")
    save_tiny_model("flux", folder / "black-forest-labs" / "FLUX.1-dev", heads=24)
    return folder


def run(
    folder: Path, nproc: int, height: int, width: int, flags: str, cluster: str | None = None, **options
) -> tuple[str, list[torch.Tensor]]:
    """The report of rank 0, and the latents of the two requests, for seeds 1 and 2."""
    size = ["--height", str(height), "--width", str(width), "--max_sequence_length", str(TEXT)]
    argv = ["--prompt", PROMPT, *size, "--num_inference_steps", "2", "--num_iterations", "1", *flags.split()]
    launch = partial(on_cluster, cluster=cluster) if cluster else partial(torchrun, nproc=nproc, timeout=120)
    output = launch("runner.py", folder, json.dumps({"case": argv}), **options).output
    ranks = reports(output, ["case"])["case"]
    assert len(ranks) == nproc, output[-4000:]
    latents = folder / "case.pt"
    found = torch.load(latents) if latents.exists() else []
    latents.unlink(missing_ok=True)
    return ranks["0"], found


def single(folder: Path, height: int, width: int, steps: int) -> list[torch.Tensor]:
    """With the dtype of the runner: bfloat16, or float16 under PipeFusion, which runs one step."""
    dtype = torch.float16 if steps == 1 else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(folder / "black-forest-labs" / "FLUX.1-dev", torch_dtype=dtype)
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: decoded.append(latents) or decode(latents, **options)
    for seed in (1, 2):
        pipe(
            PROMPT,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=3.5,
            max_sequence_length=TEXT,
            generator=torch.Generator().manual_seed(seed),
        )
    return decoded


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= EXACT


@pytest.mark.parametrize(
    ("nproc", "height", "width", "flags"),
    [
        pytest.param(3, 128, 128, "--sp-topology 3x1", id="3"),
        pytest.param(5, 64, 80, "--sp-topology 5x1", id="5"),
        pytest.param(6, 192, 64, f"--sp-topology 6x1 {PIPEFUSION}", id="2x3"),
        pytest.param(6, 128, 128, "--sp-topology 6x1", id="6"),
    ],
)
def test_latents(folder, nproc, height, width, flags):
    text, found = run(folder, nproc, height, width, f"--sp-backend torus {flags}")
    assert_equal(found, single(folder, height, width, steps=1 if PIPEFUSION in flags else 2))
    assert "repaired in xDiT: Flux's runner does not cut the default height of 1024 into rows" in text, text
    requests = [line for line in text.splitlines() if line.startswith("request: ")]
    # one from the runner and one from the pipeline that it calls
    expected = [f"max_sequence_length={TEXT}, seed={seed}{more}" for seed in (1, 2) for more in ("", ", state")]
    assert len(requests) == len(expected) and all(w in r for w, r in zip(expected, requests, strict=True)), requests


def test_xdit_as_installed_and_patched(folder, tmp_path_factory):
    flags = "--ulysses_degree 3"
    text, found = run(folder, 3, 128, 128, flags)
    assert text == CANNOT and not found
    patched = copy_of_xdit(tmp_path_factory.mktemp("patched"), "repairs")
    expected = single(folder, 128, 128, steps=2)
    path = {"PYTHONPATH": os.fspath(patched)}
    text, found = run(folder, 3, 128, 128, flags, env=path)
    assert text == "no --sp-backend: xDiT runs untouched"
    assert_equal(found, expected)
    text, found = run(folder, 3, 128, 128, "--sp-backend torus --sp-topology 3x1", env=path)
    assert "repaired in xDiT" not in text
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_use_torch_compile(folder):
    """By Inductor, on an emulated cluster, where calls are staged."""
    inductor = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else each rank starts a process for each core
    flags = "--sp-backend torus --use_torch_compile"
    text, found = run(folder, 4, 128, 128, flags, cluster="2x2", env=inductor, timeout=400)
    assert re.search(r"by torus: [1-9]", text) and "fell back" not in text, text
    assert_equal(found, single(folder, 128, 128, steps=2))
