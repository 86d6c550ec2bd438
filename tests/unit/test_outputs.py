"""Outputs of the ``sf-xfuser`` command: proven before the run, written each by itself, ``-`` for standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sf_xfuser.bench import emulate
from sf_xfuser.cli import main

CALL = ["--machines", "2", "--gpus-per-machine", "2", "--heads", "8", "--head-dim", "64", "--seq-len", "8192"]
COMMANDS = {"plan": CALL, "simulate": CALL, "models": []}
REASON = emulate.unavailable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--json {folder}/no/x.json", "there is no folder {folder}/no"),
        ("--json {folder}", "is a folder; use the path of a file"),
        ("--json /sys/x.json", "--json /sys/x.json: "),
        ("--plot {folder}/x.docx", "the suffix selects the type of the picture; use one of "),
        ("--plot {folder}/x", "the suffix selects the type of the picture; use one of "),
        ("--plot -", "the suffix selects the type of the picture; use one of "),
        ("--json {folder}/x.json --trace {folder}/../{name}/x.json", "--json and --trace both write "),
        ("--json - --trace -", "--json and --trace both write -"),
    ],
)
def test_a_path_is_refused_before_the_run(capsys, tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    values = {"folder": tmp_path, "name": tmp_path.name}
    assert main(["simulate", *CALL, *arguments.format(**values).split()]) == 2
    captured = capsys.readouterr()
    assert message.format(**values) in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert captured.err.startswith("sf-xfuser simulate: ") and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_plot_without_matplotlib_is_refused_before_the_run(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([command, *CALL, "--plot", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json")]) == 2
    assert "x.png: plots need matplotlib: pip install 'sf-xfuser[bench]'" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dash_is_standard_output(capsys, command):
    assert main([command, *COMMANDS[command], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_proving_a_path_changes_nothing(tmp_path):
    (old := tmp_path / "old.json").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for path in ("old.json", "pipe"):  # opening a pipe for writing would wait for a reader
        assert main(["plan", "--heads", "0", "--head-dim", "1", "--seq-len", "1", "--json", str(tmp_path / path)]) == 2
    assert old.read_text() == "kept" and len([*tmp_path.iterdir()]) == 2


def test_one_failed_output_does_not_lose_the_others(capsys, tmp_path):
    """/dev/full accepts no byte."""
    pytest.importorskip("matplotlib")
    others = ["--trace", str(tmp_path / "trace.json"), "--plot", str(tmp_path / "plot.svg")]
    assert main(["simulate", *CALL, "--json", "/dev/full", *others]) == 1
    captured = capsys.readouterr()
    assert captured.err == "sf-xfuser simulate: --json /dev/full was not written: No space left on device\n"
    assert "predicted torus" in captured.out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_disks_that_are_full_or_read_only(tmp_path):
    """A real disk of 512 kB, then one of 1.4 MB that fills up while the command runs, then the same read-only."""
    plan = f"{sys.executable} -m sf_xfuser plan {' '.join(CALL)}"
    simulate = f"{sys.executable} -m sf_xfuser simulate {' '.join(CALL)}"
    script = f"""
        mount -t tmpfs -o size=512k none {tmp_path}
        {plan} --json {tmp_path}/x.json; echo status $?
        mount -t tmpfs -o size=1400k none {tmp_path}
        {simulate} --machines 64 --gpus-per-machine 8 --json {tmp_path}/x.json --trace {tmp_path}/y.json; echo status $?
        ls {tmp_path}
        mount -o remount,ro {tmp_path}
        {plan} --json {tmp_path}/x.json; echo status $?
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    full, fills, read_only = done.stderr.splitlines()[0], done.stderr.splitlines()[1:-1], done.stderr.splitlines()[-1]
    assert "x.json: the disk is full (" in full
    assert all("was not written: No space left on device" in line for line in fills) and len(fills) == 2
    assert "x.json: Read-only file system" in read_only
    assert [line for line in done.stdout.splitlines() if not line.startswith("predicted")] == [
        "status 2", "status 1", "status 2",
    ]  # fmt: skip
