"""The structure that the README promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the bottom up; a module may import those of earlier rows, and those of its own row.
ROWS = [
    {"args", "hooks", "files"},
    {"topology", "plan", "agreement", "trace", "emulate"},
    {"control_plane"},
    {"kernels", "transport", "schedule"},
    {"links", "compression"},
    {"mesh", "places", "xdit_layouts", "cluster"},
    {"call", "simulate", "presets"},
    {"models", "planner"},
    {"buffers", "drop_in", "masks"},
    {"attention", "all_to_all", "all_gather", "launch", "request", "tiny_models", "platform_cpu", "repairs"},
    {"xdit_groups", "contest"},
    {"probe", "choice", "usp", "long_context", "context_parallel"},
    {"combinations"},
    {"session"},
    {"plugin"},
    {"native", "doctor"},
    {"bench"},
    {"cli"},
]
ANYWHERE = {"", "__version__", "_autoload", "__init__"}  # lazy by construction


def sources() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"kernels": list((ROOT / "kernels").rglob("*.py"))}
    for path in (ROOT / "sf_xfuser").rglob("*.py"):
        name = path.relative_to(ROOT / "sf_xfuser").parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """Names directly below sf_xfuser that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sf_xfuser":
            tail = node.module.split(".")[1:]
            found |= {tail[0]} if tail else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sf_xfuser.")}
    return found


def test_imports_run_one_way():
    row_of = {name: n for n, row in enumerate(ROWS) for name in row}
    files = sources()
    assert set(files) - ANYWHERE == set(row_of), "a module is missing from ROWS"
    for name, paths in files.items():
        if name in ANYWHERE:
            continue
        for path in paths:
            upward = {other for other in imports(path) - ANYWHERE if row_of[other] > row_of[name]}
            assert not upward, f"{path} imports {upward}, which stand above it"


def test_only_args_reads_the_environment():
    for name, paths in sources().items():
        for path in paths:
            assert name == "args" or "os.environ" not in path.read_text(), path


def test_the_readme_lists_every_module():
    table = (ROOT / "README.md").read_text()
    for name in set(sources()) - {"__init__"}:
        assert f"`sf_xfuser/{name}" in table or f"`{name}" in table or f"{name}/`" in table, name


def test_who_gives_no_flag_imports_little():
    """What the plugin loads into every program that imports xfuser."""
    program = "import sys, torch, sf_xfuser.integrations.xdit.plugin; print([m for m in sys.modules if m.startswith('sf_xfuser.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "sf_xfuser.integrations.xdit.plugin" in done.stdout
    assert not [
        name for name in ("mesh", "kernels", "transport", "attention", "choice") if f"xfuser.{name}'" in done.stdout
    ]
