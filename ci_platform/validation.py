"""Load a folder's pipeline in an isolate, without running it, and say what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ci_platform import isolation
from ci_platform.assembly import make_loader
from ci_platform.pipeline_code import FOLDER, MAIN_MODULE, PIPELINE_CLASS, module_of
from ci_platform.settings import load_settings
from dynflow.errors import IsolateLimitError, WorkerLoadError
from dynflow.isolates import WorkerCode

# Runs inside the isolate, beside the pipeline: importing it is what a run does first.
_CHECKER = f"{FOLDER}/dynflow_validation.py"
_CHECK = f"""
import inspect
import {Path(MAIN_MODULE).stem} as pipeline_module
from dynflow.workflow import WorkflowEntrypoint

def check():
    pipeline = getattr(pipeline_module, {PIPELINE_CLASS!r}, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, WorkflowEntrypoint)):
        return "there is no class {PIPELINE_CLASS}(WorkflowEntrypoint)"
    if pipeline.run is WorkflowEntrypoint.run:
        return "{PIPELINE_CLASS} has no method run(self, event, step)"
    if not inspect.iscoroutinefunction(pipeline.run):
        return "{PIPELINE_CLASS}.run has to be an async function"
    if len(inspect.signature(pipeline.run).parameters) != 3:
        return "{PIPELINE_CLASS}.run has to take (self, event, step)"
    return None
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where; `line` is None where it is the file as a whole."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


async def validate_folder(folder: Path) -> Problem | None:
    """Return the first problem of the pipeline in `folder`, None if a run could start it."""
    if not (folder / MAIN_MODULE).is_file():
        return Problem(MAIN_MODULE, None, "there is no such file")
    try:
        modules = {
            path.relative_to(folder).as_posix(): module_of(path.name, path.read_bytes())
            for path in sorted((folder / FOLDER).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
    except UnicodeDecodeError as error:
        return Problem(FOLDER, None, f"a file is not UTF-8: {error}")
    return await _check(modules)


async def _check(modules: dict[str, str | bytes]) -> Problem | None:
    code = WorkerCode(_CHECKER, {**modules, _CHECKER: _CHECK})
    settings = load_settings()
    async with isolation.opened(make_loader(settings), settings) as loader:
        try:
            message = await loader.get("validate", lambda: code).get_entrypoint().call("check")
        except WorkerLoadError as error:
            return Problem(error.file or MAIN_MODULE, error.line, error.message)
        except IsolateLimitError as error:
            return Problem(MAIN_MODULE, None, f"loading it went over a limit: {error}")
    return None if message is None else Problem(MAIN_MODULE, None, str(message))
