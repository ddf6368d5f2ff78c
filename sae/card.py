"""The model card of an SAE on the Hub: what it reads, what was measured, and how to use it here and elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from core.artifact import open_artifact
from llama3.hub import REPOSITORY
from sae.formats.plain import name_of
from sae.formats.sites import model_name
from sae.model import SAE

FIGURES = ("fvu", "l0", "dead_fraction", "ce_recovered", "ce_recovered_mean", "kl")
"""Of an evaluation, those that a card shows."""
TRAINING = ("training_rows", "training_tokens", "training_steps", "dtype", "max_length")
ADOPTED = ("source", "revision", "text", "norm", "bias", "fvu", "l0", "ce_recovered")


@dataclass(frozen=True)
class Subject:
    """The SAE that a card is about, and where it is to lie."""

    sae: SAE
    address: str
    """owner/name, or owner/name:folder."""
    licence: str = ""
    evaluation: Mapping[str, Any] | None = None
    """The content of evaluation.json; None where it was not evaluated."""


def read_evaluation(folder: Path, sae: SAE) -> dict[str, Any]:
    """The figures of a folder of sae.evaluate. ValueError where they are another SAE's."""
    artifact = open_artifact(folder, "evaluation")
    found = artifact.manifest.provenance.get("sae_hash")
    if found != sae.weights_hash:
        raise ValueError(f"--evaluation {folder}: of another SAE: its weights' hash is {found}, here it is {sae.weights_hash}")
    figures: dict[str, Any] = json.loads(artifact.file("evaluation.json").read_text(encoding="utf-8"))
    return figures


def card(subject: Subject) -> str:
    """The text of README.md, with the header that the Hub reads."""
    cfg, facts = subject.sae.cfg, subject.sae.cfg.provenance
    model = str(model_name(facts.get("model")) or "a Llama")
    header = ModelCardData(
        library_name="llama3-sae",
        tags=["sparse-autoencoder", "sae", "mechanistic-interpretability", "llama"],
        license=subject.licence or None,
        base_model=model if REPOSITORY.fullmatch(model) else None,
    )
    rows = {
        "model": model, "model hash": facts.get("model_hash"), "site": facts.get("site"),
        "architecture": f"{cfg.architecture}, k {cfg.k}" if subject.sae.sets_k else cfg.architecture,
        "width": f"{cfg.d_model}, {cfg.n_latents:,} latents", "rows before the encoder": _norm(subject.sae),
        "BOS": facts.get("bos"), "rows left out": _left_out(facts),
        "weights' hash": subject.sae.weights_hash,
        **{name.replace("_", " "): facts.get(name) for name in TRAINING},
    }  # fmt: skip
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# A sparse autoencoder of {model}, {facts.get('site') or 'site not recorded'}",
        _table(rows),
        _adopted(facts.get("adopted") or {}),
        _measured(subject.evaluation),
        _use(subject, model),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _norm(sae: SAE) -> str:
    if sae.cfg.norm == "dataset":
        return f"times {sae.cfg.scale:.6g}"
    return {"layer": "each normalised by its own mean and standard deviation", "none": "as they are"}[sae.cfg.norm]


def _left_out(facts: Mapping[str, Any]) -> str | None:
    return f"those of a norm above {facts['max_norm']:g} (attention sinks)" if facts.get("max_norm") else None


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _adopted(how: Mapping[str, Any]) -> str:
    """Where an SAE comes from that was trained elsewhere."""
    if not how:
        return ""
    told = {name.replace("_", " "): how.get(name) for name in ADOPTED}
    return (
        "## Where it comes from\n\nTrained elsewhere. `python -m sae.adopt` read its files, ran the model over "
        f"{how.get('sentences')} sentences and took the reading that fits best:\n\n{_table(told)}"
    )


def _measured(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "## Measured\n\nNo evaluation came with it: `python -m sae.evaluate` measures it."
    shown = {name: figures[name] for name in FIGURES if name in figures}
    lines = [f"| {name} | {_cell(one['value'])} | {_cell(one['definition'])} |" for name, one in shown.items()]
    conditions = next(iter(shown.values()))["conditions"]
    table = "\n".join(["| figure | value | definition |", "|---|---|---|", *lines])
    return f"## Measured\n\n{table}\n\nUnder these conditions:\n\n{_table(conditions)}"


def _use(subject: Subject, model: str) -> str:
    """How to load it, in three libraries. It holds code that runs as it stands, but for the model's access."""
    address, site = subject.address, str(subject.sae.cfg.provenance.get("site") or "")
    ours = (
        f"```python\nimport sae\n\nautoencoder = sae.load({address!r})\n"
        "latents = autoencoder.encode(x)     # x: rows of the site, [..., width]; values and indices of the active latents\n"
        "x_hat = autoencoder(x)\n```"
    )
    parts = [f"## How to use it\n\nWith llama3-sae:\n\n{ours}"]
    parts.append(f"Every stage takes it once it lies in a folder: `python -m sae.pull {address} --out sae/`.")
    if _in_saelens(subject.sae):
        parts.append(
            f"With SAELens, after `python -m sae.convert --sae {address} --to saelens --out exported/`:\n\n"
            '```python\nfrom sae_lens import SAE\n\nautoencoder = SAE.load_from_disk("exported")\n```'
        )
    layer = site.removeprefix("layers.").removesuffix(".resid_post")
    if layer.isdecimal() and REPOSITORY.fullmatch(model):
        parts.append(
            "With transformers: the site is what a decoder layer returns, so a forward hook replaces it by its reconstruction:"
            "\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({model!r})\n"
            f"hook = model.model.layers[{layer}].register_forward_hook(lambda module, args, output: autoencoder(output))\n```"
        )
    return "\n\n".join(parts)


def _in_saelens(sae: SAE) -> bool:
    try:
        return bool(name_of("saelens", sae.cfg))
    except ValueError:
        return False
