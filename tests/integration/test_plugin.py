"""The plugin inside xDiT, in one process: autoload, flags, refusals, hooks, command lines."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import pkgutil
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from sf_xfuser import TorusArgs
from sf_xfuser.integrations.xdit import plugin, session, validation
from tests.launch import run

BASE = ["--model", "m", "--ulysses_degree", "2"]
TORUS = ["--sp-backend", "torus", "--ulysses_degree", "2"]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


# -- autoload --------------------------------------------------------------------------------------------------------


def test_importing_torch_adds_one_finder_and_loads_no_plugin():
    finished = python(
        "import sys, torch\n"
        "assert 'xfuser' not in sys.modules and 'sf_xfuser.integrations.xdit.plugin' not in sys.modules\n"
        "assert sum(type(f).__name__ == '_FirstImport' for f in sys.meta_path) == 1\n"
        "mine = sorted(m for m in sys.modules if m.startswith('sf_xfuser'))\n"
        "assert mine == ['sf_xfuser', 'sf_xfuser._autoload', 'sf_xfuser.config'], mine\n"
    )
    assert finished.returncode == 0, finished.stderr


def test_autoload_can_be_disabled():
    finished = python(
        "import sys, torch\nassert not any('FirstImport' in type(f).__name__ for f in sys.meta_path)\n",
        SF_XFUSER_AUTOLOAD="0",
    )
    assert finished.returncode == 0, finished.stderr


def test_a_broken_plugin_warns_and_never_breaks_an_import(tmp_path):
    finished = python(
        "import sf_xfuser.integrations.xdit.plugin as p\n"
        "def broken(): raise KeyError('planted')\n"
        "p.enable = broken\n"
        "import torch\n"
        "try:\n    import xfuser\n"
        "except (NotImplementedError, ImportError) as error:\n    print('xDiT itself:', error)\n"
    )
    assert finished.returncode == 0, finished.stderr
    assert "could not be enabled" in finished.stderr and "planted" in finished.stderr


def test_another_extension_that_breaks_torch_keeps_its_own_error(tmp_path):
    """PyTorch loads extensions in the order of sys.path, so ours loads first, while xfuser imports torch."""
    (tmp_path / "broken.py").write_text("def load():\n    raise RuntimeError('planted')\n")
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nbroken = broken:load\n")
    finished = python(
        f"import sys\nsys.path.append({str(tmp_path)!r})\n"
        "for name in ('xfuser', 'colorsys'):\n"
        "    try:\n        __import__(name)\n        print(name, 'imported')\n"
        "    except Exception as error:\n        print(name, type(error).__name__, error.__cause__ or error)\n"
        "assert 'torch' not in sys.modules and any(type(f).__name__ == '_PostImportFinder' for f in sys.meta_path)\n"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "xfuser RuntimeError planted\ncolorsys imported\n"


def test_importing_the_package_imports_neither_torch_nor_xfuser():
    finished = python("import sys, sf_xfuser\nassert 'torch' not in sys.modules and 'xfuser' not in sys.modules\n")
    assert finished.returncode == 0, finished.stderr


def test_few_modules_import_xdit():
    package = Path(find_spec("sf_xfuser").submodule_search_locations[0])
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(line.strip().startswith(("import xfuser", "from xfuser")) for line in path.read_text().splitlines())
    }
    elsewhere = {path for path in importing if not path.startswith("integrations/xdit/")}
    assert elsewhere <= {"bench/demo.py", "bench/pipeline.py", "bench/usp_variants.py"}


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """As if torchrun had started this process as one of two."""
    plugin.enable()
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield
    session.current.command_line = None


@pytest.mark.parametrize("spelled", [["--sp-backend", "torus"], ["--sp_backend=torus"]])
@pytest.mark.parametrize("plain", [False, True])
def test_scripts_that_use_add_cli_args(launched, spelled, plain):
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    parser = xFuserArgs.add_cli_args(ArgumentParser() if plain else FlexibleArgumentParser())
    xfuser_args = xFuserArgs.from_cli_args(parser.parse_args([*BASE, *spelled]))
    assert getattr(xfuser_args, session.MARK) == TorusArgs(backend="torus")


def test_the_runners_parser(launched):
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    values = vars(
        xFuserArgs.add_runner_args(FlexibleArgumentParser()).parse_args(["--model", "m", "--sp-backend", "ulysses"])
    )
    xfuser_args = xFuserArgs.from_runner_args(values)
    assert (xfuser_args.ulysses_degree, xfuser_args.ring_degree) == (2, 1)


def test_the_http_services_plain_parser_and_keyword_arguments(launched):
    """entrypoints/launch.py: its parser does not know the flags, and it builds xFuserArgs by keyword."""
    from xfuser import xFuserArgs

    parser = ArgumentParser()
    parser.add_argument("--model_path")
    assert parser.parse_args(["--model_path", "m", "--sp-backend", "torus", "--sp-plan=paper"]).model_path == "m"
    xfuser_args = xFuserArgs(model="m", ulysses_degree=2)
    assert getattr(xfuser_args, session.MARK) == TorusArgs(backend="torus", plan="paper")
    assert getattr(pickle.loads(pickle.dumps(xfuser_args)), session.MARK).plan == "paper"


def test_other_parsers_are_unchanged(launched):
    parser = ArgumentParser()
    parser.add_argument("--sp-backend")
    assert parser.parse_args(["--sp-backend", "mine"]).sp_backend == "mine"
    assert session.current.command_line is None
    with pytest.raises(SystemExit):
        ArgumentParser().parse_args(["--sp-unknown", "x"])


@pytest.mark.parametrize(
    ("backend", "transport", "found", "expected"),
    [
        ("torus", "auto", None, "32"),
        ("usp", "nvshmem", None, "32"),
        ("torus", "auto", "16", "16"),
        ("usp", "auto", None, None),
        ("torus", "two_sided", None, None),
    ],
)
def test_the_number_of_hardware_queues_is_set_for_transports_that_wait_on_the_gpu(
    backend, transport, found, expected, monkeypatch
):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", found or "")
    if found is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(session.current, "args", None)
    session.activate(TorusArgs(backend=backend, transport=transport))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_without_the_flag_xdits_arguments_are_unchanged(launched):
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    xfuser_args = xFuserArgs.from_cli_args(parser.parse_args(["--model", "m"]))
    assert not hasattr(xfuser_args, session.MARK)
    assert (xfuser_args.ulysses_degree, xfuser_args.ring_degree) == (1, 1)
    assert session.explain() == "no --sp-backend: xDiT runs untouched"


REFUSED = {
    "degrees": (["--sp-backend", "torus", "--ulysses_degree", "3"], r"ulysses_degree=3 x ring_degree=1 = 3, but 2 "),
    "unknown heads": (["--sp-backend", "torus"], r"heads is unknown.*--ulysses_degree.*no transformer/config.json"),
    "other degrees": (["--sp-backend", "torus", "--pipefusion_parallel_degree", "3"], r"multiply to 3, which does not"),
    "conflict": (["--sp-backend", "ring", "--ulysses_degree", "2"], r"--sp-backend ring excludes ulysses_degree=2"),
    "topology": (["--sp-backend", "torus", "--sp-topology", "2x2"], r"describes 4 ranks, but the job has 2"),
    "separate vae": (
        ["--sp-backend", "torus", "--vae_parallel_size", "1"],
        r"does not work with --vae_parallel_size 1",
    ),
    "plan against degrees": (
        ["--sp-backend", "torus", "--sp-plan", "torus=1,ulysses=2,ring=1", "--ring_degree", "2"],
        r"--sp-plan torus=1,ulysses=2,ring=1 means ulysses_degree=2 and ring_degree=1, but ulysses_degree=1 and ring_",
    ),
    "strict without lse": (
        [*TORUS, "--sp-strict", "--attention_backend", "sdpa"],
        r"--sp-backend torus with --attention_backend sdpa: .* one of AITER, CUDNN",
    ),
    "compressed twice": (
        [*TORUS, "--sp-compress", "fp8", "--use_fp8_comms"],
        r"--sp-compress fp8 with --use_fp8_comms: ",
    ),
    "strict with fp8 communication": ([*TORUS, "--sp-strict", "--use_fp8_comms"], r"--sp-strict with --use_fp8_comms"),
    "check of compiled calls": (
        [*TORUS, "--sp-check", "first", "--use_torch_compile"],
        r"--sp-check first with --use_torch_compile: ",
    ),
    "data parallel attention": ([*TORUS, "--use_fast_attn"], r"--sp-backend torus with --use_fast_attn: "),
    "plan of xDiT's own": (
        ["--sp-backend", "usp", "--sp-plan", "paper", "--ulysses_degree", "2"],
        r"--sp-plan paper sets Torus Attention's layout, but --sp-backend usp runs xDiT's own code",
    ),
    "check of xDiT's own": (["--sp-backend", "usp", "--sp-check", "first"], r"--sp-check first compares .*backend usp"),
    "kernel of xDiT's own": (
        ["--sp-backend", "usp", "--sp-kernel", "fused"],
        r"--sp-kernel fused selects .*backend usp",
    ),
    "strict without torus": (["--sp-backend", "ulysses", "--sp-strict"], r"--sp-strict applies to .*backend ulysses"),
    "transport of a ring": (
        ["--sp-backend", "ring", "--sp-transport", "tcp"],
        r"--sp-transport tcp does not apply to a ring",
    ),
    "compressed by xDiT": (
        ["--sp-backend", "ring", "--sp-compress", "int8"],
        r"--sp-compress int8 .*backend ring",
    ),
    "compressed in windows": (
        [*TORUS, "--sp-compress", "int8", "--sp-transport", "shm"],
        r"--sp-compress int8 cannot be used with --sp-transport shm",
    ),
}
ACCEPTED = {  # similar to the refused ones
    "lse": [*TORUS, "--attention_backend", "flash"],
    "fp8 communication": [*TORUS, "--use_fp8_comms"],
    "compiled": [*TORUS, "--use_torch_compile", "--sp-strict", "--sp-compress", "fp8"],
    "no lse": [*TORUS, "--attention_backend", "sdpa"],
    "no lse where xDiT may run": ["--sp-backend", "auto", "--ulysses_degree", "2", "--attention_backend", "SDPA"],
    "xDiT's own": ["--sp-backend", "usp", "--ulysses_degree", "2", "--attention_backend", "SDPA", "--use_fp8_comms"],
    "strict all-to-all": ["--sp-backend", "ulysses", "--sp-strict", "--sp-transport", "tcp"],
    "plan and its degrees": [*TORUS, "--sp-plan", "torus=1,ulysses=2,ring=1"],
}
if version("xfuser") < "0.7":  # its parser does not have the flag
    for cases in (REFUSED, ACCEPTED):
        for name in [name for name, case in cases.items() if "--use_fp8_comms" in str(case)]:
            del cases[name]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_flags(launched, case):
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    argv, message = REFUSED[case]
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "m", *argv])
    with pytest.raises(ValueError, match=message):
        xFuserArgs.from_cli_args(arguments)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_flags(launched, case):
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    assert xFuserArgs.from_cli_args(parser.parse_args(["--model", "m", *ACCEPTED[case]])).ulysses_degree == 2


def test_a_hybrid_schedule_needs_log_sum_exps_in_a_ring():
    xfuser_args = SimpleNamespace(hybrid_attn_low_precision_backend="AITER_FP8", ring_degree=2)
    with pytest.raises(ValueError, match="--sp-backend torus with --hybrid_attn_low_precision_backend AITER_FP8: "):
        validation.refuse(xfuser_args, TorusArgs(backend="torus"), None)
    validation.refuse(xfuser_args, TorusArgs(backend="usp"), None)
    xfuser_args.ring_degree = 1
    validation.refuse(xfuser_args, TorusArgs(backend="torus"), None)


@pytest.mark.parametrize("transformer", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_strict_and_a_cache_inside_usp(launched, transformer, tmp_path, monkeypatch):
    """Some models keep PipeFusion's cache inside USP. Refused by the model's configuration, before weights are read."""
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    (tmp_path / "transformer").mkdir()
    config = {"_class_name": transformer, "num_attention_heads": 8}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = ["--model", str(tmp_path), "--sp-backend", "torus", "--sp-strict", "--pipefusion_parallel_degree", "2"]
    arguments = xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args(argv)
    message = (
        "--sp-strict with --pipefusion_parallel_degree 2: xDiT's own USP keeps PipeFusion's KV cache of SD3Transformer"
    )
    refused = transformer.startswith("SD3")
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        xFuserArgs.from_cli_args(arguments)


def test_an_unsupported_version_is_refused_with_the_supported_ones(launched, monkeypatch):
    from xfuser import xFuserArgs

    xfuser_args = xFuserArgs(model="m", ulysses_degree=2)
    setattr(xfuser_args, session.MARK, TorusArgs(backend="torus"))
    real = plugin.importlib.metadata.version
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda name: "0.9.1" if name == "xfuser" else real(name))
    refused = r"xfuser 0\.9\.1 is not supported; supported: 0\.5\.0 to 0\.7\.x: .*, or SF_XFUSER_ALLOW_UNTESTED=1"
    with pytest.raises(RuntimeError, match=refused):
        xfuser_args.create_config()


@pytest.mark.parametrize(("version", "allowed"), [("0.9.1", True), ("0.4.5", False)])
def test_a_newer_version_can_be_tried(version, allowed, launched, monkeypatch):
    """An older version cannot: it lacks hooked attributes."""
    real = plugin.importlib.metadata.version
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda name: version if name == "xfuser" else real(name))
    monkeypatch.setenv("SF_XFUSER_ALLOW_UNTESTED", "1")
    assert (plugin.unsupported() is None) == allowed


def test_a_newer_version_without_a_hooked_attribute_is_refused(launched, monkeypatch):
    moved = replace(plugin.HOOKS[-2], name="USP_of_another_name")
    states = [*plugin.hook_states(), (moved, "missing")]
    monkeypatch.setattr(plugin, "hook_states", lambda: states)
    monkeypatch.setenv("SF_XFUSER_ALLOW_UNTESTED", "1")
    assert "xfuser.model_executor.layers.usp.USP_of_another_name is missing" in plugin.unsupported()


def test_a_missing_package_is_named(launched, monkeypatch):
    real = plugin.importlib.util.find_spec
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None if name == "yunchang" else real(name))
    assert plugin.unsupported() == "package yunchang is missing: pip install yunchang"


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_a_request_begins_in_every_pipeline_of_xdit(launched):
    """Fails for a pipeline that a later xDiT adds."""
    from xfuser.model_executor import pipelines

    base = pipelines.xFuserPipelineBaseWrapper
    classes: list[object] = []
    for module in pkgutil.iter_modules(pipelines.__path__):
        with suppress(ImportError):  # of packages that are not here
            classes += vars(importlib.import_module(f"{pipelines.__name__}.{module.name}")).values()
    own = {
        f"{c.__module__}.{c.__name__}.__call__"
        for c in classes
        if isinstance(c, type) and issubclass(c, base) and c is not base and "__call__" in vars(c)
    }
    hooked = {f"{h.module}.{h.name}" for h, state in plugin.hook_states() if state == "applied"}
    assert own and own <= hooked, own - hooked


def test_every_hook_is_applied_and_removed():
    finished = python(
        "import sys, torch\n"
        "from sf_xfuser.integrations.xdit import plugin\n"
        "import xfuser\n"
        "assert not plugin.import_hooked_modules()\n"
        "states = {f'{h.module}.{h.name}': s for h, s in plugin.hook_states()\n"
        "          if h.required or h.module in sys.modules}  # optional modules\n"
        "assert set(states.values()) == {'applied'}, states\n"
        "import importlib, inspect, sys\n"
        "usp = importlib.import_module('xfuser.model_executor.layers.usp')\n"
        "flux = importlib.import_module('xfuser.model_executor.models.transformers.transformer_flux')\n"
        "wan = importlib.import_module('xfuser.model_executor.models.transformers.transformer_wan')\n"
        "hooked = usp.USP\n"
        "original = hooked.__wrapped__\n"
        "assert wan.USP is hooked and inspect.unwrap(flux.USP) is original  # a repair may wrap it\n"
        "import argparse\n"
        "parse = argparse.ArgumentParser.parse_known_args\n"
        "plugin.disable()\n"
        "assert usp.USP is original and wan.USP is original and flux.USP is original\n"
        "assert argparse.ArgumentParser.parse_known_args is parse.__wrapped__\n"
        "from xfuser import xFuserArgs\n"
        "assert '--sp-backend' not in xFuserArgs.add_cli_args(argparse.ArgumentParser())._option_string_actions\n"
        "assert not any(v is hooked for m in list(sys.modules.values()) if m and m.__name__.startswith('xfuser')\n"
        "               for v in vars(m).values())\n"
        "plugin.enable()\n"
        "assert usp.USP is not original and wan.USP is usp.USP\n"
    )
    assert finished.returncode == 0, finished.stderr


def test_enable_by_hand_when_autoload_is_off():
    finished = python(
        "import sf_xfuser\nsf_xfuser.enable()\n"
        "from xfuser import xFuserArgs\nfrom xfuser.config import FlexibleArgumentParser\n"
        "xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args(['--model', 'm', '--sp-backend', 'torus'])\n",
        SF_XFUSER_AUTOLOAD="0",
    )
    assert finished.returncode == 0, finished.stderr


# -- the command lines -----------------------------------------------------------------------------------------------


def test_xdit_help_shows_the_flags():
    xdit = Path(sys.executable).with_name("xdit")
    assert "--sp-backend" in run([str(xdit), "--master_port", "29575", "--help"]).output


def test_unmodified_examples_show_the_flags():
    """The example scripts that the xfuser wheel installs, as they are."""
    examples = Path(find_spec("xfuser").submodule_search_locations[0]).parent / "examples"
    script = examples / "cogvideox_usp_example.py"
    if not script.is_file():
        pytest.skip("this xfuser installs no examples")
    assert "--sp-backend" in run([sys.executable, str(script), "--help"]).output
