"""What the causal stages write and others read.

A folder of kind `attribution` holds `attribution.json` (the prompt, what was attributed, the features
taken out), `attributions.parquet`, a row for each active latent and position, and views of both. A
folder of kind `steerability` holds `steerability.parquet`, a row a latent. `suite.jsonl`, beside this
module, holds prompts with a known middle step.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.artifact import check_provenance, open_artifact
from core.tables import read_table

ATTRIBUTION_FILE = "attribution.json"
NODES_FILE = "attributions.parquet"
STEERABILITY_FILE = "steerability.parquet"
NODES_SCHEMA = pa.schema(
    {
        "sae": pa.int32(),
        "site": pa.string(),
        "latent": pa.int32(),
        "position": pa.int32(),
        "token": pa.string(),
        "activation": pa.float32(),
        "attribution": pa.float64(),
    }
)
STEERABILITY_SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "output_score": pa.float32(),
        "output_rise": pa.float32(),
        "confidence_change": pa.float32(),
    }
)
MEASURES = tuple(STEERABILITY_SCHEMA.names[1:])
"""Of steerability. Search ranks by the first, `Steerability.order`."""


class SuitePrompt(NamedTuple):
    """A prompt that the model continues right, and the step in between that it must take."""

    kind: str
    """facts, emotions, agreement, lists or code."""
    prompt: str
    answer: str
    """The next token."""
    baseline: str
    """A token of the same kind that would be wrong."""
    intermediate: tuple[str, ...]
    """Words that name the middle step, in lower case: what the label of a feature in between may hold."""


def read_suite() -> list[SuitePrompt]:
    """The prompts of `suite.jsonl`, which SmolLM2-135M continues right."""
    lines = resources.files(__package__).joinpath("suite.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [SuitePrompt(**json.loads(line)) for line in lines]
    return [row._replace(intermediate=tuple(row.intermediate)) for row in rows]


def read_attribution(path: Path) -> dict[str, Any]:
    """What interpretability.attribute found; ValueError where the folder is damaged or of another kind."""
    file = open_artifact(Path(path), "attribution").file(ATTRIBUTION_FILE)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Steerability:
    """What each latent does to the next token when it is turned up; see interpretability.causal.turned_up.

    Each array has an entry a latent.
    """

    output_score: npt.NDArray[np.float32]
    output_rise: npt.NDArray[np.float32]
    confidence_change: npt.NDArray[np.float32]

    def of(self, latent: int) -> dict[str, float]:
        """The measures of one latent, by name."""
        return {name: float(getattr(self, name)[latent]) for name in MEASURES}

    def order(self) -> list[int]:
        """All latents, the largest output score first, of equals the lowest latent."""
        found: list[int] = np.argsort(-self.output_score, kind="stable").tolist()
        return found


def read_steerability(path: Path, sae_hash: str) -> Steerability:
    """A folder of interpretability.steerability; ValueError, with both values, where it is not of the SAE `sae_hash`."""
    artifact = open_artifact(Path(path), "steerability")
    check_provenance(f"steerability {path}", {"sae_hash": sae_hash}, artifact.manifest.provenance, ["sae_hash"])
    table = read_table(artifact.file(STEERABILITY_FILE))
    return Steerability(*(table[name].to_numpy() for name in MEASURES))


class SteeredFeature(NamedTuple):
    """What inference.steering_eval measured of one latent, at its best strength and on all prompts."""

    latent: int
    effects: dict[str, float]
    """By measure: steered minus random directions of the same length."""


STEERING_MEASURES = ("firing", "promoted", "follows", "next_token", "words")


def read_steered(path: Path, sae_hash: str) -> list[SteeredFeature]:
    """The latents of a folder of inference.steering_eval that have a best strength.

    ValueError where it was measured on another SAE, or lacks what that stage writes.
    """
    artifact = open_artifact(Path(path), "steering")
    check_provenance(f"steering {path}", {"sae_hash": sae_hash}, artifact.manifest.provenance, ["sae_hash"])
    best = json.loads(artifact.file("best_strengths.json").read_text(encoding="utf-8"))
    found = []
    with artifact.file("steering.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["prompts"] == "all" and best.get(str(row["latent"])) == round(row["strength"], 3):
                effects = {name: row["steered"][name] - row["random"][name] for name in STEERING_MEASURES}
                found.append(SteeredFeature(row["latent"], effects))
    return found
