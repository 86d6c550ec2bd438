"""Timelines of one call: splits them into rows without overlap, compares them, and writes and reads Chrome traces.

A timeline is plain data: ``case``, ``variant``, ``duration_s`` and ``ranks``, each with ``rank``, ``machine`` and
``spans`` (``link``, ``name``, ``start_s``, ``end_s``, ``bytes``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sf_xfuser.bench.deprecated import upgrade

Span = Mapping[str, Any]


def without_overlap(spans: Iterable[Span]) -> list[list[Span]]:
    """Split the spans into as few lists as possible without overlapping spans in a list."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span["start_s"], span["end_s"])):
        free = next((row for row in rows if row[-1]["end_s"] <= span["start_s"]), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def chrome_trace(document: Mapping[str, Any]) -> dict[str, Any]:
    """All timelines of a document in Chrome's trace format, which Perfetto opens.

    A process is one machine during one call. A thread is one link of one rank; overlapping spans get further threads.
    """
    events: list[dict[str, Any]] = []
    pid = 0

    def add_name(kind: str, pid: int, tid: int, text: str) -> None:
        events.append({"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": text}})
        order = {"sort_index": tid if kind == "thread" else pid}
        events.append({"ph": "M", "name": f"{kind}_sort_index", "pid": pid, "tid": tid, "args": order})

    for timeline in upgrade(document).get("timelines") or ():
        for machine in sorted({rank["machine"] for rank in timeline["ranks"]}):
            pid, tid = pid + 1, 0
            add_name("process", pid, tid, f"{timeline['variant']} machine {machine}: {timeline['case']}")
            for rank in (rank for rank in timeline["ranks"] if rank["machine"] == machine):
                for link in dict.fromkeys(span["link"] for span in rank["spans"]):
                    rows = without_overlap(span for span in rank["spans"] if span["link"] == link)
                    for n, spans in enumerate(rows):
                        tid += 1
                        add_name("thread", pid, tid, f"rank {rank['rank']} {link}" + (f" {n + 1}" if n else ""))
                        events += (_complete_event(span, pid, tid) for span in spans)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _complete_event(span: Span, pid: int, tid: int) -> dict[str, Any]:
    """Times in microseconds. Rounding both ends to nanoseconds keeps consecutive spans from overlapping."""
    start, end = round(span["start_s"] * 1e6, 3), round(span["end_s"] * 1e6, 3)
    event = {"ph": "X", "name": span["name"], "cat": span["link"], "pid": pid, "tid": tid}
    return {**event, "ts": start, "dur": round(end - start, 3), "args": {"bytes": span.get("bytes", 0)}}


def from_chrome_trace(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The timelines in the events of :func:`chrome_trace`."""
    names = {(e["name"], e["pid"], e["tid"] if e["name"] == "thread_name" else 0): e["args"].get("name") for e in events
             if e["ph"] == "M"}  # fmt: skip
    timelines: dict[tuple[str, str], dict[str, Any]] = {}
    for event in (event for event in events if event["ph"] == "X"):
        process, thread = names["process_name", event["pid"], 0], names["thread_name", event["pid"], event["tid"]]
        variant, machine, case = re.fullmatch(r"(.*) machine (\d+): (.*)", process).groups()  # type: ignore[union-attr]
        number = int(re.match(r"rank (\d+) ", thread)[1])  # type: ignore[index]
        timeline = timelines.setdefault(
            (variant, case), {"case": case, "variant": variant, "duration_s": 0.0, "ranks": {}}
        )
        rank = timeline["ranks"].setdefault(number, {"rank": number, "machine": int(machine), "spans": []})
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        span = {"link": event["cat"], "name": event["name"], "start_s": start, "end_s": end}
        rank["spans"].append({**span, "bytes": event["args"].get("bytes", 0)})
        timeline["duration_s"] = max(timeline["duration_s"], end)
    return [{**t, "ranks": [t["ranks"][n] for n in sorted(t["ranks"])]} for t in timelines.values()]


def side_by_side(measured: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, Any]:
    """One timeline of the measured ranks, followed by the predicted ranks."""
    width = len(str(len(predicted["ranks"]) - 1))
    ranks = [
        {**rank, "rank": f"{rank['rank']:0{width}} {label}"}
        for timeline, label in ((measured, "measured"), (predicted, "predicted"))
        for rank in timeline["ranks"]
    ]
    return {
        "case": measured["case"],
        "variant": f"{measured['variant']} and {predicted['variant']}",
        "duration_s": max(measured["duration_s"], predicted["duration_s"]),
        "ranks": ranks,
    }
