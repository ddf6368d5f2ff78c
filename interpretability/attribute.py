"""Which features cause the next token: attribution to every active feature of a prompt, and ablation of the strongest.

    python -m interpretability.attribute --model demo --sae demo/sae --top demo/top --explanations demo/explanations \\
        --prompt "He said that he did not go to the war, because the king" --answer " had" --baseline " is" --out attribution/

With --answer and --baseline the difference of their logits is attributed; with --answer alone its logit
minus the mean of all; with neither the whole next-token distribution (KL). Attribution is gradient x
decoder row x activation, of all features in one pass forward and back; what the SAE does not explain
stays in place. Then each of the strongest features is set to 0 and the model run again, which says what
it does in truth. Several SAEs at several sites go together: --sae A B --top A B.

Writes attribution.html (a page), attribution.json, attribution.md, attribution.png, and
attributions.parquet with every active feature at every position.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core.artifact import Artifact, building, open_artifact
from core.cli import StageConfig, run_stage
from core.files import Content
from core.runtime import Runtime
from interpretability.causal.ablation import ablated
from interpretability.causal.attribution import Attribution, attribute
from interpretability.causal.attribution_page import page
from interpretability.causal.attribution_report import Found, Known, as_plot, as_table, contents, node_rows, strongest
from interpretability.causal.objectives import Divergence, LogitDifference, Objective
from interpretability.causal.records import ATTRIBUTION_FILE, NODES_FILE, NODES_SCHEMA
from interpretability.opening import check_sae, open_explanations_of, open_top_of
from interpretability.pages.page import json_text
from interpretability.records import Explanation, parquet_bytes
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.model import load

log = logging.getLogger("interpretability.attribute")


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(StageConfig):
    """Flags of `python -m interpretability.attribute`."""

    model: str
    """The model: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    sae: tuple[Path, ...]
    """Folder of an SAE of this model; several, at the same site or at several, are attributed together."""
    top: tuple[Path, ...] = ()
    """Top sentences of each SAE, in the order of --sae, for the page. None: features without sentences."""
    explanations: tuple[Path, ...] = ()
    """Explanations of each SAE, in the same order. None: features go by number."""
    prompt: str
    """Text whose next token is looked at."""
    answer: str = ""
    """The next token that is asked about, with its space: " sad". Empty: the whole next-token distribution."""
    baseline: str = ""
    """The token that it is compared with. Empty: the mean of all logits."""
    n: int = 20
    """Features that are set to 0, those of the largest attribution."""
    ablate: Literal["position", "everywhere"] = "position"
    """Where: a feature at the one position where it was attributed, or at all positions of the prompt."""
    rows: int = 32
    """Prompts in a batch of the ablation."""
    out: Path
    """Folder to write."""

    def __post_init__(self) -> None:
        if not self.sae:
            raise ValueError("--sae: give at least one")
        for name, given in (("top", self.top), ("explanations", self.explanations)):
            if given and len(given) != len(self.sae):
                raise ValueError(f"--{name}: expected one for each of {len(self.sae)} --sae, or none; found {len(given)}")
        if self.baseline and not self.answer:
            raise ValueError("--baseline: there is no --answer to compare it with; give --answer too")
        if self.n < 1 or self.rows < 2:
            raise ValueError(f"--n must be at least 1 and --rows at least 2; found {self.n} and {self.rows}")


class Opened(NamedTuple):
    """What the flags name, known to belong together."""

    model: Transformer
    tokenizer: Tokenizer
    known: list[Known]
    artifacts: list[Artifact]


