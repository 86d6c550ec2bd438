"""Reports of bench documents: the numbers in tables, summary, plots, trace and page."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from sf_xfuser import cli
from sf_xfuser.bench import page, report
from sf_xfuser.bench.timelines import chrome_trace

VOID = {"meta", "br", "link", "img", "hr", "input"}


def a_case(name: str, machines: int = 2) -> dict[str, Any]:
    shape = {"seq_len": 4096, "heads": 8, "kv_heads": 8, "head_dim": 64, "batch": 1, "dtype": "float32"}
    links = {"inter_rate_bps": 100_000_000, "inter_delay_s": 0.0}
    return {"id": name, "cluster": f"{machines}x2", "num_machines": machines, "ranks_per_machine": 2, **links, **shape}


def a_row(case: dict[str, Any], variant: str, median: float, family: str = "xdit", **changes: Any) -> dict[str, Any]:
    n = case["num_machines"]
    row = {
        "kind": "attention",
        "case": case,
        "variant": variant,
        "description": f"the variant {variant}",
        "family": family,
        "status": "ok",
        "reason": "",
        "layout": "torus=2 ulysses=2 ring=1",
        "times_s": [median],
        "median_s": median,
        "min_s": median * 0.9,
        "max_s": median * 1.2,
        "q1_s": median * 0.95,
        "q3_s": median * 1.1,
        "first_call_s": median * 2,
        "attention_s": 0.3,
        "exposed_s": median - 0.3,
        "peak_bytes": [4_000_000, 5_000_000],
        "wire_bytes": [[7 if a == b else 1_000_000 for b in range(n)] for a in range(n)],
        "formula_bytes": 1_000_000 * (n - 1),
        "max_abs_error": 1.5e-6,
        "rms_error": 1e-7,
        "bound_s": 0.4,
        "bound_compute_s": 0.3,
        "bound_wire_s": 0.4,
        "efficiency": 0.4 / median,
        "ratio_to_usp": None,
        "ratio_to_best_xdit": None,
    }
    return row | changes


def refused(case: dict[str, Any], variant: str, status: str, reason: str, family: str = "xdit") -> dict[str, Any]:
    return {"kind": "attention", "case": case, "variant": variant, "family": family, "status": status, "reason": reason}


def a_document() -> dict[str, Any]:
    """Torus is 2x, 0.5x and 4x as fast as USP, 1.6x, 0.4x and 4x as xDiT's best variant; it fails in the last case."""
    rows: list[dict[str, Any]] = []
    for name, usp, flat, torus in (("A", 1.0, 0.8, 0.5), ("B", 0.5, 0.4, 1.0), ("C", 2.0, 3.0, 0.5)):
        case = a_case(f"{name} 2x2 L4096")
        rows += [
            a_row(
                case, "single", 0.35, "reference", wire_bytes=None, formula_bytes=None, peak_bytes=None, bound_s=None
            ),
            a_row(case, "usp-allgather", usp * 1.5, peak_bytes=[1, 2]),
            a_row(case, "usp-alltoall", usp, peak_bytes=[2_500_000, None]),
            a_row(case, "ulysses", flat, peak_bytes=[8_000_000, 10_000_000]),
            refused(case, "ring-allgather", "skipped", "[gloo] has no such rotation"),
            a_row(case, "torus", torus, "ours", ratio_to_usp=usp / torus, ratio_to_best_xdit=min(usp, flat) / torus),
        ]
    rows[5]["wire_bytes"] = [[0, 900_000], [800_000, 0]]  # 10 % under the formula, in case A
    case = a_case("D 3x2 L4096", 3)
    rows += [a_row(case, "xdit-u4r2-alltoall", 1.0), refused(case, "torus", "failed", "rank 3 </script> ended", "ours")]
    return {
        "schema": 1,
        "created": "2026-11-23T21:00:00Z",
        "commit": "abc1234",
        "command": "sf-xfuser bench --cases 'a<b'",
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_bytes": 25_769_803_776, "accelerator": "cpu"},
        "versions": {"sf_xfuser": "0.1.0", "torch": "2.13.0"},
        "rows": rows,
        "timelines": [a_timeline("A 2x2 L4096", "torus"), a_timeline("A 2x2 L4096", "mapping")],
    }


