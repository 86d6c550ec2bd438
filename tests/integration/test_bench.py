"""``sf-xfuser bench`` and ``cluster run``: cases, invalid requests, real runs, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sf_xfuser import cli
from sf_xfuser.bench import command, emulate, report, usp_variants
from sf_xfuser.bench.case import Case, launches, make_case, read_grid
from sf_xfuser.bench.variants import NAMES
from tests.launch import torchrun

REASON = emulate.unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")
RANK_MODULE = "sf_xfuser.bench.rank"
SHAPE = ("--heads", "4", "--head-dim", "16")
QUICK = ("--repeat", "2", "--warmup", "0")


# --- cases ----------------------------------------------------------------------------------------------------------


def grid(folder: Path, text: str) -> Path:
    file = folder / "grid.toml"
    file.write_text(text)
    return file


def test_a_grid_is_the_product_of_its_lists(tmp_path):
    cases = read_grid(
        grid(
            tmp_path,
            """
            [defaults]
            heads = 24
            cluster = "2x2"
            [[case]]
            inter_rate = ["100mbit", "1gbit"]
            seq_len = [1024, 4096]
            [[case]]
            cluster = "4x1"
            inter_delay = "0.5ms"
            kv_heads = 8
            dtype = "bfloat16"
            plan = "paper"
            """,
        )
    )
    assert [case.id for case in cases] == [
        "2x2 100mbit L1024 H24 D64",
        "2x2 100mbit L4096 H24 D64",
        "2x2 1000mbit L1024 H24 D64",
        "2x2 1000mbit L4096 H24 D64",
        "4x1 0.5ms L4096 H24/8 D64 bfloat16 paper",
    ]
    first, last = cases[0], cases[-1]
    assert first == Case(num_machines=2, ranks_per_machine=2, inter_rate_bps=100_000_000, seq_len=1024, heads=24)
    assert first.spec == emulate.ClusterSpec.parse("2x2", "100mbit")
    assert (last.inter_rate_bps, last.inter_delay_s, last.kv_heads) == (None, 0.0005, 8)
    assert last.to_json() | {"id": last.id, "cluster": "4x1", "kv_heads": 8} == last.to_json()
    assert first.to_json()["kv_heads"] == 24 and json.loads(json.dumps(first.to_json())) == first.to_json()


def test_tokens_of_an_uneven_case():
    case = make_case({"cluster": "3x1", "seq_len": 11})
    assert case.tokens == (4, 4, 3) and sum(case.tokens) == case.seq_len


def test_ids_tell_cases_apart():
    """Rows are grouped by id, so the id must contain every field."""
    plain = {"cluster": "2x2", "inter_rate": "1gbit"}
    others = {
        "cluster": "4x1", "inter_rate": "2gbit", "inter_delay": "1ms", "seq_len": 8192, "heads": 16, "kv_heads": 4,
        "head_dim": 128, "batch": 2, "dtype": "float16", "plan": "usp",
    }  # fmt: skip
    ids = [make_case(plain).id, *(make_case({**plain, name: value}).id for name, value in others.items())]
    assert len(set(ids)) == len(ids)


def test_launches_group_cases_of_one_cluster():
    def a_case(cluster: str, rate: str | None = None, delay: str | None = None, seq_len: int = 64) -> Case:
        return make_case({"cluster": cluster, "inter_rate": rate, "inter_delay": delay, "seq_len": seq_len})

    slow, other, fast = a_case("2x2", "10mbit"), a_case("4x1", "10mbit"), a_case("2x2", "1gbit")
    unshaped, late, long = a_case("2x2"), a_case("2x2", "10mbit", "1ms"), a_case("2x2", "10mbit", seq_len=128)
    assert launches([slow, other, fast, unshaped, late, long]) == [[slow, fast, long], [other], [unshaped], [late]]
    assert launches([]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[case]\n", "is not TOML"),
        pytest.param("case = " + "[" * 5000, "is not TOML", id="nested"),
        ("", r"must have \[\[case\]\] tables.*it has no \[\[case\]\]"),
        ("[defaults]\nheads = 4\n", r"it has no \[\[case\]\]"),
        ('[[cases]]\ncluster = "2x2"\n', "it has cases"),
        ("case = 4\n", r"\[\[case\]\]"),
        ("case = [4]\n", r"\[\[case\]\]"),
        ('defaults = 4\n[[case]]\ncluster = "2x2"\n', "defaults"),
        ("[[case]]\nheads = 4\n", r"\[\[case\]\] 1: a case needs cluster = \"NxM\""),
        ('[[case]]\ncluster = "2x2"\n[[case]]\ncluster = "2y2"\n', r"\[\[case\]\] 2: --cluster .*got '2y2'"),
        ('[[case]]\ncluster = "2x2"\nhead = 4\ntokens = 5\n', r"\[\[case\]\] 1: unknown field\(s\) head, tokens; allo"),
        ('[[case]]\ncluster = "2x2"\ninter_rate = 100\n', "--inter-rate must be a number with kbit.*got '100'"),
        ('[[case]]\ncluster = "2x2"\nseq_len = "many"\n', "seq_len must be a positive whole number, got 'many'"),
        ('[[case]]\ncluster = "2x2"\nseq_len = true\n', "seq_len must be a positive whole number, got True"),
        ('[[case]]\ncluster = "2x2"\nseq_len = 3\n', "seq_len must be at least the number of ranks, 4, got 3"),
        ('[[case]]\ncluster = "2x2"\nheads = 8\nkv_heads = 3\n', "kv_heads must divide 8 heads, got 3"),
        ('[[case]]\ncluster = "2x2"\ndtype = "float64"\n', "dtype must be one of float32, bfloat16, float16"),
        ('[[case]]\ncluster = "2x2"\nseq_len = []\n', "seq_len"),
        ('[[case]]\ncluster = "2x2"\nplan = "best"\n', "best"),
        ('[[case]]\ncluster = ["2x2", "2X2"]\n', "lists some cases more than once: 2x2 L4096 H8 D64"),
    ],
)
def test_an_invalid_grid_names_the_file_and_the_table(tmp_path, text, message):
    file = grid(tmp_path, text)
    with pytest.raises(ValueError, match=message) as refused:
        read_grid(file)
    assert f"--grid {file}" in str(refused.value)


# --- invalid requests -----------------------------------------------------------------------------------------------


@pytest.fixture
def unlaunched(monkeypatch):
    """No torchrun variables; starting a cluster fails the test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a cluster was started for an invalid request")

    monkeypatch.setattr(emulate, "run", run)


