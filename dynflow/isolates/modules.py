"""A worker's modules: how `import` finds them in memory, and how an error in them names its file and line.

Used by the guest in its own process and by TrustedLoader in this one. Stdlib only.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

from dynflow.errors import WorkerLoadError

# Data goes by these names without being in anybody's way: `logging.txt` does not hide `logging`.
_TAKEN = sys.stdlib_module_names | {"dynflow", "pipelines"}


class ModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads modules from a mapping of file names to what they hold.

    `pkg/mod.py` is source, any other name a module with one attribute, `value`: text, bytes or data, where text
    under a name that ends in `.json` is parsed. Files are found from the top, and beside the main module. With a
    prefix they are modules `prefix.name`, and their own absolute imports look there first.
    """

    def __init__(self, main_module: str, modules: Mapping[str, Any], prefix: str = "") -> None:
        self._main, self._modules, self._prefix = main_module, modules, prefix
        self._files: dict[str, str] = {}
        self._packages = {prefix} if prefix else set()
        folder = main_module.rpartition("/")[0]
        for root in dict.fromkeys((folder, "")):
            for file in modules:
                if not root or file.startswith(f"{root}/"):
                    self._add(file, file[len(root) + 1 :] if root else file)
        self._builtins = {**vars(builtins), "__import__": self._import} if prefix else None

    def load_main(self) -> types.ModuleType:
        """Load the main module under its own name, whatever else has that name."""
        if self._main not in self._modules:
            raise WorkerLoadError(f"the main module is not among {sorted(self._modules)}", self._main)
        name = self._full_name(self._main.rpartition("/")[2].removesuffix(".py"))
        spec = importlib.machinery.ModuleSpec(name, self, origin=self._main)
        self._files[name] = self._main
        module = importlib.util.module_from_spec(spec)
        if self._prefix:
            importlib.import_module(self._prefix)
        sys.modules[name] = module
        try:
            self.exec_module(module)
        except (Exception, SystemExit) as error:
            raise self._load_error(error) from error
        return module

    def forget(self) -> None:
        """Take the modules out of the interpreter's tables."""
        for name in (*self._files, *self._packages):
            if getattr(sys.modules.get(name), "__loader__", None) is self:
                del sys.modules[name]
        for file in self._modules:
            linecache.cache.pop(file, None)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find `fullname` among the files."""
        del path, target
        if fullname not in self._files and fullname not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=self._files.get(fullname), is_package=fullname in self._packages
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Let the interpreter make the module."""
        del spec

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module's source."""
        file = self._files.get(module.__name__)
        if file is None:
            return  # a folder without __init__.py
        source = self._modules[file]
        module.__file__ = file
        if not file.endswith(".py"):
            vars(module)["value"] = _value_of(file, source)
            return
        if type(source) is not str:
            raise SyntaxError("a module of code is text", (file, None, None, None))
        lines = source.splitlines(keepends=True)
        linecache.cache[file] = (len(source), None, lines, file)  # for tracebacks
        if self._builtins is not None:
            vars(module)["__builtins__"] = self._builtins
        exec(compile(source, file, "exec", dont_inherit=True), vars(module))  # noqa: S102 - the tenant's code is what runs here

    def get_source(self, fullname: str) -> str | None:
        """Return the source of a module, for `inspect`."""
        file = self._files.get(fullname, "")
        return self._modules[file] if file.endswith(".py") else None

    def get_data(self, path: str) -> bytes:
        """Return what a file holds, as bytes, for `pkgutil.get_data(__name__, "file beside this one")`."""
        if path not in self._modules:
            raise FileNotFoundError(f"{path} is not among the worker's modules")
        held = self._modules[path]
        if type(held) is bytes:
            return held
        return (held if type(held) is str else json.dumps(held)).encode()

    def _add(self, file: str, relative: str) -> None:
        parts = relative.split("/")
        parts[-1], _, suffix = parts[-1].rpartition(".")
        is_package = parts[-1] == "__init__" and suffix == "py"
        parts = parts[:-1] if is_package else parts
        if not parts or not all(part.isidentifier() for part in parts):
            return  # not importable by name
        if suffix != "py" and parts[0] in _TAKEN:
            return
        name = self._full_name(".".join(parts))
        if suffix == "py" and not self._files.get(name, "").endswith(".py"):
            self._files[name] = file  # code goes before data of the same name
        self._files.setdefault(name, file)
        if is_package:
            self._packages.add(name)
        while name := name.rpartition(".")[0]:
            self._packages.add(name)

    def _full_name(self, name: str) -> str:
        return f"{self._prefix}.{name}" if self._prefix else name

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - the signature of __import__
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> types.ModuleType:
        own = self._full_name(name)
        top = self._full_name(name.partition(".")[0])
        if level or not (own in self._files or own in self._packages):
            return builtins.__import__(name, globals, locals, fromlist, level)
        module = importlib.import_module(own)
        for part in fromlist or ():
            if f"{own}.{part}" in self._files and not hasattr(module, part):
                importlib.import_module(f"{own}.{part}")
        return module if fromlist else sys.modules[top]

    def _load_error(self, error: BaseException) -> WorkerLoadError:
        if isinstance(error, WorkerLoadError):
            return error
        if isinstance(error, SyntaxError) and error.filename in self._modules:
            return WorkerLoadError(f"{type(error).__name__}: {error.msg}", error.filename, error.lineno)
        own = [
            frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in self._modules
        ]
        where = (own[-1].filename, own[-1].lineno) if own else (self._main, None)
        return WorkerLoadError(f"{type(error).__name__}: {error}", *where)


def _value_of(file: str, held: Any) -> Any:
    if type(held) is not str or not file.endswith(".json"):
        return held
    try:
        return json.loads(held)
    except json.JSONDecodeError as error:
        raise SyntaxError(f"not JSON: {error.msg}", (file, error.lineno, error.colno, None)) from None
