"""What pyproject.toml cannot say: the commit that is built, and a README without relative links for an index page."""

import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.config.pyprojecttoml import load_file

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from sf_xfuser.bench.document import COMMIT_FILE, commit  # noqa: E402


def long_description() -> str:
    """README.md with absolute links into ``Repository`` of [project.urls]; without it, with no links and pictures."""
    urls = load_file(ROOT / "pyproject.toml")["project"]["urls"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    picture, link = r"!\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)", r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)"
    if repository := urls.get("Repository"):
        readme = re.sub(picture, rf"![\1]({repository}/raw/HEAD/\2)", readme)
        return re.sub(link, rf"[\1]({repository}/blob/HEAD/\2)", readme)
    return re.sub(link, r"\1", re.sub(rf"{picture}\n*", "", readme))


def record_commit(folder: str) -> None:
    """Without a checkout (a wheel from a source distribution) the recorded commit is already among the files."""
    if described := commit():
        Path(folder, "sf_xfuser", COMMIT_FILE).write_text(described + "\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            record_commit(self.build_lib)


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list) -> None:
        super().make_release_tree(base_dir, files)
        record_commit(base_dir)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
)