def refuse(capsys, *arguments: object) -> str:
    """The error of a request that ends with status 2: one line, only on stderr."""
    assert cli.main(["bench", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sf-xfuser bench: ") and captured.err.count("\n") == 1, captured.err
    return str(captured.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--cluster NxM", "--grid FILE", "torchrun"]),
        ("--inter-rate 1gbit", ["--cluster NxM"]),
        ("--cluster 0x2", ["got 0 machine(s) x 2 rank(s)"]),
        ("--cluster 9x9", ["1 to 64 ranks"]),
        ("--cluster two", ["--cluster", "for instance 4x2", "'two'"]),
        ("--cluster 2x1 --inter-rate fast", ["--inter-rate", "for instance 100mbit", "'fast'"]),
        ("--cluster 2x1 --inter-rate 1kbit", ["64kbit to 100gbit", "1000 bit/s"]),
        ("--cluster 2x1 --inter-delay 5", ["--inter-delay", "for instance 0.2ms", "'5'"]),
        ("--cluster 2x1 --heads 0", ["heads must be a positive whole number, got 0"]),
        ("--cluster 2x1 --heads 8 --kv-heads 3", ["kv_heads must divide 8 heads, got 3"]),
        ("--cluster 2x2 --seq-len 3", ["must be at least the number of ranks, 4, got 3"]),
        ("--cluster 2x1 --plan best", ["best"]),
        ("--cluster 2x1 --variants torus,warp", ["unknown variant 'warp'", "usp-allgather", "torus-no-overlap"]),
        ("--cluster 2x1 --variants usp-allgather --predict", ["--predict calibrates with the variant torus"]),
        ("--cluster 2x1 --repeat 0", ["--repeat must be at least 1, got 0"]),
        ("--cluster 2x1 --warmup -1", ["--warmup", "at least 0"]),
        ("--cluster 2x1 --timeout nan", ["--timeout", "nan"]),
        ("--grid {folder}/none.toml", ["none.toml", "No such file"]),
        ("--grid {folder}/none.toml --cluster 2x1", ["--cluster cannot be used with --grid, whose file has"]),
        ("--grid x --seq-len 64 --dtype float16 --steps 1", ["--seq-len, --dtype, --steps cannot be used with --grid"]),
        ("--grid x --pipeline flux", ["--pipeline cannot be used with --grid"]),
        ("--cluster 2x1 --steps 2", ["--steps needs --pipeline"]),
        ("--cluster 2x1 --topology 2x1", ["--topology is torchrun's topology and cannot be used with --cluster"]),
        (
            "--cluster 2x1 --pipeline flux --seq-len 4096 --heads 8 --kv-heads 8 --head-dim 64 --batch 1 --warmup 2 "
            "--predict --trace {folder}/t.json",
            ["--seq-len, --heads, --kv-heads, --head-dim, --batch, --warmup, --predict, --trace cannot be used with"],
        ),
        ("--cluster 2x1 --plot {folder}/x.docx", ["--plot", "x.docx", "the suffix selects"]),
        ("--cluster 2x1 --markdown /sys/x.md", ["--markdown /sys/x.md: "]),
        ("--cluster 2x1 --json {folder}/no/rows.json", ["--json", "there is no folder {folder}/no"]),
        ("--cluster 2x1 --report {folder}/no/page.html", ["--report", "there is no folder {folder}/no"]),
        ("--cluster 2x1 --json {folder}", ["--json {folder}"]),
        ("--cluster 2x1 --pipeline nothing", ["nothing"]),
        ("--cluster 2x1 --against flash", ["--against: unknown package 'flash'", "diffusers, yunchang, para-attn"]),
        ("--cluster 2x1 --against ,", ["--against: unknown package ''"]),
        ("--cluster 2x1 --pipeline flux --against yunchang", ["--pipeline must be diffusers, got yunchang"]),
    ],
)
def test_an_invalid_request_is_refused(unlaunched, capsys, tmp_path, arguments, words):
    error = refuse(capsys, *arguments.format(folder=tmp_path).split())
    for word in words:
        assert word.format(folder=tmp_path) in error


def test_under_torchrun_the_cluster_is_torchruns(unlaunched, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = grid(tmp_path, '[[case]]\ncluster = "2x1"\n')
    for arguments in ("--cluster 2x1", "--inter-rate 1gbit", f"--grid {file}"):
        assert "cannot be used under torchrun; use --topology" in refuse(capsys, *arguments.split())


def test_a_refusal_of_the_installed_command():
    """The whole process, from the command line to its exit status."""
    done = bench("--cluster", "2x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sf-xfuser bench: --cluster must be machines x ranks per machine")
    assert done.stderr.count("\n") == 1
    done = bench("--dtype", "float8")  # argparse's own refusal
    assert done.returncode == 2 and "invalid choice: 'float8'" in done.stderr and "Traceback" not in done.stderr


# --- runs -----------------------------------------------------------------------------------------------------------


def environment(**changes: object) -> dict[str, str]:
    """That of programs: tables have no second part."""
    changes = {"COLUMNS": 200} | changes
    unwanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if k not in unwanted} | {k: str(v) for k, v in changes.items()}


def bench_argv(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sf_xfuser.cli", "bench", *map(str, arguments)]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(bench_argv(*arguments), capture_output=True, text=True, timeout=240, env=environment())


def strict_json(text: str) -> Any:
    """JSON without Infinity and NaN, which only Python accepts."""

    def refuse_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse_constant)


@dataclass
class Run:
    folder: Path
    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "rows.json").read_text())
        return document

    def row(self, variant: str) -> dict[str, Any]:
        (row,) = (row for row in self.document["rows"] if row["variant"] == variant)
        return row


