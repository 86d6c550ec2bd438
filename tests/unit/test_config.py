"""The ``--sp-*`` flags, their environment variables, and errors for invalid values."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields

import pytest

from sf_xfuser import config as sp_args
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.xdit.degrees import num_processes, read_model_facts


def parse(*argv: str) -> TorusArgs | None:
    parser = argparse.ArgumentParser()
    sp_args.add_arguments(parser)
    return sp_args.from_mapping(vars(parser.parse_args(argv)))


@pytest.mark.parametrize(
    "spelled",
    [["--sp-backend", "torus"], ["--sp_backend", "torus"], ["--sp-backend=torus"], ["--sp_backend=torus"]],
)
def test_every_spelling(spelled):
    assert parse(*spelled) == TorusArgs(backend="torus")


def test_all_flags():
    plan = "torus=2,ulysses=3,ring=1"
    line = f"--sp-backend auto --sp-plan {plan} --sp-topology 2x3 --sp-timeout 7.5 --sp-kernel fused --sp-strict"
    given = parse(*line.split())
    assert given == TorusArgs(backend="auto", plan=plan, topology="2x3", timeout=7.5, kernel="fused", strict=True)
    assert given.explicit_plan() == {"torus": 2, "ulysses": 3, "ring": 1}


def test_a_flag_without_backend_is_an_error():
    assert parse() is None
    with pytest.raises(ValueError, match="--sp-plan has no effect without --sp-backend"):
        parse("--sp-plan", "paper")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "tours"}, "must be one of usp, ulysses, ring, torus, auto, got 'tours'"),
        ({"plan": "torus=0"}, "positive integers, got 'torus=0'"),
        ({"plan": "torus=2,torus=2"}, "--sp-plan must be"),
        ({"plan": "fastest"}, "--sp-plan must be auto, paper, usp or torus="),
        ({"topology": "4"}, "--sp-topology must be 'auto' or NxM"),
        ({"plan": "torus=" + "9" * 5000}, "positive integers, got 'torus=999"),
        ({"topology": "9" * 5000 + "x1"}, "--sp-topology must be 'auto' or NxM"),
        ({"timeout": 0.0}, "positive number of seconds"),
        ({"timeout": float("inf")}, "at most 86400 .*, got inf"),
        ({"timeout": float("nan")}, "got nan"),
        ({"timeout": 1e10}, "got 10000000000.0"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        TorusArgs(**values)


WRONG = [None, True, 5, 0.5, "no", [], ["torus"], {}, {"torus": 2}, b"torus"]


@pytest.mark.parametrize("field", [field.name for field in fields(TorusArgs)])
def test_values_of_wrong_types(field):
    """The error names the flag, the value and what is allowed."""
    right = {"backend": ["None"], "timeout": ["5", "0.5"], "strict": ["True"]}.get(field, [])
    for value in WRONG:
        if repr(value) in right:
            TorusArgs(**{field: value})
            continue
        with pytest.raises(ValueError, match=rf"--sp-{field} must be .*, got {re.escape(repr(value))}"):
            TorusArgs(**{field: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torus", "must be JSON like .*, got 'torus'"),
        ("[]", "it must be an object with the keys backend, plan"),
        ("5", "it must be an object"),
        ("null", "it must be an object"),
        ('{"sp_backend": "torus"}', "it must be an object with the keys backend, plan"),
        ('{"backend": "torus", "plan": 5}', "^SF_XFUSER_ARGS: --sp-plan must be .*, got 5$"),
        ('{"backend": "torus", "plan": {"torus": [2]}}', r"--sp-plan must be .*, got \{'torus': \[2\]\}"),
        ('{"backend": ["torus"]}', r"--sp-backend must be one of .*, got \['torus'\]"),
        ('{"backend": "torus", "timeout": 1e999}', "--sp-timeout must be .*, got inf"),
        ('{"backend": "torus", "timeout": "60"}', "--sp-timeout must be .*, got '60'"),
        ('{"plan": "paper"}', "--sp-plan has no effect without --sp-backend"),
        ("[" * 100_000, r"got '\[\[.*: maximum recursion depth exceeded"),
        ('{"backend": "torus", "timeout": ' + "9" * 5000 + "}", "must be JSON like"),
    ],
)
def test_bad_environment(text, message, monkeypatch):
    monkeypatch.setenv(sp_args.ARGS_VARIABLE, text)
    with pytest.raises(ValueError, match=message) as caught:
        sp_args.args_from_environment()
    assert len(str(caught.value)) < 1000 and sp_args.ARGS_VARIABLE in str(caught.value)


def test_extract_removes_only_sp_flags():
    args, rest = sp_args.extract(["--model", "m", "--sp-backend=torus", "--sp_plan", "paper", "--height", "64"])
    assert args == TorusArgs(backend="torus", plan="paper")
    assert rest == ["--model", "m", "--height", "64"]


def test_environment(monkeypatch):
    monkeypatch.setenv(sp_args.ARGS_VARIABLE, TorusArgs(backend="torus", topology="2x2").to_json())
    assert sp_args.args_from_environment() == TorusArgs(backend="torus", topology="2x2")
    monkeypatch.setenv(sp_args.ARGS_VARIABLE, "{}")
    assert sp_args.args_from_environment() is None
    for value, expected in (("0", False), ("off", False), ("1", True), ("", True)):
        monkeypatch.setenv(sp_args.AUTOLOAD_VARIABLE, value)
        assert sp_args.autoload_wanted() is expected


@pytest.mark.parametrize(
    ("argv", "product", "expected"),
    [
        ("--sp-backend torus --sp-topology 2x4", 1, 8),
        ("--sp-backend torus --sp-topology 2x4 --nnodes 2", 1, 4),
        ("--sp-backend torus --sp-plan torus=2,ulysses=2,ring=1 --use-cfg-parallel", 1, 8),
        ("--sp-backend torus --ulysses_degree 2", 2, 2),
        ("--ulysses_degree 2", 2, 2),
        ("--height 64", 1, 1),
    ],
)
def test_processes_of_the_xdit_command(argv, product, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xdit", *argv.split()])
    assert num_processes(argv.split(), lambda rest: product) == expected


def test_processes_default_to_the_devices_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["xdit"])
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert num_processes(["--sp-backend", "torus"], lambda rest: 1) == 7
    assert num_processes(["--sp-backend", "torus", "--pipefusion_parallel_degree", "2"], lambda rest: 2) == 6


def test_model_facts_from_the_transformers_config(tmp_path, monkeypatch):
    assert read_model_facts(str(tmp_path)) is None
    assert read_model_facts("no/such-model") is None
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_attention_heads": 24, "num_kv_heads": 8}))
    facts = read_model_facts(str(tmp_path))
    assert facts is not None and (facts.heads, facts.kv_heads) == (24, 8)
    for text in (
        "[" * 100_000,
        "[]",
        '"heads"',
        '{"num_attention_heads": 0}',
        '{"num_attention_heads": true}',
        "{",
        "",
    ):
        (tmp_path / "transformer" / "config.json").write_text(text)
        assert read_model_facts(str(tmp_path)) is None, text[:30]
    assert read_model_facts("name" * 1000) is None  # longer than a file name may be
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"n_heads": 30}))
    facts = read_model_facts(str(tmp_path))
    assert facts is not None and (facts.heads, facts.kv_heads) == (30, 30)
