"""Repositories whose changes start runs: registered, forked, read, deleted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from litestar import delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, Parameter

from ci_platform.git_store import GitStore
from ci_platform.repositories import Repositories, RepositoryView
from ci_platform.source import Commit, CommitInfo, Source, TreeEntry


@dataclass(frozen=True, slots=True)
class NewRepository:
    """`name` is `owner/repository`. `clone_url` is needed only where the forge's own does not do."""

    name: str
    forge: str = "local"
    default_branch: str = "main"
    clone_url: str | None = None


@dataclass(frozen=True, slots=True)
class RepositoryChange:
    """What is to change: whether it starts runs, whether nobody may push to it, what its runs may have as submodules.

    None leaves it as it is.
    """

    enabled: bool | None = None
    read_only: bool | None = None
    reads: list[str] | None = None


@dataclass(frozen=True, slots=True)
class NewFork:
    """`name` is the fork's, `owner/repository`."""

    name: str


@dataclass(frozen=True, slots=True)
class RepositoryList:
    """All repositories, by name."""

    items: list[RepositoryView]


@dataclass(frozen=True, slots=True)
class CommitList:
    """Commits, the newest first. `skip` for the next page is `next_skip`; null on the last."""

    items: list[CommitInfo]
    next_skip: int | None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the commit `sha`. `skip` for the next page is `next_skip`; null on the last."""

    sha: str
    items: list[TreeEntry]
    next_skip: int | None


_TAGS = ["repositories"]
_READ = {"scope": "read", "of_repo": True}


@get("/repos", opt={"scope": "read"}, tags=_TAGS, summary="List repositories")
async def list_repos(repositories: NamedDependency[Repositories]) -> RepositoryList:
    """Return all repositories."""
    return RepositoryList(await repositories.list())


@post("/repos", opt={"scope": "admin"}, tags=_TAGS, summary="Register a repository")
async def register_repo(
    data: JSONBody[NewRepository], repositories: NamedDependency[Repositories]
) -> RepositoryView:
    """Register a repository. The same again answers the same; 409 where the name is taken."""
    return await repositories.register(
        data.name, forge=data.forge, default_branch=data.default_branch, clone_url=data.clone_url
    )


@get("/repos/{owner:str}/{name:str}", opt=_READ, tags=_TAGS, summary="Show a repository")
async def get_repo(
    owner: FromPath[str], name: FromPath[str], repositories: NamedDependency[Repositories]
) -> RepositoryView:
    """Return a repository."""
    return await repositories.get(f"{owner}/{name}")


@patch("/repos/{owner:str}/{name:str}", opt={"scope": "admin"}, tags=_TAGS, summary="Change a repository")
async def change_repo(
    owner: FromPath[str],
    name: FromPath[str],
    data: JSONBody[RepositoryChange],
    repositories: NamedDependency[Repositories],
) -> RepositoryView:
    """Make a repository read-only or not, let it start runs or not, name the repositories that its runs may read."""
    return await repositories.change(
        f"{owner}/{name}", enabled=data.enabled, read_only=data.read_only, reads=data.reads
    )


@delete("/repos/{owner:str}/{name:str}", opt={"scope": "admin"}, tags=_TAGS, summary="Delete a repository")
async def delete_repo(
    owner: FromPath[str], name: FromPath[str], git_store: NamedDependency[GitStore]
) -> None:
    """Delete a repository with its tokens; 409 while a run of it has not ended. Its forks stay whole."""
    await git_store.delete(f"{owner}/{name}")


@post("/repos/{owner:str}/{name:str}/fork", opt={"scope": "admin"}, tags=_TAGS, summary="Fork a repository")
async def fork_repo(
    owner: FromPath[str],
    name: FromPath[str],
    data: JSONBody[NewFork],
    git_store: NamedDependency[GitStore],
) -> RepositoryView:
    """Make a repository with what this one has now. It takes milliseconds and, at first, no space."""
    return await git_store.fork(f"{owner}/{name}", data.name)


@get("/repos/{owner:str}/{name:str}/log", opt=_READ, tags=_TAGS, summary="List commits")
async def read_commits(
    owner: FromPath[str],
    name: FromPath[str],
    repositories: NamedDependency[Repositories],
    source: NamedDependency[Source],
    ref: FromQuery[str | None] = None,
    limit: Annotated[int, Parameter(ge=1, le=100)] = 50,
    skip: Annotated[int, Parameter(ge=0, le=10_000)] = 0,
) -> CommitList:
    """Return the commits that a branch, tag or commit leads to; without `ref`, the default branch."""
    repo = (await repositories.get(f"{owner}/{name}")).name
    found = await source.log(repo, ref or await source.default_branch(repo), limit=limit, skip=skip)
    return CommitList(found, skip + limit if len(found) == limit else None)


@get("/repos/{owner:str}/{name:str}/commits/{sha:str}", opt=_READ, tags=_TAGS, summary="Read a commit")
async def read_commit(
    owner: FromPath[str],
    name: FromPath[str],
    sha: FromPath[str],
    repositories: NamedDependency[Repositories],
    source: NamedDependency[Source],
) -> Commit:
    """Return a whole commit."""
    return await source.read_commit((await repositories.get(f"{owner}/{name}")).name, sha)


@get("/repos/{owner:str}/{name:str}/tree", opt=_READ, tags=_TAGS, summary="List a folder of a commit")
async def read_tree(  # noqa: PLR0917 - called by name
    owner: FromPath[str],
    name: FromPath[str],
    repositories: NamedDependency[Repositories],
    source: NamedDependency[Source],
    ref: FromQuery[str | None] = None,
    path: FromQuery[str] = "",
    limit: Annotated[int, Parameter(ge=1, le=5000)] = 1000,
    skip: Annotated[int, Parameter(ge=0, le=1 << 30)] = 0,
) -> Folder:
    """Return what a folder holds; without `ref`, at the default branch."""
    repo = (await repositories.get(f"{owner}/{name}")).name
    sha = await source.resolve(repo, ref or await source.default_branch(repo))
    found = await source.read_tree(repo, sha, path, limit=limit, skip=skip)
    return Folder(sha, found, skip + limit if len(found) == limit else None)