@pytest.fixture(scope="module")
def one_run(tmp_path_factory) -> Run:
    """Every variant of one case, with every output."""
    if REASON is not None:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("bench")
    files = [f"--{kind}={folder / name}" for kind, name in (
        ("json", "rows.json"), ("report", "page.html"), ("trace", "trace.json"), ("plot", "plot.png"),
    )]  # fmt: skip
    done = bench("--cluster", "2x1", "--inter-rate", "400mbit", "--seq-len", 1024, *SHAPE, *QUICK, *files)
    return Run(folder, done.returncode, done.stdout, done.stderr)


def ok_rows(run: Run) -> list[dict[str, Any]]:
    rows = [row for row in run.document["rows"] if row["status"] == "ok"]
    assert rows
    return rows


def test_every_variant_is_measured_or_has_a_reason(one_run):
    assert one_run.status == 0, one_run.err
    status = {row["variant"]: row["status"] for row in one_run.document["rows"]}
    xdit = ["usp-allgather", "usp-alltoall", "ulysses", "mapping"]
    assert list(status) == ["single", "attention-alone", *xdit, "torus-no-overlap", "torus"]
    for row in one_run.document["rows"]:
        assert (row["family"] == "xdit") == (row["variant"] in ("usp-allgather", "usp-alltoall", "ulysses"))
        if row["variant"] == "mapping" or (row["family"] == "xdit" and usp_variants.unavailable()):
            assert row["status"] == "skipped" and row["reason"] and row["median_s"] is None, row
        else:
            assert row["status"] == "ok" and not row["reason"], row


