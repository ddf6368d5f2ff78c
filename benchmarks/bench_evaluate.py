"""What an evaluation costs beside the passes that it cannot do without, on random weights at real sizes.

    python -m benchmarks.bench_evaluate --out evaluate.json --shapes embedded smollm

One batch through `evaluate_batch`, with all sums, baselines, cross-entropies and KL, stands beside the bare passes: the model once,
the layers after the site and the head for the SAE, zero and the mean, and the SAE itself. The mark is 0.8 of that rate. Beside it
the same with whole passes in place of resumed ones, as an evaluation by hooks alone runs. Rates are tokens a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.shapes import random_model
from benchmarks.table import Row, machine_name, publish, race
from llama3 import Transformer
from sae.accumulator import Covariance
from sae.evaluate import evaluate_batch
from sae.evaluating.bootstrap import GROUPS
from sae.evaluating.contenders import baselines, of_sae
from sae.evaluating.splicing import Spliced
from sae.evaluating.subject import Batch, Subject
from sae.model import SAE, SAEConfig

SPLICES = 3  # the SAE, zero and the mean
LENGTH, LATENTS_PER_WIDTH, K = 128, 8, 32


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured."""

    out: Path = Path("bench_evaluate.json")
    """JSON with every number of the table."""
    shapes: tuple[str, ...] = ("embedded", "smollm")
    """Some of tiny, embedded, smollm, 1b, 3b."""
    batch_tokens: int = 2048
    rounds: int = 5
    """Pairs of timings."""
    device: str = "cpu"
    """Where the model runs."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


class _NoTokenizer:
    """`Subject` asks it for a BOS, which is not fed here."""

    bos_id = 0


def subject_of(model: Transformer, batch_tokens: int) -> Subject:
    """With a random SAE after the middle layer."""
    d = model.params.dim
    provenance = {"site": f"layers.{model.params.n_layers // 2}.resid_post", "bos": "none"}
    sae = SAE(SAEConfig(d_model=d, n_latents=LATENTS_PER_WIDTH * d, k=K, norm="layer", provenance=provenance))
    return Subject(sae.to(model.device).requires_grad_(False), model, _NoTokenizer(), batch_tokens)  # type: ignore[arg-type]


def measure(shape: str, config: BenchConfig) -> Iterator[Row]:
    """Both lines of one shape."""
    model = random_model(shape, torch.device(config.device))
    subject, n = subject_of(model, config.batch_tokens), config.batch_tokens // LENGTH
    tokens = torch.randint(model.params.vocab_size, (n, LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(n, device=model.device) % GROUPS)
    fitted = Covariance.none(model.params.dim)
    fitted.add(torch.randn(2 * model.params.dim, model.params.dim))
    rivals = baselines(subject.sae, fitted, 0)
    contenders = [of_sae("sae", subject.sae), *rivals.contenders(spliced=False)]
    parts = {contender.name: contender.sums(GROUPS) for contender in contenders}
    site, where = subject.sae.site, torch.ones_like(tokens, dtype=torch.bool)

    @torch.inference_mode()
    def evaluation() -> None:
        evaluate_batch(subject, batch, contenders, rivals.mean, parts)

    @torch.inference_mode()
    def bare() -> None:
        spliced = Spliced(model, site, tokens)
        model.output(spliced.hidden)
        x_hat = subject.sae(spliced.x)
        for _ in range(SPLICES):
            model.output(spliced.replaced(where, x_hat.flatten(0, 1)))

    @torch.inference_mode()
    def whole_passes() -> None:
        def replaced(x: Tensor) -> Tensor:
            return subject.sae(x)

        model(tokens)
        for _ in range(SPLICES):
            with model.hooks({site: replaced}):
                model(tokens)

    yield race(f"{shape}: evaluation; its bare passes", (evaluation, bare), tokens.numel(), 0.8, config.rounds)
    yield race(f"{shape}: evaluation; whole passes by hooks", (evaluation, whole_passes), tokens.numel(), 1.0, config.rounds)


def main(config: BenchConfig) -> None:
    """Measure, print the table, write the JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = (row for shape in config.shapes for row in measure(shape, config))
    publish(rows, config.out, config, device=machine_name(config.device != "cpu"))


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
