"""Errors of xDiT 0.7: wrong as installed, exact with the hooks of ``xdit.repairs``, exact with the patches.

Two launches of four ranks, one of the installed xDiT and one of a copy with both series of ``patches/0.7.0``, run every
case without ``--sp-backend`` and with torus. The reference is one process of diffusers. For asynchronous PipeFusion,
which uses stale keys, it is xDiT's own PipeFusion 2 x Ring 2, which is correct.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.integrations.xdit import plugin
from sf_xfuser.integrations.xdit.repairs import REPAIRS
from tests.launch import records, run, torchrun
from tests.patched import SERIES, copy_of_xdit
from tests.ranks.repaired_models import BUILDERS, save, single
from tests.ranks.run_pipeline import reference_latents

EXACT = 1e-4
STALE = ["--pipefusion_parallel_degree", "2", "--warmup_steps", "1", "--num_inference_steps", "4"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``degrees``: Ulysses and Ring of xDiT; ``topology``: of torus. ``log``: what the hooks write; ``raises``: xDiT's
    error as installed."""

    model: str
    text: int
    degrees: tuple[int, int]
    topology: str
    flags: tuple[str, ...] = ()
    log: str = ""
    raises: str = ""


TEXT = "text that is not divisible by the number of ranks is passed to USP once"
CACHE = "PipeFusion's KV cache is updated once"
CASES = {
    "tensor parallel": Case(
        model="flux", text=16, degrees=(2, 1), topology="4x1", flags=("--tensor_parallel_degree", "2")
    ),
    "flux text": Case(model="flux", text=13, degrees=(2, 2), topology="2x2", log=TEXT),
    "flux text, runner": Case(
        model="flux", text=13, degrees=(4, 1), topology="2x2", flags=("--wrapper", "runner"), log=TEXT
    ),
    "flux image, runner": Case(
        model="flux-odd",
        text=16,
        degrees=(4, 1),
        topology="2x2",
        flags=("--wrapper", "runner"),
        log="image tokens are padded to a multiple of the number of ranks",
        raises="AttributeError: .*_pad_to_sp_divisible",
    ),
    "qwen text": Case(model="qwen", text=13, degrees=(2, 2), topology="2x2", log=TEXT),
    "latte": Case(model="latte", text=16, degrees=(4, 1), topology="2x2", log="Latte's temporal attention stays"),
    "flux2 pipefusion": Case(
        model="flux2",
        text=16,
        degrees=(2, 1),
        topology="4x1",
        flags=("--pipefusion_parallel_degree", "2", "--warmup_steps", "2"),
        log=TEXT,
    ),
    # The last one: as installed it ends all ranks.
    "sd3 stale": Case(
        model="sd3",
        text=16,
        degrees=(1, 1),
        topology="auto",
        flags=(*STALE, "--use_cfg_parallel"),
        log=CACHE,
        raises="RuntimeError: The expanded size of the tensor",
    ),
}
# Not a case, because as installed it ends the launch like SD3.
FLUX2_STALE = {"ulysses": ["--ulysses_degree", "2"], "torus": ["--sp-backend", "torus", "--sp-topology", "4x1"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in BUILDERS:
        save(family, folder / family)
    for family in ("flux", "sd3"):
        save_tiny_model(family, folder / family)
    shutil.copytree(folder / "flux", folder / "flux-odd")
    size = {"height": 144, "width": 80, "guidance_scale": 3.5}  # 9 x 5 tokens
    (folder / "flux-odd" / "small_input.json").write_text(json.dumps(size))
    return folder


class Launch:
    """Results of one launch by case: latents or the error of rank 0, and the text of ``explain()``."""

    def __init__(self, models: Path, out: Path, argv: dict[str, list[str]], **options) -> None:
        out.mkdir()
        self.out = out
        (out / "cases.json").write_text(json.dumps({
            name: ["--family", model.partition("-")[0], "--model", str(models / model), "--text-length", text,
                   "--out", str(out / f"{name}.pt"), *flags]
            for name, (model, text, *flags) in argv.items()}))  # fmt: skip
        self.output = torchrun("repairs.py", out / "cases.json", timeout=200, **options).output
        self.outcome, self.explained = {}, {}
        for name, _, (outcome, explained) in records(self.output):
            if "Connection closed" not in outcome:  # the error of the other ranks after one has raised
                self.outcome[name], self.explained[name] = outcome, explained

    def latents(self, name: str) -> torch.Tensor:
        assert self.outcome[name] == "ok", self.output[-5000:]
        return next(iter(torch.load(self.out / f"{name}.pt")["latents"].values()))


ARGV = {}
for name, case in CASES.items():
    common = [case.model, str(case.text), *case.flags]
    ulysses, ring = map(str, case.degrees)
    ARGV[f"{name}, torus"] = [*common, "--sp-backend", "torus", "--sp-topology", case.topology]
    ARGV[name] = [*common, "--ulysses_degree", ulysses, "--ring_degree", ring]


@pytest.fixture(scope="module")
def installed(models, tmp_path_factory) -> Launch:
    argv = {"sd3 ring": ["sd3", "16", *STALE, "--ring_degree", "2"], **ARGV}
    out = tmp_path_factory.mktemp("out") / "installed"
    return Launch(models, out, argv, nproc=4, expect_failure=True)


@pytest.fixture(scope="module")
def patched_xdit(tmp_path_factory) -> Path:
    return copy_of_xdit(tmp_path_factory.mktemp("patched"), "backend", "repairs")


@pytest.fixture(scope="module")
def patched(models, patched_xdit, tmp_path_factory) -> Launch:
    stale = {f"flux2 stale, {name}": ["flux2", "16", *STALE, *flags] for name, flags in FLUX2_STALE.items()}
    argv = {**ARGV, **stale, "flux2 text": ["flux2", "13", "--ulysses_degree", "4"]}
    out = tmp_path_factory.mktemp("out") / "patched"
    return Launch(models, out, argv, nproc=4, env={"PYTHONPATH": str(patched_xdit)})


@pytest.fixture(scope="module")
def expected(models, installed):
    def of(name: str) -> torch.Tensor:
        case = CASES[name]
        if "stale" in name:
            return installed.latents("sd3 ring")
        if case.model in BUILDERS:
            return single(case.model, models / case.model, case.text)
        return reference_latents(models / case.model, case.text)

    return {name: of(name) for name in CASES}


def error(latents: torch.Tensor, expected: torch.Tensor) -> float:
    assert latents.shape == expected.shape
    return (latents - expected).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_wrong_as_installed(name, installed, expected):
    if CASES[name].raises:
        assert re.match(CASES[name].raises, installed.outcome[name]), installed.outcome[name]
    else:
        assert error(installed.latents(name), expected[name]) > 100 * EXACT


@pytest.mark.parametrize("name", CASES)
def test_exact_with_the_hooks(name, installed, expected):
    assert error(installed.latents(f"{name}, torus"), expected[name]) <= EXACT
    explained = installed.explained[f"{name}, torus"]
    assert f"repaired in xDiT: {CASES[name].log}" in explained or not CASES[name].log, explained
    assert "fell back" not in explained or "valid_kv_len" in explained, explained


@pytest.mark.parametrize("name", CASES)
def test_exact_with_the_patches_alone(name, patched, expected):
    assert error(patched.latents(name), expected[name]) <= EXACT
    assert patched.explained[name].startswith("no --sp-backend")


@pytest.mark.parametrize("name", CASES)
def test_patches_and_hooks_do_not_both_apply(name, patched, expected):
    assert error(patched.latents(f"{name}, torus"), expected[name]) <= EXACT
    assert "repaired in xDiT" not in patched.explained[f"{name}, torus"]


def test_flux2_with_stale_keys(models, patched, tmp_path):
    """Asynchronous PipeFusion of Flux2: the patches on four ranks equal the hooks on two ranks."""
    argv = {"hooks": ["flux2", "16", *STALE, "--sp-backend", "torus"], "installed": ["flux2", "16", *STALE]}
    launched = Launch(models, tmp_path / "out", argv, nproc=2, expect_failure=True)
    assert re.match("RuntimeError: The expanded size of the tensor", launched.outcome["installed"])
    assert CACHE in launched.explained["hooks"]
    for name in FLUX2_STALE:
        assert error(patched.latents(f"flux2 stale, {name}"), launched.latents("hooks")) <= EXACT


def test_flux2_text_in_the_patches(models, patched):
    assert error(patched.latents("flux2 text"), single("flux2", models / "flux2", 13)) <= EXACT


SMALL = """
import re, runpy, sys, torch, xfuser
from xfuser.config import FlexibleArgumentParser
for flags in (["--download-dir", "d"], ["--trust-remote-code"], ["--download_dir", "d"]):
    try:
        xfuser.xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", "m", *flags])
        print("@parsed")
    except SystemExit:
        print("@unrecognized")
torch.cuda.is_available = lambda: True  # the module imports yunchang's functions only with a GPU
try:
    import xfuser.core.long_ctx_attention.ring
    print("@imported")
except ImportError as error:
    print("@" + str(error).partition(" from ")[0])
class Arguments(Exception): pass
def raise_arguments(**kwargs): raise Arguments(kwargs.get("ring_degree"))
xfuser.xFuserArgs = raise_arguments
sys.argv = ["launch.py", "--model_path", "m", "--ring_degree", "2"]
try:
    runpy.run_path(SCRIPT, run_name="__main__")
except Arguments as error:
    print("@ring", error)
"""


def test_options_and_imports(patched_xdit):
    """The HTTP service's ring_degree, options with dashes, and an import from yunchang 0.6.4. Patches only."""
    printed = {}
    for name, folder in {"installed": Path(find_spec("xfuser").origin).parents[1], "patched": patched_xdit}.items():
        code = SMALL.replace("SCRIPT", repr(str(folder / "entrypoints" / "launch.py")))
        output = run([sys.executable, "-c", code], env={"PYTHONPATH": str(folder)}).output
        printed[name] = re.findall(r"^@(.*)$", output, re.MULTILINE)
    assert printed["installed"] == ["unrecognized"] * 3 + ["cannot import name 'update_npu_out'", "ring None"]
    assert printed["patched"] == ["parsed"] * 3 + ["imported", "ring 2"]


# -- the records -------------------------------------------------------------------------------------------------------

PATCHES = {path.name[:4]: path.read_text() for path in sorted(SERIES.glob("repairs/*.patch"))}
HOOKS = {n: [hook for hook, _ in plugin.hook_states() if f"/{n} " in hook.remove_when] for n in REPAIRS}


@pytest.mark.parametrize("number", sorted({*PATCHES, *REPAIRS}))
def test_each_patch_has_a_record_with_a_test_and_hooks_or_a_reason_for_none(number):
    assert number in PATCHES and bool(HOOKS[number]) != bool(REPAIRS[number].without_hook)
    for hook in HOOKS[number]:
        assert f"b/{hook.module.replace('.', '/')}.py" in PATCHES[number] or hook.native is None
        assert hook.native is None or re.search(rf"^\+.*\b{hook.native}\b", PATCHES[number], re.MULTILINE)
    sources = "".join(path.read_text() for path in (SERIES.parents[1] / "tests").rglob("test_*.py"))
    assert all(test in CASES or f"def {test}(" in sources for test in REPAIRS[number].tests)


def test_the_readme_lists_the_records():
    rows = ["| patch | error in xDiT 0.7.0 | hooks | tests |", "|---|---|---|---|"]
    for number, repair in sorted(REPAIRS.items()):
        [subject] = re.findall(r"^Subject: \[PATCH \d+/12\] fix: (.*(?:\n .*)*)", PATCHES[number], re.MULTILINE)
        hooked = repair.without_hook or len(HOOKS[number])
        tests = ", ".join(f"`{test}`" for test in repair.tests)
        rows.append(f"| {number} {subject.replace(chr(10), '')} | {repair.why} | {hooked} | {tests} |")
    table = "\n".join(rows)
    assert table in (SERIES.parent / "README.md").read_text(), f"replace the table in patches/README.md by\n{table}"
