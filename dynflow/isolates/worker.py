"""A worker's code, loaded: its modules, its entrypoints, what `fetch` is given.

Used by the guest in its own process and by TrustedLoader in this one. Stdlib only.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import linecache
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynflow.errors import WorkerLoadError
from dynflow.workflow import ExecutionContext, WorkerEntrypoint, WorkflowEntrypoint, current_env


class Env:
    """What tenants get as `env`: one attribute per binding."""

    def __init__(self, bindings: Mapping[str, Any]) -> None:
        self.__dict__.update(bindings)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"env has no binding {name!r}; it has: {', '.join(sorted(self.__dict__)) or 'none'}"
        )


class Request:
    """What `fetch(request, env)` gets."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def json(self) -> Any:
        """Return the value that the stub's `fetch` was called with."""
        return self._value


class Worker:
    """Modules of one tenant, loaded under `prefix` (empty where the process is the tenant's own).

    Raises WorkerLoadError with file and line where the code is at fault.
    """

    def __init__(self, main_module: str, modules: Mapping[str, str], *, prefix: str = "") -> None:
        self._finder = ModuleFinder(main_module, modules, prefix)
        self._main_file = main_module
        sys.meta_path.insert(0, self._finder)
        try:
            self.main = self._finder.load_main()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Forget the modules."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder.forget()

    def find(
        self, entrypoint: str | None, method: str, ctx: ExecutionContext, env: Env
    ) -> Callable[..., Any]:
        """Return the public `method` of a new instance of the class `entrypoint`, or the main module's function."""
        if method.startswith("_"):
            raise WorkerLoadError(f"{method!r} is not public", self._main_file)
        if entrypoint is None:
            function = vars(self.main).get(method)
            if not inspect.isfunction(function):
                raise WorkerLoadError(self._missing("function", method), self._main_file)
            if method == "fetch":
                return lambda value=None: function(Request(value), env)
            return function
        bound = getattr(self._instance(entrypoint, WorkerEntrypoint, ctx, env), method, None)
        if not inspect.ismethod(bound):
            raise WorkerLoadError(f"{entrypoint} has no public method {method!r}", self._main_file)
        return bound

    def find_workflow(self, name: str | None, ctx: ExecutionContext, env: Env) -> Callable[[Any, Any], Any]:
        """Return `run` of a new instance of the workflow class `name` (None: the only one of the main module)."""
        if name is None:
            found = [
                key for key, value in vars(self.main).items() if _is_own_class(value, WorkflowEntrypoint)
            ]
            if len(found) != 1:
                raise WorkerLoadError(f"name the workflow to run: found {found or 'none'}", self._main_file)
            (name,) = found
        run: Callable[[Any, Any], Any] = self._instance(name, WorkflowEntrypoint, ctx, env).run
        return run

    def _instance(self, name: str, base: type, ctx: ExecutionContext, env: Env) -> Any:
        cls = vars(self.main).get(name)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise WorkerLoadError(self._missing(f"{base.__name__} class", name), self._main_file)
        current_env.set(env)
        return cls(ctx, env)  # type: ignore[call-arg]  # both bases take these two

    def _missing(self, what: str, name: str) -> str:
        bases = (WorkerEntrypoint, WorkflowEntrypoint)
        there = [
            key
            for key, value in vars(self.main).items()
            if not key.startswith("_") and (inspect.isfunction(value) or _is_own_class(value, bases))
        ]
        return f"there is no {what} {name!r}; there is: {', '.join(there) or 'nothing'}"


def _is_own_class(value: Any, bases: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, type) and issubclass(value, bases) and not value.__module__.startswith("dynflow.")
    )


class ModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads modules from a mapping of file names to source.

    Files are found from the top, and beside the main module. With a prefix they are modules `prefix.name`,
    and their own absolute imports look there first.
    """

    def __init__(self, main_module: str, modules: Mapping[str, str], prefix: str = "") -> None:
        self._main, self._modules, self._prefix = main_module, modules, prefix
        self._files: dict[str, str] = {}
        self._packages = {prefix} if prefix else set()
        folder = main_module.rpartition("/")[0]
        for root in dict.fromkeys((folder, "")):
            for file in modules:
                if file.endswith(".py") and (not root or file.startswith(f"{root}/")):
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
        lines = source.splitlines(keepends=True)
        linecache.cache[file] = (len(source), None, lines, file)  # for tracebacks
        module.__file__ = file
        if self._builtins is not None:
            vars(module)["__builtins__"] = self._builtins
        exec(compile(source, file, "exec", dont_inherit=True), vars(module))  # noqa: S102 - the tenant's code is what runs here

    def get_source(self, fullname: str) -> str | None:
        """Return the source of a module, for `inspect`."""
        file = self._files.get(fullname)
        return None if file is None else self._modules[file]

    def _add(self, file: str, relative: str) -> None:
        parts = relative.removesuffix(".py").split("/")
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        if not parts or not all(part.isidentifier() for part in parts):
            return  # not importable by name
        name = self._full_name(".".join(parts))
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