def test_statistics_are_those_of_the_times(one_run):
    for row in ok_rows(one_run):
        times = row["times_s"]
        assert len(times) == 2 and min(times) > 0
        assert row["median_s"] == pytest.approx(statistics.median(times))
        assert (row["min_s"], row["max_s"]) == (min(times), max(times))
        assert row["min_s"] <= row["q1_s"] <= row["median_s"] <= row["q3_s"] <= row["max_s"], row["variant"]
        assert 0 < row["attention_s"] <= row["max_s"]
        assert 0 <= row["exposed_s"] < row["max_s"]
        assert row["first_call_s"] > 0
        if row["variant"] != "single":
            assert len(row["peak_bytes"]) == 2 and min(row["peak_bytes"]) > 0


def test_results_are_those_of_one_process(one_run):
    for row in ok_rows(one_run):
        if row["family"] == "reference":
            assert row["max_abs_error"] is None
        else:
            assert 0 <= row["rms_error"] <= row["max_abs_error"] < 1e-5, row["variant"]
    assert one_run.row("torus")["max_abs_error"] > 0, "the two ways to sum cannot agree in every bit"


def test_bytes_between_machines_are_those_of_the_formula(one_run):
    """L H D = 1024 x 4 x 16 floats: each of the two machines sends a quarter of Q, K, V and O."""
    torus = one_run.row("torus")
    assert torus["formula_bytes"] == 4 * (1024 * 4 * 16 * 4) / 4
    for row in ok_rows(one_run):
        matrix = row["wire_bytes"]
        assert (matrix[0][0], matrix[1][1]) == (0, 0)
        sent = {matrix[0][1], matrix[1][0]}
        if row["family"] == "reference":
            assert max(sent) < 10_000
        else:
            assert row["formula_bytes"] <= min(sent) and max(sent) <= 1.05 * row["formula_bytes"], row["variant"]


def test_efficiency_is_the_bound_over_the_median(one_run):
    alone, torus = one_run.row("attention-alone"), one_run.row("torus")
    assert torus["bound_wire_s"] == pytest.approx(torus["formula_bytes"] * 8 / 400e6)
    for row in ok_rows(one_run):
        if row["family"] == "reference":
            assert row["efficiency"] is None and row["ratio_to_usp"] is None
            continue
        assert row["bound_compute_s"] == alone["median_s"]
        assert row["bound_s"] == max(row["bound_compute_s"], row["bound_wire_s"])
        assert row["efficiency"] == pytest.approx(row["bound_s"] / row["median_s"])


@pytest.mark.skipif(usp_variants.unavailable() is not None, reason=usp_variants.unavailable() or "")
def test_ratios_are_to_the_faster_variant(one_run):
    median = {row["variant"]: row["median_s"] for row in ok_rows(one_run)}
    usp = min(median["usp-allgather"], median["usp-alltoall"])
    torus = one_run.row("torus")
    assert torus["ratio_to_usp"] == pytest.approx(usp / median["torus"])
    assert torus["ratio_to_best_xdit"] == pytest.approx(min(usp, median["ulysses"]) / median["torus"])


