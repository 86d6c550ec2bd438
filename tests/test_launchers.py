"""The flag under every way to start xDiT, on CPU ranks: the xdit command, two torchrun nodes, Ray, the HTTP service."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sf_xfuser.tiny_models import save_tiny_model
from tests.launch import RANKS, run
from tests.ranks.run_pipeline import reference_latents


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return save_tiny_model("flux", tmp_path_factory.mktemp("launchers") / "FLUX.1-dev")


def test_xdit_command_without_degrees(flux, tmp_path):
    """The number of processes comes from --sp-topology, the degrees from the plan, the heads from the registry."""
    command = [str(Path(sys.executable).with_name("xdit")), "--master_port", "29573", "--model", "tiny-flux"]
    command += ["--prompt", "a cat", "--seed", "1", "--height", "128", "--width", "128", "--num_inference_steps", "1"]
    command += ["--max_sequence_length", "16", "--num_iterations", "1", "--output_directory", str(tmp_path)]
    env = {"TINY_FLUX": str(flux), "PYTHONPATH": str(RANKS / "site")}
    finished = run([*command, "--sp-backend=torus", "--sp-topology", "2x2"], env=env)
    assert "Torus Attention; 2 machine(s) x 2 rank(s): torus=2 ulysses=2 ring=1" in finished.output
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_two_torchrun_nodes(tmp_path):
    """examples/05_two_nodes.sh as it is: two agents, one rendezvous, two machines by --sp-topology."""
    example = Path(__file__).parents[1] / "examples" / "05_two_nodes.sh"
    finished = run(["bash", str(example)], env={"PYTHON": sys.executable, "PORT": "29519"}, timeout=240)
    assert "Torus Attention; 2 machine(s) x 2 rank(s): torus=2 ulysses=2 ring=1" in finished.output
    assert (example.parents[1] / "out" / "example5" / "image.png").stat().st_size > 0


def test_ray_workers(flux, tmp_path):
    """The flags reach workers that parse no command line; the picture is that of one process."""
    out = tmp_path / "latents.pt"
    command = [sys.executable, str(RANKS / "ray_flux.py"), "--out", str(out), "--model", str(flux), "--use_ray"]
    command += ["--ray_world_size", "4", "--sp-backend", "torus", "--sp-topology", "2x2"]
    finished = run(command, timeout=300)
    assert re.search(r"RayWorkerWrapper.*--sp-backend torus: Torus Attention", finished.output), finished.output[-4000:]
    assert (torch.load(out) - reference_latents(flux, 16)).abs().max() <= 1e-4


# Ray finds no GPU here, and the service's actors each want one: Ray is told of four before the script runs, as it is.
SERVICE = """
import runpy, sys, ray
ray.init(num_cpus=4, num_gpus=4, include_dashboard=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_http_service(flux):
    """entrypoints/launch.py of the xfuser wheel, unmodified: its plain parser knows nothing of the flags."""
    script = Path(find_spec("xfuser").submodule_search_locations[0]).parent / "entrypoints" / "launch.py"
    command = [sys.executable, "-c", SERVICE, str(script), "--model_path", str(flux), "--world_size", "4"]
    command += ["--sp-backend", "torus", "--sp-topology=2x2"]
    service = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(service.stdout), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and service.poll() is None:
            if any("Torus Attention" in line for line in list(lines)):
                break
            time.sleep(0.5)
    finally:
        if service.poll() is None:
            os.killpg(service.pid, signal.SIGTERM)
        service.wait(timeout=30)
        reader.join(timeout=10)
    text = "".join(lines)
    assert re.search(r"ImageGenerator.*--sp-backend torus: Torus Attention; 2 machine", text), text[-4000:]
    assert "Uvicorn running" in text
