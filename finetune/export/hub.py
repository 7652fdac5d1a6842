"""Pushing to the Hub: access is tried before anything is sent, a push is one commit, a failure keeps everything.

Private unless asked otherwise; a repository with other content is only replaced when that is asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import BadInputError, FinetuneError
from finetune.files import sha256_file
from finetune.hub_client import HubClient, http_status

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
# Written by the Hub itself when it creates a repository.
_OF_THE_HUB = {".gitattributes"}
_WRITING_ROLES = ("admin", "write", "contributor")
_SHOWN_FILES = 4


@dataclass(frozen=True)
class Access:
    """What the account may write to, found out without sending anything."""

    repo_id: str
    user: str
    exists: bool
    private: bool = True
    head: str | None = None
    """The newest commit of an existing repository."""
    files: tuple[str, ...] = ()
    """The files of an existing repository, less those of the Hub's own."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    commit: str
    num_bytes: int
    changed: bool
    """False where the repository already held exactly this."""


def check_access(
    repo_id: str, *, endpoint: str | None = None, token: str | None = None, next_command: str | None = None
) -> Access:
    """Who we are on the Hub and that we may write to `repo_id`, or create it; nothing is sent or created.

    Raises:
        BadInputError: `repo_id` is not of the form ORG/NAME.
        FinetuneError: no or a wrong token, no permission, or the Hub cannot be reached.
    """
    return _check_access(HubClient(endpoint=endpoint, token=token, next_command=next_command), repo_id)


def push(
    files: dict[str, Path | bytes],
    repo_id: str,
    *,
    public: bool = False,
    overwrite: bool = False,
    message: str = "Push with finetune",
    access: Access | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    next_command: str | None = None,
) -> Pushed:
    """Make `files` (path in the repository to a local file or its bytes) the content of `repo_id`, in one commit.

    The repository is created if it is absent, private unless `public`. Pushing the same content again does nothing.
    `access` is what `check_access` has just returned; without it access is tried first.

    Raises:
        BadInputError: `repo_id` is malformed, holds other content and `overwrite` is not set, or is public
            while `public` is not set.
        FinetuneError: the Hub refuses or cannot be reached, after retries where they can help.
    """
    client = HubClient(endpoint=endpoint, token=token, next_command=next_command)
    access = access or _check_access(client, repo_id)
    client.user = access.user
    if access.exists and not access.private and not public:
        raise BadInputError(f"{repo_id} is public; add --public to publish there, or push to another repository")
    if not access.exists:
        _create(client, repo_id, private=not public)
    plan = _Plan(client, repo_id, files, overwrite=overwrite, message=message)
    commit, changed = client.call(repo_id, plan.commit)
    if access.exists and access.private and public:
        client.call(repo_id, lambda: client.api.update_repo_settings(repo_id, private=False))
    num_bytes = sum(_size(content) for content in files.values())
    return Pushed(f"{client.api.endpoint}/{repo_id}", commit, num_bytes, changed)


def _check_access(client: HubClient, repo_id: str) -> Access:
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _REPO_ID.fullmatch(repo_id):
        raise BadInputError(f"{repo_id}: a repository is named ORG/NAME, such as my-org/my-adapter")
    who = client.call(repo_id, client.api.whoami)
    client.user = who["name"]
    try:
        info = client.call(repo_id, lambda: client.api.model_info(repo_id))
    except FinetuneError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        _require_namespace(client, who, repo_id)
        return Access(repo_id, who["name"], exists=False)
    _require_write(client, who, repo_id)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    held = tuple(sorted(name for name in names if name not in _OF_THE_HUB))
    return Access(repo_id, who["name"], exists=True, private=bool(info.private), head=info.sha, files=held)


def _require_write(client: HubClient, who: dict[str, Any], repo_id: str) -> None:
    """Ask the Hub itself; a mirror that does not know the question leaves it to the account's roles."""
    try:
        client.call(repo_id, lambda: client.api.auth_check(repo_id, write=True))
    except FinetuneError as error:
        cause = error.__cause__
        if cause is None or http_status(cause) not in (404, 405, 501):
            raise
        _require_namespace(client, who, repo_id)


