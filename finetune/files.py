"""Writing files so that a kill at any instant leaves the old state or the new one, never half of it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import BadInputError, first_line

MANIFEST = "manifest.json"

# What `write_atomic` and `new_directory` call their temporary files (tempfile's own eight letters), and directories
# that were about to replace another.
_UNFINISHED = re.compile(r"\..+\.(tmp-)?[a-z0-9_]{8}|\..+-new")


def cache_dir() -> Path:
    """Where converted models and tokenized data are kept: `$FINETUNE_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("FINETUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finetune"


def fsync_path(path: Path) -> None:
    """Force a file's or directory's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all; a link stays, what it names is replaced.

    A device, a pipe or an open descriptor is written to as it stands.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with naming(path), path.open("ab", buffering=0) as stream:
            rest = memoryview(data)
            while rest:
                rest = rest[stream.write(rest) :]
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _is_stream(path: Path) -> bool:
    """Whether nothing may be renamed over `path`: a device, a pipe, or an open descriptor, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return True
    while path.is_symlink():
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / path.readlink()
    return False


def require_own(path: Path, option: str, mark: re.Pattern[bytes], *, streams: bool = True) -> None:
    """Whether a command may write `path`: nothing is lost there but an earlier output, which opens as `mark` says.

    A device or pipe may be written unless `streams` is false: what is not written by `write_atomic` would replace it.

    Raises:
        BadInputError: another file stands there; `option` is what named it.
    """
    if _is_stream(path):
        if streams:
            return
        raise BadInputError(f"{option} {path}: is a device or pipe; name a file")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    if path.is_dir():
        raise BadInputError(f"{option} {path}: is a directory; name a file in it")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if mark.match(content):
                return
    except (OSError, ValueError):  # not readable, or emptied meanwhile
        pass
    raise BadInputError(
        f"{option} {path}: exists, and is no earlier output of this command; name another file, or remove that one"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` say which file could not be written: that of a write or a flush does not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it is synced and becomes `path`, else it is removed.

    Raises:
        FileExistsError: if `path` exists when the work is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync_path(file)
        fsync_path(temporary)
        os.chmod(temporary, 0o755)
        if path.exists():
            raise FileExistsError(path)
        os.rename(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_text(content: dict[str, Any]) -> str:
    """`content` as a manifest, with its own hash."""
    return json.dumps({**content, "sha256": _manifest_hash(content)}, indent=2) + "\n"


def read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, whose `files` are as `damage_of` takes them; or nothing of it, and why."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest["files"].items()
    except FileNotFoundError:
        return {}, f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f"its {MANIFEST} cannot be read"
    if manifest.get("sha256", _manifest_hash(manifest)) != _manifest_hash(manifest):
        return {}, f"its {MANIFEST} does not match its own hash"
    return manifest, None


def _manifest_hash(content: dict[str, Any]) -> str:
    """The hash of a manifest's other keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damage_of(folder: Path, files: Mapping[str, Mapping[str, Any]], *, hashes: bool = True) -> str | None:
    """Why `folder` no longer holds `files` (name to `bytes` and `sha256`) as written; None if it does."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if hashes and sha256_file(file) != expected["sha256"]:
            return f"{name} does not match its hash"
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; wait for another process as long as it takes.

    The system drops the lock when its holder dies, so nobody waits for the dead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_failure(error: BaseException) -> str:
    """Why a write failed: the system's words, where they are behind what a library raised, else its first line."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        # safetensors and tokenizers are written in Rust, whose errors are words alone.
        if match := re.search(r"\(os error (\d+)\)", str(current)):
            return os.strerror(int(match[1]))
        current = current.__cause__ or current.__context__
    return first_line(error)


def recover_directory(folder: Path, spare: tuple[str, ...] = ()) -> None:
    """Put right what processes left in `folder` that were killed while they wrote there.

    Nobody else may write to it, but for names that begin with one of `spare`.

    A directory that was being replaced by `replace_directory` and is gone comes back; unfinished files and directories
    of `write_atomic` and `new_directory` go.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(".") or path.name.startswith(spare):
            continue
        if path.name.endswith(".old") and path.is_dir():
            target = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
            if not target.exists():
                os.rename(path, target)
                continue
        elif not _UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_directory(source: Path, target: Path) -> None:
    """Make `source` become `target`; what stood there is gone only when the new one stands.

    A kill between the two renames leaves `.target.old`, which `recover_directory` puts back.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def sole_owner(path: Path) -> Iterator[None]:
    """Hold `path` as a lock that says who holds it; dropped by the system when the process dies.

    Raises:
        BlockingIOError: if another process holds it; the message is what that process wrote: its pid and host.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(file.read().strip()) from None
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            # Its owner has removed it since it was opened, and a third process could own another of that name.
            raise BlockingIOError("a process that has just ended")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
