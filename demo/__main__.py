"""The whole path in one command: real text becomes labelled, steerable features of a real Llama.

    python -m demo                       # everything, then the app on 127.0.0.1
    python -m demo --no-serve            # everything, without the app
    python -m demo --quick --no-serve    # the small version, on the embedded model
    python -m demo doctor                # what this machine has, what is missing and how to get it

Each stage is a command of its own, printed before it runs; finished stages are reused. With smollm2 the SAE that ships is
trained further on some new text, and the app opens on the one that ships.
"""

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from core.cli import one_line_errors, parse, set_up_logging
from core.shipped import shipped_for
from demo.chain import run_all
from demo.doctor import doctor
from demo.plan import FULL, QUICK, REAL, Plan
from demo.showcase import showcase
from inference.session import InferenceConfig
from llama3.hub import locate

DEFAULT_MODEL = "smollm2"
"""What `make demo` shows."""


@dataclass(frozen=True)
class DemoConfig:
    """What to run, on which model and text."""

    serve: bool = True
    """Open the app when everything is done; --no-serve ends instead."""
    quick: bool = False
    """The small version: 9,000 sentences and 1,024 latents, on the embedded model where --model names no other."""
    port: int = 7860
    """Port of the app on 127.0.0.1."""
    model: str = ""
    """The model: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2, or demo, the embedded one. Empty: smollm2, and the
    embedded one where that cannot be had."""
    source: str = ""
    """Text to use in place of the embedded corpus: a file, a folder, or nltk:NAME."""
    out: Path | None = None
    """Folder for all stages. None: runs/ and the model's name, with -quick for the small version."""
    site: str = ""
    """Where activations are read; empty: where the SAE that ships reads, else the residual stream after 5/6 of the layers."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


def model_of(config: DemoConfig) -> str:
    """The model to run on. Where the default cannot be had, a line says why, and it is the embedded one."""
    if config.model or config.quick:
        return config.model or "demo"
    try:
        locate(DEFAULT_MODEL)
    except ValueError as error:
        print(f"{' '.join(str(error).split())}. The demo goes on with the embedded model.", file=sys.stderr)
        return "demo"
    return DEFAULT_MODEL


def plan_of(config: DemoConfig) -> Plan:
    """Everything decided."""
    model = model_of(config)
    name = re.sub(r"[^\w.-]+", "-", Path(model).name) + ("-quick" if config.quick else "")
    # The embedded SAE was trained on this very corpus: the demo trains one anew.
    base = shipped_for(model) if model != "demo" and not config.site else None
    scale = QUICK if config.quick else REAL if base else FULL
    return Plan(model, scale, config.out or Path("runs") / name, config.source, config.site, config.threads, base)


def app_flags(plan: Plan) -> list[str]:
    """What the app opens on: the SAE that ships for a real model, else the one that was trained here."""
    if plan.base:
        return ["--model", plan.model]
    out = plan.out
    folders = {"sae": out / "run" / "sae", "top": out / "top", "explanations": out / "explanations"}
    return ["--model", plan.model, *(part for name, path in folders.items() for part in (f"--{name}", str(path)))]


def run(config: DemoConfig) -> None:
    began = time.monotonic()
    plan = plan_of(config)
    if not plan.source:
        print("Collecting the embedded corpus: passages written for this project, and documentation found on this machine")
        if n := plan.write_documents():
            print(f"      {plan.documents}: {n:,} documents")
    path = plan.stages()
    seconds = run_all(path)
    app = app_flags(plan)
    showcase(parse(InferenceConfig, "", app), plan.scale.tried)
    times = ", ".join(f"{stage.name} {spent:.0f}" for stage, spent in zip(path, seconds, strict=True))
    print(f"\nDone in {time.monotonic() - began:.0f} s ({times}).")
    print("Everything is in", plan.out)
    print(f"      the report   {plan.out / 'report' / 'report.html'}")
    for stage in path:
        print(f"      {stage.out.name:<12} {stage.title.lower()}")
    command = ["-m", "inference.app", *app, "--port", str(config.port)]
    print(f"\nThe app: search features, steer the model, side by side\n      $ python {shlex.join(command)}", flush=True)
    if config.serve:
        raise SystemExit(subprocess.run([sys.executable, *command], check=False).returncode)


def main() -> None:
    if sys.argv[1:2] == ["doctor"]:
        raise SystemExit(doctor())
    set_up_logging()
    with one_line_errors():
        run(parse(DemoConfig, __doc__ or ""))


if __name__ == "__main__":
    main()
