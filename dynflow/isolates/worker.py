"""A worker's code, loaded: its entrypoints, what `fetch` is given.

Used by the guest in its own process and by TrustedLoader in this one. Stdlib only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dynflow.errors import WorkerLoadError
from dynflow.isolates.modules import ModuleFinder
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

    def __init__(self, main_module: str, modules: Mapping[str, Any], *, prefix: str = "") -> None:
        self._finder = ModuleFinder(main_module, modules, prefix)
        self._main_file, self.modules = main_module, modules
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
