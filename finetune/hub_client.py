"""Talking to the Hub: every call with a time limit, retried where that can help, its failure said in words."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from finetune import __version__
from finetune.console import console, say
from finetune.errors import FinetuneError
from finetune.privacy import redact

T = TypeVar("T")

# Seconds before the second, third and fourth attempt.
WAITS = (1.0, 4.0, 16.0)
# Longest silence of the server in seconds; the Hub's client alone would wait for ever.
TIMEOUT_SECONDS = 120.0
# What another attempt can mend.
TRANSIENT = (408, 429, 500, 502, 503, 504)


class HubClient:
    """The Hub's API with time limits, retries and errors that say what to do."""

    def __init__(
        self, *, endpoint: str | None = None, token: str | None = None, next_command: str | None = None
    ) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

        # The client logs every failed attempt with its address, which may be signed; `call` says it in words.
        logging.set_verbosity_error()
        if not console.is_terminal:
            disable_progress_bars()
        else:
            enable_progress_bars()  # whatever loaded the model has switched them off
        self.api = HfApi(endpoint=endpoint, token=token, library_name="finetune", library_version=__version__)
        self.user: str | None = None
        self._next = next_command

    def call(self, repo_id: str, action: Callable[[], T]) -> T:
        """The result of `action`, tried again after a cut connection, a time-out, 429 or 5xx.

        Raises:
            FinetuneError: it failed for good; the message says what to do.
        """
        for wait in (*WAITS, None):
            try:
                return self._once(action)
            except FinetuneError:
                raise
            except Exception as error:  # transports, the client's own kinds and plain OSErrors alike
                if wait is None or not _is_transient(error):
                    raise self.explain(repo_id, error) from error
                say(f"the Hub: {_reason(error)}; trying again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("unreachable")

    def quiet(self, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None where it fails: for what is nice to know."""
        try:
            return self._once(action)
        except Exception:
            return None

    def explain(self, repo_id: str, error: BaseException) -> FinetuneError:
        """The error for users: what the Hub said, what that means here, what to do and to run next."""
        if any(type(one).__name__ == "LocalTokenNotFoundError" for one in _causes(error)):
            return self.refusal(f"{repo_id}: not logged in to the Hub; log in (hf auth login), or set HF_TOKEN")
        status = http_status(error)
        said = f"the Hub answered {status}" if status else _reason(error)
        if status in _ADVICE:
            org, user = repo_id.split("/")[0], self.user or "this account"
            advice = f": {_ADVICE[status].format(repo=repo_id, org=org, user=user)}"
        elif _is_transient(error):
            advice = f": {_TRY_LATER}"
        else:
            advice = f" ({_words(error)})" if status else ""
        return self.refusal(redact(f"{repo_id}: {said}{advice}", keep=repo_id.split("/")))

    def refusal(self, reason: str) -> FinetuneError:
        """An error for users that ends with the command to run next."""
        then = f"\n  Everything is kept here. Next: {self._next}" if self._next else ""
        return FinetuneError(reason + then)

    def _once(self, action: Callable[[], T]) -> T:
        from huggingface_hub import get_session

        # The session is remade after a failed connection, so the limit is set each time.
        get_session().timeout = TIMEOUT_SECONDS
        return action()


_TRY_LATER = "check the network and HF_ENDPOINT, and try again later"
_ADVICE = {
    401: "the token was not accepted for {repo}; log in with one that may write: hf auth login, or set HF_TOKEN",
    402: "{org} has no room or no plan for {repo}; free some storage, or push to another namespace",
    403: "{user} may not write to {repo}; use a token with write permission for {org} (hf auth login, or HF_TOKEN), "
    "or push to a namespace of your own",
    404: "there is no {repo}, or {user} may not see it; check the name and that {org} exists",
    409: "{repo} is being changed by someone else, or the name is taken; look at it, then push again",
    412: "{repo} was changed while this push was under way; look at the new commit, then push again",
    413: "a file is too large for {repo}",
}


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind `error`, however deep it is wrapped; None where the server said nothing."""
    for one in _causes(error):
        code = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(code, int):
            return code
    return None


def _is_transport(error: BaseException) -> bool:
    # By name: the client moved from httpx to a library of its own with the same classes.
    return any(base.__name__ == "TransportError" for one in _causes(error) for base in type(one).__mro__)


def _is_transient(error: BaseException) -> bool:
    status = http_status(error)
    if status is not None:
        return status in TRANSIENT
    # A proxy's error page instead of the Hub's JSON is no status to the client.
    return _is_transport(error) or isinstance(error, json.JSONDecodeError)


def _reason(error: BaseException) -> str:
    status = http_status(error)
    if status is not None:
        return f"it answered {status}"
    if any(type(one).__name__ == "LocalEntryNotFoundError" for one in _causes(error)) and _is_offline(error):
        return "it is not in this machine's cache, and HF_HUB_OFFLINE is set; unset it, or give a local directory"
    for one in _causes(error):
        if any(base.__name__ == "TransportError" for base in type(one).__mro__):
            return f"no answer ({type(one).__name__})"
    return "HF_HUB_OFFLINE is set, so nothing can be sent" if _is_offline(error) else _words(error)


def _is_offline(error: BaseException) -> bool:
    return any(type(one).__name__ == "OfflineModeIsEnabled" for one in _causes(error))


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # What follows a `?` in an address may be a signature.
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", " ".join(lines[:3]))
