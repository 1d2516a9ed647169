"""Settings: every one with its default and a help line, read once, frozen, secrets never shown.

An option wins over `DYNFLOW_<NAME>` in the environment, that over `<data>/dynflow.toml`, that over the
default. A secret may also be given as `DYNFLOW_<NAME>_FILE`, the path of a file that only its owner can
read.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
)

from ci_platform.errors import InvalidInputError
from ci_platform.service_settings import ServiceSettings, default_data_folder
from ci_platform.setting_types import MEBIBYTE, Duration, Hosts, Size

_PREFIX = "DYNFLOW_"


class Settings(ServiceSettings):
    """Everything that can be set. Durations are timedeltas, sizes bytes, secrets SecretStr."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    status_context: str = Field(
        "dynflow",
        min_length=1,
        max_length=100,
        description="Start of the name under which commit statuses show.",
    )
    report_for: Duration = Field(
        timedelta(days=1), description="How long an undeliverable status or comment is tried again."
    )

    max_body: Size = Field(25 * MEBIBYTE, description="Largest request body (GitHub's own cap is 25 MB).")
    max_push: Size = Field(2048 * MEBIBYTE, description="Largest pack that a git push may bring.")
    max_fetch: Size = Field(
        4096 * MEBIBYTE,
        description="What all submodules of a fork may bring together from hosts that its commit names.",
    )
    max_lfs: Size = Field(
        4096 * MEBIBYTE, description="What the files that LFS keeps of one commit may be together."
    )
    run_timeout: Duration = Field(
        timedelta(hours=6),
        description="How long a run may work without waiting; then it is stopped, timed out.",
    )
    pipeline_compute: Duration = Field(
        timedelta(seconds=30),
        description="How long a pipeline's own code may compute without waiting for anything.",
    )
    pipeline_memory: Size = Field(256 * MEBIBYTE, description="Memory that a pipeline's own code may use.")
    command_timeout: Duration = Field(
        timedelta(hours=1), description="Longest time one command may run, whatever its pipeline says."
    )
    command_memory: Size = Field(2048 * MEBIBYTE, description="Memory that one command may use.")
    command_cpu: Duration | None = Field(
        None,
        description="Time that all processors together may work for one command. Default: its timeout alone.",
    )
    command_disk: Size = Field(
        20 * 1024 * MEBIBYTE, description="Disk that one command's changes of its workspace may use."
    )
    command_files: int = Field(
        1_000_000, ge=1, description="Files and folders that one command may make or change in its workspace."
    )
    command_kept: Duration = Field(
        timedelta(hours=1),
        description="How long a command that has ended while the server was away waits for it to come back.",
    )
    command_processes: int = Field(512, ge=1, description="Processes that one command may have at once.")
    command_cpus: float | None = Field(
        None,
        gt=0,
        description="Processors that one command may use, such as 1.5. Default: all.",
    )
    max_log: Size = Field(
        64 * MEBIBYTE, description="What one step may print; the rest is dropped, and said."
    )
    concurrency: int = Field(
        default_factory=lambda: max(4, 2 * (os.cpu_count() or 1)),
        ge=1,
        description="Runs that work at the same time; others queue. Waiting runs do not count.",
    )
    concurrency_per_repository: int | None = Field(
        None,
        ge=1,
        description="The same, within one repository. Default: three quarters of it, so that one is left.",
    )
    tree_cache: Size = Field(10 * 1024 * MEBIBYTE, description="Disk that commits' files may use.")
    max_tree_files: int = Field(
        1_000_000, ge=1, description="Files and folders that a commit may have to be a workspace."
    )
    max_tree: Size = Field(
        16 * 1024 * MEBIBYTE, description="What the files of a commit may be together to be a workspace."
    )
    cache_disk: Size = Field(
        20 * 1024 * MEBIBYTE, description="Disk that the caches of all repositories may use together."
    )
    cache_repository: Size = Field(
        10 * 1024 * MEBIBYTE, description="Disk that the caches of one repository may use."
    )
    cache_floor: Size = Field(
        1024 * MEBIBYTE, description="Disk up to which a repository loses no cache to other repositories."
    )
    lazy_trees: bool = Field(
        default=True,
        description="Whether the first commands of a large commit start before its files are on disk: files are read "
        "out of git as they are asked for, and all are written meanwhile. Needs root and /dev/fuse.",
    )
    lazy_files: int = Field(5_000, ge=1, description="Files from which on a commit is large.")
    lazy_size: Size = Field(
        256 * MEBIBYTE, description="What its files have to be together to be large anyhow."
    )
    keep_failures: Duration = Field(
        timedelta(days=1),
        description="How long the files that failed commands left can be looked at: the last three of a workspace.",
    )
    retention: Duration = Field(
        timedelta(days=30), description="How long finished runs and their logs are kept."
    )
    artifact_retention: Duration = Field(
        timedelta(days=30), description="How long artifacts are kept where their pipeline says nothing."
    )
    artifact_retention_max: Duration = Field(
        timedelta(days=90),
        description="How long a pipeline may have an artifact kept. Its run is kept as long.",
    )
    max_artifacts: Size = Field(
        10 * 1024 * MEBIBYTE, description="What the artifacts of one run may be together."
    )
    max_artifact_files: int = Field(
        100_000, ge=1, description="Files that the artifacts of one run may have together."
    )
    artifact_budget: Size = Field(
        20 * 1024 * MEBIBYTE,
        description="Disk that artifacts may use; a quarter of it besides those of pull requests from forks.",
    )
    artifact_floor: Size = Field(
        1024 * MEBIBYTE, description="Disk up to which a repository loses no artifact before its time."
    )
    mirror_budget: Size = Field(
        20 * 1024 * MEBIBYTE, description="Disk that mirrors of forges' repositories may use."
    )
    lfs_budget: Size = Field(20 * 1024 * MEBIBYTE, description="Disk that files that LFS keeps may use.")
    workspace_budget: Size = Field(
        20 * 1024 * MEBIBYTE,
        description="Disk that workspaces of ended runs may use: snapshots, and what a rerun from a step needs.",
    )
    failure_budget: Size = Field(
        5 * 1024 * MEBIBYTE, description="Disk that the files of failed commands may use."
    )
    log_budget: Size = Field(10 * 1024 * MEBIBYTE, description="Disk that logs may use.")
    image_budget: Size = Field(
        20 * 1024 * MEBIBYTE, description="Disk of Docker that images may use that runs have made."
    )
    keep_recent: Duration = Field(
        timedelta(hours=1), description="What was used in this time is not collected, whatever a budget says."
    )
    keep_newest: Duration = Field(
        timedelta(days=7),
        description="How long the newest tree, ended workspace and log of each repository is not collected either.",
    )
    min_free: Size | None = Field(
        None,
        description="Disk that must be free for new runs to begin. With less they queue, and garbage is collected at "
        "once. Default: a twentieth of the disk, at most 1 GB.",
    )
    min_free_files: int | None = Field(
        None,
        ge=0,
        description="The same in files and folders (inodes). Default: a fiftieth of them, at most 100,000.",
    )

    copy_on_write: Literal["auto", "overlay", "reflink", "copy"] = Field(
        "auto", description="How workspaces are layered. auto takes the first that works here."
    )
    allow_network: bool = Field(
        default=True,
        description="Whether commands of trusted runs that ask for a network get one. "
        "In the isolate sandbox a gateway lets them out to public addresses, and says in the log whereto.",
    )
    inner_hosts: Hosts | None = Field(
        None,
        description="Hosts of your own network that commands of trusted runs may reach although their addresses are "
        "not public, such as a mirror of packages: name:port, *.domain:port, with commas between them.",
    )
    allow_forks: bool = Field(
        default=True,
        description="Whether pull requests from forks start runs. They are untrusted, and whoever may open one "
        "has code run here.",
    )
    allow_file_remotes: bool = Field(
        default=False,
        description="Whether repositories may be cloned from file:// URLs, that is from this machine.",
    )
    allow_containers: bool = Field(
        default=True, description='Whether commands may ask for sandbox="container".'
    )
    unsafe_no_isolation: bool = Field(
        default=False,
        description="Start although this machine lacks essential walls around pipelines' code: without them it may do "
        "what this user can. For machines on which every pipeline is trusted.",
    )
    container_image: str = Field(
        "dynflow/python:latest", description='Image of sandbox="container" where the pipeline names none.'
    )
    images_file: Path | None = Field(
        None,
        description="TOML file of images that pipelines may call by a short name. "
        "Default: sandbox_images/images.toml beside the platform's code, if it is there.",
    )
    push_images: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*$",
        description="Where pipelines may push images that they build, such as registry.example.org/ci: "
        "as <this>/<repository>:<tag>. Default: nowhere.",
    )
    pull_images: bool = Field(
        default=True,
        description="Whether images that are not on this machine are pulled from their registries, "
        "with what the Docker configuration of this user knows of credentials.",
    )

    @property
    def repository_share(self) -> int:
        """How many runs of one repository work at the same time."""
        return self.concurrency_per_repository or max(1, self.concurrency * 3 // 4)

    @property
    def base_url(self) -> str:
        """What links start with, without a slash at the end."""
        if self.public_url:
            return self.public_url
        host = "localhost" if self.host in {"0.0.0.0", "::", ""} else self.host  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the platform's database. May hold a password: never print it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data / 'platform.db'}"

    @property
    def engine_path(self) -> Path:
        """The engine's SQLite file."""
        return self.data / "engine.db"

    @property
    def workspaces_path(self) -> Path:
        """Folder of trees and layers."""
        return self.data / "workspaces"

    @property
    def caches_path(self) -> Path:
        """Folder of caches: on the file system of the workspaces."""
        return self.workspaces_path / ".caches"

    @property
    def artifacts_path(self) -> Path:
        """Folder of artifacts."""
        return self.data / "artifacts"

    @property
    def facets_path(self) -> Path:
        """Folder of tenants' databases, where there are any."""
        return self.data / "facets"

    @property
    def logs_path(self) -> Path:
        """Folder of command output."""
        return self.data / "logs"

    @property
    def token_path(self) -> Path:
        """File of the local administrator's token, mode 0600; the CLI on this machine reads it."""
        return self.data / "token"


def load_settings(
    options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings. `options` are the command line's; those that are None do not count.

    Raises InvalidInputError naming setting and source; values are not shown, for they may be secret.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (options or {}).items() if value is not None}
    named = {**_from_environment(environ), **given}
    data = Path(named.get("data", default_data_folder()))
    values = {**_from_file(data / "dynflow.toml"), **named}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(_explain(error)) from None


def make_data_folder(settings: Settings) -> None:
    """Make the data folder and its parts, mode 0700. Raises InvalidInputError where it cannot be made."""
    try:
        for folder in (settings.data, settings.workspaces_path, settings.logs_path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"cannot make the data folder {settings.data}: {error.strerror}") from error


def write_secret(path: Path, secret: str) -> None:
    """Write `secret` to `path` so that only the owner can read it; replaces atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)


def read_secret(path: Path) -> str:
    """Return the secret in `path`. Raises InvalidInputError if others can read it, or it is not there."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            raise InvalidInputError(f"{path} holds a secret and others can read it: chmod 600 {path}")
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the secret in {path}: {error}") from None


def _secret_names() -> set[str]:
    return {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in Settings.model_fields:
        variable = _PREFIX + name.upper()
        if variable in environ:
            found[name] = environ[variable]
        elif name in _secret_names() and f"{variable}_FILE" in environ:
            found[name] = read_secret(Path(environ[f"{variable}_FILE"]))
    return found


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}") from error
    if "data" in values:
        raise InvalidInputError(f"{path}: data cannot be set inside the data folder")
    if _secret_names() & values.keys():
        read_secret(path)  # refuses a file that others can read
    return values


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_input=False, include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "settings"
        unknown = item["type"] == "extra_forbidden"
        problems.append(f"{name}: there is no such setting" if unknown else f"{name}: {item['msg']}")
    return "; ".join(problems)
