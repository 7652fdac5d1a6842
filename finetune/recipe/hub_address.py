"""Adapters on the Hub, as the command line and recipes name them: hf://ORG/NAME[@REVISION]."""

from __future__ import annotations

import re

from finetune.errors import BadInputError

HUB_SCHEME = "hf://"
# A repository's files in the Hub's cache: organisation, name, commit.
# Source: huggingface_hub, "Manage your cache": models--ORG--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$")
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
