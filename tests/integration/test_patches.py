"""xDiT with the dispatch point of ``patches/0.7.0/backend`` and the plugin as its backend, with and without hooks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import records, run, torchrun
from tests.patched import ORDERS, copy_of_xdit
from tests.ranks.run_pipeline import reference_latents

EXACT = 1e-4


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return copy_of_xdit(tmp_path_factory.mktemp("native"), "backend")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return save_tiny_model("flux", tmp_path_factory.mktemp("flux") / "flux")


@pytest.mark.parametrize("series", ORDERS)
def test_the_series_apply_alone_and_in_either_order(series, tmp_path):
    copy_of_xdit(tmp_path, *series)


def run_flux(xdit: Path, model: Path, out: Path, **env: str) -> str:
    """Flux on 2 x 2 ranks, plain and on torus: both equal one process. Returns ``explain()`` of torus."""
    common = ["--family", "flux", "--model", str(model), "--text-length", "16"]
    flags = {
        "plain": ["--ulysses_degree", "2", "--ring_degree", "2"],
        "torus": ["--sp-backend", "torus", "--sp-topology", "2x2"],
    }
    argv = {name: [*common, "--out", str(out / f"{name}.pt"), *more] for name, more in flags.items()}
    (out / "cases.json").write_text(json.dumps(argv))
    env = {"PYTHONPATH": str(xdit), **env}
    output = torchrun("run_pipelines.py", out / "cases.json", nproc=4, env=env, timeout=120).output
    explained = {}
    for name, _, (outcome, text) in records(output):
        assert outcome == "ok", output[-4000:]
        explained[name] = text
    for name in flags:
        [latents, *_] = torch.load(out / f"{name}.pt")["latents"].values()
        assert (latents - reference_latents(model, 16)).abs().max() <= EXACT
    assert "no --sp-backend" in explained["plain"]
    return explained["torus"]


def test_a_patched_xdit_finds_the_plugin_without_any_hook(native, flux, tmp_path):
    """Without autoload there are no hooks: xDiT has the flag, the CPU platform and the backend."""
    assert "torus: 8" in run_flux(native, flux, tmp_path, SF_XFUSER_AUTOLOAD="0")


def test_each_call_is_dispatched_once_with_patches_and_hooks(native, flux, tmp_path):
    """2 steps x (2 double + 2 single blocks) are 8 calls; two dispatchers would count 16."""
    assert "torus: 8" in run_flux(native, flux, tmp_path)


def test_hooks_that_a_patch_replaces_are_omitted(native):
    code = (
        "import torch, json, xfuser\n"
        "from sf_xfuser.integrations.xdit import plugin\n"
        "assert not plugin.import_hooked_modules()\n"
        "from xfuser.model_executor.layers import usp\n"
        "assert not hasattr(usp.USP.__wrapped__, '__wrapped__')\n"
        "assert plugin.unsupported() is None\n"
        "print('@' + json.dumps({f'{h.module}.{h.name}': s for h, s in plugin.hook_states()}))\n"
    )
    output = run([sys.executable, "-c", code], env={"PYTHONPATH": str(native)}).output
    states = json.loads(output.rpartition("@")[2])
    omitted = {name for name, state in states.items() if state == "native"}
    assert {"xfuser.model_executor.layers.usp.USP", "xfuser.envs.get_device_version"} <= omitted
    assert {"xfuser.config.args.xFuserArgs.create_config", "xfuser.cli.get_nproc_from_args"} <= omitted
    assert "missing" not in states.values(), states


def test_native_flags_equal_those_of_the_plugin(native):
    """xDiT parses the flags without hooks, and rejects a backend that is not installed."""
    env = {"PYTHONPATH": str(native), "SF_XFUSER_AUTOLOAD": "0"}
    code = (
        "from xfuser import xFuserArgs\nfrom xfuser.config import FlexibleArgumentParser\n"
        "parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())\n"
        "print(parser.parse_args(['--model', 'm', '--sp-backend', 'torus', '--sp-plan=paper', '--sp_strict']))\n"
        "parser.parse_args(['--model', 'm', '--sp_backend', 'moon'])\n"
    )
    output = run([sys.executable, "-c", code], env=env, expect_failure=True).output
    assert "sp_backend='torus'" in output and "sp_plan='paper'" in output and "sp_strict=True" in output
    assert re.search(r"argument --sp_backend.*invalid choice: 'moon'.*torus", output), output