def test_the_table_shows_the_rows(one_run):
    lines = {line.split()[0]: line for line in one_run.out.splitlines() if line.split()}
    for row in one_run.document["rows"]:
        line = lines[row["variant"]]
        if row["status"] != "ok":
            assert f"skipped: {row['reason']}" in " ".join(one_run.out.split())
            continue
        numbers = line.strip().removeprefix(row["variant"]).rpartition(row["layout"] or report.DASH)[0]
        shown = [None if cell == report.DASH else cell.rstrip("x") for cell in numbers.split()]
        assert len(shown) == 10, line
        low, high = shown.pop(1).split("..")
        sent = max(map(sum, row["wire_bytes"])) / 1e6
        peak = max(row["peak_bytes"]) / 1e6 if row["peak_bytes"] else None
        low_ms, high_ms, median, first, exposed = (
            1e3 * row[name] for name in ("q1_s", "q3_s", "median_s", "first_call_s", "exposed_s")
        )
        ratios, efficiency = (row["ratio_to_usp"], row["ratio_to_best_xdit"]), row["efficiency"]
        expected = [median, *ratios, row["max_abs_error"], sent, efficiency and 100 * efficiency, exposed, peak, first]
        for cell, value in zip([low, high, *shown], [low_ms, high_ms, *expected], strict=True):
            assert (cell is None) == (value is None), line
            assert value is None or float(cell) == pytest.approx(value, rel=0.06, abs=0.005), line
    assert one_run.document["rows"][0]["case"]["id"] in one_run.out
    assert "torus, MB sent" in one_run.out
    assert "DEBUG" not in one_run.out and "WARNING" not in one_run.out, "a library writes into the table"


def test_the_document_says_what_was_run_where(one_run):
    document = one_run.document
    assert document["schema"] == 1 and document["command"].startswith("sf-xfuser bench --cluster 2x1 ")
    assert document["hardware"]["cores"] >= 1 and document["versions"]["torch"]
    case = make_case({"cluster": "2x1", "inter_rate": "400mbit", "seq_len": 1024, "heads": 4, "head_dim": 16})
    assert all(row["case"] == case.to_json() for row in document["rows"])
    traced = [row["variant"] for row in ok_rows(one_run) if row["variant"] != "single"]
    assert [timeline["variant"] for timeline in document["timelines"]] == traced[::-1]


def test_the_timeline_holds_what_was_computed_and_sent(one_run):
    torus = next(t for t in one_run.document["timelines"] if t["variant"] == "torus")
    assert [(rank["rank"], rank["machine"]) for rank in torus["ranks"]] == [(0, 0), (1, 1)]
    for rank in torus["ranks"]:
        spans = rank["spans"]
        assert {span["link"] for span in spans} >= {"compute", "across"}
        for span in spans:
            assert 0 <= span["start_s"] <= span["end_s"] <= torus["duration_s"], span
        arrived = sum(span["bytes"] for span in spans if span["link"] == "across")
        assert arrived == one_run.row("torus")["formula_bytes"]  # both machines send, so both receive, as much
    trace = strict_json((one_run.folder / "trace.json").read_text())
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert any(name.startswith("torus machine 0") for name in names) and len(names) == 2 * len(
        one_run.document["timelines"]
    )


def test_the_page_and_the_plot(one_run):
    page = (one_run.folder / "page.html").read_text()
    for row in one_run.document["rows"]:
        assert row["variant"] in page
    assert one_run.document["rows"][0]["case"]["id"] in page
    assert (one_run.folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_grid_has_stored_its_results(tmp_path, monkeypatch):
    launched = []

    def launch(_: Any, spec: emulate.ClusterSpec, __: Any, document: dict[str, Any]) -> int:
        if launched:
            raise SystemExit("killed")  # not handled anywhere
        launched.append(spec)
        document["rows"].append({"case": {"id": str(spec)}})
        return 0

    monkeypatch.setattr(command, "_launch", launch)
    file = grid(tmp_path, '[[case]]\ncluster = ["2x1", "3x1"]\nseq_len = 64\n')
    with pytest.raises(SystemExit):
        cli.main(["bench", "--grid", str(file), "--json", str(tmp_path / "rows.json")])
    rows = strict_json((tmp_path / "rows.json").read_text())["rows"]
    assert [row["case"]["id"] for row in rows] == [str(launched[0])] == ["2x1"]


# --- several cases, in one launch -----------------------------------------------------------------------------------

UNEVEN = '[[case]]\ncluster = "2x1"\nheads = 4\nhead_dim = 16\ninter_rate = "400mbit"\nseq_len = 1023\n'


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory) -> Run:
    """Two cases: one that xDiT cannot split, one at another rate with fewer key heads; rows to standard output."""
    if REASON is not None:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("grid")
    file = grid(folder, UNEVEN + UNEVEN.replace("1023", "1024\nkv_heads = 2").replace("400mbit", "10mbit"))
    variants = "usp-allgather,usp-alltoall,torus"
    done = bench("--grid", file, "--variants", variants, *QUICK, "--json", "-", "--markdown", folder / "table.md")
    (folder / "rows.json").write_text(done.stdout)
    return Run(folder, done.returncode, done.stdout, done.stderr)


