"""A run's directory to a repository on the Hub: its files, a model card, one commit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import say, warn
from finetune.errors import BadInputError
from finetune.export.hub import Access, Pushed, check_access, push
from finetune.export.hub_contents import Contents, Kind, collect
from finetune.export.model_card import add_card
from finetune.export.model_card_licence import find_licences
from finetune.hub_client import HubClient
from finetune.recipe.schema import HubSection

_WHAT: dict[Kind, str] = {
    "adapter": "the adapter",
    "merged": "the merged model",
    "gguf": "a GGUF file",
    "gguf-lora": "the adapter as a GGUF file",
}


@dataclass(frozen=True)
class PushOptions:
    """What `finetune push` can be told."""

    merged: bool = False
    gguf: Path | None = None
    public: bool = False
    overwrite: bool = False
    message: str | None = None

    def command(self, run: str | Path, repo_id: str) -> str:
        """The command line that does the same again."""
        parts = ["finetune", "push", str(run), repo_id]
        parts += ["--merged"] if self.merged else []
        parts += ["--gguf", str(self.gguf)] if self.gguf else []
        parts += ["--public"] if self.public else []
        parts += ["--overwrite"] if self.overwrite else []
        parts += ["--message", self.message] if self.message else []
        return shlex.join(parts)


def plan_push(run: str | Path, repo_id: str | None, options: PushOptions) -> tuple[str, Contents]:
    """The repository and what a push would hold, its card included; asks no server.

    Raises:
        BadInputError: there is nothing to push, no name to push it to, or a file holds a token.
    """
    contents = collect(run, merged=options.merged, gguf=options.gguf)
    name = _require_repo(repo_id or contents.original.hub.repo_id, run)
    base_id = contents.base.name if contents.base.on_hub else None
    add_card(contents, name, find_licences(contents.original, base_id, None))
    return name, contents


def push_run(
    run: str | Path,
    repo_id: str | None = None,
    options: PushOptions | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish a run's adapter, merged model or GGUF file with a model card, in one commit.

    `repo_id` is the recipe's `hub.repo_id` where it is None.

    Raises:
        BadInputError: nothing to push, a malformed name, other content there, or a token in a file.
        FinetuneError: the Hub refuses or cannot be reached; everything local is kept.
    """
    options = options or PushOptions()
    contents = collect(run, merged=options.merged, gguf=options.gguf)
    name = _require_repo(repo_id or contents.original.hub.repo_id, run)
    again = options.command(run, name)
    for warning in contents.warnings:
        warn(warning)
    access = check_access(name, endpoint=endpoint, token=token, next_command=again)
    client = HubClient(endpoint=endpoint, token=token)
    base_id = contents.base.name if contents.base.on_hub else None
    add_card(contents, name, find_licences(contents.original, base_id, lambda *about: _licence(client, *about)))
    sizes = contents.sizes()
    say(f"pushing {_WHAT[contents.kind]}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, to {name}")
    return push(
        contents.files,
        name,
        public=options.public,
        overwrite=options.overwrite,
        message=options.message or f"Push {_WHAT[contents.kind]} of {contents.recipe.name}",
        access=access,
        endpoint=endpoint,
        token=token,
        next_command=again,
    )


def check_push(hub: HubSection, run: Path) -> Access:
    """Before a run that is to push at its end: may we write there? Warns where the push would be refused.

    Raises:
        BadInputError: the repository is public, and the recipe says private.
        FinetuneError: no login, no permission, or no network.
    """
    repo_id = _require_repo(hub.repo_id, run)
    later = f"the same command again, or with hub.push=false, and after it: finetune push {run} {repo_id}"
    access = check_access(repo_id, next_command=later)
    if access.exists and hub.private and not access.private:
        raise BadInputError(
            f"hub.repo_id: {repo_id} is public, and hub.private is true; set hub.private: false to publish there, "
            "or name another repository"
        )
    say(f"the Hub: {access.user} may write to {repo_id}")
    if access.files:
        warn(
            f"{repo_id} already holds {len(access.files)} files; unless they are this run's, the push at the end is "
            f"refused, and finetune push {run} {repo_id} --overwrite replaces them"
        )
    return access


def push_recipe(hub: HubSection, run: Path) -> Pushed:
    """Push a finished run's adapter as its recipe says.

    Raises:
        FinetuneError: as `push_run`; the run's directory is kept as it is.
    """
    return push_run(run, hub.repo_id, PushOptions(public=not hub.private))


def _require_repo(repo_id: str | None, run: str | Path) -> str:
    if repo_id is None:
        raise BadInputError(f"where to? Give ORG/NAME (finetune push {run} ORG/NAME), or set hub.repo_id in the recipe")
    return repo_id


def _licence(client: HubClient, repo_id: str, kind: str) -> str | None:
    def ask() -> Any:
        return client.api.dataset_info(repo_id) if kind == "dataset" else client.api.model_info(repo_id)

    info = client.quiet(ask)
    stated = getattr(getattr(info, "card_data", None), "license", None)
    return stated if isinstance(stated, str) else None
