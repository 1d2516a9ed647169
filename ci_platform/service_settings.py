"""Settings of what the platform is among other services: its address and data, its engine and its forge."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SecretStr, field_validator

from ci_platform.setting_types import Duration


def default_data_folder() -> Path:
    """Return `$XDG_DATA_HOME/dynflow`, or `~/.local/share/dynflow`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "share") / "dynflow"


class ServiceSettings(BaseModel):
    """The first part of `Settings`."""

    data: Path = Field(
        default_factory=default_data_folder,
        description="Folder of everything that must survive: databases, repositories, workspaces, logs.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 listens on all.")
    port: int = Field(8420, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    public_url: str | None = Field(
        None,
        description="URL under which people and forges reach this server. Default: http://<host>:<port>.",
    )
    public_read: bool = Field(
        default=False, description="Whether anybody may look at runs, logs and artifacts without a token."
    )
    database_url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL of the platform's database, such as postgresql+psycopg://user@host/name. "
        "Default: SQLite in the data folder.",
    )

    engine: Literal["embedded", "temporal"] = Field(
        "embedded",
        description="What keeps runs: embedded is a file in the data folder, temporal a Temporal server.",
    )
    temporal_address: str = Field("localhost:7233", description="Where the Temporal server is: host:port.")
    temporal_namespace: str = Field(
        "default", min_length=1, description="Namespace of the Temporal server in which runs are kept."
    )
    temporal_task_queue: str = Field(
        "dynflow",
        min_length=1,
        max_length=100,
        description="Task queue in Temporal. Each data folder needs one of its own in a namespace.",
    )
    temporal_tls: bool | None = Field(
        None,
        description="Whether the connection to Temporal is encrypted. "
        "Default: where an API key or a certificate is given.",
    )
    temporal_tls_ca: Path | None = Field(
        None,
        description="PEM file of the authority that signed the Temporal server's certificate. "
        "Default: those that this machine trusts.",
    )
    temporal_tls_cert: Path | None = Field(
        None, description="PEM file of the certificate by which Temporal knows this client."
    )
    temporal_tls_key: Path | None = Field(None, description="PEM file of that certificate's key.")
    temporal_tls_server_name: str | None = Field(
        None, description="Name in the Temporal server's certificate. Default: the host of its address."
    )
    temporal_api_key: SecretStr | None = Field(
        None, description="API key for Temporal, such as Temporal Cloud's. It is sent over TLS only."
    )

    github_url: str = Field(
        "https://github.com",
        description="Where repositories of GitHub are cloned from: <url>/<owner>/<repo>.git.",
    )
    github_api_url: str = Field("https://api.github.com", description="Base URL of GitHub's API.")
    github_token: SecretStr | None = Field(None, description="Token for GitHub's API and for fetching.")
    github_webhook_secret: SecretStr | None = Field(
        None, description="Secret that GitHub signs deliveries with. Without it no delivery is accepted."
    )
    github_timeout: Duration = Field(
        timedelta(seconds=15), description="How long one call to GitHub may take."
    )

    @field_validator("data")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - resolve() would follow links

    @field_validator("public_url", "github_url", "github_api_url")
    @classmethod
    def _no_slash(cls, value: str | None) -> str | None:
        return value.rstrip("/") if value else value
