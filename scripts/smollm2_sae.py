"""An SAE of SmolLM2 from documents to the folder that ships, as a chain of the real command lines.

python -m scripts.smollm2_sae --texts CORPORA --max-units 24000                                 # into demo/smollm2
python -m scripts.smollm2_sae --texts CORPORA --max-units 24000 --site layers.10.resid_post     # into the user's cache
python -m scripts.smollm2_sae --texts CORPORA --written written.jsonl                           # with text that the model wrote

Each command is printed before it runs; killed at any moment, the same command continues. What training reads lies in
--work; what ships, in --out: `sae/` (int8), `top/`, `explanations/` and `steering/`. Maxima, densities and counts of a
latent come from all training text, sentences from what may be quoted (`scripts.smollm2_documents --shown`).
"""

from dataclasses import dataclass
from pathlib import Path

from core.cli import one_line_errors, parse, set_up_logging
from core.shipped import FOLDERS
from demo.chain import Stage, run_all
from llama3.smollm2 import NAME, cache_folder

SHIPPED_SITE = "layers.15.resid_post"
READINGS = "readings.json"
"""In the folder that ships: titles that readers wrote (scripts.reading_sheets), of this very SAE."""
LIMIT = 30 * 2**20
"""Bytes of all that ships together."""


@dataclass(frozen=True, kw_only=True)
class SAEPathConfig:
    """Which SAE to make, from what, where."""

    texts: Path
    """Folder with the texts of others (scripts.smollm2_documents)."""
    written: tuple[Path, ...] = ()
    """Files of texts that the model wrote itself (scripts.smollm2_written)."""
    site: str = SHIPPED_SITE
    """Where activations are read."""
    out: Path | None = None
    """Folder for what ships. None: demo/smollm2 for the site that ships, else a folder of the site in the user's cache."""
    work: Path = Path("runs/smollm2-sae")
    """Folder for everything between; the corpora in it serve every site."""
    tokens: int = 128
    """Length of a passage in tokens; 0: single sentences."""
    n_latents: int = 8192
    """Latents of the SAE."""
    k: int = 32
    """Active latents per token."""
    epochs: int = 3
    """Passes over the training rows."""
    max_units: int = 0
    """Sentences or passages of the training text, at most; 0: all."""
    shown: int = 12
    """Sentences of each latent that ship."""
    steering: bool = True
    """Measure steering too, which takes longest."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""

    @property
    def folder(self) -> Path:
        """Where what ships goes."""
        return self.out or (FOLDERS[NAME] if self.site == SHIPPED_SITE else cache_folder() / "saes" / NAME / self.site)


def stages(config: SAEPathConfig) -> list[Stage]:
    """The chain in order, each reading what those before it wrote."""
    return [*_corpora(config), *_activations(config), *_sae(config), *_features(config)]


def _corpora(config: SAEPathConfig) -> list[Stage]:
    work, texts = config.work, ("--texts", str(config.texts))
    written = ("--written", *map(str, config.written)) if config.written else ()
    unit = ("--unit", "passage", "--tokens", str(config.tokens), "--tokenizer", NAME) if config.tokens else ()
    limit = ("--max-sentences", str(config.max_units)) if config.max_units else ()
    found = []
    for name, flags in (("training", written), ("shown", (*written, "--shown")), ("reviews", ("--reviews",))):
        file = work / f"{name}.jsonl"
        cut = ("--source", str(file), "--deduplicate", *unit, *(limit if name == "training" else ()))
        found.append(Stage(f"Collect documents: {name}", "scripts.smollm2_documents", (*texts, *flags), file))
        found.append(Stage(f"Cut them: {name}", "capture.sentences", cut, work / name))
    return found


def _activations(config: SAEPathConfig) -> list[Stage]:
    chunk = ("--chunk-sentences", "128") if config.tokens else ()
    flags = ("--model", NAME, "--sites", config.site, *chunk, *_threads(config))
    return [
        Stage(
            f"Run the model, keep {config.site}: {name}",
            "capture.activations",
            ("--corpus", str(config.work / name), *flags),
            _of_site(config, f"{name}-activations"),
        )
        for name in ("training", "shown")
    ]


def _sae(config: SAEPathConfig) -> list[Stage]:
    acts = str(_of_site(config, "training-activations"))
    batches, run, sae = _of_site(config, "batches"), _of_site(config, "run"), config.folder / "sae"
    shape = ("--n-latents", str(config.n_latents), "--k", str(config.k), "--epochs", str(config.epochs))
    training = ("--lr", "1e-3", "--lr-end", "1e-4", "--warmup-steps", "200", "--dead-after-tokens", "1000000")
    evaluate = ("--sae", str(sae), "--model", NAME, *_threads(config))
    return [
        Stage("Shuffle the activations", "sae.preprocess", ("--activations", acts, *_threads(config)), batches),
        Stage(
            "Train the SAE",
            "sae.train",
            ("--batches", str(batches), *shape, *training, "--wandb", "off", *_threads(config)),
            run,
        ),
        Stage(
            "Store it in 8 bits, and say what that costs",
            "sae.convert",
            ("--sae", str(run / "sae"), "--to", "sae", "--dtype", "int8", "--measure", acts),
            sae,
        ),
        *(
            Stage(
                f"Evaluate it on documents out of training: {name}",
                "sae.evaluate",
                (*evaluate, "--corpus", str(config.work / name)),
                _of_site(config, f"evaluation-{name}"),
            )
            for name in ("training", "reviews")
        ),
    ]


def _features(config: SAEPathConfig) -> list[Stage]:
    folder, counted = config.folder, _of_site(config, "counted")
    read = folder / READINGS
    readings = ("--readings", str(read)) if read.is_file() else ()
    sae = ("--sae", str(folder / "sae"), "--model", NAME, "--aggregations", "max", *_threads(config))
    none = ("--n-level", "0", "--sample-sentences", "0", "--n-ngrams", "0", "--n-cofiring", "0")
    count = ("--n-sentences", "1", "--n-promoted", "0", *none)
    top, corpus = _of_site(config, "top"), ("--corpus", str(config.work / "shown"))
    shown = ("--activations", str(_of_site(config, "shown-activations")), *corpus, "--statistics", str(counted))
    every = ("--activations", str(_of_site(config, "training-activations")), "--corpus", str(config.work / "training"))
    what = "interpretability.top_sentences"
    found = [
        Stage("Count how often and how strongly each latent fires", what, (*sae, *every, *count), counted),
        Stage("Find the sentences to explain from", what, (*sae, *shown, "--n-sentences", "20"), top),
        Stage(
            "Explain each latent",
            "interpretability.explain run",
            ("--top", str(top), *corpus, "--model", NAME, *readings),
            folder / "explanations",
        ),
        Stage(
            "Keep the sentences that ship",
            what,
            (*sae, *shown, "--n-sentences", str(config.shown), *none, "--compact"),
            folder / "top",
        ),
    ]
    inputs = [part for name in ("sae", "top", "explanations") for part in (f"--{name}", str(folder / name))]
    steering = ("--model", NAME, *inputs, *_threads(config))
    measured = Stage("Measure steering", "inference.steering_eval", steering, folder / "steering")
    return [*found, measured] if config.steering else found


def _of_site(config: SAEPathConfig, name: str) -> Path:
    return config.work / config.site / name


def _threads(config: SAEPathConfig) -> tuple[str, ...]:
    return ("--threads", str(config.threads)) if config.threads else ()


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each folder that ships."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    return {part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) for part in parts}


def main() -> None:
    set_up_logging()
    with one_line_errors():
        config = parse(SAEPathConfig, __doc__ or "")
        config.work.mkdir(parents=True, exist_ok=True)
        run_all(stages(config))
        found = sizes(config.folder)
        print(f"\n{config.folder}: " + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in found.items()))
        if sum(found.values()) > LIMIT:
            raise ValueError(
                f"{config.folder}: {sum(found.values()) / 2**20:.1f} MiB together, and {LIMIT / 2**20:.0f} MiB may ship; "
                "give a lower --shown or --n-latents"
            )


if __name__ == "__main__":
    main()
