"""The rooms of the package, and the direction of imports between them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom up: a room imports from itself and from the rooms before it.
ROOMS = [
    "files", "config", "kernels", "layout", "simulator", "transport", "torus", "autotune", "integrations",
    "metrics", "bench", "doctor", "cli",
]  # fmt: skip
# Every file with its path inside the package. __init__, __main__ and _autoload are in no room.
FILES = {path.relative_to(ROOT / "sf_xfuser"): path for path in (ROOT / "sf_xfuser").rglob("*.py")}
FILES |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
SOURCES = [(name.parts[0].removesuffix(".py"), path) for name, path in FILES.items()]
SOURCES = [(room, path) for room, path in SOURCES if room not in ("__init__", "__main__", "_autoload")]


def imports(path: Path) -> list[str]:
    """Everything that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_below_it(room):
    """xDiT, diffusers and yunchang are known from integrations upwards."""
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"}
    for path in (path for of, path in SOURCES if of == room):
        for package, _, module in (name.partition(".") for name in imports(path)):
            assert package != "sf_xfuser" or module.split(".")[0] in allowed, f"{path} imports {module}"
            assert package not in ("xfuser", "diffusers", "yunchang") or "integrations" in allowed, path


def test_every_file_is_in_a_room_and_only_config_reads_the_environment():
    assert {room for room, _ in SOURCES} == set(ROOMS)
    assert {room for room, path in SOURCES if "os.environ" in path.read_text()} == {"config"}


def test_importing_the_plugin_loads_no_attention():
    """Every program that imports xfuser loads the plugin; without the flag it must load little more."""
    program = "import sys, sf_xfuser.integrations.xdit.plugin; print(*(m for m in sys.modules if 'sf_xfuser.' in m))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    rooms = {module.split(".")[1] for module in done.stdout.split()}
    assert "integrations" in rooms and not {"kernels", "simulator", "transport", "torus", "autotune"} & rooms
