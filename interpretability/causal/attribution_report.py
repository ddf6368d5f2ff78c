"""What an attribution found, as records, as a table and as a plot.

Shapes: T tokens, H nodes (active latents at positions).
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from interpretability.causal.ablation import Cut
from interpretability.causal.agreement import spearman
from interpretability.causal.attribution import Attribution, Nodes, by_latent
from interpretability.causal.objectives import LogitDifference, Objective
from interpretability.causal.records import NODES_SCHEMA
from interpretability.records import Explanation, TopSentences, title_of
from llama3 import Tokenizer
from sae.model import SAE

NEXT_TOKENS = 10
SHOWN_LABEL = 44
MAX_WIDTH = 40.0
"""Of the plot, in inches."""


class Known(NamedTuple):
    """An SAE and what is known of its latents."""

    sae: SAE
    top: TopSentences | None
    explanations: Mapping[int, Explanation]


class Group(NamedTuple):
    """Nodes of one latent that are taken out together."""

    sae: int
    latent: int
    places: torch.Tensor
    """int64, their places in the nodes."""
    attribution: float
    """Of all of them."""

    def cut(self, nodes: Nodes, saes: Sequence[SAE]) -> Cut:
        return Cut(saes[self.sae], nodes.take(self.places))


@dataclass(frozen=True)
class Found:
    """One prompt, attributed, and its strongest features taken out."""

    known: list[Known]
    tokenizer: Tokenizer
    ids: list[int]
    objective: Objective
    attribution: Attribution
    groups: list[Group]
    effects: list[float]
    """Of each group, measured."""
    where: str
    """`position` or `everywhere`."""


def strongest(nodes: Nodes, n: int, everywhere: bool) -> list[Group]:
    """The `n` groups of the largest attribution, whichever its sign: single nodes, or all nodes of a latent."""
    if everywhere:
        groups = [Group(*key, places, float(nodes.effect[places].sum())) for key, places in by_latent(nodes).items()]
    else:
        columns = (nodes.sae.tolist(), nodes.latent.tolist(), nodes.effect.tolist())
        rows = enumerate(zip(*columns, strict=True))
        groups = [Group(sae, latent, torch.tensor([place]), effect) for place, (sae, latent, effect) in rows]
    return sorted(groups, key=lambda group: -abs(group.attribution))[:n]


def contents(found: Found, prompt: str, model: str) -> dict[str, Any]:
    """`attribution.json`: all that was found, but for the nodes themselves."""
    nodes, pieces = found.attribution.nodes, found.tokenizer.pieces(found.ids)
    predicted = [group.attribution for group in found.groups]
    return {
        "model": model,
        "prompt": prompt,
        "tokens": pieces,
        "objective": _objective(found),
        "next": _next_tokens(found),
        "ablated": found.where,
        "active": len(nodes.latent),
        "spearman": spearman(np.array(predicted), np.array(found.effects)),
        "saes": [_sae(found, number) for number in range(len(found.known))],
        "features": [_feature(found, group, effect, pieces) for group, effect in zip(found.groups, found.effects, strict=True)],
        "grid": _grid(found),
    }


def _objective(found: Found) -> dict[str, Any]:
    objective, decode = found.objective, found.tokenizer.decode
    if not isinstance(objective, LogitDifference):
        return {"kind": "distribution", "unit": "nats"}
    baseline = objective.baseline
    return {
        "kind": "mean" if baseline is None else "tokens",
        "unit": "logits",
        "answer": decode([objective.answer]),
        "baseline": None if baseline is None else decode([baseline]),
        "value": float(objective.scores(found.attribution.logits[None])[0]),
    }


def _next_tokens(found: Found) -> list[dict[str, Any]]:
    """The likeliest next tokens, and those that were asked about, with probability and rank from 1."""
    chances = found.attribution.logits.softmax(0)
    ids = chances.topk(min(NEXT_TOKENS, len(chances))).indices.tolist()
    if isinstance(found.objective, LogitDifference):
        ids += [i for i in (found.objective.answer, found.objective.baseline) if i is not None and i not in ids]
    return [
        {
            "token": found.tokenizer.decode([i]),
            "probability": float(chances[i]),
            "rank": 1 + int((chances > chances[i]).sum()),
        }
        for i in ids
    ]


def _sae(found: Found, number: int) -> dict[str, Any]:
    """Where an SAE was read, and by position what the objective owes to its features and to its error."""
    attribution, sae = found.attribution, found.known[number].sae
    own = attribution.nodes.sae == number
    by_position = torch.zeros(len(found.ids), dtype=torch.float64, device=own.device)
    by_position.index_add_(0, attribution.nodes.position[own], attribution.nodes.effect[own])
    return {
        "site": sae.site,
        "sae_hash": sae.weights_hash,
        "active": int(own.sum()),
        "used": attribution.used[number].tolist(),
        "features": by_position.tolist(),
        "error": attribution.errors[number].tolist(),
    }


def _feature(found: Found, group: Group, effect: float, pieces: Sequence[str]) -> dict[str, Any]:
    nodes, known = found.attribution.nodes.take(group.places), found.known[group.sae]
    return {
        "sae": group.sae,
        "site": known.sae.site,
        "latent": group.latent,
        "title": title_of(known.explanations.get(group.latent)),
        "positions": nodes.position.tolist(),
        "tokens": [pieces[p] for p in nodes.position.tolist()],
        "activations": nodes.activation.tolist(),
        "attributions": nodes.effect.tolist(),
        "attribution": group.attribution,
        "effect": effect,
    }


def _grid(found: Found) -> list[dict[str, Any]]:
    """Of each latent that was taken out, the strongest first: all of its nodes, whether they were taken out or not."""
    nodes, places = found.attribution.nodes, by_latent(found.attribution.nodes)
    rows = []
    for sae, latent in dict.fromkeys((group.sae, group.latent) for group in found.groups):
        own = nodes.take(places[sae, latent])
        rows.append(
            {
                "sae": sae,
                "latent": latent,
                "title": title_of(found.known[sae].explanations.get(latent)),
                "positions": own.position.tolist(),
                "activations": own.activation.tolist(),
                "attributions": own.effect.tolist(),
            }
        )
    return rows


def node_rows(found: Found) -> pa.Table:
    """The rows of `attributions.parquet`."""
    nodes = Nodes(*(column.cpu() for column in found.attribution.nodes))
    pieces, sites = found.tokenizer.pieces(found.ids), [known.sae.site for known in found.known]
    columns = {
        "sae": nodes.sae.int().numpy(),
        "site": [sites[i] for i in nodes.sae.tolist()],
        "latent": nodes.latent.int().numpy(),
        "position": nodes.position.int().numpy(),
        "token": [pieces[p] for p in nodes.position.tolist()],
        "activation": nodes.activation.float().numpy(),
        "attribution": nodes.effect.numpy(),
    }
    return pa.table(columns, schema=NODES_SCHEMA)


def asked(record: Mapping[str, Any]) -> str:
    """What was attributed, in words."""
    objective = record["objective"]
    if objective["kind"] == "distribution":
        return "how far the next-token distribution moves (KL, nats)"
    against = "the mean of all logits" if objective["baseline"] is None else f"that of {objective['baseline']!r}"
    return f"the logit of {objective['answer']!r} minus {against}"


def as_table(record: Mapping[str, Any]) -> str:
    """The record in Markdown: the prompt, and a line for each feature that was taken out."""
    rho = record["spearman"]
    agree = "" if rho is None else f" Spearman of both columns: {rho:.3f}."
    where = "at its position" if record["ablated"] == "position" else "at all positions"
    prompt = _cell(record["prompt"])
    lines = [
        f"# What causes the next token of {prompt!r}\n",
        f"Attributed: {asked(record)}. `attribution` is the first-order prediction of what is lost when the feature is taken "
        f"out, `ablation` what is lost when it is set to 0 {where} and the model is run again.{agree}\n",
        "| site | latent | label | token | activation | attribution | ablation |\n" + "|---" * 7 + "|",
    ]
    for row in record["features"]:
        peak = max(range(len(row["positions"])), key=lambda i: row["activations"][i])
        token = f"`{_cell(row['tokens'][peak])}` at {row['positions'][peak]}"
        numbers = f"{row['activations'][peak]:.3g} | {row['attribution']:+.4f} | {row['effect']:+.4f}"
        lines.append(f"| {row['site']} | {row['latent']} | {_cell(row['title'])} | {token} | {numbers} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "↵")


def as_plot(record: Mapping[str, Any]) -> bytes:
    """Tokens by features, coloured by attribution, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, used = record["grid"], np.flatnonzero(np.any([sae["used"] for sae in record["saes"]], axis=0))
    grid = np.zeros((len(rows), len(record["tokens"])))
    for line, row in zip(grid, rows, strict=True):
        line[row["positions"]] = row["attributions"]
    grid, tokens = grid[:, used], [record["tokens"][position] for position in used]
    width = min(MAX_WIDTH, 4.5 + 0.34 * len(tokens))
    figure = Figure(figsize=(width, 1.9 + 0.26 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    limit = float(np.abs(grid).max()) or 1.0
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    # No mathematics in labels: "$" is a character of the text.
    axis.set_yticks(range(len(rows)), [f"{row['title'][:SHOWN_LABEL]} #{row['latent']}" for row in rows], parse_math=False)
    names = [token.strip().replace("\n", "↵") for token in tokens]
    axis.set_xticks(range(len(tokens)), names, rotation=60, ha="right", parse_math=False)
    axis.set_title(f"Attribution: {asked(record)}", parse_math=False)
    figure.colorbar(image, ax=axis, shrink=0.8)
    picture = io.BytesIO()
    with warnings.catch_warnings():  # a character that no installed font has is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
