"""The files that a command writes: proven before the run, each written by itself. ``-`` is standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sf_xfuser.config import launch_environment

_TEXTS = ("json", "markdown", "trace", "report")
_NEED_MATPLOTLIB = ("plot", "report")
_MIN_FREE_BYTES = 1 << 20


class Outputs:
    """The options ``json``, ``markdown``, ``trace``, ``report`` and ``plot`` of ``options``, as far as it has them.

    ``command``: the start of error messages, such as ``"sf-xfuser plan"``.

    The constructor proves each path and leaves no file behind. Raises ValueError, with the option's name, if the path
    cannot be written, if less than 1 MiB is free there, or if matplotlib is missing or does not know the suffix of a
    plot. Under torchrun only rank 0 writes, so only rank 0 proves.

    ``on_stdout``: an output is standard output, so the command must print no tables there. ``failed``: an output could
    not be written.
    """

    def __init__(self, command: str, options: object) -> None:
        self._command, self.failed = command, False
        given = {name: getattr(options, name, None) for name in (*_TEXTS, "plot")}
        self._paths = {name: str(path) for name, path in given.items() if path}
        self.on_stdout = "-" in self._paths.values()
        if launch_environment().rank in (None, 0):
            self._prove()

    def _prove(self) -> None:
        names: dict[str, str] = {}
        for name, path in self._paths.items():
            if (other := names.setdefault(os.path.realpath(path), name)) != name:
                raise ValueError(f"--{other} and --{name} both write {path}; use two files")
            if path != "-" and Path(path).is_dir():
                raise ValueError(f"--{name} {path} is a folder; use the path of a file")
            try:
                if name in _NEED_MATPLOTLIB:
                    _check_matplotlib(path if name == "plot" else None)
                if path != "-":
                    _prove_file(Path(path))
            except (OSError, RuntimeError, ValueError) as error:
                text = error.strerror if isinstance(error, OSError) else error
                raise ValueError(f"--{name} {path}: {text}") from None

    def text(self, name: str, make: Callable[[], str]) -> None:
        """Write the text that ``make`` returns to the file of option ``name``, if it was given."""

        def write(path: str) -> None:
            if path == "-":
                print(make().removesuffix("\n"), flush=True)
            else:
                Path(path).write_text(make(), encoding="utf-8")

        self.file(name, write)

    def json(self, document: object, indent: int | None = 1) -> None:
        """Write ``document`` to the file of ``--json``, if it was given."""
        self.text("json", lambda: json.dumps(document, indent=indent) + "\n")

    def file(self, name: str, write: Callable[[str], object]) -> None:
        """Call ``write`` with the path of option ``name``, if it was given.

        An error is one line on stderr; the partial file is removed, and ``failed`` is true from then on.
        """
        if (path := self._paths.get(name)) is None:
            return
        try:
            write(path)
        except Exception as error:  # of any kind: the other outputs must still be written
            self.failed = True
            text = error.strerror if isinstance(error, OSError) and error.strerror else f"{error!r}"
            print(f"{self._command}: --{name} {path} was not written: {text}", file=sys.stderr)
            if os.path.isfile(path) and not os.path.islink(path):
                os.unlink(path)


def _check_matplotlib(plot: str | None) -> None:
    """Raise RuntimeError if matplotlib is missing, ValueError if it cannot write the file ``plot``."""
    from sf_xfuser.bench import page

    page.require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = "" if plot is None else Path(plot).suffix[1:].lower()
    types = FigureCanvasBase.get_supported_filetypes()
    if plot is not None and suffix not in types:
        raise ValueError(f"the suffix selects the type of the picture; use one of {', '.join(sorted(types))}")


def _prove_file(path: Path) -> None:
    """Raise OSError or ValueError if ``path`` cannot be written. Creates and removes a new file; changes no other."""
    if not (folder := path.absolute().parent).is_dir():
        raise ValueError(f"there is no folder {folder}")
    is_new = not path.exists()
    if not is_new and not path.is_file():  # a pipe or a device: opening it can block, or end its reader
        if not os.access(path, os.W_OK):
            raise ValueError("it is not writable")
        return
    with path.open("ab") as file:
        disk = os.fstatvfs(file.fileno())
    if is_new:
        path.unlink(missing_ok=True)
    free_bytes = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free_bytes < _MIN_FREE_BYTES:
        raise ValueError(f"the disk is full ({free_bytes / 1e3:.0f} kB free)")
