"""What attribution and ablation cost beside the model's own passes, on random weights at real sizes.

    python -m benchmarks.bench_causal --out causal.json
    python -m benchmarks.bench_causal --shapes embedded smollm 1b --threads 2

Attribution of all active features of a prompt of 32 tokens stands beside one pass forward and back.
Ablation of 100 features stands beside the batched forward rate: the same rows through the model
without a hook; the mark is 0.6 of that rate. Medians of pairs timed one after the other.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from benchmarks.shapes import random_model
from benchmarks.table import publish, said, seconds
from interpretability.causal.ablation import Cut, ablated
from interpretability.causal.attribution import attribute
from interpretability.causal.objectives import LogitDifference
from llama3 import Transformer
from sae.model import SAE, SAEConfig

TOKENS, FEATURES, ROWS = 32, 100, 32
LATENTS_PER_WIDTH, K = 8, 32
OBJECTIVE = LogitDifference(3, 7)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured."""

    out: Path = Path("bench_causal.json")
    """JSON with every number of the table."""
    shapes: tuple[str, ...] = ("embedded", "smollm")
    """Some of tiny, embedded, smollm, 1b, 3b."""
    rounds: int = 7
    """Pairs of timings."""
    device: str = "cpu"
    """Where the model runs."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


class Row(NamedTuple):
    """A line of the table."""

    shape: str
    measure: str
    ours_ms: float
    beside_ms: float
    ratio: float
    mark: str


def sae_of(model: Transformer, layer: int) -> SAE:
    """A random SAE after `layer`, scaled to activations of any size by its own normalisation of each row."""
    d = model.params.dim
    cfg = SAEConfig(
        d_model=d, n_latents=LATENTS_PER_WIDTH * d, k=K, norm="layer",
        provenance={"site": f"layers.{layer}.resid_post", "bos": "none"},
    )  # fmt: skip
    return SAE(cfg).to(model.device).requires_grad_(False)


def pairs(
    rounds: int, ours: Callable[[], object], beside: Callable[[], object], device: torch.device
) -> tuple[float, float, float]:
    """Medians of both in seconds, and of the ratios beside / ours of neighbouring timings."""
    ours(), beside()
    found = [(seconds(ours, device), seconds(beside, device)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in found),
        statistics.median(b for _, b in found),
        statistics.median(b / a for a, b in found),
    )


def measure(shape: str, config: BenchConfig) -> list[Row]:
    """Both lines of one shape."""
    device = torch.device(config.device)
    model = random_model(shape, device)
    sae = sae_of(model, model.params.n_layers // 2)
    tokens = torch.randint(model.params.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
    nodes = attribute(model, [sae], tokens, OBJECTIVE).nodes
    strongest = nodes.effect.abs().argsort(descending=True)[:FEATURES]
    cuts = [Cut(sae, nodes.take(place[None])) for place in strongest]

    def one_pass() -> None:
        with torch.enable_grad(), model.hooks({sae.site: lambda x: x.detach().requires_grad_()}):
            model(tokens[None], last_only=True)[0, -1, 3].backward()

    @torch.inference_mode()
    def forward() -> None:
        for first in range(0, FEATURES, ROWS):
            model(tokens.expand(min(ROWS, FEATURES - first), -1), last_only=True)

    attribution = pairs(config.rounds, lambda: attribute(model, [sae], tokens, OBJECTIVE), one_pass, device)
    ablation = pairs(config.rounds, lambda: ablated(model, tokens, cuts, OBJECTIVE, ROWS), forward, device)
    return [
        Row(shape, f"attribution of {len(nodes.latent)} features over one pass", *_ms(attribution), "at least 0.5"),
        Row(shape, f"ablation of {FEATURES} features over the forward rate", *_ms(ablation), "at least 0.6"),
    ]


def _ms(found: tuple[float, float, float]) -> tuple[float, float, float]:
    return 1000 * found[0], 1000 * found[1], found[2]


def main(config: BenchConfig) -> None:
    """Measure, print the table, write the JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = [row for shape in config.shapes for row in measure(shape, config)]
    for row in rows:
        said(f"{row.shape:9} {row.measure:48} {row.ours_ms:9.1f} ms {row.beside_ms:9.1f} ms  {row.ratio:.2f} ({row.mark})")
    publish(config.out, [row._asdict() for row in rows])


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