def a_timeline(case: str, variant: str) -> dict[str, Any]:
    def span(link: str, name: str, start: float, end: float, size: int = 0) -> dict[str, Any]:
        return {"link": link, "name": name, "start_s": start, "end_s": end, "bytes": size}

    ranks = []
    for rank in range(4):
        spans = [
            span("compute", "Q 1 x KV 0", 0.0, 0.1),
            span("wait", "k from 2", 0.1, 0.15),
            span("compute", "Q 1 x KV 2", 0.15, 0.3),
            span("inside", "v from 1", 0.0, 0.05, 10),
            span("across", "q from 2", 0.0, 0.2, 65536),
            span("across", "k from 2", 0.05, 0.15, 4096),  # inside the one before
            span("across", "v from 2", 0.1, 0.25, 4096),  # overlaps both
            span("across", "o to 2", 0.2, 0.3, 4096),  # starts when the first ends
            span("across", "counts from 2", 0.25, 0.26, 4),
        ]
        ranks.append({"rank": rank, "machine": rank // 2, "spans": spans})
    return {"case": case, "variant": variant, "duration_s": 0.3, "ranks": ranks}


def rows_of(document: dict[str, Any], case: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["case"]["id"].startswith(case)]


def printed(table: Any, width: int = 250) -> list[list[str]]:
    """The cells of a printed table, line by line."""
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return [re.split(r" {2,}", line.strip()) for line in capture.get().splitlines() if line.strip()]


def test_a_table_shows_each_variant_and_the_reason_of_missing_numbers():
    rows = rows_of(a_document(), "A")
    result = report.table(rows)
    text = printed(result)
    assert text[0] == ["A 2x2 L4096"] and text[-1] == ["lower bound 400 ms, set by wire"]
    found = {line[0]: line for line in text}
    torus = dict(zip(report.COLUMNS, found["torus"], strict=True))
    assert torus == {
        "variant": "torus",
        "layout": "torus=2 ulysses=2 ring=1",
        "median ms": "500",
        "spread ms": "475..550",
        "first ms": "1,000",
        "exposed ms": "200",
        "peak MB": "5.00",
        "out MB": "0.900",
        "max error": "1.5e-06",
        "eff. %": "80.0",
        "vs USP": "2.00x",
        "vs best xDiT": "1.60x",
    }
    assert found["ring-allgather"][1] == "skipped: [gloo] has no such rotation"
    single = dict(zip(report.COLUMNS, found["single"], strict=True))
    assert [name for name, cell in single.items() if cell == "–"] == ["vs USP", "vs best xDiT", "out MB", "peak MB"]
    bold = [line[0] for line, style in zip(result.lines, result.styles, strict=True) if "bold" in style]
    assert bold == ["torus"], "the single process is faster, but a reference"


def every_table(document: dict[str, Any]) -> list[report.FittedTable]:
    rows = document["rows"]
    tables = [report.table(case_rows) for case_rows in report.by_case(rows).values()]
    tables += [report.grid_table(rows), report.summary_table(report.summary(rows))]
    matrix = [[0 if a == b else 1e6 * (a + 64 * b) for b in range(32)] for a in range(32)]
    predicted = [row | {"predicted_s": 1.0} for row in rows]
    return [*tables, report.matrix_table("32 machines", matrix), report.prediction_table(predicted)]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_cell_is_cut_and_no_reason_vanishes(width):
    document = a_document()
    long = "the ranks of machine 3 cannot reach those of machine 1 over this transport, because " * 3
    document["rows"].append(refused(document["rows"][0]["case"], "torus-nvshmem", "skipped", long, "ours"))
    for table in every_table(document):
        console = Console(width=width, no_color=True)
        with console.capture() as capture:
            console.print(table)
        lines = capture.get().splitlines()
        assert max(map(len, lines)) <= width and "…" not in capture.get()
        words = Counter(re.findall(r"\S+", capture.get()))
        cells = [cell for line in table.lines for cell in line] + [text for _, text, _ in table.reasons]
        assert words >= Counter(word for cell in cells for word in cell.split())
        headers = {word for name in table.columns for word in name.split()}
        assert headers <= set(words)
        if width == 160 and len(table.columns) <= len(report.COLUMNS):
            assert len([line for line in lines if "──" in line]) == 1, "all columns fit in one table"


def test_what_bounds_a_case_comes_from_its_row():
    case = a_case("x")
    assert report.bound([a_row(case, "usp-alltoall", 1.0, bound_s=9.0), a_row(case, "torus", 1.0)]) == (0.4, "wire")
    assert report.bound([a_row(case, "new-variant", 1.0, bound_s=0.5, bound_compute_s=0.5)]) == (0.5, "compute")
    assert report.bound([refused(case, "torus", "failed", "")]) == (None, "–")


def test_bytes_and_numbers():
    case = a_case("x", 3)
    row = a_row(case, "torus", 1.0, wire_bytes=[[5, 1, 2], [3, 5, 4], [0, 0, 9]])
    assert report.bytes_out(row) == 7, "machine 1, without bytes to itself"
    assert ["from 0", "7.00e-06", "1.00", "1.00"] in printed(
        report.matrix_table("x", a_row(case, "torus", 1.0)["wire_bytes"])
    )
    assert [report.fmt(x, 1e3) for x in (0.0123456, 1.2345, 0.0099, 0.00001)] == ["12.3", "1,234", "9.90", "0.0100"]
    assert [report.fmt(x) for x in (None, math.nan, math.inf, "?")] == ["–"] * 4


def test_predictions_are_compared_by_hand():
    """Errors of 10 %, 50 % and 20 %. The pair of A differs by over 10 % and is predicted in the wrong order."""
    case, other = a_case("A"), a_case("B")
    rows = [
        a_row(case, "usp-allgather", 1.0, predicted_s=0.9),
        a_row(case, "torus", 0.8, "ours", predicted_s=1.2),
        a_row(other, "usp-allgather", 1.0, predicted_s=1.2),
        a_row(other, "torus", 0.95, "ours"),
        a_row(other, "ulysses", 0.5, predicted_s=0.5, status="failed"),
    ]
    found = report.predictions(rows)
    assert found["variants"] == 3 and found["median_error"] == pytest.approx(0.2)
    assert found["worst"] == {"case": case["id"], "variant": "torus", "ratio": pytest.approx(1.5)}
    wrong = {"case": case["id"], "variants": ["usp-allgather", "torus"], "ratio": pytest.approx(1.25)}
    assert found["pairs"] == 1 and found["wrong_order"] == [wrong]
    caption = report.prediction_table(rows).caption
    assert caption.startswith("median error 20.0 % over 3 rows, worst 1.50x (torus")
    assert "order wrong in 1 of 1 pairs" in caption
    assert report.prediction_table(a_document()["rows"]) is None


def test_the_summary_is_right_by_hand():
    result = report.summary(a_document()["rows"])
    assert result["cases"] == 4 and result["without_torus"] == ["D 3x2 L4096"]
    usp, xdit = result["vs_usp"], result["vs_best_xdit"]
    assert usp["geometric_mean"] == pytest.approx((2.0 * 0.5 * 4.0) ** (1 / 3)) and usp["cases"] == 3
    assert xdit["geometric_mean"] == pytest.approx((1.6 * 0.4 * 4.0) ** (1 / 3))
    assert usp["best"] == {"case": "C 2x2 L4096", "ratio": 4.0}
    assert usp["worst"] == {"case": "B 2x2 L4096", "ratio": 0.5} and usp["slower"] == [usp["worst"]]
    assert result["median_efficiency"] == pytest.approx(0.8)  # of 0.8, 0.4, 0.8
    assert result["peak_vs_usp"]["ratio"] == pytest.approx(2.0), "the faster USP variant, not the one with least memory"
    assert result["peak_vs_ulysses"]["ratio"] == pytest.approx(0.5)
    deviation = result["wire_deviation"]
    assert (deviation["case"], deviation["variant"]) == ("A 2x2 L4096", "torus")
    assert deviation["deviation"] == pytest.approx(-0.1)
    lines = {line[0]: line[1] for line in printed(report.summary_table(result)) if len(line) == 2}
    assert lines["vs USP, geometric mean of 3"] == "1.59x"
    assert lines["vs best xDiT, slower in"] == "1 of 3: 0.40x (B 2x2 L4096)"
    assert lines["bytes vs formula, worst"] == "-10.00% (torus, A 2x2 L4096)"
    assert json.loads(json.dumps(result)) == result


def test_a_grid_has_one_line_per_case():
    document = a_document()
    assert report.grid_cells(document["rows"]) == [
        ["A 2x2 L4096", "500", "1,000", "ulysses", "800", "2.00x", "1.60x", "80.0", "wire"],
        ["B 2x2 L4096", "1,000", "500", "ulysses", "400", "0.50x", "0.40x", "40.0", "wire"],
        ["C 2x2 L4096", "500", "2,000", "usp-alltoall", "2,000", "4.00x", "4.00x", "80.0", "wire"],
        ["D 3x2 L4096", "failed", "–", "xdit-u4r2-alltoall", "1,000", "–", "–", "–", "wire"],
    ]
    text = printed(report.grid_table(document["rows"]))
    assert [line for line in text if line[0][:2] in ("A ", "B ", "C ", "D ")] == report.grid_cells(document["rows"])
    document["rows"][0]["case"]["id"] = "a|b"  # the same case object is in all rows of case A
    lines = report.markdown_table(document["rows"]).splitlines()
    assert lines[1] == "| :-- " + "| --: " * (len(report.GRID_COLUMNS) - 1) + "|"
    assert lines[2] == "| a\\|b | 500 | 1,000 | ulysses | 800 | 2.00x | 1.60x | 80.0 | wire |" and len(lines) == 6


def test_a_trace_has_every_span_and_its_events_never_overlap_on_a_thread():
    document = a_document()
    trace = json.loads(json.dumps(chrome_trace(document)))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    spans = [span for timeline in document["timelines"] for rank in timeline["ranks"] for span in rank["spans"]]
    keys = sorted((span["name"], span["link"], span["start_s"] * 1e6, span["bytes"]) for span in spans)
    found = sorted((event["name"], event["cat"], event["ts"], event["args"]["bytes"]) for event in complete)
    assert [key[:2] + key[3:] for key in keys] == [key[:2] + key[3:] for key in found]
    assert [key[2] for key in keys] == pytest.approx([key[2] for key in found])
    assert sum(event["dur"] for event in complete) == pytest.approx(
        sum(span["end_s"] - span["start_s"] for span in spans) * 1e6
    )
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in complete:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for events in threads.values():
        events.sort(key=lambda event: event["ts"])
        for one, next_one in itertools.pairwise(events):
            assert round(one["ts"] + one["dur"], 3) <= next_one["ts"]
    names = [event for event in trace["traceEvents"] if event["name"] in ("process_name", "thread_name")]
    processes = [event["args"]["name"] for event in names if event["name"] == "process_name"]
    assert processes == [f"{variant} machine {n}: A 2x2 L4096" for variant in ("torus", "mapping") for n in (0, 1)]
    first = [event["args"]["name"] for event in names if event["name"] == "thread_name" and event["pid"] == 1][:6]
    links = ("compute", "wait", "inside", "across", "across 2", "across 3")
    assert first == [f"rank 0 {link}" for link in links], "three spans run at once, so three threads and no more"
    assert {(event["pid"], event["tid"]) for event in names if event["name"] == "thread_name"} == set(threads)


def one_case(document: dict[str, Any], case: str) -> dict[str, Any]:
    return document | {"rows": rows_of(document, case)}


def texts_of(panel: page.Panel) -> tuple[Any, list[str]]:
    """The axes of a drawn panel, and all words in them."""
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(11, panel.height), layout="constrained")
    axes = figure.add_subplot()
    panel.draw(axes)
    figure.draw_without_rendering()
    legend = axes.get_legend().get_texts() if axes.get_legend() else []
    words = [*axes.texts, *axes.get_yticklabels(), *legend, *(axes.title, axes._left_title)]
    return axes, [word.get_text() for word in words if word.get_text()]


def test_bars_are_the_numbers_of_the_rows():
    rows = rows_of(a_document(), "A")
    axes, texts = texts_of(page.bars_panel(rows))
    ends: dict[float, float] = {}
    for bar in axes.patches:
        at = round(bar.get_y() + bar.get_height() / 2)
        ends[at] = max(ends.get(at, 0.0), bar.get_x() + bar.get_width())
    assert ends == pytest.approx({0: 350, 1: 1500, 2: 1000, 3: 800, 5: 500})
    assert {
        "500 ms, 2.00x USP",
        "skipped: [gloo] has no such rotation",
        "lower bound, set by wire",
        "attention",
    } <= set(texts)
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() == "lower bound, set by wire"] == [400]


