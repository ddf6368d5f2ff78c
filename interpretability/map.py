"""A map of the features: UMAP of the decoder rows, in one HTML file that needs no server and no network.

    python -m interpretability.map --sae run/sae --top top/ --explanations explanations/ --out map/
    python -m interpretability.report ... --map map/

Features that write in similar directions lie close together; hovering shows a label, clicking opens the feature in the report.
The report takes a copy beside itself with `--map`; the page in `map/` links to `../report/report.html`. UMAP (McInnes et al.
2018) comes with the extra `viz`. Latents that never fire are left out.

Shapes: M latents on the map, D model width.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from core.artifact import building, open_artifact
from core.cli import StageConfig, run_stage
from core.norms import unit_rows
from core.runtime import Runtime
from interpretability.labels.first import shown_first
from interpretability.opening import open_explanations_of, open_top_of
from interpretability.pages.page import json_text, render
from interpretability.pages.report_features import short, short_or_none
from interpretability.records import Explanation, TopSentences, title_of
from sae.model import load

MAP_FILE, DATA_FILE = "map.html", "map.json"
N_COLOURS = 12
LABELS_COMPARED = 10
KINDS = {
    "word": "a word", "start": "beginning of a word", "end": "end of a word", "inside": "piece of a word", "form": "a spelling",
    "after_word": "a word after another", "before_word": "a word before another", "after": "anything after a word",
    "before": "anything before a word", "kind": "names, numbers, years", "first_word": "a word that begins a sentence",
    "first": "first word", "last": "last word",
}  # fmt: skip
"""What the kinds of `patterns.py` are called in the legend."""
LEAST_SHARE = 0.3
"""Share of a latent's top sentences that must carry one label for the latent to be given it."""

log = logging.getLogger("interpretability.map")


@dataclass(frozen=True, kw_only=True)
class MapConfig(StageConfig):
    """Flags of `python -m interpretability.map`."""

    sae: Path
    """Folder of the SAE (`run/sae`)."""
    top: Path
    """Its top sentences: which latents fire, how often, and on sentences of which label."""
    explanations: Path
    """Explanations of its latents."""
    out: Path
    """Folder to write."""
    neighbours: int = 15
    """Neighbours that UMAP keeps together: few show small groups, many the whole."""
    min_dist: float = 0.1
    """Least distance of points on the map, 0 to 1: small values pack groups tightly."""

    def __post_init__(self) -> None:
        if self.neighbours < 2 or not 0 <= self.min_dist <= 1:
            raise ValueError(
                f"--neighbours must be at least 2 and --min-dist from 0 to 1; found {self.neighbours} and {self.min_dist}"
            )


