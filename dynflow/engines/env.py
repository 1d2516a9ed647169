"""What a workflow sees as `self.env`."""

from __future__ import annotations

from typing import Any


class Env(dict[str, Any]):
    """A dict whose items are attributes too: `env.WORKFLOWS` and `env["WORKFLOWS"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"env has no binding {name!r}; it has {sorted(self)}") from None
