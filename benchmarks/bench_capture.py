"""Capture beside what it replaces: a `transformers` loop, the bare forward pass, `cat`, and itself on ten times the text.

    python -m benchmarks.bench_capture --threads 2 --out capture.json                   # on a CPU
    python -m benchmarks.bench_capture --device cuda --shape 3b --dtype bfloat16        # on a GPU

Real sentences (`demo/data/passages.jsonl`) and a Llama of the embedded size with random weights: speed does not depend on them.
Speeds are medians of ratios of neighbouring timings, so that a machine that slows down slows both. Prints a table, writes JSON.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
import xxhash
from torch import Tensor

from benchmarks.bench_llama3 import make_pair
from benchmarks.shapes import SHAPES, random_model
from benchmarks.table import Row, machine_name, publish, race, seconds
from capture import activations, sentences, tensorfile
from capture.activations import ActivationsConfig
from capture.batches import batches, tokenise
from capture.sentences import SentencesConfig
from capture.store import Corpus, chunk_name, open_activations, open_corpus
from core.artifact import building, verify
from core.runtime import Runtime, Solo
from llama3 import Tokenizer, Transformer, load_tokenizer
from llama3.sites import default_site

PASSAGES = Path(__file__).parent.parent / "demo" / "data" / "passages.jsonl"
LOOP_BATCH = 32  # sentences, of the transformers loop
PEAK = 8192  # edge of the matrix product that is timed beside the GPU's forward pass
NOMINAL = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
"""Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the name."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured and where."""

    out: Path = Path("bench_capture.json")
    """JSON with every number of the table."""
    sentences: int = 512
    """Sentences of a timing of capture against the transformers loop; against the forward pass alone, eight times as many."""
    memory_documents: int = 80
    """Documents whose peak memory is compared with that of ten copies of them; of some nine sentences each."""
    rounds: int = 7
    """Pairs of timings; the table shows the median."""
    reader_rounds: int = 30
    """The same for the store's reader, where a timing takes milliseconds."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda adds the share of the GPU's rate that the truncated forward pass of the 3B shape reaches."""
    shape: str = "embedded"
    """Size of the model of the speeds: tiny, embedded, smollm, 1b, 3b."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Its type."""
    parts: tuple[str, ...] = ("speed", "reader", "memory", "gpu")
    """Which groups of rows."""

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no GPU is visible to PyTorch")


