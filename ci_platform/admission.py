"""Whether a run may begin now. One that may not is held, with the reason shown, until it may."""

from __future__ import annotations

from collections.abc import Callable


class Admission:
    """Holds runs back while `shortage` says what there is too little of. On one event loop.

    `on_refusal` is called at each refusal, to have something done about it.
    """

    def __init__(self, shortage: Callable[[], str | None] = lambda: None) -> None:
        self._shortage = shortage
        self._held: set[str] = set()
        self.on_refusal: Callable[[], None] = lambda: None

    def refusal(self, run_id: str) -> str | None:
        """Return why a run must wait, and remember it; None where it may begin."""
        why = self._shortage()
        if why is not None:
            self._held.add(run_id)
            self.on_refusal()
        return why

    def released(self) -> set[str]:
        """Return the runs that were held back and may be asked about again, and forget them."""
        if not self._held or self._shortage() is not None:
            return set()
        released, self._held = self._held, set()
        return released
