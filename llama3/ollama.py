"""Models that Ollama has pulled: `ollama:llama3.2:1b` is a GGUF file among its blobs, which a manifest names."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.text import read_json

REGISTRY, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
"""What Ollama takes for the parts of a name that are not given."""
MODEL = "application/vnd.ollama.image.model"
ADAPTER = "application/vnd.ollama.image.adapter"
SERVICE = Path("/usr/share/ollama/.ollama/models")
"""Where Linux keeps the models of the service that Ollama's installer sets up."""


def find_ollama(name: str) -> Path:
    """The GGUF file of the model that Ollama calls `name`, `[[host/]namespace/]model[:tag]`.

    ValueError, naming the models that are there, where it is not.
    """
    folders = _folders()
    parts = _parts(name)
    for folder in folders:
        manifest = folder.joinpath("manifests", *parts)
        if manifest.is_file():
            return _blob(name, folder, manifest)
    there = sorted({shown for folder in folders for shown in _names(folder)})
    listed = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    raise ValueError(
        f"ollama:{name}: not in {' or '.join(map(str, folders))}, which holds {listed or 'no model'}; get it with "
        f"`ollama pull {name}`, or set OLLAMA_MODELS to the folder where Ollama keeps its models"
    )


def _folders() -> list[Path]:
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path("~/.ollama/models").expanduser(), *([SERVICE] if SERVICE.is_dir() else [])]


def _parts(name: str) -> list[str]:
    """Host, namespace, model and tag."""
    path, _, tag = name.partition(":")
    parts = [*(REGISTRY, NAMESPACE)[: max(0, 3 - len(path.split("/")))], *path.split("/"), tag or TAG]
    if len(parts) != 4 or not all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", part) for part in parts):
        raise ValueError(f"ollama:{name}: is no name of Ollama's; expected one like ollama:llama3.2:1b")
    return parts


def _names(folder: Path) -> Iterator[str]:
    """The models of `folder`, as Ollama lists them."""
    for manifest in folder.glob("manifests/*/*/*/*"):
        host, namespace, model, tag = manifest.relative_to(folder / "manifests").parts
        hidden = [REGISTRY, NAMESPACE] if namespace == NAMESPACE else [REGISTRY]
        parts = [host, namespace, model]
        yield "/".join(parts[len(hidden) :] if parts[: len(hidden)] == hidden else parts) + f":{tag}"


def _blob(name: str, folder: Path, manifest: Path) -> Path:
    layers = _layers(manifest)
    if any(layer.get("mediaType") == ADAPTER for layer in layers):
        raise ValueError(f"ollama:{name}: is a model with an adapter, which is not supported; merge them before")
    models = [layer for layer in layers if layer.get("mediaType") == MODEL]
    digest = str(models[0].get("digest")) if len(models) == 1 else ""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ValueError(f"{manifest}: expected one layer of type {MODEL} with its SHA-256; give `ollama pull {name}` again")
    blob, size = folder / "blobs" / digest.replace(":", "-"), models[0].get("size")
    found = blob.stat().st_size if blob.is_file() else None
    if found is None or found != size:
        there = "is not there" if found is None else f"has {found:,} bytes"
        raise ValueError(f"ollama:{name}: its file {blob} {there}, expected {size} bytes; give `ollama pull {name}` again")
    return blob


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        found = read_json(manifest)["layers"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not all(isinstance(layer, dict) for layer in found):
        raise ValueError(f"{manifest}: expected Ollama's manifest of a model, a JSON object with layers; it is damaged")
    return found
