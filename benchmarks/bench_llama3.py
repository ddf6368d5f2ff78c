"""Llama 3 beside transformers: same weights, same numbers, pairs timed in one run.

    python -m benchmarks.bench_llama3 --out llama3.json                    # numbers and speed at the embedded size
    python -m benchmarks.bench_llama3 --measures load --shapes 1b          # writes 2.5 GB to the temporary folder twice
    python -m benchmarks.bench_llama3 --measures mfu --shapes 3b --device cuda --dtype bfloat16

Each speed is the median of ratios of neighbouring timings, so that a machine that slows down slows both. Prints a table and writes
JSON. Everything is random weights: speed does not depend on them, and 64 greedy tokens of random weights are a hard comparison.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import SHAPES, args_of, random_model
from benchmarks.table import Row, machine_name, publish, race, seconds
from core.cli import one_line_errors, parse
from core.product import linear
from core.runtime import pick_device
from llama3 import ModelArgs, Sampling, Tokenizer, Transformer, generate, load_model
from llama3.tokenizer import special_tokens

MEASURES = ("numbers", "prefill", "capture", "decode", "load", "mfu")
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
NUMBERS: dict[str, dict[str, Any]] = {
    "MHA": {"num_key_value_heads": 4},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "rope 3.1": {"rope_parameters": SCALED | {"factor": 8.0, "rope_theta": 500_000.0}},
    "rope 3.2": {"rope_parameters": SCALED | {"factor": 32.0, "rope_theta": 500_000.0}},
    "odd vocabulary": {"vocab_size": 997},
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured and where."""

    out: Path = Path("bench_llama3.json")
    """JSON with every number of the table."""
    measures: tuple[str, ...] = ("numbers", "prefill", "capture", "decode")
    """Some of: numbers, prefill, capture, decode, load (peak memory of loading), mfu (share of the matrix rate)."""
    shapes: tuple[str, ...] = ("embedded",)
    """Sizes to measure, of: tiny, embedded, smollm, 1b, 3b. The numbers have sizes of their own."""
    device: str = "auto"
    """auto (the GPU where there is one), cpu or cuda. Numbers and loading are always measured on the CPU."""
    dtype: str = "float32"
    """float32, bfloat16 or float16, for what is timed."""
    batch: int = 8
    """Rows of a prefill and of a capture."""
    length: int = 256
    """Tokens a row there."""
    new_tokens: int = 64
    """Tokens that each decoding timing generates per row."""
    rounds: int = 9
    """Pairs of timings; the table shows the median."""
    in_flight: int = 16_384
    """Tokens of the pass whose share of the matrix rate is measured, in rows of 2,048."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""

    def __post_init__(self) -> None:
        for found, known in ((self.shapes, SHAPES), (self.measures, MEASURES)):
            if unknown := [name for name in found if name not in known]:
                raise ValueError(f"unknown name {unknown[0]!r}; expected some of {', '.join(known)}")


class Pair(NamedTuple):
    """The same weights in both implementations."""

    ours: Transformer
    theirs: LlamaForCausalLM


@torch.no_grad()
def make_pair(shape: dict[str, Any], device: str, dtype: torch.dtype, scale: float = 1.0) -> Pair:
    """Random weights written by transformers and read by `load_model`. `scale` multiplies their spread."""
    torch.manual_seed(0)
    config = LlamaConfig(**({"max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": 0} | shape))
    theirs = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=scale * parameter.shape[1] ** -0.5)
    theirs.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder, device=device, dtype=dtype)
    return Pair(ours, theirs.to(device))


def fake_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly this many ids, none of which ends a text."""
    n_ranks = vocab_size - 256
    made = (bytes([a, b, c]) for a in range(256) for b in range(256) for c in range(2))
    ranks = {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in zip(range(n_ranks - 256), made, strict=False)}
    tokenizer = Tokenizer(ranks, special_tokens(n_ranks))
    tokenizer.stop_ids = frozenset()
    return tokenizer


# --- numbers --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_numbers() -> Iterator[Row]:
    """Eight configurations in float32 on the CPU: logits, greedy tokens, padding, cached steps."""
    base = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for name, change in NUMBERS.items():
        ours, theirs = make_pair(base | {"vocab_size": 512} | change, "cpu", torch.float32, scale=1.5)
        tokens = torch.randint(1, ours.params.vocab_size, (4, 96), generator=torch.Generator().manual_seed(1))
        logits = ours(tokens)
        yield at_most(f"{name}: max logit difference", logits, theirs(tokens).logits)
        yield greedy_tokens(name, ours, theirs, tokens[:, :32])
        yield at_most(f"{name}: left padding against the row alone", *left_padded(ours, tokens))
        cache = ours.new_cache(4, 96)
        steps = torch.cat([ours(tokens[:, t : t + 1], cache=cache) for t in range(96)], dim=1)
        yield at_most(f"{name}: cached steps against one pass", steps, logits)


