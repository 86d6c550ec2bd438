"""The rooms of the package, and the direction of imports between them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the bottom up: a room imports from itself and from the rooms before it.
ROOMS = [
    "files", "config", "kernels", "layout", "simulator", "transport", "torus", "autotune", "integrations", "bench",
    "doctor", "cli",
]  # fmt: skip


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imported(path: Path) -> set[str]:
    """Every module of this package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sf_xfuser":
            found |= {node.module} if "." in node.module else {f"sf_xfuser.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sf_xfuser.")}
    return found


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every module below a room; the package's own lazy entry points stand outside."""
    package = ROOT / "sf_xfuser"
    found = [(path.relative_to(package).parts[0].removesuffix(".py"), path) for path in package.rglob("*.py")]
    found += [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    return [(room, path) for room, path in found if room not in ("__init__", "_autoload")]


def test_imports_between_rooms_point_downwards():
    assert {room for room, _ in sources()} == set(ROOMS)
    for room, path in sources():
        for module in imported(path):
            other = room_of(module)
            assert other == "__version__" or ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {module}"


def test_only_integrations_and_above_know_other_packages():
    for room, path in sources():
        if ROOMS.index(room) < ROOMS.index("integrations"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not {"xfuser", "diffusers", "yunchang"} & {str(name).split(".")[0] for name in names}, path


def test_only_config_reads_the_environment():
    for room, path in sources():
        assert room == "config" or "os.environ" not in path.read_text(), path


def test_importing_the_plugin_loads_no_attention():
    """Every program that imports xfuser loads the plugin; without the flag it must load little more."""
    program = "import sys, sf_xfuser.integrations.xdit.plugin; print(*(m for m in sys.modules if 'sf_xfuser.' in m))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "sf_xfuser.integrations.xdit.plugin" in done.stdout
    assert not {"kernels", "simulator", "transport", "torus", "autotune"} & set(map(room_of, done.stdout.split()))
