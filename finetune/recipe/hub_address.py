"""Adapters on the Hub, as the command line and recipes name them (hf://ORG/NAME[@REVISION]), and their files here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import BadInputError
from finetune.hub_client import HubClient

HUB_SCHEME = "hf://"
# A repository's files in the Hub's cache: organisation, name, commit.
# Source: huggingface_hub, "Manage your cache": models--ORG--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$")
# What an adapter's repository holds; a merged model or a GGUF file beside it is not fetched.
_ADAPTER_FILES = ("adapter_*", "*.json", "*.yaml", "*.jinja", "*.model", "*.txt", "README.md")
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def parse_address(address: str) -> tuple[str, str | None]:
    """The repository and the revision, if one is named.

    Raises:
        BadInputError: it is no such address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise BadInputError(f"{address}: write it as hf://ORG/NAME, or hf://ORG/NAME@REVISION")
    return match.group(1), match.group(2)


def resolve_repo(
    address: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = _ADAPTER_FILES,
) -> Path:
    """The local folder of `hf://ORG/NAME[@REVISION]`, its adapter's files downloaded into the Hub's cache.

    Raises:
        BadInputError: the address is malformed.
        FinetuneError: there is no such repository or revision, no access, or no network and nothing cached.
    """
    repo_id, revision = parse_address(address)
    from huggingface_hub import snapshot_download

    client = HubClient(endpoint=endpoint, token=token)

    def download() -> str:
        return snapshot_download(
            repo_id, revision=revision, endpoint=endpoint, token=token, allow_patterns=list(patterns), max_workers=4
        )

    return Path(client.call(repo_id, download))