def at_most(measure: str, found: Tensor, expected: Tensor, limit: float = 1e-4) -> Row:
    difference = (found - expected).abs().max().item()
    return Row(measure, difference, 0.0, difference / limit, f"<= {limit:g}", difference <= limit)


def greedy_tokens(name: str, ours: Transformer, theirs: LlamaForCausalLM, prompt: Tensor) -> Row:
    options: Any = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = theirs.generate(prompt, **options)[:, prompt.shape[1] :]
    found = decode_ours(ours, prompt, 64)
    equal = int((found == expected).sum())
    return Row(
        f"{name}: greedy tokens equal, of {expected.numel()}", equal, expected.numel(), 1.0, "all", equal == expected.numel()
    )


def left_padded(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the last rows of a left-padded batch, and of each row alone."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row in range(len(tokens)):
        mask[row, : 20 * row] = False
    together = model(tokens, mask=mask)
    alone = [model(tokens[row : row + 1, 20 * row :])[0] for row in range(len(tokens))]
    return torch.cat([together[row, 20 * row :] for row in range(len(tokens))]), torch.cat(alone)


def decode_ours(model: Transformer, prompt: Tensor, n: int) -> Tensor:
    """Greedy continuation (B, n) through the loop that everything else uses."""
    out = torch.zeros(len(prompt), n, dtype=torch.long)
    sampling = Sampling(max_new_tokens=n, temperature=0)
    for piece in generate(model, fake_tokenizer(model.params.vocab_size), prompt.tolist(), sampling):
        out[piece.row, piece.position - prompt.shape[1]] = piece.token_id
    return out


# --- speed ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_speed(shape: str, config: BenchConfig, device: str) -> Iterator[Row]:
    ours, theirs = make_pair(SHAPES[shape], device, getattr(torch, config.dtype))
    tokens = torch.randint(1, ours.params.vocab_size, (config.batch, config.length), device=device)
    if "prefill" in config.measures:
        yield race(
            f"{shape}: prefill tokens/s, {config.batch} x {config.length}",
            (lambda: ours(tokens), lambda: theirs(tokens, use_cache=False)),
            tokens.numel(),
            1.1 if shape == "embedded" else 1.0,
            config.rounds,
        )
    if "capture" in config.measures:
        yield from compare_capture(shape, Pair(ours, theirs), tokens, config.rounds)
    if "decode" in config.measures:
        for rows in (1, 8):
            yield compare_decoding(shape, Pair(ours, theirs), tokens[:1, :32].repeat(rows, 1), config)


def compare_capture(shape: str, pair: Pair, tokens: Tensor, rounds: int) -> Iterator[Row]:
    """Activations after five sixths of the layers, as the two usual ways through transformers get them."""
    layer = max(0, round(pair.ours.params.n_layers * 5 / 6) - 1)
    site = f"layers.{layer}.resid_post"
    kept: list[Tensor] = []

    def with_hidden_states() -> Tensor:
        return pair.theirs(tokens, use_cache=False, output_hidden_states=True).hidden_states[layer + 1]  # type: ignore[no-any-return]

    def with_forward_hook() -> Tensor:
        kept.clear()
        handle = pair.theirs.model.layers[layer].register_forward_hook(lambda module, args, out: kept.append(out))
        pair.theirs.model(tokens, use_cache=False)
        handle.remove()
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]

    def captured() -> Tensor:
        return pair.ours.capture(tokens, [site])[site]

    difference = (captured().float() - with_hidden_states().float()).abs().max().item()
    scale = captured().float().abs().max().item()
    tolerance = 1e-4 if pair.ours.dtype == torch.float32 else 0.1
    assert difference <= tolerance * max(1.0, scale), f"not the same activations: they differ by {difference:g} of {scale:g}"
    for name, work, reach in (("hidden states", with_hidden_states, 1.3), ("LlamaModel and a hook", with_forward_hook, 1.1)):
        yield race(f"{shape}: capture tokens/s at {site} / {name}", (captured, work), tokens.numel(), reach, rounds)


