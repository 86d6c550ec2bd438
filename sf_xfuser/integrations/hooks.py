"""Runtime hooks on another package, as data: which attribute, the wrapper, why, and when it can go.

A :class:`Hook` names a module attribute and a function that turns the original into its replacement. A
:class:`HookSet` applies hooks the moment their module has been imported (or at once, where it already is),
keeps the originals, and puts them back. It knows nothing of xDiT.
"""

from __future__ import annotations

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
    """One attribute of one module of the host, and what replaces it.

    ``name`` is dotted below the module (``"xFuserArgs.create_config"``). ``wrap`` receives the original (for a
    ``staticmethod`` or ``classmethod``: the plain function inside it) and returns the replacement. ``sweep`` also
    rebinds the same object where other modules of the host hold it by ``from ... import``. ``required=False`` marks
    an attribute that some supported versions do not have. ``native`` names an attribute of the module that is there
    where the host does by itself what this hook is for: the hook is then not applied.
    """

    module: str
    name: str
    wrap: Callable[[Any], Any]
    why: str
    remove_when: str
    sweep: bool = False
    required: bool = True
    native: str | None = None


@dataclass(slots=True)
class _Undo:
    owner: Any
    attribute: str
    original: Any  # _ABSENT where the owner inherited the attribute
    replacement: Any


@dataclass
class HookSet:
    """Applies ``hooks`` when their modules are imported; ``remove()`` restores every original.

    ``roots`` are the top-level packages whose imports matter and whose modules are swept.
    """

    hooks: Sequence[Hook]
    roots: tuple[str, ...] = ("xfuser",)
    _undo: dict[Hook, list[_Undo]] = field(default_factory=dict)
    _missing: set[Hook] = field(default_factory=set)
    _native: set[Hook] = field(default_factory=set)
    _finder: _PostImportFinder | None = None

    @property
    def installed(self) -> bool:
        return self._finder is not None

    def install(self) -> None:
        """Variant the import hook and apply what is already imported. Calling it twice changes nothing."""
        if self._finder is not None:
            return
        self._finder = _PostImportFinder(frozenset(hook.module for hook in self.hooks), self._module_imported)
        sys.meta_path.insert(0, self._finder)
        for module_name in dict.fromkeys(hook.module for hook in self.hooks):
            module = sys.modules.get(module_name)
            if module is None:
                continue
            if _is_initializing(module):
                self._finder.late.add(module_name)  # it imports torch, which is what installs us
            else:
                self._module_imported(module)

    def add(self, hook: Hook) -> None:
        """One more, whose module has been imported. A second one for the same attribute changes nothing."""
        if self.installed and all((hook.module, hook.name) != (other.module, other.name) for other in self.hooks):
            self.hooks = (*self.hooks, hook)
            self._apply(hook, sys.modules[hook.module])

    def remove(self) -> None:
        """Put every original back, newest first, and disarm the import hook. Idempotent."""
        if self._finder is None:
            return
        sys.meta_path.remove(self._finder)
        self._finder = None
        for hook in reversed(list(self._undo)):
            for undo in reversed(self._undo.pop(hook)):
                self._restore(undo)
                if hook.sweep:
                    for owner, attribute in _holders(self.roots, undo.replacement):
                        setattr(owner, attribute, _unwrap_descriptor(undo.original))
        self._missing.clear()
        self._native.clear()

    def state(self, hook: Hook) -> str:
        """``"applied"``, ``"pending"`` (module not imported yet), ``"missing"`` (attribute not found), ``"native"``
        (not applied, because the host does it by itself) or ``"off"``."""
        if not self.installed:
            return "off"
        if hook in self._undo:
            return "applied"
        if hook in self._native:
            return "native"
        return "missing" if hook in self._missing else "pending"

    def _module_imported(self, module: ModuleType) -> None:
        for hook in self.hooks:
            if hook.module == module.__name__ and hook not in self._undo:
                self._apply(hook, module)

    def _apply(self, hook: Hook, module: ModuleType) -> None:
        if hook.native is not None and hasattr(module, hook.native):
            self._native.add(hook)
            return
        *path, attribute = hook.name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, _ABSENT)
        if owner is _ABSENT or not hasattr(owner, attribute):
            self._missing.add(hook)
            return
        own = vars(owner).get(attribute, _ABSENT)
        raw = getattr(owner, attribute) if own is _ABSENT else own
        replacement = hook.wrap(_unwrap_descriptor(raw))
        if isinstance(raw, (staticmethod, classmethod)):
            replacement = type(raw)(replacement)
        undo = [_Undo(owner, attribute, own, replacement)]
        if hook.sweep:
            for holder, name in _holders(self.roots, raw):
                undo.append(_Undo(holder, name, raw, replacement))
        for entry in undo:
            setattr(entry.owner, entry.attribute, replacement)
        self._undo[hook] = undo

    @staticmethod
    def _restore(undo: _Undo) -> None:
        if undo.original is _ABSENT:
            delattr(undo.owner, undo.attribute)
        else:
            setattr(undo.owner, undo.attribute, undo.original)


def _unwrap_descriptor(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _is_initializing(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _holders(roots: Iterable[str], value: Any) -> list[tuple[ModuleType, str]]:
    """Every (module, attribute) below ``roots`` that is bound to this very object."""
    prefixes = tuple(f"{root}." for root in roots)
    found = []
    for name, module in list(sys.modules.items()):
        if module is not None and (name in roots or name.startswith(prefixes)):
            found += [(module, key) for key, held in list(vars(module).items()) if held is value]
    return found


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a watched module, then calls ``imported`` right after it has executed."""

    def __init__(self, watched: frozenset[str], imported: Callable[[ModuleType], None]) -> None:
        self._watched = watched
        self._imported = imported
        self._finding: set[str] = set()
        self.late: set[str] = set()  # watched modules whose import was under way already

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for name in list(self.late):
            module = sys.modules.get(name)
            if module is None:  # its import has failed; the next one is noticed as that of any watched module
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
        return getattr(self._loader, name)  # get_code and friends: `python -m` and inspect ask for them

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had been loaded without us (inspect, pickle and reload read these).
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module)
