"""The ``sf-xfuser`` command: help with examples, ``python -m sf_xfuser``, tables at every width, models, progress."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import sf_xfuser
from sf_xfuser import cli
from sf_xfuser.bench import models_command, progress
from sf_xfuser.bench.models_command import MODELS, SUPPORT

ROOT = Path(__file__).parents[2]
COMMANDS = ["doctor", "bench", "plan", "simulate", "models", "cluster", "cluster run"]
CALL = ["--machines", "4", "--gpus-per-machine", "2", "--heads", "6", "--head-dim", "64", "--seq-len", "8192"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_the_parser_accepts(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, text.splitlines())) <= 80
    examples = text.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example)
        start = words.index("sf_xfuser" if "-m" in words[:5] else "sf-xfuser") + 1
        assert words[start:][: len(command.split())] == command.split()
        assert cli.parser(words[start:]).parse_args(words[start:]).run


def test_the_subcommands_are_those_tested_here():
    (commands,) = (action for action in cli.parser([])._actions if action.dest == "command")
    assert [*commands.choices] == list(dict.fromkeys(command.split()[0] for command in COMMANDS))


def test_python_m_sf_xfuser_is_the_command():
    done = subprocess.run([sys.executable, "-m", "sf_xfuser", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"sf-xfuser {sf_xfuser.__version__}\n")


def test_dir_shows_the_api():
    assert dir(sf_xfuser) == sorted([*sf_xfuser.__all__, "__version__"])
    assert all(callable(getattr(sf_xfuser, name)) for name in sf_xfuser.__all__)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("command", ["plan", "models"])
def test_tables_fit_the_terminal_and_keep_every_cell(monkeypatch, capsys, width, command):
    monkeypatch.setenv("COLUMNS", str(width))
    arguments = [command, *(CALL if command == "plan" else ["--machines", "5"])]
    assert cli.main([*arguments, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    launch = re.search("launch with: .*", out)
    lines = [line for line in out.splitlines() if not line.startswith("launch with")]  # one line, to be copied
    assert max(map(len, lines)) <= width and "…" not in out
    words = Counter(out.replace(";", " ").split())
    if command == "plan":
        layouts = document["candidates"]
        assert launch[0] == f"launch with: {layouts[0]['flags']}"
        cells = [layout[key] for layout in layouts for key in ("layout", "reason")]
        cells += [
            f"{layout['seconds'] * 1e3:.2f} {layout['step_s'] * 1e3:.1f}" for layout in layouts if "seconds" in layout
        ]
    else:
        models = document["models"]
        cells = [str(model[key] or "") for model in models for key in ("model", "layout", "reason", "even")]
    assert words >= Counter(word for cell in cells for word in cell.replace(";", " ").split())


def test_models_are_those_of_xdits_runner_and_of_the_page(capsys):
    pytest.importorskip("xfuser")
    from xfuser.model_executor.models import runner_models  # noqa: F401  (registers the models)
    from xfuser.model_executor.models.runner_models.base_model import MODEL_REGISTRY

    listed = {name for name in MODELS if name in MODEL_REGISTRY}
    assert {MODEL_REGISTRY[name] for name in listed} == {*MODEL_REGISTRY.values()}, "a model of the runner is missing"
    assert all(
        MODELS[name][1] in MODEL_REGISTRY for name in listed if name != "Wan2.2-Distilled-I2V" and "Causal" not in name
    )
    page = (ROOT / "docs/models.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| model |")).split(" | ")
    columns = [head.index(name) for name in ("even", "text 13", "odd")]
    rows = {line[2:].split(" | ")[0]: line.split(" | ") for line in page.splitlines() if line.startswith("| ")}
    for name, results in SUPPORT.items():
        assert [rows[name][n] for n in columns] == [*results], name
    assert {row for row, *_ in MODELS.values()} == {*SUPPORT, ""}
    capsys.readouterr()  # xDiT prints when it is imported
    assert cli.main(["models", "--machines", "5", "--gpus-per-machine", "1", "--json", "-"]) == 0
    models = {model["model"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert models["FLUX.1-dev"]["layout"] == "torus=5 ulysses=1 ring=1", "24 heads are split unevenly"
    assert models["FLUX.1-dev"]["flags"] == "--ulysses_degree 1 --ring_degree 5"
    assert models["Krea-2-Raw"]["layout"] is None and "local cache" in models["Krea-2-Raw"]["reason"]


def test_a_cached_configuration_replaces_the_published_heads(monkeypatch, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"num_attention_heads": 6}))
    monkeypatch.setitem(MODELS, "Krea-2-Raw", ("Krea 2", str(tmp_path)))
    assert models_command._supported("Krea-2-Raw", 3, 2).layout == "torus=3 ulysses=2 ring=1"


def test_progress_prints_lines_with_an_estimate(monkeypatch, capsys):
    """Elsewhere than on a terminal: one line when the estimate is known, then one per interval, also in long steps."""
    monkeypatch.setattr(progress, "LINE_S", 0.3)
    with progress.Progress("case", 11) as shown:
        shown.doing("preparing")
        time.sleep(0.7)  # in no step, so not in the estimate
        shown.doing("first")
        time.sleep(0.1)
        shown.advance()
        shown.doing("second")
        time.sleep(0.8)
    lines = [line for line in capsys.readouterr().err.splitlines() if "preparing" not in line]
    assert re.fullmatch(r"case: second, 1 of 11 steps, about [1-5] s left, \d s so far", lines[0]), lines
    assert 3 <= len(lines) <= 4 and all(re.match("case: second, 1 of 11 steps, about", line) for line in lines[1:])
    with progress.Progress("short", 2) as shown:
        shown.advance()
        shown.doing("second")
    with progress.Progress("hidden", 1000, visible=False) as shown:
        time.sleep(0.4)
        shown.advance()
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal():
    program = (
        "import time; from sf_xfuser.bench.progress import Progress\n"
        "with Progress('case', 3) as shown: shown.doing('first'); shown.advance(); time.sleep(1.2)"
    )
    command = ["script", "-qec", shlex.join([sys.executable, "-c", program]), "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, stdin=subprocess.DEVNULL)
    assert "case: first" in done.stdout and "1 of 3 steps" in done.stdout and "━" in done.stdout
