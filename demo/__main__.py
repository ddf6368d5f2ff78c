"""The whole path in one command: real text becomes labelled, steerable features of a real (small) Llama.

    python -m demo                       # everything, then the app on 127.0.0.1
    python -m demo --no-serve            # everything, without the app
    python -m demo --quick --no-serve    # the small version
    python -m demo doctor                # what this machine has, what is missing and how to get it

Each stage is a command of its own, printed before it runs; finished stages are reused.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from core.cli import one_line_errors, parse, set_up_logging
from demo.corpus import write_documents
from demo.doctor import doctor
from demo.showcase import showcase


@dataclass(frozen=True)
class DemoConfig:
    """What to run, on which model and text."""

    serve: bool = True
    """Open the app when everything is done; --no-serve ends instead."""
    quick: bool = False
    """The small version: 9,000 sentences and 1,024 latents."""
    port: int = 7860
    """Port of the app on 127.0.0.1."""
    model: str = "demo"
    """The model: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo, the embedded one."""
    source: str = ""
    """Text to use in place of the embedded corpus: a file, a folder, or nltk:NAME."""
    out: Path = Path("runs/demo")
    """Folder for all stages; `-quick` is added to its name for the small version."""
    site: str = ""
    """Where activations are read; empty: the residual stream after 5/6 of the layers."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


@dataclass(frozen=True)
class Scale:
    """The sizes of one version of the demo."""

    sentences: int
    n_latents: int
    k: int
    epochs: int
    evaluated: int


FULL = Scale(sentences=0, n_latents=4096, k=32, epochs=2, evaluated=1000)
QUICK = Scale(sentences=9000, n_latents=1024, k=16, epochs=2, evaluated=400)


@dataclass(frozen=True)
class Stage:
    """One command of the path and the folder it writes."""

    title: str
    module: str
    flags: tuple[str, ...]
    out: Path

    @property
    def command(self) -> list[str]:
        return ["-m", *self.module.split(), *self.flags, "--out", str(self.out)]


def stages(config: DemoConfig, source: str) -> list[Stage]:
    """The stages in order, with the flags of this version."""
    scale, out, model = QUICK if config.quick else FULL, config.out, ("--model", config.model)
    threads = ("--threads", str(config.threads)) if config.threads else ()
    corpus, acts, batches, run = out / "corpus", out / "activations", out / "batches", out / "run"
    evaluation, top, explanations = out / "evaluation", out / "top", out / "explanations"
    cut = ("--deduplicate", *(("--max-sentences", str(scale.sentences)) if scale.sentences else ()))
    site = ("--sites", config.site) if config.site else ()
    shape = ("--n-latents", str(scale.n_latents), "--k", str(scale.k), "--epochs", str(scale.epochs))
    training = ("--lr", "1e-3", "--lr-end", "1e-4", "--warmup-steps", "50", "--dead-after-tokens", "200000", "--wandb", "off")
    shown = ("--top", str(top), "--explanations", str(explanations), "--run", str(run), "--evaluation", str(evaluation))
    return [
        Stage("Cut the text into sentences", "capture.sentences", ("--source", source, *cut), corpus),
        Stage(
            "Run the model, keep the residual stream",
            "capture.activations",
            (*model, "--corpus", str(corpus), *site, *threads),
            acts,
        ),
        Stage(
            "Shuffle the activations, measure mean and norm", "sae.preprocess", ("--activations", str(acts), *threads), batches
        ),
        Stage("Train a sparse autoencoder", "sae.train", ("--batches", str(batches), *shape, *training, *threads), run),
        Stage(
            "Evaluate it inside the model",
            "sae.evaluate",
            ("--sae", str(run / "sae"), *model, "--corpus", str(corpus), "--sentences", str(scale.evaluated), *threads),
            evaluation,
        ),
        Stage(
            "Find the sentences that fire each latent most",
            "interpretability.top_sentences",
            ("--sae", str(run / "sae"), "--activations", str(acts), "--corpus", str(corpus), *model, "--n", "20", *threads),
            top,
        ),
        Stage(
            "Explain each latent", "interpretability.explain run", ("--top", str(top), "--corpus", str(corpus)), explanations
        ),
        Stage("Write the report", "interpretability.report", shown, out / "report"),
    ]


def run_stage_command(number: int, total: int, stage: Stage) -> float:
    """Run one stage in a process of its own; returns seconds. SystemExit with its code where it fails."""
    print(f"\n[{number}/{total}] {stage.title}\n      $ python {shlex.join(stage.command)}", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *stage.command], check=False)
    if done.returncode:
        print(f"error: {stage.module} ended with exit code {done.returncode}; the line above says why", file=sys.stderr)
        raise SystemExit(done.returncode)
    return time.monotonic() - began


def prepare_source(config: DemoConfig) -> str:
    """The `--source` of the first stage; the embedded corpus is written to a file once."""
    if config.source:
        return config.source
    path = config.out / "documents.jsonl"
    if not path.exists():
        print("Collecting the embedded corpus: passages written for this project, and documentation found on this machine")
        packages = ("python",) if config.quick else ("python", "numpy", "networkx", "sympy", "torch")
        print(f"      {path}: {write_documents(path, packages):,} documents")
    return str(path)


def main() -> None:
    if sys.argv[1:2] == ["doctor"]:
        raise SystemExit(doctor())
    set_up_logging()
    with one_line_errors():
        config = parse(DemoConfig, __doc__ or "")
        if config.quick:
            config = DemoConfig(**(vars(config) | {"out": config.out.with_name(f"{config.out.name}-quick")}))
        began = time.monotonic()
        path = stages(config, prepare_source(config))
        seconds = [run_stage_command(i, len(path), stage) for i, stage in enumerate(path, 1)]
        showcase(config.model, config.out)
        print(
            f"\nDone in {time.monotonic() - began:.0f} s ("
            + ", ".join(f"{s.module.split('.')[1].split()[0]} {t:.0f}" for s, t in zip(path, seconds, strict=True))
            + ")."
        )
        print("Everything is in", config.out)
        print(f"      the report   {config.out / 'report' / 'report.html'}")
        for stage in path:
            print(f"      {stage.out.name:<12} {stage.title.lower()}")
        app = ["-m", "inference.app", "--model", config.model, "--sae", str(config.out / "run" / "sae")]
        app += [
            "--top",
            str(config.out / "top"),
            "--explanations",
            str(config.out / "explanations"),
            "--port",
            str(config.port),
        ]
        print(f"\nThe app: search features, steer the model, side by side\n      $ python {shlex.join(app)}", flush=True)
        if config.serve:
            raise SystemExit(subprocess.run([sys.executable, *app], check=False).returncode)


if __name__ == "__main__":
    main()
