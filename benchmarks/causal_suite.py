"""Does attribution rank features as ablation does? Over the suite of prompts that SmolLM2 answers right.

    python -m benchmarks.causal_suite --sae run/sae --out causal_suite.json

For each prompt the logit of the answer minus that of its wrong alternative is attributed, the 20 features of the
largest attribution are set to 0 at their positions one by one, and both are compared (Spearman). The mark is a
median of 0.7. Prints the distribution, and the prompts that fall short.
"""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from core.cli import progress, set_up_logging
from interpretability.causal.ablation import ablated
from interpretability.causal.agreement import spearman
from interpretability.causal.attribution import attribute
from interpretability.causal.attribution_report import strongest
from interpretability.causal.objectives import LogitDifference
from interpretability.causal.records import SuitePrompt, read_suite
from interpretability.opening import check_sae
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.model import SAE, load

MARK = 0.7


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What is measured."""

    sae: tuple[Path, ...]
    """SAEs of the model, at one site or several, attributed together."""
    model: str = "smollm2"
    """The model that answers the suite right."""
    n: int = 20
    """Features that are set to 0."""
    every: int = 1
    """Take every so many prompts of the suite, where all take too long."""
    out: Path = Path("causal_suite.json")
    """JSON with a line for each prompt."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


def agreement(row: SuitePrompt, model: Transformer, tokenizer: Tokenizer, saes: list[SAE], n: int) -> float:
    """Spearman of attribution and ablation on one prompt."""
    answer, baseline = (tokenizer.encode(text)[0] for text in (row.answer, row.baseline))
    objective, tokens = LogitDifference(answer, baseline), torch.tensor(tokenizer.encode_prompt(row.prompt))
    nodes = attribute(model, saes, tokens, objective, tokenizer.bos_policy).nodes
    groups = strongest(nodes, n, everywhere=False)
    effects = ablated(model, tokens, [group.cut(nodes, saes) for group in groups], objective, 32)
    rho = spearman(np.array([group.attribution for group in groups]), effects.numpy())
    assert rho is not None
    return rho


def main(config: SuiteConfig) -> None:
    """Measure, print, write."""
    set_up_logging()
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer, model = load_tokenizer(config.model), load_model(config.model).eval().requires_grad_(False)
    saes = [load(path) for path in config.sae]
    for sae, path in zip(saes, config.sae, strict=True):
        check_sae(sae, path, model, tokenizer)
    suite = read_suite()[:: config.every]
    found = [(agreement(row, model, tokenizer, saes, config.n), row) for row in progress(suite, "suite", len(suite), "prompts")]
    kinds: dict[str, list[float]] = defaultdict(list)
    for rho, row in found:
        kinds[row.kind].append(rho)
        kinds["all"].append(rho)
    for kind, values in kinds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        short = sum(value < MARK for value in values)
        print(f"{kind:10} {len(values):4} prompts: median {middle:.3f} ({low:.3f} to {high:.3f}), {short} below {MARK}")
    for rho, row in sorted(found, key=lambda item: item[0])[:10]:
        print(f"{rho:.2f} {row.kind}: {row.prompt!r}")
    record = {
        "sites": [sae.site for sae in saes],
        "sae_hashes": [sae.weights_hash for sae in saes],
        "prompts": [{"prompt": row.prompt, "kind": row.kind, "spearman": rho} for rho, row in found],
    }
    config.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(SuiteConfig, description=__doc__))
