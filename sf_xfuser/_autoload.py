"""PyTorch calls :func:`register` at the end of ``import torch`` (entry-point group ``torch.backends``).

It must not break ``import torch`` in programs without xDiT: until ``xfuser`` is imported it imports only the standard
library, and it catches every error.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any


def register() -> None:
    """Enable the plugin when ``xfuser`` starts being imported. Never raises; ``SF_XFUSER_AUTOLOAD=0`` turns it off."""
    try:
        from sf_xfuser.config import autoload_wanted

        if not autoload_wanted():
            return
        if "xfuser" in sys.modules:  # xfuser is importing torch
            _enable()
        elif not any(isinstance(finder, _FirstImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _FirstImport())
    except Exception as error:
        _warn(error)


def __getattr__(name: str) -> Any:
    """Return ``register`` for any name: an older editable install has an entry point with another name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return register


class _FirstImport:
    """A meta-path finder that enables the plugin at the first import of ``xfuser``. It finds no module itself."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "xfuser":
            sys.meta_path.remove(self)
            _enable()


def _enable() -> None:
    try:
        from sf_xfuser.integrations.xdit import plugin

        plugin.enable()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"sf-xfuser is installed but could not be enabled; xDiT runs without it ({type(error).__name__}: {error}). "
        f"Run `sf-xfuser doctor` for details, or set SF_XFUSER_AUTOLOAD=0 to silence this warning",
        RuntimeWarning,
        stacklevel=2,
    )