def _require_namespace(client: HubClient, who: dict[str, Any], repo_id: str) -> None:
    """Whether the account and its token may create or write in the repository's namespace.

    Raises:
        FinetuneError: they may not.
    """
    namespace = repo_id.split("/")[0]
    login = "use a token with write permission: hf auth login, or HF_TOKEN"
    orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs") or ()}
    mine = [who["name"], *(name for name, role in orgs.items() if role in (None, *_WRITING_ROLES))]
    token = (who.get("auth") or {}).get("accessToken") or {}
    if namespace not in mine:
        why = f"it may only read in {namespace}" if namespace in orgs else f"it is no member of {namespace}"
        reason = f"{who['name']} may not write to {repo_id}: {why}; push to one of: {', '.join(sorted(mine))}"
    elif token.get("role") == "read":
        reason = f"the token of {who['name']} may only read; {login}"
    elif token.get("role") == "fineGrained" and not _is_granted(token.get("fineGrained"), namespace, repo_id):
        reason = f"the token of {who['name']} has no right to write in {namespace}; {login}"
    else:
        return
    raise client.refusal(reason)


def _is_granted(grants: dict[str, Any] | None, namespace: str, repo_id: str) -> bool:
    if grants is None:
        return True
    scopes = grants.get("scoped") or ()
    return any(
        scope.get("entity", {}).get("name") in (namespace, repo_id) and "repo.write" in scope.get("permissions", ())
        for scope in scopes
    )


def _create(client: HubClient, repo_id: str, *, private: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    attempts = 0

    def create() -> None:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            # The answer to the first attempt may have been lost after the repository was made.
            try:
                client.api.model_info(repo_id)
                return
            except RepositoryNotFoundError:
                pass
        client.api.create_repo(repo_id, private=private)

    client.call(repo_id, create)


class _Plan:
    """One commit that makes a repository hold `files`; looks anew before every attempt."""

    def __init__(
        self, client: HubClient, repo_id: str, files: dict[str, Path | bytes], *, overwrite: bool, message: str
    ) -> None:
        self._client, self._repo_id, self._message, self._overwrite = client, repo_id, message, overwrite
        self._files = files
        self._hashes: dict[tuple[str, bool], str] = {}

    def commit(self) -> tuple[str, bool]:
        """The commit that holds the files, and whether it had to be made.

        Raises:
            BadInputError: the repository holds other content, and may not be overwritten.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = self._client.api
        head = api.model_info(self._repo_id).sha
        assert head is not None
        remote = self._remote(head)
        others = sorted(name for name in remote if name not in self._files or not self._is_same(name, remote[name]))
        if not others and remote.keys() == self._files.keys():
            return head, False  # also where the answer to an earlier attempt was lost
        if others and not self._overwrite:
            raise BadInputError(self._refusal(others))
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(self._files.items())
        ]
        operations += [CommitOperationDelete(name, is_folder=False) for name in others if name not in self._files]
        done = api.create_commit(
            self._repo_id, operations, commit_message=self._message, parent_commit=head, num_threads=2
        )
        return done.oid, True

    def _remote(self, head: str) -> dict[str, Any]:
        tree = self._client.api.list_repo_tree(self._repo_id, recursive=True, revision=head)
        return {entry.path: entry for entry in tree if hasattr(entry, "size") and entry.path not in _OF_THE_HUB}

    def _is_same(self, name: str, remote: Any) -> bool:
        content = self._files[name]
        if remote.size != _size(content):
            return False
        is_lfs = remote.lfs is not None
        if (name, is_lfs) not in self._hashes:
            self._hashes[name, is_lfs] = _sha256(content) if is_lfs else _git_blob(content)
        return bool(self._hashes[name, is_lfs] == (remote.lfs.sha256 if is_lfs else remote.blob_id))

    def _refusal(self, others: Sequence[str]) -> str:
        more = f" and {len(others) - _SHOWN_FILES} more" if len(others) > _SHOWN_FILES else ""
        return (
            f"{self._repo_id} already holds other content ({', '.join(others[:_SHOWN_FILES])}{more}); "
            "add --overwrite to replace all of it (its history keeps it), or push to another repository"
        )


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


def _git_blob(content: Path | bytes) -> str:
    """Git's name for a file's content; only small files are stored so."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
