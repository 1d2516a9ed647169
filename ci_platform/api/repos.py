"""Repositories whose changes start runs."""

from __future__ import annotations

from dataclasses import dataclass

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from ci_platform.repositories import Repositories, RepositoryView


@dataclass(frozen=True, slots=True)
class NewRepository:
    """`name` is `owner/repository`. `clone_url` is needed only where the forge's own does not do."""

    name: str
    forge: str = "local"
    default_branch: str = "main"
    clone_url: str | None = None


@dataclass(frozen=True, slots=True)
class RepositoryList:
    """All repositories, by name."""

    items: list[RepositoryView]


@get("/repos", opt={"scope": "read"}, tags=["repositories"], summary="List repositories")
async def list_repos(repositories: NamedDependency[Repositories]) -> RepositoryList:
    """Return all repositories."""
    return RepositoryList(await repositories.list())


@post("/repos", opt={"scope": "admin"}, tags=["repositories"], summary="Register a repository")
async def register_repo(
    data: JSONBody[NewRepository], repositories: NamedDependency[Repositories]
) -> RepositoryView:
    """Register a repository. The same again answers the same; 409 where the name is taken."""
    return await repositories.register(
        data.name, forge=data.forge, default_branch=data.default_branch, clone_url=data.clone_url
    )
