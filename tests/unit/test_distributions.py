"""The source distribution and the wheel: files, README of an index page, version, commit. No network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import sf_xfuser

ROOT = Path(__file__).parents[2]
RELATIVE_LINK = re.compile(r"\]\((?!\w+:|#)")


def run(*command: str | Path, cwd: Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout.strip()


def build(what: str, source: Path, out: Path) -> Path:
    """Call one hook of the build backend in ``source``, as pip and build do. Returns what it wrote into ``out``."""
    program = f"import sys, setuptools.build_meta as b; sys.stdout = sys.stderr; name = b.{what}(sys.argv[1])"
    name = run(sys.executable, "-c", f"{program}; print(name, file=sys.__stdout__)", out, cwd=source)
    return out / name.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This working tree as a repository of its own, with one commit."""
    try:
        files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "init", "--quiet", cwd=folder)
    run("git", "add", "--all", cwd=folder)
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message=All", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(build("build_sdist", checkout, folder)) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_source_distribution_has_every_file_of_the_checkout(checkout, source):
    tracked = run("git", "ls-files", cwd=checkout).splitlines()
    assert [name for name in tracked if not (source / name).exists()] == []


def test_the_kernels_of_a_checkout_are_found_without_an_install(source):
    program = "from importlib.util import find_spec; print(find_spec('sf_xfuser.kernels').origin)"
    assert run(sys.executable, "-S", "-c", program, cwd=source) == str(source / "kernels/__init__.py")


def test_the_wheel_has_the_version_and_every_module_of_the_package(source, wheel):
    assert metadata(wheel)["Version"] == sf_xfuser.__version__
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(source)) for path in (source / "sf_xfuser").rglob("*.py")}
    modules |= {f"sf_xfuser/{path.relative_to(source)}" for path in (source / "kernels").rglob("*.py")}
    assert {*modules, "sf_xfuser/py.typed"} <= names


def test_an_index_page_has_no_relative_link(source, wheel, tmp_path):
    text = metadata(wheel).get_payload()
    assert "docs/transports.md" not in text and "transports" in text and not RELATIVE_LINK.search(text)
    published = shutil.copytree(source, tmp_path / "published")
    project = (published / "pyproject.toml").read_text()
    named = project.replace("[project.urls]", '[project.urls]\nRepository = "https://host/owner/name"')
    (published / "pyproject.toml").write_text(named)
    folder = build("prepare_metadata_for_build_wheel", published, tmp_path)
    text = (folder / "METADATA").read_text()
    assert "](https://host/owner/name/blob/HEAD/docs/transports.md)" in text
    assert "](https://host/owner/name/raw/HEAD/docs/images/timeline.svg)" in text and not RELATIVE_LINK.search(text)


def test_a_report_names_the_commit_of_the_package_and_not_of_the_folder_around_it(checkout, wheel, tmp_path):
    def commit() -> str:
        program = "from sf_xfuser.bench.document import new_document; print(new_document('t', 'cpu')['commit'])"
        return run(sys.executable, "-c", program, cwd=folder)

    built, folder = run("git", "describe", "--always", cwd=checkout), checkout
    assert commit() == built
    (checkout / "README.md").write_text("changed")
    assert commit() == f"{built}-dirty"
    run("git", "checkout", "README.md", cwd=checkout)

    run("git", "init", "--quiet", cwd=tmp_path)  # a project that has installed the wheel into a folder of its own
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m=x", cwd=tmp_path)
    folder = tmp_path / "packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    assert commit() == built
    (folder / "sf_xfuser/commit.txt").unlink()
    assert commit() == "None"