def test_cases_share_a_launch(grid_run):
    assert grid_run.status == 0, grid_run.err
    assert grid_run.err.count("starting 2 ranks for 2 case(s)") == 1
    assert "2 of 2 cases measured" in grid_run.err
    cases = report.by_case(grid_run.document["rows"])
    assert list(cases) == ["2x1 400mbit L1023 H4 D16", "2x1 10mbit L1024 H4/2 D16"]
    for rows in cases.values():
        assert {row["variant"] for row in rows} == {"attention-alone", "usp-allgather", "usp-alltoall", "torus"}
    _, _, *lines = (grid_run.folder / "table.md").read_text().removesuffix("\n").split("\n")
    assert [line.split("|")[1:2] for line in lines] == [[f" {case} "] for case in cases]


def test_uneven_tokens_leave_xdit_out(grid_run):
    uneven, even = report.by_case(grid_run.document["rows"]).values()
    for row in uneven:
        if row["family"] == "xdit":
            assert row["status"] == "skipped"
            assert usp_variants.unavailable() or "1023 tokens cannot be split over 2 ranks" in row["reason"]
        else:
            assert row["status"] == "ok" and len(row["times_s"]) == 2
            assert 0 < row["attention_s"] <= row["max_s"], "attention is timed also where no variant of xDiT runs"
    assert report.variant_row(uneven, "torus")["max_abs_error"] < 1e-5
    assert {row["status"] for row in even if row["family"] != "xdit"} == {"ok"}


def test_the_rate_changes_between_cases(grid_run):
    """With half as many key heads, a ring across machines sends least: half of K and V. That takes 100 ms at 10 Mbit/s,
    on any computer, less a burst; at the first case's rate it would take 3 ms."""
    torus = report.variant_row(list(report.by_case(grid_run.document["rows"]).values())[1], "torus")
    assert torus["formula_bytes"] == 2 * 1024 * 2 * 16 * 4 / 2
    assert torus["formula_bytes"] <= torus["wire_bytes"][0][1] <= 1.05 * torus["formula_bytes"]
    assert torus["min_s"] > 0.6 * torus["bound_wire_s"] > 0.06


@pytest.mark.skipif(REASON is not None or usp_variants.unavailable() is not None, reason=REASON or "xDiT is missing")
def test_auto_selects_a_candidate_before_it_is_timed(tmp_path):
    """At 20 Mbit/s between machines either way to send 512 x 8 x 16 floats takes much longer than on the host."""
    shape = ("--seq-len", 512, "--heads", 8, "--head-dim", 16, "--variants", "usp-allgather,torus,auto")
    done = bench("--cluster", "2x2", "--inter-rate", "20mbit", *shape, *QUICK, "--json", tmp_path / "rows.json")
    run = Run(tmp_path, done.returncode, done.stdout, done.stderr)
    assert run.status == 0, run.err
    auto, candidates = run.row("auto"), {"xDiT's own USP", "torus (torus=2 ulysses=2 ring=1)"}
    candidates.add("torus (torus=1 ulysses=2 ring=2 (2 across machines x 1 inside))")
    candidates.add("torus unstaged (torus=2 ulysses=2 ring=1)")
    assert auto["status"] == "ok" and auto["max_abs_error"] < 1e-5 and len(auto["times_s"]) == 2
    candidates.add("xDiT's USP (ulysses=4 ring=1)")
    assert auto["layout"] in candidates and f"selected {auto['layout']}; " in auto["description"]
    assert all(re.search(re.escape(name) + r": \S+ ms \(median of \d", auto["description"]) for name in candidates)
    assert auto["wire_bytes"][0][1] > 0.9 * run.row("torus")["formula_bytes"]


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_run(tmp_path_factory) -> Run:
    """Under torchrun, with two variants and a peer that return wrong results, and a peer that raises."""
    folder = tmp_path_factory.mktemp("wrong")
    variants = "usp-alltoall,torus-no-overlap,torus"
    arguments = ["--variants", variants, "--topology", "2x1", "--seq-len", 64, *SHAPE, *QUICK]
    arguments += ["--against", "torch", "--json", folder / "rows.json"]
    done = torchrun("bench_wrong_variants.py", *arguments, nproc=2, expect_failure=True)
    return Run(folder, done.returncode, done.output, "")


