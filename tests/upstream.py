"""The tests of xDiT and of yunchang, as they are in checkouts of those, on CPU ranks with the plugin installed.

    python -m tests.upstream --xdit CHECKOUT --yunchang CHECKOUT [--markdown FILE]

Everything runs without the flag and, where it can, with torus. What fails is run again without the plugin, on the CPU
platform alone: only what passes there fails because of the plugin, and makes the exit status 1. The patch series are
applied to a copy of xDiT's checkout, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.launch import RANKS, Finished, finish, records
from tests.patched import ORDERS, copy_of_xdit

PROBLEMS = {"failure": "failed", "error": "failed", "skipped": "skipped"}  # of pytest's report


@dataclass(frozen=True)
class Program:
    """A file that torchrun starts on ``ranks`` ranks."""

    path: str
    arguments: tuple[str, ...] = ()
    ranks: int = 4
    torus: bool = True  # whether it makes calls that torus serves

    @property
    def name(self) -> str:
        return " ".join((self.path, *self.arguments))


# Files of tests that make groups of ranks, of which pytest starts these: with --sp-topology
SPAWNING = {"tests/layers/attention_processor_test.py": "2x2", "tests/layers/usp_test.py": "auto"}
XDIT = [
    Program("tests/layers/feedforward_test.py", ranks=2, torus=False),
    Program("tests/core/test_ring_flash_attn.py", torus=False),
    Program("tests/core/test_xfuser_attn.py"),
]
HYBRID = "test/test_hybrid_attn.py"
YUNCHANG = [
    *(
        Program(HYBRID, ("--sp_ulysses_degree", degree, *more), torus="--causal" not in more)
        for degree in ("4", "2", "1")
        for more in ((), ("--ring_impl_type", "zigzag", "--causal", "--attn_impl", "fa"))
    ),
    Program(HYBRID, ("--sp_ulysses_degree", "2", "--attn_impl", "fa", "--use_bwd"), torus=False),
    Program("test/test_ulysses_attn.py", torus=False),
    Program("test/test_hybrid_qkvpacked_attn.py", torus=False),
    Program("test/test_hybrid_attn_npu.py", torus=False),
    Program("test/test_ulysses_attn_npu.py", torus=False),
]

SCRIPTS = {
    "tests/parallel_test.py": "no test: a script that makes a picture with the SD3 checkpoint on GPUs",
    "tests/context_parallel/debug_flux_usp_example.py": "no test: starts an example with FLUX.1-dev on two GPUs",
    "tests/context_parallel/debug_tests.py": "no test: starts test_diffusers_adapters.py on two GPUs",
}
MEANINGS = {
    "[Aa]iter|AITER|_get_fp8_hadamard": "needs AITER, on ROCm",
    "not compiled with CUDA": "names a CUDA device",
    "^StopIteration": "needs a GPU: takes its device from a table that has a row for each",
    "expecttest": "needs expecttest, GPUs and the FLUX.1-dev checkpoint",
    "torch_npu": "needs an NPU",
    "hung worker": "gives its processes 20 or 30 s, in which each imports xfuser: too few on two busy cores",
    "inherits an implicit declaration|'capability': False": "xDiT's own runners are not as it wants them",
    "'True' == 'False'": "diffusers 0.42 keeps modules in float32 by itself",
    "Runtime state has not been": "makes groups without xDiT's runtime state, which USP asks for since 0.5",
    "SimpleNamespace": "its stand-in for xDiT's runner lacks what the runner of this release has",
    "AttnType.*TORCH'|no attribute 'TORCH'|^AttributeError: TORCH": "yunchang 0.6.4 has no AttnType.TORCH",
}
# Tests of flags, which give torus four ranks and neither degrees nor a model to read the heads from
REFUSAL = "--sp-backend torus: cannot plan for"


@dataclass
class Result:
    """One test: variant -> passed, failed or skipped; why it was not passed; calls handled by torus."""

    name: str
    outcome: dict[str, str] = field(default_factory=dict)
    why: str = ""
    handled: int | None = None

    @property
    def kind(self) -> str:
        if "failed" not in self.outcome.values():
            return "cannot run" if "skipped" in self.outcome.values() else "passes"
        if self.outcome.get("without the flag") == "passed" and REFUSAL in self.why:
            return "torus refuses"
        alone = {"passed": "FAILS WITH THE PLUGIN", "failed": "fails without the plugin, too"}
        return alone.get(self.outcome.get("no plugin", ""), "fails")


def suite(
    checkout: Path, variant: str, chosen: Sequence[str], results: dict[str, Result], topology: str | None = None
) -> None:
    """pytest over ``chosen``, against the installed xfuser; with ``topology``: over a file of ``SPAWNING``."""
    left_out = () if topology else (*(given.path for given in XDIT), *SPAWNING)
    env = environment(variant, "upstream" if topology else "site", topology)
    with tempfile.TemporaryDirectory() as folder:  # not in the checkout, whose xfuser would come before the installed
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-c", str(checkout / "pytest.ini"), "--rootdir", str(checkout)]
        pytest += ["-qs", "-o", "addopts=", "-o", "log_cli=false", "-o", "junit_family=xunit1"]
        pytest += ["-p", "no:cacheprovider", f"--junitxml={report}", "--continue-on-collection-errors"]
        pytest += [f"--ignore={checkout / path}" for path in left_out]
        pytest += [str(checkout / name) for name in chosen]
        output = finish(pytest, env=env, cwd=folder, timeout=1200).output
        if not report.exists():
            raise SystemExit(f"pytest ended without a report:\n{output[-4000:]}")
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((found for kind in PROBLEMS if (found := case.find(kind)) is not None), None)
            message = "" if problem is None else problem.get("message", "")
            name = path = case.get("file", "")
            if message != "collection failure":  # of the whole file
                scope = case.get("classname", "").rpartition(".")[2]
                name = "::".join((path, *([scope] if scope[:1].isupper() else []), case.get("name", "")))
            result = results.setdefault(name, Result(name))
            result.outcome[variant] = "passed" if problem is None else PROBLEMS[problem.tag]
            if problem is not None:
                result.why = reason(message if name != path else problem.text or "")
            note_handled(result, output)


def reason(text: str) -> str:
    """What was wrong: the first error that is named, in other words where it means more than it says."""
    named = re.search(
        r"^(?:E +|\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error: .*|StopIteration$)|fixture '\w+' not found)",
        text,
        re.MULTILINE,
    )
    line = named[1] if named else text.strip().partition("\n")[0]
    line = re.sub(r"<module '(.*?)' from '.*?'>", r"\1", line)
    line = re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", line)  # folders of whoever ran this
    line = re.sub(r"(worker)(?: pids: \[.*?\])", r"\1s", line)[:160]
    meaning = next((meaning for pattern, meaning in MEANINGS.items() if re.search(pattern, line)), None)
    return f"{meaning} (`{line}`)" if meaning else line


def program(checkout: Path, given: Program, variant: str, results: dict[str, Result]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = checkout / given.path
        env = environment(variant, "upstream", "2x2")
        env["PYTHONPATH"] += f"{os.pathsep}{path.parent}"
        if variant == "torus" and given in YUNCHANG:  # two lines change, as README says
            path = Path(folder) / path.name
            text = (checkout / given.path).read_text()
            names = "import LongContextAttention, set_seq_parallel_pg"
            assert f"from yunchang {names}, " in text
            path.write_text(text.replace(f"from yunchang {names}, ", f"from sf_xfuser {names}\nfrom yunchang import "))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
        try:
            finished = finish([*torchrun, str(path), *given.arguments], env=env, cwd=folder, timeout=600)
        except AssertionError as still_running:
            finished = Finished(1, f"TimeoutError: {still_running}")
    result = results.setdefault(given.name, Result(given.name))
    result.outcome[variant] = "failed" if finished.returncode else "passed"
    if finished.returncode:
        result.why = reason(finished.output)
    note_handled(result, finished.output)


def environment(variant: str, site: str, topology: str | None) -> dict[str, str]:
    """``site``: the folder of ``ranks/`` whose sitecustomize prepares each process of this variant."""
    if variant == "without the flag":
        return {"PYTHONPATH": str(RANKS / "upstream")} if site == "upstream" else {}
    if variant == "no plugin":
        return {"PYTHONPATH": str(RANKS / site), "SF_XFUSER_AUTOLOAD": "0"}
    given = {"SF_XFUSER_ARGS": json.dumps({"backend": "torus", "topology": topology or "auto", "strict": True})}
    return {**given, "PYTHONPATH": str(RANKS / "upstream")} if site == "upstream" else given


def note_handled(result: Result, output: str) -> None:
    """Calls handled by torus on one rank."""
    if handled := [calls for case, _, calls in records(output) if case == "handled"]:
        result.handled = max(handled)


def run_all(checkout: Path, spawning: Mapping[str, str], programs: Sequence[Program]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for variant in ("without the flag", "torus"):
        if spawning:
            suite(checkout, variant, ["tests"], results)
        for path, topology in spawning.items():
            suite(checkout, variant, [path], results, topology)
        for given in programs:
            if variant != "torus" or given.torus:
                program(checkout, given, variant, results)
    without_the_plugin(checkout, spawning, programs, results)
    return results


def without_the_plugin(
    checkout: Path, spawning: Mapping[str, str], programs: Sequence[Program], results: dict[str, Result]
) -> None:
    """Run again what failed."""
    failed = [name for name, result in results.items() if "failed" in result.outcome.values()]
    failed = [name for name in failed if results[name].kind != "torus refuses"]
    by_torchrun = {given.name: given for given in programs}
    for path, topology in spawning.items():
        if again := [name for name in failed if name.startswith(path)]:
            suite(checkout, "no plugin", again, results, topology)
    if again := [name for name in failed if name not in by_torchrun and name.partition("::")[0] not in spawning]:
        suite(checkout, "no plugin", again, results)
    for name in by_torchrun.keys() & set(failed):
        program(checkout, by_torchrun[name], "no plugin", results)


def report(found: dict[str, dict[str, Result]]) -> str:
    """Markdown: how many passed by file and by program, then each that cannot run and why."""
    lines = ["# xDiT's and yunchang's own tests with the plugin installed", ""]
    lines += ["Made by `make test-upstream` (docs/developing.md); CPU ranks over gloo.", ""]
    for owner, results in found.items():
        lines += [f"## {owner} {version({'xDiT': 'xfuser'}.get(owner, owner))}", ""]
        files: dict[str, list[Result]] = {}
        for result in results.values():
            files.setdefault(result.name.partition("::")[0], []).append(result)
        lines += ["| tests | pass without the flag | pass with torus | do not |", "|---|---|---|---|"]
        for file, of_file in sorted(files.items()):
            passed = [
                sum(r.outcome.get(variant) == "passed" for r in of_file) for variant in ("without the flag", "torus")
            ]
            handled = "".join(f" ({r.handled} calls on torus)" for r in of_file if r.handled)
            cells = [
                str(passed[0]),
                f"{passed[1]}{handled}" if any("torus" in r.outcome for r in of_file) else "not USP",
            ]
            lines.append(f"| `{file}` | {' | '.join(cells)} | {sum(r.kind != 'passes' for r in of_file) or ''} |")
        lines += ["", "Not passed, and why:", "", "| test | outcome | why |", "|---|---|---|"]
        grouped = Counter((r.name.partition("[")[0], r.kind, r.why) for r in results.values() if r.kind != "passes")
        for (name, kind, why), number in sorted(grouped.items()):
            lines.append(f"| `{name}`{f' x {number}' * (number > 1)} | {kind} | {why.replace('|', '/')} |")
        lines += [f"| `{name}` | cannot run | {why} |" for name, why in SCRIPTS.items() if owner == "xDiT"]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xdit", type=Path, required=True, help="xDiT's tree at the release that is installed")
    parser.add_argument("--yunchang", type=Path, required=True, help="yunchang's, likewise")
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    options = parser.parse_args()
    xdit, yunchang = options.xdit.resolve(), options.yunchang.resolve()
    for series in ORDERS:
        with tempfile.TemporaryDirectory() as folder:
            copy_of_xdit(Path(folder), *series, source=xdit)
        print(f"patches/0.7.0: {' then '.join(series)}: applied to {xdit}", flush=True)
    found = {
        "xDiT": run_all(xdit, SPAWNING, XDIT),
        "yunchang": run_all(yunchang, {}, YUNCHANG),
    }
    text = report(found)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    sys.exit(
        any(
            result.kind in ("FAILS WITH THE PLUGIN", "fails")
            for results in found.values()
            for result in results.values()
        )
    )


if __name__ == "__main__":
    main()
