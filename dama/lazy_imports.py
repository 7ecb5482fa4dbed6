"""Load libraries that others import at every start when they are first used.

PEFT imports bitsandbytes, which compiles functions with torch's inductor; transformers' trainer imports datasets, and
with it pandas and pyarrow. Few runs use them, and they take a fifth of every process's start. DeepSpeed's ZeRO imports
its Muon optimizer, whose functions are compiled by inductor, too. transformers reads the source of all models twice.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What the import system, and searches through sys.modules, read of a module that is not loaded.
KNOWN_BEFORE = {"__class__", "__name__", "__spec__", "__loader__", "__package__", "__file__", "__warningregistry__"}


class LazyLoader(Loader):
    """Leave a module unloaded; `loader` loads it later, and answers for everything else."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.lock = threading.RLock()
        self.is_loading = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create what the library's own loader would."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Mark the module as unloaded instead of running its file."""
        module.__class__ = UnloadedModule


class UnloadedModule(ModuleType):
    """A module whose file runs when one of its attributes is first read, set or deleted."""

    def __getattribute__(self, name: str) -> Any:
        if name not in KNOWN_BEFORE:
            # An import of a submodule by another thread holds a lock that the load may need.
            load(self, wait=name != "__path__")
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in KNOWN_BEFORE:
            load(self)
        ModuleType.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        load(self)
        ModuleType.__delattr__(self, name)


def load(module: ModuleType, wait: bool = True) -> None:
    """Run the module's file, once; what it reads of itself meanwhile is what it has so far.

    Args:
        wait: whether to wait for the end where another thread loads it.

    Raises:
        Whatever the module raises; it is imported anew after that, as after any failed import.
    """
    spec = module.__spec__
    loader = spec and spec.loader
    if spec is None or not isinstance(loader, LazyLoader) or not loader.lock.acquire(blocking=wait):
        return
    try:
        if loader.is_loading or type(module) is not UnloadedModule:
            return
        loader.is_loading = True
        loader.loader.exec_module(module)
        spec.loader = module.__loader__ = loader.loader
        object.__setattr__(module, "__class__", ModuleType)
    except BaseException:
        loader.is_loading = False
        sys.modules.pop(spec.name, None)
        raise
    finally:
        loader.lock.release()


class DeferredLoader(LazyLoader):
    """Run a module's file with functions under torch.compile left to be compiled at their first call."""

    def exec_module(self, module: ModuleType) -> None:
        """Load the module as its own loader does."""
        import torch

        compile_now = torch.compile
        torch.compile = partial(compile_when_called, compile_now)
        try:
            self.loader.exec_module(module)
        finally:
            torch.compile = compile_now


class ScanningLoader(LazyLoader):
    """Load transformers.utils.import_utils with a cache for all model folders, where its own holds 128 of them."""

    def exec_module(self, module: ModuleType) -> None:
        """Load the module as its own loader does, and replace the cache of what was found in each folder."""
        self.loader.exec_module(module)
        scan: Any = vars(module).get("create_import_structure_from_path")
        if hasattr(scan, "cache_info"):
            vars(module)["create_import_structure_from_path"] = cache(scan.__wrapped__)


def compile_when_called(
    compile_now: Callable[..., Any], model: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """torch.compile, of a function or as a decorator with options, whose work begins with the function's first call."""
    if model is None:
        return partial(compile_when_called, compile_now, **options)
    compiled = cache(lambda: compile_now(model, **options))

    @wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


class LazyFinder(MetaPathFinder):
    """Find modules of these names where Python would, with another loader around their own."""

    def __init__(self, names: Sequence[str], loader: type[LazyLoader] = LazyLoader) -> None:
        self.names, self.loader = frozenset(names), loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of a module of these names; None for all others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.names else None
        if spec is not None and spec.loader is not None:
            spec.loader = self.loader(spec.loader)
        return spec


def load_when_used(*names: str) -> None:
    """Let later imports of these top-level libraries run their files at the first use of an attribute."""
    sys.meta_path.insert(0, LazyFinder(names))


def compile_when_used(*names: str) -> None:
    """Let later imports of these modules compile nothing: their functions under torch.compile are when called."""
    sys.meta_path.insert(0, LazyFinder(names, DeferredLoader))


def scan_models_once() -> None:
    """Let a later import of transformers read each of its model folders once."""
    sys.meta_path.insert(0, LazyFinder(["transformers.utils.import_utils"], ScanningLoader))
