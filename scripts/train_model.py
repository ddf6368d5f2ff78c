"""Train the embedded model: tokenizer, then a Llama of 6.5 M parameters, on CPU in about two hours or on a GPU in minutes.

    python -m scripts.train_model --text state_union/ inaugural/ genesis/ movie_reviews.zip --out demo/model

The text is the embedded corpus (demo/corpus.py) and the public texts named in demo/model/README.md, which NLTK's downloader
fetches. Everything follows from the seed; on CPU the same threads give the same weights.
"""

import json
import math
import re
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
import xxhash
from safetensors.torch import save_file

from demo.corpus import documents
from llama3.args import ModelArgs
from llama3.chat_format import Message, encode_llama3
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer
from scripts.train_tokenizer import train_tokenizer, write_tokenizer

N_RANKS = 7_936  # with the 256 special tokens, 8,192 ids


@dataclass(frozen=True)
class TrainConfig:
    """How the embedded model is trained."""

    text: tuple[Path, ...]
    """Folders of .txt files and zip archives of them, read beside the embedded corpus."""
    out: Path
    """Folder for params.json, consolidated.safetensors, tokenizer.model and training.json."""
    steps: int = 2000
    """Optimizer steps."""
    sequences: int = 48
    """Sequences a step."""
    micro_sequences: int = 16
    """Sequences in one forward pass."""
    length: int = 256
    """Tokens a sequence."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, for the matrices of the layers."""
    adam_lr: float = 0.002
    """Peak learning rate of Adam, for embeddings and norms."""
    warmup: int = 40
    """Steps of linear warm-up; then the rate falls linearly to a twentieth."""
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    compile: bool = True
    bf16: bool = True
    """Matrix products in bf16, weights in float32; twice as fast where the CPU has instructions for it."""


class Text(NamedTuple):
    """A training document; `chat` is the request that it answers, where it has one."""

    name: str
    text: str
    chat: str | None = None


def read_texts(paths: tuple[Path, ...]) -> Iterator[Text]:
    """The embedded corpus and every text file below `paths`, exact duplicates dropped."""
    seen: set[str] = set()
    for document in documents():
        chat = None
        if document.label:
            style = document.name.split(".")[-2].replace("_", " ")
            chat = f"Write a {style} about {document.label}."
        yield Text(document.name, document.text, chat)
        seen.add(document.text)
    for name, raw in _files(paths):
        text = re.sub(r"[ \t]+", " ", raw.decode("utf-8", errors="replace").replace("\r", "")).strip()
        text = re.sub(r"(?<![.!?:\"'])\n(?!\n)", " ", text) if "genesis" in name or "state_union" in name else text
        text = re.sub(r" ([,.;:!?)]|n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", text).replace("( ", "(")  # spaces of pre-split reviews
        if text and text not in seen:
            seen.add(text)
            yield Text(name, text)


def _files(paths: tuple[Path, ...]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith(".txt")):
                    yield name, archive.read(name)
        else:
            files = sorted(path.rglob("*.txt"))
            if not files:
                raise ValueError(f"{path}: expected a folder with .txt files or a zip archive")
            for file in files:
                yield f"{path.name}/{file.name}", file.read_bytes()


def held_out(name: str) -> bool:
    """Whether a document is kept for evaluation: 3 %, by a hash of the name. Genesis, which is there twice, never is."""
    return "genesis" not in name and xxhash.xxh3_64_intdigest(name.encode()) % 100 < 3


class Sequences:
    """Token sequences for training.

    Half of them carry `<|begin_of_text|>` at the start and before each document, half never do: the pipeline feeds sentences
    without it.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[Text], length: int, seed: int) -> None:
        self.length, self.bos, self.eos = length, tokenizer.bos_id, tokenizer.eos_id
        self.documents = [np.array(tokenizer.encode(t.text), dtype=np.int32) for t in texts]
        eot = tokenizer.special_tokens["<|eot_id|>"]
        self.dialogs = [
            np.array([*encode_llama3(tokenizer, [Message("user", t.chat)])[1:], *tokenizer.encode(t.text), eot], dtype=np.int32)
            for t in texts
            if t.chat
        ]
        self.rng = np.random.default_rng(seed)

    def epoch(self) -> np.ndarray:
        """All documents once in a new order, `[n, length + 1]`, int32."""
        rows = []
        every = self.documents + self.dialogs
        order = self.rng.permutation(len(every))
        for with_bos, mine in zip((True, False), np.array_split(order, 2), strict=True):
            lead = [self.bos] if with_bos else []
            stream = np.concatenate([np.array([*lead, *every[i], self.eos], dtype=np.int32) for i in mine])
            width = self.length + 1 - with_bos
            windows = stream[: len(stream) // width * width].reshape(-1, width)
            rows.append(np.pad(windows, ((0, 0), (int(with_bos), 0)), constant_values=self.bos))
        joined = np.concatenate(rows)
        return joined[self.rng.permutation(len(joined))]

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Endless batches `[size, length + 1]`; an epoch's last rows open the next one."""
        rest = np.zeros((0, self.length + 1), dtype=np.int32)
        while True:
            rest = np.concatenate([rest, self.epoch()])
            while len(rest) >= size:
                yield torch.from_numpy(rest[:size]).long()
                rest = rest[size:]