def run(config: AttributeConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `attribution`."""
    opened = open_inputs(config, runtime.device)
    ids = prompt_ids(opened, config.prompt)
    objective = objective_of(config, opened.tokenizer)
    saes = [known.sae for known in opened.known]
    # Before the folder is begun: a prompt on which nothing is active leaves none behind.
    attribution = attribute(opened.model, saes, ids, objective, opened.tokenizer.bos_policy)
    provenance: dict[str, Any] = {
        "model": str(saes[0].cfg.provenance.get("model", "")),
        "model_hash": opened.model.weights_hash,
        "tokenizer_hash": opened.tokenizer.hash,
        "bos": opened.tokenizer.bos_policy,
        "sites": [sae.site for sae in saes],
        "sae_hashes": [sae.weights_hash for sae in saes],
    }
    with building(config.out, "attribution", config, runtime, opened.artifacts, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        names = [ATTRIBUTION_FILE, NODES_FILE, "attribution.md", "attribution.png", "attribution.html"]
        counts: Mapping[str, int] = {}
        if runtime.is_main:
            found = measure(config, opened, ids, objective, attribution)
            record = contents(found, config.prompt, provenance["model"])
            html = page(record, found)
            written: list[Content] = [json_text(record).encode(), parquet_bytes(NODES_SCHEMA, [node_rows(found)])]
            written += [as_table(record).encode(), as_plot(record), html.encode()]
            for name, content in zip(names, written, strict=True):
                builder.publish(name, content)
            counts = {"active": len(found.attribution.nodes.latent), "ablated": len(found.groups)}
            log.info("%s: %s", config.out, in_a_line(record))
        builder.finish(names if runtime.is_main else [], counts)
    log.info("%s: the page", config.out / "attribution.html")


def open_inputs(config: AttributeConfig, device: torch.device) -> Opened:
    """Load what the flags name; ValueError where a part is missing or does not belong to the others."""
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device=device).eval().requires_grad_(False)
    known, artifacts = [], []
    for path, top_path, explained_path in zip_longest(config.sae, config.top, config.explanations):
        sae = load(path, device)
        check_sae(sae, path, model, tokenizer)
        artifacts.append(open_artifact(path, "sae"))
        top = open_top_of(sae, top_path) if top_path else None
        explanations: Mapping[int, Explanation] = open_explanations_of(sae, explained_path) if explained_path else {}
        artifacts += [top.artifact] if top else []
        artifacts += [open_artifact(explained_path, "explanations")] if explained_path else []
        known.append(Known(sae, top, explanations))
    return Opened(model, tokenizer, known, artifacts)


def prompt_ids(opened: Opened, prompt: str) -> Tensor:
    """(T,) token ids of the prompt, as the model met texts in training; ValueError where they do not fit its context."""
    ids, context = opened.tokenizer.encode_prompt(prompt), opened.model.params.max_seq_len
    if not prompt.strip():
        raise ValueError("--prompt is empty; give the text whose next token is asked about")
    if len(ids) > context:
        raise ValueError(f"--prompt has {len(ids):,} tokens, but the context holds {context:,}; shorten it")
    return torch.tensor(ids, device=opened.model.device)


def objective_of(config: AttributeConfig, tokenizer: Tokenizer) -> Objective:
    """What the flags ask for; ValueError where an answer is not one token."""
    if not config.answer:
        return Divergence()
    baseline = one_token("--baseline", config.baseline, tokenizer) if config.baseline else None
    answer = one_token("--answer", config.answer, tokenizer)
    if answer == baseline:
        raise ValueError(f"--baseline {config.baseline!r} is --answer itself: their difference is always 0; give another token")
    return LogitDifference(answer, baseline)


def one_token(flag: str, text: str, tokenizer: Tokenizer) -> int:
    """The id of a text that is one token; ValueError names the tokens where it is several."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        pieces = ", ".join(repr(piece) for piece in tokenizer.pieces(ids))
        raise ValueError(f"{flag} {text!r}: expected one token, found {len(ids)} ({pieces}); give the first, or another word")
    return ids[0]


def measure(config: AttributeConfig, opened: Opened, ids: Tensor, objective: Objective, attribution: Attribution) -> Found:
    """Take the strongest features out."""
    saes = [known.sae for known in opened.known]
    groups = strongest(attribution.nodes, config.n, config.ablate == "everywhere")
    cuts = [group.cut(attribution.nodes, saes) for group in groups]
    effects = ablated(opened.model, ids, cuts, objective, config.rows)
    return Found(opened.known, opened.tokenizer, ids.tolist(), objective, attribution, groups, effects.tolist(), config.ablate)


def in_a_line(record: Mapping[str, Any]) -> str:
    """What was found, for the log."""
    rho = record["spearman"]
    agree = "too few to compare" if rho is None else f"rank agreement with attribution (Spearman) {rho:.2f}"
    return f"{record['active']:,} active features, {len(record['features'])} set to 0: {agree}"


if __name__ == "__main__":
    run_stage(AttributeConfig, run, __doc__ or "")
