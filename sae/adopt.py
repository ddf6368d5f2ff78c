"""A published SAE becomes one of ours: read, then measured on the model, so that nobody has to trust a format.

    python -m sae.adopt EleutherAI/sae-llama-3-8b-32x:layers.23 --model meta-llama/Meta-Llama-3-8B --out sae/
    python -m sae.adopt theirs/ --model M --out sae/ --site layers.23.resid_post --bos feed

A few hundred sentences go through the model. Sites, BOS or none, plain text or chat, normalisations and meanings of the bias
are compared by what the SAE explains of the rows (FVU), by its active latents (L0) and by what the model loses with it
(CE recovered); FVU with the SAE's coordinates shuffled says what is chance. What the files say is taken where it fits as well
as anything; what is settled by nothing is refused, with the flag that settles it. Every later stage takes the folder written.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from tyro.conf import Positional

from capture.store import open_corpus
from core.artifact import MANIFEST, building
from core.cli import StageConfig, machine, run_stage
from core.runtime import Runtime
from llama3 import load_model, load_tokenizer
from llama3.hub import DEMO, model_name
from sae.adopting.candidates import SITE_CANDIDATES, THRESHOLD_FACTOR, BiasName, Convention, NormName, meant
from sae.adopting.decision import Decision, Measured, Stated, Undecided, decide, describe, table
from sae.adopting.measuring import Reader
from sae.adopting.search import Found, Given, search, stated
from sae.adopting.source import Source, locate
from sae.formats import finding
from sae.loading import is_ours
from sae.model import SAE

CAPTURE = {"dtype": "bf16", "chunk_sentences": 2048, "batch_tokens": 8192, "max_padding": 0.05}
"""How later stages are to capture, where no training of ours says it: the defaults of capture.activations."""
PASSAGES = DEMO.parent / "data" / "passages.jsonl"

log = logging.getLogger("sae.adopt")


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(StageConfig):
    """Flags of the stage."""

    source: Positional[str] = machine()
    """A folder or file of any layout of docs/formats.md, or a Hub id: owner/name, owner/name:folder."""
    model: str
    """The model that it was trained on: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    out: Path
    """Folder to write, of kind sae."""
    corpus: Path | None = None
    """Corpus folder whose sentences are read; none: sentences of the embedded passages."""
    sentences: int = 300
    """Sentences that the model reads, drawn at random."""
    rows: int = 4096
    """Tokens on which the best candidates are measured, at most."""
    max_length: int = 192
    """Tokens after which a sentence is cut; recorded, so that later stages do the same."""
    site: str = ""
    """The hook site that it reads; empty: as its files say and measurement agrees, or the one that fits best."""
    bos: Literal["", "feed", "none"] = ""
    """Whether BOS stands before each sentence; empty: as measured."""
    text: Literal["", "plain", "chat"] = ""
    """Whether it was trained on plain text or on dialogues; empty: as measured."""
    norm: NormName = "as-read"
    """What rows are before the encoder: none, dataset (of norm sqrt(d) on average), unit (of mean squared norm 1), layer (each
    by its own mean and std). as-read: as the layout says, unless another fits better."""
    bias: BiasName = "as-read"
    """added, removed: W_enc b_dec is added to or taken from the encoder's bias, where the layout is wrong about whether b_dec
    is subtracted from the rows. as-read: as the layout says, unless another fits better."""
    l0: float | None = None
    """Active latents per token that the card states. none: what the files say; 0: nothing."""

    def __post_init__(self) -> None:
        for name in ("sentences", "rows", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.l0 is not None and self.l0 < 0:
            raise ValueError(f"--l0 {self.l0}: expected at least 0")

    @property
    def given(self) -> Given:
        return Given(self.site, self.bos, self.text, Convention(self.norm, self.bias))


def run(config: AdoptConfig, runtime: Runtime) -> None:
    """Read, measure, decide, write. One process does it all."""
    if runtime.world_size > 1:
        raise ValueError("sae.adopt is the work of one process; start it without torchrun")
    source = locate(config.source)
    if is_ours(source.path):
        raise ValueError(f"{config.source}: a folder of ours already; every stage takes it as it is")
    if config.out.is_dir() and not (config.out / MANIFEST).exists() and any(config.out.iterdir()):
        raise ValueError(f"{config.out}: not empty and not the output of a stage; choose another --out")
    sae = finding.read(source.path).to(runtime.device)
    reader = _reader(config, runtime.device)
    said = stated(sae, config.given, config.l0)
    found = search(reader, sae, config.given, said, config.rows, config.seed)
    try:
        decision = decide(found.measured, said, (reader.tokenizer.bos_policy, "plain"))
    except Undecided:
        print(table(found.measured, None), flush=True)
        raise
    print(table(found.measured, decision.chosen), flush=True)
    for what, why in decision.why.items():
        log.info("%s: %s", what, why)
    adopted = adopt(config, sae, reader, source, found, decision)
    report = _report(found.measured, decision, said)
    with building(config.out, "sae", config, runtime, provenance=adopted.cfg.provenance) as builder:
        if not builder.complete:
            names, sae_hash = adopted.cpu().publish(builder)
            names.append(builder.publish("adoption.json", (json.dumps(report, indent=1) + "\n").encode()).name)
            builder.finish(names, {"n_latents": adopted.cfg.n_latents}, {"sae_hash": sae_hash})
    log.info("%s: %s", config.out, describe(decision.chosen.candidate))


def _reader(config: AdoptConfig, device: torch.device) -> Reader:
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device).eval()
    texts = tuple(_texts(config.corpus, config.sentences, config.seed))
    longest = min(config.max_length, model.params.max_seq_len - 1)
    return Reader(model, tokenizer, texts, longest, batch_tokens=4096)


