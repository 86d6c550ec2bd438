"""xDiT on CPU ranks over gloo with only the hooks of cpu_platform: imports, USP, PipeFusion, the runner, `xdit`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.integrations.xdit import cpu_platform
from tests.launch import RANKS, run, torchrun

PROMPT = "a cat on a red chair"
# The plugin, which installs the same hooks, is off; the sitecustomize of RANKS/site installs only them.
PLATFORM_ONLY = {
    "SF_XFUSER_AUTOLOAD": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(RANKS / "site"), os.environ.get("PYTHONPATH")])),
}
# One step: the first step of PipeFusion is its synchronous warm-up, which is exact.
RUNNER_FLAGS = ["--model", "tiny-flux", "--prompt", PROMPT, "--seed", "1", "--height", "128", "--width", "128"]
RUNNER_FLAGS += ["--num_inference_steps", "1", "--max_sequence_length", "16", "--num_iterations", "1"]


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.mark.parametrize("build", [pytest.param("cpu-build", marks=pytest.mark.slow), "cuda-build"])
def test_everything_imports_and_remove_restores_it(build):
    """Also with a CUDA build of PyTorch without a GPU, which xDiT treats as a CUDA machine."""
    finished = run([sys.executable, str(RANKS / "platform_import.py"), build], env=PLATFORM_ONLY)
    assert "imported and removed" in finished.output


def test_usp_equals_single_process_attention():
    """U2, R2, U2R2, U4, R4 without and with joint tensors, and the local attention: fp32 to 1e-5; bf16 and fp16 run."""
    output = torchrun("platform_usp.py", nproc=4, env=PLATFORM_ONLY).output
    assert output.count("joint=") == 15


def test_pipefusion_delivers_every_send_and_is_exact(tiny_flux):
    """Two stages of xDiT's Flux pipeline, synchronous and asynchronous; sends without a kept Work arrive."""
    output = torchrun("platform_pipefusion.py", tiny_flux, nproc=2, env=PLATFORM_ONLY).output
    assert "2 patches" in output


@pytest.mark.parametrize("nproc", [2, 3])
def test_exchanges_equal_those_of_gloo(nproc):
    """All-to-all (even, uneven, asynchronous, functional), a hop of the ring, and all-gather of two ranks."""
    output = torchrun("platform_gloo.py", nproc=nproc, env=PLATFORM_ONLY).output
    assert output.count("as gloo's own") == 3 * nproc


def test_fsdp_shards_and_equals_the_whole_module():
    """Ranks that start with other weights than rank 0 (FSDP1 broadcasts them), and the per-block path (FSDP2)."""
    output = torchrun("platform_sharding.py", nproc=2, env=PLATFORM_ONLY).output
    assert output.count("equals the whole module") == 4


def test_cuda_devices_in_xdit_mean_the_cpu(tiny_flux):
    """The offload options, single components, and the tensors and generators of the runner models."""
    finished = run([sys.executable, str(RANKS / "platform_devices.py"), str(tiny_flux)], env=PLATFORM_ONLY)
    assert finished.output.count("same image") == 3


@pytest.mark.parametrize(
    ("launcher", "degrees"),
    [
        ("xdit", ["--ring_degree", "2"]),
        pytest.param("torchrun", ["--ulysses_degree", "2"], marks=pytest.mark.slow),
        pytest.param("torchrun", ["--pipefusion_parallel_degree", "2"], marks=pytest.mark.slow),
    ],
)
def test_runner_makes_the_image_of_diffusers(launcher, degrees, tiny_flux, tmp_path):
    """xDiT's own FLUX runner model (bfloat16; float16 with PipeFusion) through both entry points."""
    import numpy
    from diffusers import FluxPipeline
    from PIL import Image

    arguments = [*RUNNER_FLAGS, *degrees, "--output_directory", str(tmp_path)]
    environment = {**PLATFORM_ONLY, "TINY_FLUX": str(tiny_flux)}
    if launcher == "xdit":
        xdit = [str(Path(sys.executable).parent / "xdit"), "--master_port", "29571"]
        run([*xdit, *arguments], env=environment)
    else:
        distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xfuser.runner"]
        run([sys.executable, *distributed, *arguments], env=environment)
    (image,) = (numpy.asarray(Image.open(path), dtype=float) for path in tmp_path.glob("*.png"))
    (seconds,) = json.loads((tmp_path / "timings.json").read_text(encoding="utf-8"))
    assert 0 < seconds < 60

    dtype = torch.float16 if "--pipefusion_parallel_degree" in degrees else torch.bfloat16
    pipeline = FluxPipeline.from_pretrained(tiny_flux, torch_dtype=dtype)
    expected = pipeline(
        PROMPT,
        height=128,
        width=128,
        num_inference_steps=1,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    error = numpy.abs(image - numpy.asarray(expected, dtype=float)).mean()
    assert error < 1.0, f"mean difference {error} of 255"
    assert image.std() > 5, "images without contrast are always close"


@pytest.mark.parametrize("accelerator", ["cuda", "npu", "musa", "mps"])
def test_is_not_needed_with_an_accelerator(accelerator, monkeypatch):
    present = SimpleNamespace(is_available=lambda: True)
    absent = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch_musa", SimpleNamespace())
    for name in ("cuda", "npu", "musa"):
        monkeypatch.setattr(torch, name, absent, raising=False)
    monkeypatch.setattr(torch.backends, "mps", absent)
    assert cpu_platform.needed()
    monkeypatch.setattr(torch.backends if accelerator == "mps" else torch, accelerator, present, raising=False)
    assert not cpu_platform.needed()


def test_needed_survives_a_broken_probe(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1: wrong ELF class")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cpu_platform.needed()


def test_every_hook_has_a_reason_and_a_removal_condition():
    attributes = [(hook.module, hook.name) for hook in cpu_platform.HOOKS]
    assert len(set(attributes)) == len(attributes)
    assert all(len(hook.why) > 20 and len(hook.remove_when) > 20 for hook in cpu_platform.HOOKS)
