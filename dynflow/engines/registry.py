"""The workflows that an engine runs, as hosts register them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dynflow.binding import WorkflowBinding
from dynflow.engines.env import Env
from dynflow.errors import InvalidArgumentError
from dynflow.instance import check_workflow_name
from dynflow.router import DynamicWorkflowBinding
from dynflow.step_config import StepConfig, merge_config
from dynflow.types import WorkflowEvent
from dynflow.workflow import ExecutionContext, WorkflowEntrypoint, awaitable, current_env

_CONTEXT = ExecutionContext()


@dataclass(frozen=True, slots=True)
class Registered:
    """A workflow that the engine runs."""

    entrypoint: type[WorkflowEntrypoint]
    env: Any
    step_defaults: StepConfig
    concurrency: int

    async def main(self, event: WorkflowEvent, step: Any) -> Any:
        """Run one instance's code."""
        current_env.set(self.env)
        entrypoint = self.entrypoint(_CONTEXT, self.env)
        return await awaitable(entrypoint.run(event, step), entrypoint.run)


class Registry:
    """Registered workflows by name. `max_retries` and `concurrency` are the engine's."""

    def __init__(self, *, max_retries: int, concurrency: int) -> None:
        self._max_retries, self._concurrency = max_retries, concurrency
        self._by_name: dict[str, Registered] = {}

    def __getitem__(self, name: str) -> Registered:
        return self._by_name[name]

    def names(self) -> list[str]:
        """Return the names of the registered workflows."""
        return sorted(self._by_name)

    def add(
        self,
        name: str,
        entrypoint: object,
        env: Any,
        binding: object,
        step_defaults: Mapping[str, Any] | None,
        concurrency: object,
    ) -> Registered:
        """Check what `register` of an engine was given, and keep it. Raises InvalidArgumentError."""
        if check_workflow_name(name) in self._by_name:
            raise InvalidArgumentError(
                f"workflow {name!r} is registered already: an engine has one of a name"
            )
        if not isinstance(entrypoint, type) or not callable(getattr(entrypoint, "run", None)):
            raise InvalidArgumentError(f"{entrypoint!r:.200} is not a class with run(event, step)")
        if binding is not None and (type(binding) is not str or not binding.isidentifier()):
            raise InvalidArgumentError(f"binding is a name in tenants' env, not {binding!r:.100}")
        defaults, delay = merge_config(
            step_defaults, defaults=StepConfig(), max_retries=self._max_retries, step="(defaults)"
        )
        if delay is not None:
            raise InvalidArgumentError("step_defaults: retries.delay is a duration; functions are steps' own")
        most = self._concurrency if concurrency is None else at_least_one(concurrency, "concurrency")
        bound = Env(env) if isinstance(env, Mapping) else env
        registered = self._by_name[name] = Registered(entrypoint, bound, defaults, most)
        return registered

    def check(self, name: str) -> None:
        """Raise InvalidArgumentError where no workflow of this name is registered."""
        if name not in self.names():  # what is no name may have no hash
            raise InvalidArgumentError(
                f"no workflow {name!r:.100} is registered; registered are {self.names()}"
            )


def bind(raw: WorkflowBinding, binding: str | None, env: Any) -> None:
    """Let the loaders in `env` give tenants the workflow under the name `binding`."""
    if binding is not None and isinstance(env, Mapping):
        for item in env.values():
            if hasattr(item, "bind"):
                item.bind(binding, partial(DynamicWorkflowBinding, raw))


def at_least_one(given: object, what: str) -> int:
    """Return `given` if it is an int of at least 1, else raise InvalidArgumentError."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InvalidArgumentError(f"{what} must be an int of at least 1, not {given!r:.100}")
    return given
