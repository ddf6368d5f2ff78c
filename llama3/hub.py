"""Where a checkpoint lies: the embedded model, a folder, or a repository on the Hugging Face Hub."""

import re
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"

WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "original/tokenizer.model",
)


def locate(path: str | Path, files: tuple[str, ...] = WEIGHT_FILES + TOKENIZER_FILES) -> Path:
    """The folder of a checkpoint. `demo` is the embedded model (a folder of that name is written `./demo`); a path that is no
    folder but reads `owner/name` is fetched from the Hub: of its files, those that match `files`.

    Raises ValueError naming what was looked for and what to do.
    """
    if str(path) == "demo":
        return DEMO
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{path}: is a file; expected the folder of a checkpoint, {folder.parent}")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", str(path)):
        raise ValueError(f"{path}: no such folder; expected a folder with a checkpoint, a Hub id such as owner/name, or demo")
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
