"""PyTorch calls :func:`register` at the end of ``import torch`` (entry-point group ``torch.backends``).

Whatever happens here must not break ``import torch`` for programs that have nothing to do with xDiT: nothing but the
standard library is imported before ``xfuser`` is, and no error escapes.
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
        if "xfuser" in sys.modules:  # xfuser itself is what imports torch
            _enable()
        elif not any(isinstance(finder, _FirstImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _FirstImport())
    except Exception as error:
        _warn(error)


def __getattr__(name: str) -> Any:
    """An editable install that is older than its checkout asks for this function by its old name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return register


class _FirstImport:
    """A meta-path finder that finds nothing: it notices the first import of ``xfuser`` and is gone."""

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
        f"sf-xfuser is installed but could not be enabled, xDiT runs without it ({type(error).__name__}: {error}); "
        f"`sf-xfuser doctor` tells more, SF_XFUSER_AUTOLOAD=0 silences this",
        RuntimeWarning,
        stacklevel=2,
    )