def initialise_(model: Transformer) -> None:
    """Normal with std 0.02 for embeddings, `1 / sqrt(fan_in)` for matrices, zero for those that write to the residual."""
    for name, parameter in model.named_parameters():
        if "tok_embeddings" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("wo.weight", "w2.weight")):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: list[Text], length: int) -> float:
    """Bits per UTF-8 byte of `texts`. Windows of `length` tokens overlap by half; each token is scored once, with at least half
    a window of context where the document has it."""
    device, bits, n_bytes = model.device, 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text.text)]
        n_bytes += len(text.text.encode())
        for start in range(0, max(1, len(ids) - 1), length // 2):
            window = torch.tensor([ids[start : start + length + 1]], device=device)
            if start and window.shape[1] <= length // 2 + 1:
                break
            with torch.no_grad():
                losses = F.cross_entropy(model(window[:, :-1])[0].float(), window[0, 1:], reduction="none")
            bits += losses[length // 2 if start else 0 :].sum().item() / math.log(2)
    return bits / n_bytes


def train(
    config: TrainConfig, tokenizer: Tokenizer, train_texts: list[Text], test_texts: list[Text]
) -> tuple[Transformer, list[dict[str, float]]]:
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    args = ModelArgs(
        dim=256, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.n_vocab, multiple_of=64, max_seq_len=config.length,
        tie_word_embeddings=True, rope_theta=10_000.0,
    )  # fmt: skip
    model = Transformer(args)
    initialise_(model)
    model.to(config.device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and name.startswith("layers."))]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [config.muon_lr, config.adam_lr]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(config.device.split(":")[0], dtype=torch.bfloat16, enabled=config.bf16):
            logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    compiled = torch.compile(loss_of) if config.compile else loss_of
    batches = Sequences(tokenizer, train_texts, config.length, config.seed).batches(config.sequences)
    history: list[dict[str, float]] = []
    began = time.monotonic()
    for step in range(1, config.steps + 1):
        factor = min(step / config.warmup, 1.0, max(0.05, (config.steps - step) / (0.6 * config.steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss = 0.0
        for micro in torch.split(next(batches).to(config.device), config.micro_sequences):
            part = compiled(micro) * (len(micro) / config.sequences)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        entry = {"step": step, "tokens": step * config.sequences * config.length, "loss": loss}
        if step % 200 == 0 or step == config.steps:
            entry["held_out_bits_per_byte"] = bits_per_byte(
                model, tokenizer, test_texts[:: 1 if step == config.steps else 8], config.length
            )
            save(model, tokenizer, config.out)
        history.append(entry)
        print(json.dumps(entry | {"of": config.steps, "seconds": round(time.monotonic() - began)}), flush=True)
    return model, history


def save(model: Transformer, tokenizer: Tokenizer, out: Path) -> None:
    """Write the weights in bf16 and Meta's `params.json`."""
    weights = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "consolidated.safetensors")
    args = asdict(model.params)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
    params = {name: args[name] for name in (*names, "tie_word_embeddings", "max_seq_len")}
    (out / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def main() -> None:
    config = tyro.cli(TrainConfig, description=__doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    texts = list(read_texts(config.text))
    train_texts = [t for t in texts if not held_out(t.name)]
    test_texts = [t for t in texts if held_out(t.name)]
    write_tokenizer(train_tokenizer((t.text for t in train_texts), N_RANKS), config.out / "tokenizer.model")
    tokenizer = Tokenizer.from_file(config.out / "tokenizer.model")
    size = {part: sum(len(t.text.encode()) for t in some) for part, some in (("train", train_texts), ("held_out", test_texts))}
    print(json.dumps({"documents": [len(train_texts), len(test_texts)], "bytes": size}), flush=True)
    model, history = train(config, tokenizer, train_texts, test_texts)
    save(model, tokenizer, config.out)
    record = {
        "config": {k: v for k, v in asdict(config).items() if k not in ("out", "text")},
        "torch": torch.__version__,
        "bytes": size,
        "history": history,
    }
    (config.out / "training.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