def test_a_wrong_variant_fails_and_the_others_are_measured(wrong_run):
    torus, blocking = wrong_run.row("torus"), wrong_run.row("torus-no-overlap")
    assert (torus["status"], blocking["status"]) == ("failed", "failed")
    assert "error 1.00e-02, allowed 0.0001" in torus["reason"] and torus["times_s"] == []
    assert "not all elements are finite" in blocking["reason"] and blocking["max_abs_error"] is None
    assert wrong_run.row("attention-alone")["status"] == "ok"
    if usp_variants.unavailable() is None:
        usp = wrong_run.row("usp-alltoall")
        assert usp["status"] == "ok" and len(usp["times_s"]) == 2
        assert torus["ratio_to_usp"] is None and torus["efficiency"] is None
    assert "failed: wrong result" in wrong_run.out


def test_a_peer_may_raise_or_be_wrong(wrong_run):
    raises, wrong = wrong_run.row("torch-allgather"), wrong_run.row("torch-alltoall")
    assert (raises["status"], raises["reason"]) == ("skipped", "NotImplementedError: no kernel for this device")
    assert wrong["status"] == "failed" and wrong["reason"].startswith("wrong result: error ")
    assert "torch-allgather: NotImplementedError: no kernel for this device" in " ".join(wrong_run.out.split())


def test_every_reader_takes_the_json_of_a_wrong_variant(wrong_run):
    strict_json((wrong_run.folder / "rows.json").read_text())


def test_one_rank_fails_the_command(wrong_run):
    assert wrong_run.status == 1
    assert re.findall(r"rank (\d) ended with exit status", wrong_run.out) == ["0"]  # its status is the job's


