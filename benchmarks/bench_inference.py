"""What steering and watching cost while text is generated, and how soon the first token comes; pairs in one run.

    python -m benchmarks.bench_inference --out inference.json                  # the embedded model and its SAE
    python -m benchmarks.bench_inference --model M --sae run/sae --top top/ --device cuda
    python -m benchmarks.bench_inference --shape 1b --new-tokens 8 --batches 1 # random weights of a real size

Each cost is the median over rounds of neighbouring timings, without and with the edit in changing order, and is printed with its
quartiles. Decoding is greedy from the same prompts, and no end token ends a row, so that both sides generate as many tokens.
Prints a table and writes JSON.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from benchmarks.shapes import SHAPES, random_model
from benchmarks.table import in_turns, machine_name, publish, said
from core.cli import machine, one_line_errors, parse
from core.runtime import pick_device
from inference.session import Features, InferenceConfig, Session, open_session
from inference.steering import MODES, Edit, Recipe, Steering
from inference.watch import Watch
from inference.web.validation import Knobs
from inference.web.workbench import checked_request, compare
from llama3 import load_tokenizer
from llama3.generate import HooksFor, Sampling, generate
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer
from sae.model import SAE, SAEConfig

PROMPT = "The storm came over the harbour in the night, and in the morning nobody could find the old man who kept the light."
FIRST_TOKEN_MS = 300.0


@dataclass(frozen=True, kw_only=True)
class BenchConfig(InferenceConfig):
    """What is measured and where."""

    out: Path = machine(Path("bench_inference.json"))
    """JSON with every number of the table."""
    batches: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    new_tokens: int = 64
    """Tokens that each timing generates per row."""
    rounds: int = 9
    """Pairs of timings."""
    shape: str = ""
    """Instead of --model: random weights of this size (smollm, 1b or 3b; bfloat16 on a GPU) and, at its middle layer, a random SAE
    with 32 latents a dimension and k 64. Only decoding is measured then."""
    latent: int = -1
    """Latent that is steered; -1 takes the one that fires on most tokens of the prompt, the dearest for a clamp. Another row
    clamps one that is silent on the whole prompt, as most are."""


class Row(NamedTuple):
    """One line of the table."""

    measure: str
    plain: float
    changed: float
    cost: float
    quartiles: tuple[float, float]
    reach: str
    reached: bool | None

    def __str__(self) -> str:
        low, high = self.quartiles
        figures = f"{self.plain:>9,.4g} {self.changed:>9,.4g} {self.cost:>8.3g} {low:>8.3g} {high:>8.3g}"
        return f"{self.measure:<62} {figures}  {self.reach:<9} {said(self.reached)}"


HEADER = f"{'measure':<62} {'plain':>9} {'changed':>9} {'cost':>8} {'25 %':>8} {'75 %':>8}  {'to reach':<9} reached"


class Decoding:
    """Greedy decoding of the same prompts, with whatever hooks."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, rows: int, n: int) -> None:
        self._model, self._n = model, n
        self.prompts = [tokenizer.encode_prompt(PROMPT)] * rows
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.stop_ids = frozenset()

    def run(self, hooks: HooksFor | None) -> None:
        for _ in generate(self._model, self._tokenizer, self.prompts, Sampling(self._n, temperature=0), hooks):
            pass


def race(measure: str, decoding: Decoding, make: Callable[[], HooksFor | None], config: BenchConfig, reach: float) -> Row:
    """Tokens per second without and with what `make` gives for each request, which is timed too, and the cost in per cent."""
    pairs = in_turns((lambda: decoding.run(None), lambda: decoding.run(make())), config.rounds)
    tokens = len(decoding.prompts) * config.new_tokens
    plain, changed = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
    costs = [100 * (1 - without / with_it) for without, with_it in pairs]
    low, cost, high = statistics.quantiles(costs, n=4)
    return Row(measure, plain, changed, cost, (low, high), f"<= {reach:g} %", cost <= reach)


def compare_steering(session: Session, config: BenchConfig, latent: int) -> Iterator[Row]:
    """Tokens per second of decoding, in every mode of an edit, and while a latent is watched."""
    features = session.needs_features()
    watches = {"": None, ", with an alarm at its maximum": 1.0}
    silent = {"clamp, a latent silent on the prompt": Edit(latent=silent_latent(session), mode="clamp")}
    for rows in config.batches:
        decoding = Decoding(session.model, session.tokenizer, rows, config.new_tokens)
        yield from compare_modes(decoding, features.steering, config, latent, silent)
        for how, threshold in watches.items():
            watch = partial(_watching, features, latent, threshold)
            yield race(f"decode tokens/s, batch {rows}: one latent watched{how}", decoding, watch, config, 10)


def _watching(features: Features, latent: int, threshold: float | None) -> HooksFor:
    return Watch(features, (latent,), threshold).hooks_for


def compare_modes(
    decoding: Decoding, steering: Steering, config: BenchConfig, latent: int, more: Mapping[str, Edit] = MappingProxyType({})
) -> Iterator[Row]:
    """Tokens per second of decoding without edits, with one of every mode, and with each of `more`."""
    edits = {mode: Edit(latent=latent, mode=mode) for mode in MODES} | dict(more)  # type: ignore[arg-type]
    recipes = {name: Recipe((edit,), steering.sae.weights_hash) for name, edit in edits.items()}
    lengths = [len(prompt) for prompt in decoding.prompts]
    for name, recipe in {"no edit": Recipe(), **recipes}.items():
        measure = f"decode tokens/s, batch {len(lengths)}: {name}"
        yield race(measure, decoding, lambda r=recipe: steering.hooks_for([r] * len(lengths), lengths), config, 10)  # type: ignore[misc]


