"""``--sp-backend`` with every launcher of xDiT, on CPU ranks: the xdit command, torchrun, Ray, the HTTP service.

The tests run the scripts in examples/.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.integrations.xdit import plugin
from tests.launch import run
from tests.ranks.run_pipeline import PROMPT, SEED

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return save_tiny_model("flux", tmp_path_factory.mktemp("launchers") / "FLUX.1-dev")


def test_xdit_command_without_degrees():
    """examples/06_xdit_command.sh: the number of processes comes from --sp-topology, the degrees from the plan, the
    heads from the registry."""
    env = {"PYTHON": sys.executable, "XDIT": str(Path(sys.executable).with_name("xdit")), "PORT": "29573"}
    finished = run(["bash", str(EXAMPLES / "06_xdit_command.sh")], env=env)
    assert "Torus Attention; 2 machine(s) x 2 rank(s): torus=2 ulysses=2 ring=1" in finished.output
    (picture,) = re.findall(r"picture: (\S+)", finished.output)
    assert (ROOT / picture).stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("", 1),  # xDiT's own guess
        ("--sp-backend torus", 6),
        ("--sp-backend torus --pipefusion_parallel_degree 4", 4),
        ("--sp-backend torus --sp-topology 2x3 --nnodes 2 --node_rank 1", 3),
        ("--sp-backend torus --ulysses_degree 2", 2),
    ],
)
def test_number_of_processes_of_the_xdit_command(flags, processes, monkeypatch):
    """On a machine with six devices."""
    plugin.enable()
    cli = importlib.import_module("xfuser.cli")
    started = []

    class Started:
        def __init__(self, command, **_):
            started.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(cli.subprocess, "Popen", Started)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(sys, "argv", ["xdit", "--model", "FLUX.1-dev", *flags.split()])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"--nproc_per_node={processes}" in started[0]


def test_one_torchrun_node(flux, tmp_path):
    """examples/03_flux_with_the_flag.py, an xDiT script with only the flag; the topology is gathered."""
    script, size = str(EXAMPLES / "03_flux_with_the_flag.py"), ["--height", "128", "--width", "128"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *size]
    command += ["--model", str(flux), "--prompt", PROMPT, "--num_inference_steps", "1", "--max_sequence_length", "16"]
    finished = run([*command, "--out", str(tmp_path), "--sp-backend", "torus"])
    assert "Torus Attention; 1 machine(s) x 2 rank(s): torus=1 ulysses=2 ring=1" in finished.output
    assert "topology from hosts of the ranks" in finished.output
    assert (tmp_path / "image.png").stat().st_size > 0


def test_two_torchrun_nodes():
    """examples/05_two_nodes.sh as it is: two agents, one rendezvous, two machines by --sp-topology."""
    finished = run(
        ["bash", str(EXAMPLES / "05_two_nodes.sh")], env={"PYTHON": sys.executable, "PORT": "29519"}, timeout=240
    )
    assert "Torus Attention; 2 machine(s) x 2 rank(s): torus=2 ulysses=2 ring=1" in finished.output
    assert (ROOT / "out" / "example5" / "image.png").stat().st_size > 0


@pytest.mark.parametrize("failed", [0, 1])
def test_two_torchrun_nodes_end_with_the_status_of_a_failed_node(failed, tmp_path):
    """examples/05_two_nodes.sh, with a stand-in for Python."""
    stand_in = tmp_path / "python.sh"
    stand_in.write_text(f'case "$*" in *"--node-rank {failed} "*) exit 3;; esac\n')
    script = ["bash", str(EXAMPLES / "05_two_nodes.sh")]
    finished = subprocess.run(script, env={**os.environ, "PYTHON": f"sh {stand_in}"}, capture_output=True, text=True)
    assert finished.returncode == 3 and "picture" not in finished.stdout


def test_ray_workers(flux, tmp_path):
    """examples/07_ray.py: workers parse no command line; the picture equals that of one process."""
    out = tmp_path / "picture.pt"
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "max_sequence_length": 16, "seed": SEED}
    command = [sys.executable, str(EXAMPLES / "07_ray.py"), "--model", str(flux), "--prompt", PROMPT, "--out", str(out)]
    command += [f"--{name}={value}" for name, value in size.items()]
    command += ["--use_ray", "--ray_world_size", "2", "--sp-backend", "torus", "--sp-topology", "2x1"]
    finished = run(command, timeout=300)
    assert re.search(r"RayWorkerWrapper.*--sp-backend torus: Torus Attention", finished.output), finished.output[-4000:]
    pipe = DiffusionPipeline.from_pretrained(flux, torch_dtype=torch.float32)
    expected = pipe(
        prompt=PROMPT, generator=torch.Generator("cpu").manual_seed(size.pop("seed")), output_type="pt", **size
    ).images
    assert (torch.load(out) - expected).abs().max() <= 1e-4


def test_http_service(flux, tmp_path):
    """examples/08_http_service.py: xDiT's service, with a parser that does not know the flags, returns a picture. It
    returns the same one after requests that fail."""
    model = shutil.copytree(flux, tmp_path / flux.name)
    vae = model / "vae" / "config.json"  # the service warms up with 1024 x 1024 pixels: no attention over them
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"mid_block_add_attention": False}))
    command = [sys.executable, str(EXAMPLES / "08_http_service.py"), "--model_path", str(model), "--world_size", "2"]
    command += ["--sp-backend", "torus", "--sp-topology=2x1"]
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
    picture = None
    try:
        deadline = time.monotonic() + 180
        while picture is None and time.monotonic() < deadline and service.poll() is None:
            time.sleep(0.5)
            if any("Torus Attention" in line for line in list(lines)):
                picture = generate(timeout_s=deadline - time.monotonic())
        for bad in ({"height": 1 << 24, "width": 1 << 24}, {"height": "tall"}, {"prompt": ""}):
            with pytest.raises(AssertionError, match=r"detail|Internal Server Error"):
                generate(timeout_s=60, **bad)
        assert generate(timeout_s=60) == picture
    finally:
        if service.poll() is None:
            os.killpg(service.pid, signal.SIGTERM)
        service.wait(timeout=30)
        reader.join(timeout=10)
    text = "".join(lines)
    assert re.search(r"ImageGenerator.*--sp-backend torus: Torus Attention; 2 machine", text), text[-4000:]
    assert picture is not None and picture.size == (128, 128), text[-4000:]
    assert len(picture.getcolors(maxcolors=128 * 128)) > 1000  # random weights give noise, not one colour


def generate(timeout_s: float, **changes: object) -> Image.Image | None:
    """The picture from the service; None if it is not listening yet. AssertionError with the service's answer."""
    order = {"prompt": PROMPT, "num_inference_steps": 1, "cfg": 3.5, "height": 128, "width": 128, **changes}
    request = urllib.request.Request(
        "http://127.0.0.1:6000/generate", json.dumps(order).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return Image.open(io.BytesIO(base64.b64decode(json.load(answer)["output"])))
    except ConnectionRefusedError:
        return None
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise
