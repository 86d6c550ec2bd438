"""Runtime hooks on another package, as data.

A :class:`Hook` names a module attribute and a function that turns the original into its replacement. A
:class:`HookSet` applies hooks as soon as their module is imported, keeps the originals, and restores them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """Replaces one attribute of one module of the host.

    ``name`` is dotted below the module (``"xFuserArgs.create_config"``). ``wrap`` receives the original (for a
    ``staticmethod`` or ``classmethod``: the plain function inside it) and returns the replacement. ``sweep`` also
    rebinds the object in other modules of the host that got it by ``from ... import``. ``required=False`` marks an
    attribute that some supported versions do not have. ``native`` names a module attribute: if it exists, the host does
    the same natively, and the hook is not applied.
    """

    module: str
    name: str
    wrap: Callable[[Any], Any]
    why: str
    remove_when: str
    sweep: bool = False
    required: bool = True
    native: str | None = None


def wrapper(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn ``function(original, *args, **kwargs)`` into a ``Hook.wrap``."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return replacement

    return wrap


@dataclass(slots=True)
class _Undo:
    owner: Any
    attribute: str
    original: Any  # _ABSENT if the owner inherits the attribute
    replacement: Any


@dataclass
class HookSet:
    """Applies ``hooks`` when their modules are imported; ``remove()`` restores every original.

    ``roots`` are the top-level packages that ``Hook.sweep`` covers.
    """

    hooks: Sequence[Hook]
    roots: tuple[str, ...] = ("xfuser",)
    _undo: dict[Hook, list[_Undo]] = field(default_factory=dict)
    _skipped: dict[Hook, str] = field(default_factory=dict)  # with the reason: "missing" or "native"
    _finder: _PostImportFinder | None = None

    @property
    def installed(self) -> bool:
        return self._finder is not None

    def install(self) -> None:
        """Start to watch imports, and hook the modules that are imported already. Idempotent."""
        if self._finder is not None:
            return
        self._finder = _PostImportFinder(frozenset(hook.module for hook in self.hooks), self._module_imported)
        sys.meta_path.insert(0, self._finder)
        for module_name in dict.fromkeys(hook.module for hook in self.hooks):
            module = sys.modules.get(module_name)
            if module is None:
                continue
            if _is_initializing(module):
                self._finder.late.add(module_name)  # it is importing torch, and torch loads this package
            else:
                self._module_imported(module)

    def add(self, hook: Hook) -> None:
        """Apply one more hook, if its attribute has none. Its module must have been imported."""
        if self.installed and all((hook.module, hook.name) != (other.module, other.name) for other in self.hooks):
            self.hooks = (*self.hooks, hook)
            self._apply(hook, sys.modules[hook.module])

    def remove(self) -> None:
        """Restore every original, newest first, and stop watching imports. Idempotent."""
        if self._finder is None:
            return
        sys.meta_path.remove(self._finder)
        self._finder = None
        for hook in reversed(list(self._undo)):
            for undo in reversed(self._undo.pop(hook)):
                if undo.original is _ABSENT:
                    delattr(undo.owner, undo.attribute)
                else:
                    setattr(undo.owner, undo.attribute, undo.original)
                if hook.sweep:
                    for owner, attribute in _holders(self.roots, undo.replacement):
                        setattr(owner, attribute, _unwrap_descriptor(undo.original))
        self._skipped.clear()

    def state(self, hook: Hook) -> str:
        """``"applied"``, ``"pending"`` (module not imported yet), ``"missing"`` (attribute not found), ``"native"``
        (not applied: the host does the same) or ``"off"``."""
        if not self.installed:
            return "off"
        return "applied" if hook in self._undo else self._skipped.get(hook, "pending")

    def _module_imported(self, module: ModuleType) -> None:
        for hook in self.hooks:
            if hook.module == module.__name__ and hook not in self._undo:
                self._apply(hook, module)

    def _apply(self, hook: Hook, module: ModuleType) -> None:
        if hook.native is not None and hasattr(module, hook.native):
            self._skipped[hook] = "native"
            return
        *path, attribute = hook.name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, _ABSENT)
        if owner is _ABSENT or not hasattr(owner, attribute):
            self._skipped[hook] = "missing"
            return
        own = vars(owner).get(attribute, _ABSENT)
        raw = getattr(owner, attribute) if own is _ABSENT else own
        replacement = hook.wrap(_unwrap_descriptor(raw))
        if isinstance(raw, (staticmethod, classmethod)):
            replacement = type(raw)(replacement)
        undo = [_Undo(owner, attribute, own, replacement)]
        if hook.sweep:
            undo += [_Undo(holder, name, raw, replacement) for holder, name in _holders(self.roots, raw)]
        for entry in undo:
            setattr(entry.owner, entry.attribute, replacement)
        self._undo[hook] = undo


def _unwrap_descriptor(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _is_initializing(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _holders(roots: Iterable[str], value: Any) -> list[tuple[ModuleType, str]]:
    """Every (module, attribute) below ``roots`` that is bound to the same object as ``value``."""
    prefixes = tuple(f"{root}." for root in roots)
    return [
        (module, attribute)
        for name, module in list(sys.modules.items())
        if module is not None and (name in roots or name.startswith(prefixes))
        for attribute, item in list(vars(module).items())
        if item is value
    ]


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Finds a watched module with the other finders, and calls ``imported`` right after its execution."""

    def __init__(self, watched: frozenset[str], imported: Callable[[ModuleType], None]) -> None:
        self._watched = watched
        self._imported = imported
        self._finding: set[str] = set()
        self.late: set[str] = set()  # watched modules that were being imported already

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for name in list(self.late):
            module = sys.modules.get(name)
            if module is None:  # its import has failed; find_spec sees the next one
                self.late.discard(name)
            elif not _is_initializing(module):
                self.late.discard(name)
                self._imported(module)
        if fullname not in self._watched or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _NotifyingLoader(spec.loader, self._imported)
        return spec


class _NotifyingLoader(importlib.abc.Loader):
    """The module's own loader, with one call added after ``exec_module``."""

    def __init__(self, loader: Any, imported: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._imported = imported

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # `python -m` and inspect need get_code and others

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # inspect, pickle and reload read these: they must be those of an unhooked module.
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module)