def run(config: MapConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `map`."""
    try:
        import umap  # noqa: F401
    except ImportError:
        raise ValueError(
            "umap-learn is not installed; `pip install umap-learn`, or this package with its extra `viz`"
        ) from None
    sae = load(config.sae)
    top, explanations = open_top_of(sae, config.top), open_explanations_of(sae, config.explanations)
    inputs = [open_artifact(config.sae, "sae"), top.artifact, open_artifact(config.explanations, "explanations")]
    with building(config.out, "map", config, runtime, inputs, top.provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        latents = np.flatnonzero(top.firing_counts).tolist()
        if runtime.is_main:
            data = contents(latents, coordinates(sae.W_dec[latents], config), top, explanations)
            builder.publish(DATA_FILE, json_text(data).encode())
            builder.publish(MAP_FILE, page(data, "../report/report.html").encode())
        builder.finish([MAP_FILE, DATA_FILE] if runtime.is_main else [], {"latents": len(latents)})
    log.info("%s: %s features", config.out / MAP_FILE, f"{len(latents):,}")


def coordinates(directions: Tensor, config: MapConfig) -> npt.NDArray[np.float64]:
    """(M, 2) places of `directions` (M, D) on the map, the longer side from 0 to 1. ValueError for fewer than 4."""
    if len(directions) < 4:
        raise ValueError(f"a map needs 4 latents that fire at least; found {len(directions)}")
    import umap

    rows = unit_rows(directions.detach().float()).numpy()
    # From cosine distance, with a seed and one thread: the same map from the same SAE. Few points need a plain start.
    reducer = umap.UMAP(
        n_neighbors=min(config.neighbours, len(rows) - 1), min_dist=config.min_dist, metric="cosine",
        random_state=config.seed, n_jobs=1, init="spectral" if len(rows) > 50 else "random",
    )  # fmt: skip
    places = np.asarray(reducer.fit_transform(rows), dtype=np.float64)
    places -= places.min(0)
    scaled: npt.NDArray[np.float64] = places / places.max()
    return scaled


def contents(
    latents: Sequence[int], places: npt.NDArray[np.float64], top: TopSentences, explanations: Mapping[int, Explanation]
) -> dict[str, Any]:
    """What the page draws, as JSON values; `order` holds places in `latents`, those whose label is to be seen first."""
    aggregation = "max" if "max" in top.aggregations else top.aggregations[0]
    sentences = [top.sentences(latent, aggregation, LABELS_COMPARED) for latent in latents]
    place_of = {latent: i for i, latent in enumerate(latents)}
    densities = [math.log10(count / top.n_tokens) for count in top.firing_counts[list(latents)].tolist()]
    kinds = [explanations[i].details.get("fires_on") if i in explanations else None for i in latents]
    colours = [
        _categories("by kind of label", [KINDS.get(kind["kind"], kind["kind"]) if kind else None for kind in kinds]),
        _categories("by topic", [_topic([row.label for row in rows]) for rows in sentences]),
        _numbers("by score", [explanations[i].score if i in explanations else None for i in latents], "{:.2f}"),
        _numbers("by density", densities, "10^{:.1f} of tokens"),
    ]
    return {
        "about": {name: str(top.provenance.get(name, "")) for name in ("model", "site")},
        "latents": list(latents),
        "titles": [title_of(explanations.get(latent)) for latent in latents],
        "x": places[:, 0].round(5).tolist(),
        "y": places[:, 1].round(5).tolist(),
        "width": round(float(places[:, 0].max()), 5),
        "height": round(float(places[:, 1].max()), 5),
        "order": [place_of[latent] for latent in shown_first(explanations, top.peak_variety) if latent in place_of],
        "colours": [by for by in colours if by],
    }


def _topic(labels: Sequence[str | None]) -> str | None:
    """The label of LEAST_SHARE of the sentences or more, where there is one."""
    found = Counter(label for label in labels if label)
    label, count = next(iter(found.most_common(1)), ("", 0))
    return label if count >= max(2, LEAST_SHARE * len(labels)) else None


def _categories(name: str, values: Sequence[str | None]) -> dict[str, Any] | None:
    """The N_COLOURS most frequent values with a colour each, the rest with none (-1); None where there are no values."""
    names = [value for value, _ in Counter(value for value in values if value).most_common(N_COLOURS)]
    index = {value: i for i, value in enumerate(names)}
    return {"name": name, "names": names, "values": [index.get(value or "", -1) for value in values]} if names else None


def _numbers(name: str, values: Sequence[float | None], text: str) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    ends = {"low": short(low), "high": short(high), "low_text": text.format(low), "high_text": text.format(high)}
    return {"name": name, "values": [short_or_none(value) for value in values], **ends}


def page(data: dict[str, Any], report: str) -> str:
    """The page; `report` is the relative address of the report that a click opens."""
    data = data | {"about": data["about"] | {"report": report}}
    title = " · ".join(filter(None, (data["about"]["model"], data["about"]["site"])))
    return render("map.html", title, data, ("theme.css", "map.css"), ("dom.js", "map.js"))


def read_map(path: Path) -> dict[str, Any]:
    """The data of a map folder. ValueError where it is damaged."""
    file = open_artifact(path, "map").file(DATA_FILE)
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


if __name__ == "__main__":
    run_stage(MapConfig, run, __doc__ or "")
