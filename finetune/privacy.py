"""What must not leave this machine in a text: tokens and keys, local paths, the host's name."""

from __future__ import annotations

import netrc
import os
import re
import socket
import tempfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from finetune.files import cache_dir

REMOVED = "[removed]"
_SHORTEST_SECRET = 8
_SECRET_NAME = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# The forms that services give their tokens: Hugging Face, Weights & Biases, GitHub, GitLab, AWS, Slack.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)
# OpenAI's, and those of all that took its form: letters alone, a uuid and words with hyphens are keys of some service.
# Only a name that is known to be public is none (acme/sk-wikipedia-instructions).
_SK_KEY = re.compile(r"(?<![A-Za-z0-9])sk-[\w-]{20,}")
_SK_NAME = re.compile(r"(?<![A-Za-z0-9])sk-[\w-]+")
# What commands and files append to a name: -merged, -merged-f16, -q8_0.
_APPENDED = re.compile(r"(?:-[a-z][a-z0-9_]{1,6}){0,2}")
_ASSIGNED = re.compile(
    r"(?i)\b(\w*(?:api_?key|access_token|auth_token|hf_token|secret|password)\b[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]{8,}"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{8,}=*")
_IN_URL = re.compile(r"(://)[^/\s:@]+:[^/\s@]+@")
_END = r"[^\s'\"`<>|()\[\]{},;:]*"
_LOCAL = re.compile(
    r"(?<![\w.:/~-])/(?:home|Users|root|mnt|scratch|workspace|work|data|srv|tmp|var|opt|content|kaggle)/" + _END
)
_WINDOWS = re.compile(r"\b[A-Za-z]:\\Users\\" + _END)


def redact(text: str, *, keep: Collection[str] = ()) -> str:
    """`text` without secrets; local paths cut to their last part, the host's name removed.

    Words of `keep` (names that are meant to be public) stay even where the host is called the same, or where they look
    like a key. For text of others: a host may be called like a word of ours.
    """
    text = redact_secrets(text, keep=keep)
    for host in _hosts():
        if not any(host in word for word in keep):
            text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", REMOVED, text)
    return text


def redact_secrets(text: str, *, keep: Collection[str] = ()) -> str:
    """`text` without secrets, names of `keep` aside that look like a key; local paths cut to their last part."""
    for secret in known_secrets():
        text = text.replace(secret, REMOVED)
    text = _TOKEN.sub(REMOVED, text)
    text = _SK_KEY.sub(lambda match: match.group() if _is_public(match.group(), keep) else REMOVED, text)
    text = _ASSIGNED.sub(lambda match: match.group(1) + REMOVED, text)
    text = _BEARER.sub(lambda match: match.group(1) + REMOVED, text)
    text = _IN_URL.sub(r"\1", text)
    text = _local_paths().sub(lambda match: PurePosixPath(match.group()).name, text)
    text = _LOCAL.sub(lambda match: PurePosixPath(match.group()).name, text)
    return _WINDOWS.sub(lambda match: match.group().rpartition("\\")[2], text)


def holds_secret(text: str, *, keep: Collection[str] = ()) -> bool:
    """Whether a token or key stands in `text`: one of this machine's, or one of a form that services use.

    Names of `keep` that look like a key are none.
    """
    keys = _SK_KEY.findall(text)
    return (
        _TOKEN.search(text) is not None
        or any(not _is_public(key, keep) for key in keys)
        or any(secret in text for secret in known_secrets())
    )


def _is_public(key: str, names: Collection[str]) -> bool:
    """Whether what looks like a key is a part of a public name, or of a name made from it."""
    parts = (part for name in names for part in _SK_NAME.findall(name))
    return any(key.startswith(part) and _APPENDED.fullmatch(key.removeprefix(part)) for part in parts)


def holds_local_path(text: str) -> bool:
    """Whether a path of this machine, or one that looks like a user's, stands in `text`."""
    return any(pattern.search(text) for pattern in (_local_paths(), _LOCAL, _WINDOWS))


def known_secrets() -> list[str]:
    """The secrets that this process can see: environment, the Hub's login, .netrc; the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    found |= _netrc_passwords() | _hub_token()
    secrets = {value.strip() for value in found}
    # A path or a plain word in such a variable (HF_TOKEN_PATH, "disabled") is no secret.
    return sorted(
        (one for one in secrets if len(one) >= _SHORTEST_SECRET and not one.startswith("/") and re.search(r"\d", one)),
        key=len,
        reverse=True,
    )


def _hub_token() -> set[str]:
    from huggingface_hub import get_token

    token = get_token()
    return {token} if token else set()


def _netrc_passwords() -> set[str]:
    try:
        return {row[2] for row in netrc.netrc().hosts.values() if row[2]}
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return set()


def _local_paths() -> re.Pattern[str]:
    roots = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), cache_dir()}
    roots |= {root.resolve() for root in roots}
    texts = sorted((str(root) for root in roots if len(root.parts) > 1), key=len, reverse=True)
    either = "|".join(re.escape(text) for text in texts)
    return re.compile(rf"(?<![\w.:/~-])(?:{either})(?![\w-]){_END}" if either else r"(?!)")


def _hosts() -> list[str]:
    names = {socket.gethostname(), os.environ.get("HOSTNAME", "")}
    names |= {name.partition(".")[0] for name in names}
    return sorted((name for name in names if len(name) > 3 and name != "localhost"), key=len, reverse=True)
