"""What attribution and ablation cost beside the model's own passes, on random weights at real sizes.

    python -m benchmarks.bench_causal --out causal.json
    python -m benchmarks.bench_causal --shapes embedded smollm 1b --threads 2

Attribution of all active features of a prompt of 32 tokens stands beside one pass forward and back.
Ablation of 100 features stands beside the batched forward rate: 100 prompts through the model without a
hook; the mark is 0.6 of that rate. Rates are prompt tokens a second; ratios are medians of neighbouring pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.shapes import random_model
from benchmarks.table import Row, machine_name, publish, race
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


def sae_of(model: Transformer, layer: int) -> SAE:
    """A random SAE after `layer`, scaled to activations of any size by its own normalisation of each row."""
    d = model.params.dim
    cfg = SAEConfig(
        d_model=d, n_latents=LATENTS_PER_WIDTH * d, k=K, norm="layer",
        provenance={"site": f"layers.{layer}.resid_post", "bos": "none"},
    )  # fmt: skip
    return SAE(cfg).to(model.device).requires_grad_(False)


def measure(shape: str, config: BenchConfig) -> Iterator[Row]:
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

    attribution = (lambda: attribute(model, [sae], tokens, OBJECTIVE), one_pass)
    yield race(f"{shape}: attribution of {len(nodes.latent)} features; one pass", attribution, TOKENS, 0.5, config.rounds)
    ablation = (lambda: ablated(model, tokens, cuts, OBJECTIVE, ROWS), forward)
    measure = f"{shape}: ablation of {FEATURES} features; forward alone"
    yield race(measure, ablation, FEATURES * TOKENS, 0.6, config.rounds)


def main(config: BenchConfig) -> None:
    """Measure, print the table, write the JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = (row for shape in config.shapes for row in measure(shape, config))
    publish(rows, config.out, config, device=machine_name(config.device != "cpu"))


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
