"""The documentation: links, named files, flags, language of paths, pictures. No network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sf_xfuser import config
from sf_xfuser.bench import pictures

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "patches/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:sf_xfuser|kernels|tests|examples|docs|patches)/[\w./-]+)`")


def text_of(path: Path) -> str:
    """Without code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_lead_somewhere(page):
    for target in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(path), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    if page.name in ("CHANGELOG.md", "upstream-tests.md"):
        return  # they name files of earlier versions, and of xDiT
    for name in NAMED.findall(text_of(page)):
        installed = ROOT / name.replace("sf_xfuser/kernels", "kernels")
        assert installed.exists() or list(ROOT.glob(f"{name}*")), f"{name} does not exist"


def test_the_readme_is_short_and_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    assert "\nmake demo " in readme and "\nmake test " in readme


def test_every_page_is_in_the_navigation_and_the_index():
    navigation, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page
        assert page.name == "index.md" or f"({page.name})" in index, page


def test_the_page_of_flags_has_every_flag_with_its_values_and_default():
    page = (ROOT / "docs/flags.md").read_text()
    rows = dict(re.findall(r"^\| `--sp-(\w+)` \| (.*)$", page, flags=re.M))
    assert set(rows) == {field.name for field in fields(config.TorusArgs)}
    choices = {
        "backend": config.BACKENDS,
        "kernel": config.KERNELS,
        "graphs": config.GRAPHS,
        "transport": config.TRANSPORTS,
        "check": config.CHECKS,
        "compress": config.COMPRESSIONS,
    }
    for field in fields(config.TorusArgs):
        values, default, _ = rows[field.name].split(" | ", 2)
        if field.default not in (None, False):
            assert default == f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"
        if field.name in choices:
            assert set(re.findall(r"`(\w+)`", values)) == set(choices[field.name])
    for name in (name for name in vars(config) if name.endswith("_VARIABLE")):
        assert f"`{getattr(config, name)}" in page


def test_pictures_are_drawn_from_the_committed_rows(tmp_path):
    drawn = pictures.draw_all(tmp_path)
    assert len(drawn) == len(pictures.PICTURES) and all(path.stat().st_size > 10_000 for path in drawn)
    assert {path.name for path in drawn} == {path.name for path in (ROOT / "docs/images").iterdir()}


def test_the_picture_of_traffic_shows_the_bytes_of_the_plan():
    layout = pictures.make_plan(2, 2, heads=pictures.HEADS, max_imbalance=pictures.UNEVEN).layout
    usp = pictures.XditConfig(ulysses_degree=2, ring_degree=2)
    for traffic, expected in (
        (pictures.torus_traffic(layout), layout.egress()),
        (pictures.usp_traffic(usp), pictures.egress(usp, 2, 2)),
    ):
        across = [sent for (sender, receiver), sent in traffic.items() if sender < 2 <= receiver]
        assert sum(size for sent in across for _, size in sent) == pytest.approx(float(expected))


def test_architecture_shows_the_output_of_the_example():
    page = (ROOT / "docs/architecture.md").read_text()
    command, expected = re.search(r"```\n\$ python (.*?)\n(.*?)```", page, flags=re.S).groups()
    assert (
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True).stdout == expected
    )


def test_the_table_of_host_times_shows_the_rows_of_its_file():
    rows = json.loads((ROOT / "docs/results/host-2core.json").read_text())["rows"]
    table = (ROOT / "docs/performance.md").read_text().partition("<!-- host: ")[2]
    shown = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \[[^]]+\] \| (\d+) \[", table, flags=re.M)
    assert shown == [(r["layout"], r["granularity"], f"{r['host_us']:.0f}", str(r["launches"])) for r in rows]