def first_token(session: Session, config: BenchConfig, latent: int) -> Iterator[Row]:
    """Milliseconds from a request as the page sends it, text and all, to the first token of baseline and steered column."""
    features = session.needs_features()
    edit = Recipe((Edit(latent=latent),), features.sae.weights_hash)
    room = session.context - config.new_tokens
    for words in (1, 16, room // 2):
        text = " ".join((PROMPT.split() * words)[:words])
        n_tokens = len(session.tokenizer.encode_prompt(text))

        def begin(recipe: Recipe, text: str = text) -> None:
            next(compare(session, checked_request(session, text, recipe, Knobs())))

        pairs = in_turns((lambda: begin(Recipe()), lambda: begin(edit)), config.rounds)
        plain, both = ([1000 * value for value in column] for column in zip(*pairs, strict=True))
        low, median, high = statistics.quantiles(both, n=4)
        measure = f"first token of a prompt of {n_tokens} tokens, ms: baseline / both columns"
        reached = median <= FIRST_TOKEN_MS
        yield Row(measure, statistics.median(plain), median, median, (low, high), f"<= {FIRST_TOKEN_MS:g}", reached)


@torch.no_grad()
def zero_edits(session: Session, latent: int) -> Row:
    """Largest difference of the logits of a prompt under edits that change nothing; 0 is bit-identical."""
    steering = session.needs_features().steering
    tokens = torch.tensor([session.tokenizer.encode_prompt(PROMPT)], device=session.model.device)
    plain, worst = session.model(tokens), 0.0
    nothing: Sequence[tuple[Edit, ...]] = ((), (Edit(latent=latent, strength=0),), (Edit(latent=latent, positions=10**6),))
    for edits in nothing:
        hooks = steering.hooks_for([Recipe(edits, steering.sae.weights_hash)], [tokens.shape[1]])
        with session.model.hooks(hooks(torch.arange(tokens.shape[1], device=tokens.device)[None]) if hooks else {}):
            worst = max(worst, float((session.model(tokens) - plain).abs().max()))
    return Row("largest logit difference: no, zero and far away edits", 0, worst, worst, (worst, worst), "= 0", worst == 0)


def dearest_latent(session: Session) -> int:
    """The latent that fires on most tokens of the prompt."""
    reading = session.read(session.tokenizer.encode_prompt(PROMPT))
    return int(reading.indices[1:][reading.values[1:] > 0].bincount().argmax())


def silent_latent(session: Session) -> int:
    """The first latent that fires on the corpus and on no token of the prompt."""
    reading = session.read(session.tokenizer.encode_prompt(PROMPT))
    silent = session.needs_features().max_values.cpu() > 0
    silent[reading.indices[reading.values > 0]] = False
    return int(silent.nonzero()[0])


@torch.no_grad()
def at_shape(config: BenchConfig, device: torch.device) -> tuple[SAE, Iterator[Row]]:
    """A random SAE on random weights of `config.shape`, and the rows of steering by a latent that fires on the prompt."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = random_model(config.shape, device, dtype), load_tokenizer("demo")
    d, site = model.params.dim, f"layers.{model.params.n_layers // 2}.resid_post"
    sae = SAE(SAEConfig(d_model=d, n_latents=32 * d, k=64, norm="none")).to(device).requires_grad_(False)
    decodings = [Decoding(model, tokenizer, rows, config.new_tokens) for rows in config.batches]
    found = sae.encode(model.capture(torch.tensor(decodings[0].prompts[:1], device=device), [site])[site][0, 1:].float())
    latent = int(found.indices[found.values > 0].bincount().argmax())
    steering = Steering(sae, site, torch.full((32 * d,), float(found.values.max()), device=device))
    return sae, (row for decoding in decodings for row in compare_modes(decoding, steering, config, latent))


def measured(session: Session, config: BenchConfig) -> Iterator[Row]:
    latent = dearest_latent(session) if config.latent < 0 else config.latent
    yield zero_edits(session, latent)
    yield from compare_steering(session, config, latent)
    yield from first_token(session, config, latent)


def main() -> None:
    with one_line_errors():
        config = parse(BenchConfig, __doc__ or "")
        if config.shape and config.shape not in (known := [name for name in SHAPES if name != "tiny"]):  # of too few tokens
            raise ValueError(f"--shape: expected one of {', '.join(known)}; found {config.shape!r}")
        if config.threads:
            torch.set_num_threads(config.threads)
        device = pick_device(config.device, 0)
        if config.shape:
            sae, rows = at_shape(config, device)
        else:
            session = open_session(config, device)
            sae, rows = session.needs_features().sae, measured(session, config)
    name = f"random weights of {config.shape}" if config.shape else session.name
    shape = f"d_model {sae.cfg.d_model}, {sae.cfg.n_latents} latents, k {sae.cfg.k}"
    publish(rows, config.out, config, HEADER, device=machine_name(device.type == "cuda"), model=name, SAE=shape)


if __name__ == "__main__":
    main()
