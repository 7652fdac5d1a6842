"""What the base model's publisher asks for: licence, gate, revision; and whether the Hub lets us push."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune.export.hub_publish import check_push
from finetune.export.model_card_licence import find_licences
from finetune.findings import Finding, error, fact, warning
from finetune.hub_client import HubClient
from finetune.recipe.schema import Recipe


def _check_terms(recipe: Recipe) -> Iterator[Finding]:
    """Of a hub model from the Hub, where it can be reached; of others from what lies beside them."""
    name = recipe.model.name
    if name.startswith("package://") or name.endswith(".gguf") or name.startswith(("/", ".", "~")):
        licence = find_licences(recipe, None, None).base
        yield fact("licence", f"licence of the base: {licence or 'not stated beside it'}", licence=licence)
        return
    info = _hub_info(recipe)
    if info is None:
        yield fact("licence", f"{name}: the Hub cannot be reached, so licence and access are not known")
        return
    licence = getattr(getattr(info, "card_data", None), "license", None)
    gated = bool(getattr(info, "gated", False))
    yield fact(
        "licence",
        f"{name}: licence {licence or 'not stated'}, {'gated' if gated else 'not gated'}, revision {info.sha}",
        licence=licence,
        gated=gated,
        revision=info.sha,
    )
    if gated:
        from huggingface_hub import get_token

        if get_token() is None:
            yield error("licence", f"{name} is gated: accept its terms on the Hub, then run: hf auth login")
    if recipe.model.revision is None:
        yield warning("licence", f"model.revision is not set; {info.sha} pins what is there now")


def _hub_info(recipe: Recipe) -> Any:
    client = HubClient()
    return client.quiet(lambda: client.api.model_info(recipe.model.name, revision=recipe.model.revision))


def _check_push(recipe: Recipe) -> Iterator[Finding]:
    if recipe.hub.push:
        access = check_push(recipe.hub, recipe.run_path)
        yield fact("push", f"{access.user} may write to {recipe.hub.repo_id}")


CHECKS: dict[str, Callable[[Recipe], Iterator[Finding]]] = {"licence": _check_terms, "push": _check_push}