class Bench:
    """Corpora, model and scratch folder that the measurements share."""

    def __init__(self, config: BenchConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = torch.device(config.device)
        self.runtime = Runtime(0, 1, self.device, Solo())
        self.tokenizer = load_tokenizer("demo")
        self.model, self.theirs = make_pair(SHAPES[config.shape], config.device, getattr(torch, config.dtype))
        self.model.weights_hash = "random"
        self.site = default_site(self.model.params.n_layers)
        self._n = 0

    def corpus(self, n_sentences: int) -> Path:
        out = self.folder / f"corpus-{n_sentences}"
        sentences.run(SentencesConfig(source=str(PASSAGES), out=out, max_sentences=n_sentences), self.runtime)
        return out

    def copies(self, times: int) -> Path:
        """A corpus of `times` copies of the first documents."""
        source, out = self.folder / f"copies-{times}.jsonl", self.folder / f"copies-{times}"
        lines = PASSAGES.read_text().splitlines(keepends=True)[: self.config.memory_documents]
        source.write_text("".join(lines * times))
        sentences.run(SentencesConfig(source=str(source), out=out), self.runtime)
        return out

    def capture(self, corpus: Path, **flags: Any) -> Path:
        """One run of the stage into a fresh folder, the model being loaded."""
        self._n += 1
        out = self.folder / f"acts-{self._n}"
        before = activations.load_model, activations.load_tokenizer
        activations.load_model = lambda *_: self.model  # type: ignore[assignment]
        activations.load_tokenizer = lambda *_: self.tokenizer  # type: ignore[assignment]
        try:
            config = ActivationsConfig(model="demo", corpus=corpus, out=out, bos="none", **flags)  # as what it races
            activations.run(config, self.runtime)
        finally:
            activations.load_model, activations.load_tokenizer = before
        return out


# --- speed ----------------------------------------------------------------------------------------------------------------


def compare_speed(bench: Bench) -> Iterator[Row]:
    """End to end against the loop, with the head (what AutoModelForCausalLM does) and without it; and against the forward."""
    corpus = bench.corpus(bench.config.sentences)
    opened = open_corpus(corpus)
    flags = {"chunk_sentences": max(opened.n_sentences // 4, 1)}  # several chunks, so that writing overlaps with computing
    if bench.config.dtype == "float32":  # two implementations in bf16 differ by more than the rounding of what they store
        check_same_rows(bench, corpus, flags)
    n = opened.n_sentences
    for name, model in (("", bench.theirs), (" without its head", bench.theirs.model)):
        row = race(
            f"sentences/s to disk / transformers loop{name}",
            (lambda: bench.capture(corpus, **flags), lambda model=model: loop(bench, model, opened)),  # type: ignore[misc]
            n, 3.0, bench.config.rounds,
        )  # fmt: skip
        yield row._replace(reach="", reached=None) if name else row
    # Against a forward pass alone a run must be long enough that opening and closing a folder is no part of it.
    corpus = bench.corpus(8 * bench.config.sentences)
    flags = {"chunk_sentences": bench.config.sentences}
    ready = list(padded_batches(open_corpus(corpus), bench.tokenizer, bench.config.sentences))
    yield race(
        "tokens/s with tokenising and writing / bare forward pass",
        (lambda: bench.capture(corpus, **flags), lambda: bare_forward(bench.model, ready, bench.site)),
        sum(tokens.numel() for tokens in ready), 0.92, bench.config.rounds,
    )  # fmt: skip


def padded_batches(corpus: Corpus, tokenizer: Tokenizer, chunk_sentences: int) -> Iterator[Tensor]:
    """The token ids that capture feeds to the model, batch by batch."""
    for start in range(0, corpus.n_sentences, chunk_sentences):
        rows = corpus.rows(start, min(start + chunk_sentences, corpus.n_sentences))
        chunk = tokenise(rows, tokenizer, ActivationsConfig.max_length)
        for batch in batches(chunk, ActivationsConfig.batch_tokens, ActivationsConfig.max_padding):
            yield batch.tokens


@torch.inference_mode()
def bare_forward(model: Transformer, ready: list[Tensor], site: str) -> None:
    """The model up to the site over the same batches; what comes out is dropped."""
    for tokens in ready:
        model.capture(tokens.to(model.device), [site])


@torch.inference_mode()
def loop(bench: Bench, model: Any, corpus: Corpus) -> Path:
    """What the reference run does: batches of 32 in order, padded to the longest, hidden states, a file per sentence."""
    bench._n += 1
    out = bench.folder / f"loop-{bench._n}"
    out.mkdir()
    layer = int(bench.site.split(".")[1])
    texts = corpus.texts(range(corpus.n_sentences))
    for start in range(0, len(texts), LOOP_BATCH):
        ids = [bench.tokenizer.encode(text)[:192] for text in texts[start : start + LOOP_BATCH]]
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=bench.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=bench.device)
        hidden = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
        for i, row in enumerate(ids):
            torch.save(hidden[i, : len(row)].to(torch.bfloat16).cpu().clone(), out / f"{start + i}.pt")
    return out


def check_same_rows(bench: Bench, corpus: Path, flags: dict[str, Any]) -> None:
    """Both write the same activations, up to the rounding of bf16."""
    ours = open_activations(bench.capture(corpus, **flags))
    theirs = loop(bench, bench.theirs, open_corpus(corpus))
    for sentence in range(0, ours.n_sentences, 97):
        expected = torch.load(theirs / f"{sentence}.pt", weights_only=True).float()
        torch.testing.assert_close(ours.sentence(sentence).activations.float(), expected, rtol=2e-2, atol=2e-2)


# --- the reader -----------------------------------------------------------------------------------------------------------


def compare_reader(bench: Bench) -> Iterator[Row]:
    """Every row into one buffer of a chunk's size, against `cat` of the same files to /dev/null."""
    folder = write_rows(bench.folder / "rows", n_chunks=12, rows=40_000, d_model=256)
    store = open_activations(folder)
    paths = [str(folder / name) for name in store.files]
    buffer = torch.empty(max(store.rows(i) for i in range(len(store))), store.d_model, dtype=store.dtype)
    n_bytes = store.n_tokens * store.d_model * buffer.element_size()

    def read(check: bool = False) -> None:
        for index in range(len(store)):
            rows = store.read_into(index, buffer)
            if check:
                found = xxhash.xxh3_128_hexdigest(rows.view(torch.uint8).numpy().data)
                expected = xxhash.xxh3_128_hexdigest(store.chunk(index).activations.view(torch.uint8).numpy().data)
                assert found == expected, f"chunk {index}: what was read is not what the file holds"

    def first_open() -> None:
        fresh = open_activations(folder)
        for index in range(len(fresh)):
            fresh.read_into(index, buffer)

    def cat() -> None:
        with open("/dev/null", "wb") as nothing:
            subprocess.run(["cat", *paths], stdout=nothing, check=True)

    read(check=True)
    yield race("reader, bytes/s / cat, the same warm files", (read, cat), n_bytes, 1.0, bench.config.reader_rounds)
    yield race("first open with verification, bytes/s / cat", (first_open, cat), n_bytes, 0.4, bench.config.reader_rounds)


def write_rows(folder: Path, n_chunks: int, rows: int, d_model: int) -> Path:
    """An activations folder of random rows, sentences of 20 tokens."""
    site, per = "layers.4.resid_post", rows // 20
    config = ActivationsConfig(model="demo", corpus=folder, out=folder, sites=(site,), bos="none", chunk_sentences=per)
    provenance = {"sites": [site], "d_model": d_model, "dtype": "bf16"}
    generator = torch.Generator().manual_seed(0)
    with building(folder, "activations", config, Runtime(0, 1, torch.device("cpu"), Solo()), provenance=provenance) as builder:
        names = [chunk_name(site, i) for i in range(n_chunks)]
        for i, name in enumerate(names):
            tensors = {
                "activations": torch.randn(rows, d_model, generator=generator).bfloat16(),
                "token_ids": torch.zeros(rows, dtype=torch.int32),
                "sentence_ids": torch.arange(i * per, (i + 1) * per),
                "document_ids": torch.zeros(per, dtype=torch.long),
                "offsets": torch.arange(0, rows + 1, 20),
            }
            builder.publish(name, tensorfile.pieces(tensors, {"counts": "{}"}), rows)
        builder.finish(names, {"sentences": n_chunks * per, "tokens": n_chunks * rows})
    verify(folder)
    return folder


# --- memory ---------------------------------------------------------------------------------------------------------------


def compare_memory(bench: Bench) -> Iterator[Row]:
    """Peak anonymous memory of the stage in a process of its own, on a corpus and on one ten times as large."""
    corpora = [bench.copies(times) for times in (1, 10)]
    n = [open_corpus(corpus).n_sentences for corpus in corpora]
    chunk = max(n[0] // 8, 1)  # even the small corpus fills the queue of the writer
    peaks = [peak_memory(bench, corpus, bench.folder / f"memory-{corpus.name}", chunk) for corpus in corpora]
    more = peaks[1] / peaks[0] - 1
    measure = f"peak RssAnon in MB, {n[1]:,} / {n[0]:,} sentences"
    yield Row(measure, peaks[1] / 1e6, peaks[0] / 1e6, peaks[1] / peaks[0], "<= 1.05", more <= 0.05)


def peak_memory(bench: Bench, corpus: Path, out: Path, chunk_sentences: int) -> int:
    """Bytes, sampled every 10 ms."""
    command = [
        sys.executable,
        "-m",
        "capture.activations",
        "--model",
        "demo",
        "--corpus",
        corpus,
        "--out",
        out,
        "--bos",
        "none",
    ]
    flags = ["--chunk-sentences", chunk_sentences, "--threads", max(bench.config.threads, 1), "--device", "cpu"]
    process = subprocess.Popen([str(part) for part in (*command, *flags)], stderr=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    assert process.returncode == 0, "the stage failed"
    return peak


# --- a GPU ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_utilisation(bench: Bench) -> Iterator[Row]:
    """FLOP/s of the 3B shape's forward pass up to 5/6 of its depth in bf16, over the GPU's nominal rate and over that of one
    large matrix product.

    Two operations per weight and token, and 4 T/2 H K per token and layer for causal attention over T tokens.
    """
    if bench.device.type == "cpu":
        nothing = float("nan")
        yield Row("3B: forward to 5/6 depth on a GPU: not measured", nothing, nothing, nothing, ">= 0.45", None)
        return
    model, length = random_model("3b", "cuda", torch.bfloat16), 64
    args = model.params
    tokens = torch.randint(0, args.vocab_size, (65_536 // length, length), device="cuda")
    site = default_site(args.n_layers)
    layers = int(site.split(".")[1]) + 1
    weights = sum(p.numel() for p in model.layers[:layers].parameters())
    flop = tokens.numel() * (2 * weights + layers * 4 * (length / 2) * args.n_heads * args.head_dim)
    a, b = (torch.randn(PEAK, PEAK, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    works: tuple[Callable[[], Any], ...] = (lambda: model.capture(tokens, [site]), lambda: [a @ b for _ in range(10)])
    for work in works * 3:
        seconds(work)
    pairs = [(seconds(works[0]), seconds(works[1])) for _ in range(bench.config.rounds)]
    ours = flop / statistics.median(pair[0] for pair in pairs) / 1e12
    product = 10 * 2 * PEAK**3 / statistics.median(pair[1] for pair in pairs) / 1e12
    gpu = torch.cuda.get_device_name()
    nominal = next((rate for name, rate in NOMINAL.items() if name in gpu), None)
    what, rate = ("nominal", nominal) if nominal else ("a matrix product's", product)
    yield Row(f"3B: forward to 5/6 depth, TFLOP/s / {what}", ours, rate, ours / rate, ">= 0.45", ours / rate >= 0.45)
    if nominal:
        yield Row("the same / a matrix product's", ours, product, ours / product, "", None)


# --- the run --------------------------------------------------------------------------------------------------------------


def main() -> None:
    config = tyro.cli(BenchConfig, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    groups = {"speed": compare_speed, "reader": compare_reader, "memory": compare_memory, "gpu": measure_utilisation}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        publish(
            (row for name in config.parts for row in groups[name](bench)),
            config.out,
            config,
            device=machine_name(config.device == "cuda"),
            transformers=transformers.__version__,
        )


if __name__ == "__main__":
    main()
