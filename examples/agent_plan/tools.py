"""The agent's tools: all that its plan can reach. They guard what is risky; the plan cannot skip the question."""

import json
import re
from pathlib import Path

from dynflow import NonRetryableError
from dynflow.isolates import Capability, current_caller

SAMPLES = {
    "report-2024-q3.txt": "Third quarter of 2024\n\nSales were fair.\n",
    "report-2024-q4.txt": "Fourth quarter of 2024\n\nSales were good.\n",
    "report-2025-q1.txt": "First quarter of 2025\n\nSales are open.\n",
}


class Tools(Capability):
    """Files of one folder. Deleting one needs a person's consent to that name, in that run of a plan.

    Tenant code reaches the `async` methods; the others are the host's. Each may be called twice for one step,
    when the machine goes down in the middle of it: so each does the same again.
    """

    def __init__(self, files: Path, requests: Path) -> None:
        self._files, self._requests = files, requests

    async def list_files(self) -> dict[str, int]:
        """Return the size of each file."""
        self._say("list_files")
        return {path.name: path.stat().st_size for path in self._files.iterdir()}

    async def read_file(self, name: str) -> str:
        """Return a file's text."""
        path = self._path(name)
        if not path.exists():
            raise NonRetryableError(f"there is no file {name}", name="NoSuchFileError")
        self._say(f"read_file {name}")
        return path.read_text()

    async def write_file(self, name: str, text: str) -> None:
        """Write a file."""
        path = self._path(name)
        self._say(f"write_file {name}")
        path.write_text(text)

    async def ask_to_delete(self, names: list[str]) -> None:
        """Ask for consent to delete files; the answer comes as an `approval` event."""
        checked = [self._path(name).name for name in names]
        self._say(f"ask_to_delete {' '.join(checked)}")
        self._store("asked", _instance(), checked)

    async def delete_file(self, name: str) -> None:
        """Delete a file that a person agreed to delete."""
        if self._path(name).name not in self._load("allowed", _instance()):
            raise NonRetryableError(f"nobody agreed to delete {name}", name="NotAllowedError")
        self._say(f"delete_file {name}")
        self._path(name).unlink(missing_ok=True)

    # --- for the host ---

    def begin(self) -> None:
        """Lay out the sample files, and forget the consent given to earlier plans."""
        self._files.mkdir(parents=True, exist_ok=True)
        self._requests.mkdir(parents=True, exist_ok=True)
        for old in (*self._files.iterdir(), *self._requests.iterdir()):
            old.unlink()
        for name, text in SAMPLES.items():
            (self._files / name).write_text(text)

    def asked(self, instance_id: str) -> list[str]:
        """Return the names that the plan asked for."""
        return self._load("asked", instance_id)

    def allow(self, instance_id: str, names: list[str]) -> None:
        """Note a person's consent."""
        self._store("allowed", instance_id, names)

    def _path(self, name: str) -> Path:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
            raise NonRetryableError(f"{name!r:.100} is not the name of a file here", name="NoSuchFileError")
        return self._files / name

    def _store(self, what: str, instance_id: str, names: list[str]) -> None:
        (self._requests / f"{instance_id}.{what}.json").write_text(json.dumps(names))

    def _load(self, what: str, instance_id: str) -> list[str]:
        path = self._requests / f"{instance_id}.{what}.json"
        names: list[str] = json.loads(path.read_text()) if path.exists() else []
        return names

    @staticmethod
    def _say(what: str) -> None:
        print(f"  tool: {what}", flush=True)


def _instance() -> str:
    # What the host says of the caller; nothing that the plan says of itself.
    return current_caller.get().instance_id or ""