def ranks_among(pids: set[int]) -> dict[int, int]:
    """RANK -> process number, of those that run the rank side of the bench."""
    found: dict[int, int] = {}
    for pid in pids:
        if RANK_MODULE in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            found[int(re.search(r"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())[1])] = pid
    return found


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, wave = set(), {pid}
    while wave := {child for child, parent in parents.items() if parent in wave} - found:
        found |= wave
    return found


def wait_for(condition, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@dataclass
class Driver:
    """A bench of two cases: the first takes a moment, the second minutes."""

    folder: Path
    process: subprocess.Popen[str]

    def in_second_case(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        return any(self.folder.glob("*/job.rows"))  # ranks write them after each case

    def finish(self, below: set[int], seconds: float) -> tuple[str, str]:
        out, err = self.process.communicate(timeout=seconds)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "all processes end", 20)
        assert not any(self.folder.glob("sf-xfuser-bench-*")), "a temporary folder is left behind"
        return out, err


@pytest.fixture
def driver(tmp_path):
    if REASON is not None:
        pytest.skip(REASON)
    file = grid(tmp_path, UNEVEN.replace("1023", "64") + UNEVEN.replace("400mbit", "100kbit").replace("1023", "4096"))
    arguments = ["--grid", file, "--variants", "torus", "--repeat", 1, "--warmup", 0, "--json", tmp_path / "rows.json"]
    process = subprocess.Popen(
        bench_argv(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment(TMPDIR=tmp_path),
    )  # fmt: skip
    try:
        yield Driver(tmp_path, process)
    finally:
        if process.poll() is None:
            process.kill()  # the kernel kills the ranks
            process.communicate()


def test_a_killed_rank_is_named_and_earlier_results_remain(driver):
    wait_for(driver.in_second_case, "the first case is measured", 120)
    below = descendants(driver.process.pid)
    ranks = ranks_among(below)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    out, err = driver.finish(below, 60)
    assert driver.process.returncode == 1
    words = " ".join(err.split())
    assert "rank 1 (machine 1) was killed by SIGKILL" in words
    assert "not measured: ['2x1 0.1mbit L4096 H4 D16']" in words
    rows = strict_json((driver.folder / "rows.json").read_text())["rows"]
    assert {row["case"]["id"] for row in rows} == {"2x1 400mbit L64 H4 D16"}
    assert report.variant_row(rows, "torus")["status"] == "ok" and "torus" in out


def test_ctrl_c_ends_everything(driver):
    wait_for(driver.in_second_case, "the first case is measured", 120)
    below = descendants(driver.process.pid)
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground group
    _, err = driver.finish(below, 30)
    assert driver.process.returncode == 130
    assert "sf-xfuser bench: stopped" in err and "Traceback" not in err


@pytest.mark.skipif(REASON is not None or usp_variants.unavailable() is not None, reason=REASON or "xDiT is missing")
def test_sigterm_ends_a_pipeline_that_says_how_long_it_takes(tmp_path):
    """Ranks of one machine: they have shared memory, and each has made the model in the temporary folder."""
    arguments = ["--cluster", "1x2", "--pipeline", "cogvideox", "--steps", 1, "--repeat", 1000]
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(bench_argv(*arguments), stdout=err, stderr=err, env=environment(TMPDIR=tmp_path))
        try:
            wait_for(
                lambda: re.search(r"about .* left", (tmp_path / "err").read_text()),
                "an estimate after the first step",
                200,
            )
            assert len([*tmp_path.glob("sf-xfuser-bench-*/*/model_index.json")]) == 2
            below = descendants(process.pid)
            maps = " ".join(Path(f"/proc/{pid}/maps").read_text() for pid in below)
            process.terminate()
            assert process.wait(30) == 143
        finally:
            process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "all processes end", 20)
    assert {path.name for path in tmp_path.iterdir()} == {"err"}
    assert not [segment for segment in re.findall(r"/dev/shm/\S+", maps) if os.path.exists(segment)]
    said = (tmp_path / "err").read_text()
    assert re.search(r"cogvideox on 1x2: torus: first call, 1 of 2003 steps, about \d+ (s|min) left", said), said
    assert "Traceback" not in said and said.endswith("sf-xfuser bench: stopped\n"), said


# --- cluster run ----------------------------------------------------------------------------------------------------

# One write per line, because ranks share the stream.
SAY = "import os; os.write(1, '{RANK} of {WORLD_SIZE} on {0}\\n'.format(os.uname().nodename, **os.environ).encode())"


@needs_namespaces
def test_cluster_run(tmp_path):
    argv = [sys.executable, "-m", "sf_xfuser.cli", "cluster", "run", "--cluster", "2x1"]
    said = ["0 of 2 on machine0", "1 of 2 on machine1"]
    for output, shaped in ((tmp_path / "run.json", []), ("-", ["--inter-rate", "1gbit"])):
        command = [*argv, *shaped, "--json", output, "--", sys.executable, "-c", SAY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "MB sent" in done.stderr
        assert ("links between machines are not shaped" in done.stderr) == (not shaped)
        document, printed = (done.stdout, done.stderr) if output == "-" else (output.read_text(), done.stdout)
        assert strict_json(document)["status"] == 0 and {*said} <= {*printed.splitlines()}


def test_an_invalid_cluster_is_refused(unlaunched, capsys):
    assert cli.main(["cluster", "run", "--cluster", "0x1", "--", "true"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("sf-xfuser cluster: ") and captured.err.count("\n") == 1


def test_old_names_work_with_one_warning_each(capsys):
    parser = argparse.ArgumentParser()
    command.add_bench_arguments(parser)
    assert parser.parse_args([]).variants is None
    options = parser.parse_args(["--cluster", "2x1", "--arms", "torus,torus-together"])
    command._check(options, None)
    assert options.variants == ("torus", "torus-unstaged")
    assert capsys.readouterr().err.splitlines() == [
        "sf-xfuser: --arms is now --variants; old names will be removed in 0.2",
        "sf-xfuser: the variant torus-together is now torus-unstaged; old names will be removed in 0.2",
    ]
    command._check(parser.parse_args(["--cluster", "2x1", "--variants", ",".join(NAMES)]), None)
    assert capsys.readouterr().err == ""