def _texts(corpus: Path | None, n: int, seed: int) -> list[str]:
    """`n` sentences at random, of a corpus or of the passages that ship with the embedded model."""
    generator = torch.Generator().manual_seed(seed)
    if corpus is not None:
        opened = open_corpus(corpus)
        return opened.texts(torch.randperm(opened.n_sentences, generator=generator)[:n].sort().values)
    passages = [json.loads(line)["text"] for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
    sentences = [part for passage in passages for part in re.split(r"(?<=[.!?])\s+", passage) if len(part) > 20]
    return [sentences[i] for i in torch.randperm(len(sentences), generator=generator)[:n].sort().values.tolist()]


def adopt(config: AdoptConfig, sae: SAE, reader: Reader, source: Source, found: Found, decision: Decision) -> SAE:
    """The SAE as `decision` takes it, with all that later stages ask for."""
    chosen = decision.chosen
    reading, convention = chosen.candidate
    rows = found.rows[reading]
    taken = meant(sae, convention, rows)
    name = model_name(config.model)
    facts = {k: v for k, v in sae.cfg.provenance.items() if k not in (SITE_CANDIDATES, THRESHOLD_FACTOR, "model")}
    if (theirs := sae.cfg.provenance.get("model")) and Path(str(theirs)).name != Path(name).name:
        log.warning("its files name the model %s; --model is %s", theirs, name)
        facts["stated_model"] = theirs
    figures = {"fvu": chosen.fvu, "fvu_by_chance": chosen.chance, "l0": chosen.l0, "ce_recovered": chosen.ce_recovered}
    how = {
        "source": source.name, "revision": source.revision, "files": source.hashes(), "text": reading.text,
        **convention._asdict(), "why": decision.why, **figures, "sentences": len(reader.texts), "rows": config.rows,
        "texts_hash": xxhash.xxh3_128_hexdigest("\0".join(reader.texts).encode()),
    }  # fmt: skip
    provenance = facts | CAPTURE | {
        "model": name, "model_hash": reader.model.weights_hash, "tokenizer_hash": reader.tokenizer.hash,
        "site": reading.site, "sites": [reading.site], "d_model": sae.cfg.d_model, "bos": reading.bos,
        "max_length": reader.max_length, "max_norm": rows.max_norm, "median_norm": rows.median_norm,
        "mean_norm": rows.mean_norm, "adopted": how,
    }  # fmt: skip
    k = sae.cfg.k
    if not sae.sets_k and k == 1:  # its layout has none
        k = min(max(1, round(chosen.l0)), sae.cfg.n_latents)
    taken.cfg = replace(taken.cfg, k=k, provenance=provenance)
    return taken


def _report(measured: Sequence[Measured], decision: Decision, said: Stated) -> dict[str, Any]:
    """All that was measured, the best first."""

    def line(one: Measured) -> dict[str, Any]:
        figures = {name: value for name, value in asdict(one).items() if name != "candidate" and value == value}
        return {**one.candidate.reading._asdict(), **one.candidate.convention._asdict(), **figures}

    order = sorted(measured, key=lambda one: one.fvu)
    found = {"chosen": line(decision.chosen), "why": decision.why, "stated": said._asdict()}
    return found | {"candidates": list(map(line, order))}


if __name__ == "__main__":
    run_stage(AdoptConfig, run, __doc__ or "")