def compare_decoding(shape: str, pair: Pair, prompt: Tensor, config: BenchConfig) -> Row:
    """Greedy decoding, against the faster of transformers' two caches."""
    n, tokenizer = config.new_tokens, fake_tokenizer(pair.ours.params.vocab_size)
    sampling = Sampling(max_new_tokens=n, temperature=0)
    options: Any = {"min_new_tokens": n, "max_new_tokens": n, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    prompts = prompt.tolist()

    def decode() -> None:
        for _ in generate(pair.ours, tokenizer, prompts, sampling):
            pass

    rows = [
        race(
            f"{shape}: decode tokens/s, batch {len(prompt)} / {cache or 'default'} cache",
            (decode, lambda cache=cache: pair.theirs.generate(prompt, **options, cache_implementation=cache)),  # type: ignore[misc]
            n * len(prompt),
            1.5,
            config.rounds,
        )
        for cache in (None, "static")
    ]
    return min(rows, key=lambda row: row.ratio)


# --- memory and utilisation -----------------------------------------------------------------------------------------------

LOAD = """
import json, re, sys, time, torch
from pathlib import Path
from llama3 import load_model
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = memory("VmRSS")
began = time.perf_counter()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
spent = time.perf_counter() - began
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"size": size, "peak": memory("VmHWM") - before, "seconds": spent}))
"""


def measure_loading(shape: str) -> Iterator[Row]:
    """Peak of resident memory while loading, in a process of its own, over the size of the parameters (bf16 on disk)."""
    args = args_of(shape)
    for kind in ("safetensors", "pth"):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(args, Path(folder), kind)
            for dtype in ("bfloat16", "float32"):
                run = subprocess.run([sys.executable, "-c", LOAD, folder, dtype], capture_output=True, text=True, check=True)
                found = json.loads(run.stdout)
                ratio = found["peak"] / found["size"]
                measure = f"{shape}: peak MB / size MB of loading {kind} as {dtype}, {found['seconds']:.1f} s"
                yield Row(measure, found["peak"] / 1e6, found["size"] / 1e6, ratio, "< 1.2", ratio < 1.2)


def write_checkpoint(args: ModelArgs, folder: Path, kind: str) -> None:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(args).named_parameters()}
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if kind == "pth":
        torch.save(weights, folder / "consolidated.00.pth")
    else:
        save_file(weights, folder / "consolidated.safetensors")
    names = ("dim", "hidden_dim", "n_layers", "vocab_size", "n_heads", "n_kv_heads", "tie_word_embeddings")
    (folder / "params.json").write_text(json.dumps({name: getattr(args, name) for name in names}))


@torch.no_grad()
def measure_utilisation(shape: str, config: BenchConfig, device: str) -> Iterator[Row]:
    """Model FLOP utilisation: operations per second of a forward pass over those of one large matrix product, measured in turns.

    Counted are two operations per weight and token, and 4 T/2 H K per token and layer for causal attention (the two products of
    T/2 keys on average); the embedding is a look-up and costs none.
    """
    model = random_model(shape, device, getattr(torch, config.dtype))
    args = model.params
    length = min(2048, config.in_flight)
    tokens = torch.randint(0, args.vocab_size, (config.in_flight // length, length), device=device)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers."))
    head = args.vocab_size * args.dim
    attention = args.n_layers * 4 * (length / 2) * args.n_heads * args.head_dim
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, config.dtype)) for _ in range(2))
    product = lambda: [linear(a, b) for _ in range(10)]  # noqa: E731
    compiled = torch.compile(model)
    final = [f"layers.{args.n_layers - 1}.resid_post"]
    works: dict[str, tuple[Callable[[], Any], float]] = {
        "capture of the last layer": (lambda: model.capture(tokens, final), 2 * weights + attention),
        "forward": (lambda: model(tokens), 2 * (weights + head) + attention),
        "forward, compiled": (lambda: compiled(tokens), 2 * (weights + head) + attention),
    }
    for name, (work, per_token) in works.items():
        operations = per_token * tokens.numel()
        for _ in range(3):
            seconds(work)
            seconds(product)
        pairs = [(operations / seconds(work), 20 * side**3 / seconds(product)) for _ in range(config.rounds)]
        ours, peak = (statistics.median(column) for column in zip(*pairs, strict=True))
        share = statistics.median(found / best for found, best in pairs)
        measure = f"{shape}: {name}, {tokens.numel():,} tokens, TFLOP/s / of a product"
        yield Row(measure, ours / 1e12, peak / 1e12, share, ">= 0.5", share >= 0.5)


# --- the run --------------------------------------------------------------------------------------------------------------


def measured(config: BenchConfig, device: str) -> Iterator[Row]:
    if "numbers" in config.measures:
        yield from compare_numbers()
    for shape in config.shapes:
        if {"prefill", "capture", "decode"} & set(config.measures):
            yield from compare_speed(shape, config, device)
        if "load" in config.measures:
            yield from measure_loading(shape)
        if "mfu" in config.measures:
            yield from measure_utilisation(shape, config, device)


def main() -> None:
    with one_line_errors():
        config = parse(BenchConfig, __doc__ or "")
        device = pick_device(config.device, 0).type
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    publish(
        measured(config, device),
        config.out,
        config,
        device=machine_name(device == "cuda"),
        dtype=config.dtype,
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    main()
