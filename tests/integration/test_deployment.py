"""The Dockerfile and the launch examples for Slurm and Kubernetes: linted, and their launch lines parsed by the real
parsers of torchrun and of xDiT's runner. No container, batch system or cluster is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser

from sf_xfuser.integrations.xdit import plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder for programs that the scripts find before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def require_launch_of_four_machines(argv: list[str]) -> None:
    """``argv``: of torchrun on one of four machines with eight GPUs, under ``--sp-backend torus``."""
    plugin.disable()  # torchrun does not import xfuser
    launch = get_args_parser().parse_args(argv)
    assert (launch.nnodes, launch.nproc_per_node) == ("4", "8")
    assert launch.module and launch.training_script == "xfuser.runner"
    plugin.enable()
    args = xFuserArgs.add_runner_args(FlexibleArgumentParser()).parse_args(launch.training_script_args)
    assert args.model and args.prompt and args.sp_backend == "torus"


def test_hadolint_passes():
    subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script):
    subprocess.run([BIN / "shellcheck", script], check=True)


def test_the_image_gets_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.search(r"pip install .*\.\[(.*)\]", DOCKERFILE)[1].split(",")
    assert set(extras) - {"${NVSHMEM}"} <= set(project["project"]["optional-dependencies"])
    assert set(re.findall(r"NVSHMEM=([\w-]+)", DOCKERFILE)) <= set(project["project"]["optional-dependencies"])
    context = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.M)
    needed = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    needed |= {*project["tool"]["setuptools"]["package-dir"].values(), "README.md", "setup.py", "pyproject.toml"}
    assert needed | set(project["project"]["license-files"]) == set(context)
    assert all((ROOT / name).exists() for name in context)


@pytest.mark.parametrize(("status", "ran"), [(0, "a red chair\n"), (1, "")])
def test_the_entry_point_checks_the_installation_before_its_command(status, ran, programs):
    write_program(programs / "sf-xfuser", f'[ "$1" = doctor ] && exit {status}')
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)", DOCKERFILE, re.M)[1])
    done = subprocess.run([*entry, "echo", "a red chair"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, ran)


def test_slurm(programs, monkeypatch):
    write_program(
        programs / "scontrol", '[ "$*" = "show hostnames gpu[1-4]" ] && printf "gpu1\\ngpu2\\ngpu3\\ngpu4\\n"'
    )
    write_program(
        programs / "srun", f"exec {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\""
    )
    for name, value in {"JOB_NODELIST": "gpu[1-4]", "NNODES": "4", "JOB_ID": "17"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    script = ROOT / "examples/11_slurm.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
    doctor, launch = map(json.loads, done.stdout.splitlines())
    assert doctor == ["sf-xfuser", "doctor"] and launch[0] == "torchrun"
    assert "gpu1:29500" in launch
    require_launch_of_four_machines(launch[1:])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("4", "1", "8")


def test_kubernetes(monkeypatch):
    job = yaml.safe_load((ROOT / "examples/12_kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 3}
    # What the operator sets in the second worker.
    for name, value in {"NNODES": "4", "NODE_RANK": "2", "NPROC_PER_NODE": job["spec"]["nprocPerNode"],
                        "MASTER_ADDR": "sf-xfuser-master-0", "MASTER_PORT": "23456"}.items():  # fmt: skip
        monkeypatch.setenv(f"PET_{name}", value)
    for spec in replicas.values():
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and container["args"][0] == "torchrun"
        assert "command" not in container  # the image's entry point checks the installation
        require_launch_of_four_machines(container["args"][1:])
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        memory = {volume["name"]: volume["emptyDir"]["medium"] for volume in pod["volumes"]}
        assert memory == {container["volumeMounts"][0]["name"]: "Memory"}
        assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"