def test_ratio_bars_and_timeline_show_all():
    document = a_document()
    axes, texts = texts_of(page.ratio_panel(document["rows"]))
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2.0, 1.6, 0.5, 0.4, 4.0, 4.0])
    assert "failed: rank 3 </script> ended" in texts
    axes, texts = texts_of(page.timeline_panel(document["timelines"][0]))
    assert {"machine 0", "machine 1", "rank 3  compute", "across", "inside", "wait", "other tensors", *"qkvo"} <= set(
        texts
    )
    assert sum(len(spans.get_paths()) for spans in axes.collections) == 4 * 9
    assert axes.get_xlim() == pytest.approx((0, 300))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_suffix_selects_the_type_of_a_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    page.plot(one_case(a_document(), "A") if suffix == "png" else a_document(), path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start) and path.stat().st_size > 5000


def test_without_matplotlib_a_plot_names_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"plots need matplotlib: pip install 'sf-xfuser\[bench\]'"):
        page.plot(a_document(), tmp_path / "plot.png")
    with pytest.raises(ValueError, match="the document has no rows"):
        page.plot({"rows": []}, tmp_path / "plot.png")


class Reader(HTMLParser):
    """Fails on unmatched tags; collects text, ids and the JSON of the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.data += data
        elif data.strip():
            self.words.append(data.strip())


def test_the_page_contains_everything_and_loads_nothing():
    pytest.importorskip("matplotlib")
    document = a_document()
    document["rows"][1]["rms_error"] = math.nan
    text = page.html(document)
    read = Reader(text)
    for row in document["rows"]:
        assert row["variant"] in read.words
    for words in ("abc1234", "AMD EPYC", "25.8 GB", document["command"], "1.59x", "failed: rank 3 </script> ended"):
        assert any(words in found for found in read.words), words
    assert "rate between machines 100 Mbit/s" in text and read.words.count("from 1") == 3 * 2  # torus and USP, 3 cases
    assert read.tags.count("svg") == 1 + 4 + 2  # ratios, a case each, both timelines
    assert read.tags.count("script") == 1 and "http" not in text and "<link" not in text and "@import" not in text
    assert len(set(read.ids)) == len(read.ids)
    assert set(read.references) <= {f"#{name}" for name in read.ids}
    document["rows"][1]["rms_error"] = None
    assert json.loads(read.data) == document["rows"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [a_row(a_case("one variant", 1), "single", 0.5, "reference", wire_bytes=[[0]], formula_bytes=0)],
        [
            refused(a_case("none ok"), "torus", "failed", "$x_{$ unset"),
            refused(a_case("none ok"), "usp-alltoall", "skipped", "no"),
        ],
        [
            {"kind": "pipeline", "case": {"id": "bare", "model": "flux"}, "variant": "torus", "family": "ours"}
            | {"status": "ok", "median_s": math.nan, "peak_bytes": None, "wire_bytes": []},
        ],
    ],
    ids=["no rows", "one variant of one machine", "none succeeded", "nothing measured"],
)
def test_documents_with_gaps_still_render(rows, tmp_path):
    pytest.importorskip("matplotlib")
    document = {"rows": rows, "timelines": []}
    read = Reader(page.html(document))
    assert set(read.words) >= {row["variant"] for row in rows}
    for table in (report.table(rows), report.grid_table(rows), report.summary_table(report.summary(rows))):
        printed(table)
    for row in rows:
        assert printed(report.matrix_table("x", row.get("wire_bytes") or []))
    assert report.markdown_table(rows).count("\n") == 2 + len(report.by_case(rows))
    assert chrome_trace(document)["traceEvents"] == []
    if rows:
        page.plot(document | {"timelines": [{"case": "x", "variant": "torus", "ranks": []}]}, tmp_path / "plot.png")


def test_documents_with_old_keys_are_read_with_one_warning(capsys, tmp_path):
    """Rows and timelines of 0.1's first documents have "arm" for "variant" and "lane" for "link"."""
    pytest.importorskip("matplotlib")
    document = one_case(a_document(), "A")
    expected, trace = page.html(document), chrome_trace(document)
    old = json.loads(json.dumps(document).replace('"variant":', '"arm":').replace('"link":', '"lane":'))
    assert capsys.readouterr().err == ""
    assert page.html(old) == expected
    warning = "keys 'arm' and 'lane' are now 'variant' and 'link'; old names will be removed in 0.2"
    assert warning in capsys.readouterr().err
    assert chrome_trace(old) == trace
    page.plot(old, tmp_path / "plot.png")
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    call = ["--machines", "2", "--gpus-per-machine", "2", "--heads", "8", "--head-dim", "64", "--seq-len", "4096"]
    capsys.readouterr()
    assert cli.main(["simulate", *call, "--measured", str(path), "--measured-arm", "torus"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("measured torus, A 2x2 L4096: 300.00 ms")
    assert "--measured-arm is now --measured-variant" in captured.err and warning in captured.err
