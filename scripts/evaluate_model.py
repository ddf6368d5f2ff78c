"""Judge the embedded model on documents that it was not trained on, against `xz` and a 5-gram model; draw its loss curve.

python -m scripts.evaluate_model --text state_union/ inaugural/ genesis/ movie_reviews.zip --model demo/model
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from llama3 import Sampling, complete, load_model, load_tokenizer
from scripts.ngram import NGram
from scripts.train_model import Text, bits_per_byte, held_out, read_texts

PROMPTS = (
    "The soldiers crossed the river at night and",
    "When the bread comes out of the oven,",
    "My dear sister,",
    "Returns a tensor with",
    "The film is",
)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate on what."""

    text: tuple[Path, ...]
    """The texts that scripts.train_model was given: the same documents are held out."""
    model: Path = Path("demo/model")
    """Folder of the model; `evaluation.json` and `loss.png` are written there."""


def xz_bits_per_byte(train: list[Text], test: list[Text]) -> float:
    """Bits per byte of the held-out text given the training text: `8 (xz(train + test) - xz(train)) / bytes`, 64 MiB window."""

    def size(data: bytes) -> int:
        chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 * 2**20}]
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=chain))

    known, new = ("\n".join(t.text for t in part).encode() for part in (train, test))
    return 8 * (size(known + new) - size(known)) / len(new)


def draw_loss(history: list[dict[str, float]], path: Path) -> None:
    """The training loss of each step in nats per token, thin, and its running mean over 20 steps."""
    tokens = [entry["tokens"] / 1e6 for entry in history]
    loss = [entry["loss"] for entry in history]
    smooth = [sum(loss[max(0, i - 19) : i + 1]) / len(loss[max(0, i - 19) : i + 1]) for i in range(len(loss))]
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=150)
    axes.plot(tokens, loss, color="#c9d6e8", linewidth=0.8)
    axes.plot(tokens, smooth, color="#1f4e8c", linewidth=1.6)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    texts = list(read_texts(config.text))
    train, test = [t for t in texts if not held_out(t.name)], [t for t in texts if held_out(t.name)]
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    n_bytes = sum(len(t.text.encode()) for t in test)
    encoded = [[tokenizer.encode(t.text) for t in part] for part in (train, test)]
    result = {
        "held_out_documents": len(test),
        "held_out_bytes": n_bytes,
        "held_out_tokens": sum(map(len, encoded[1])),
        "train_tokens": sum(map(len, encoded[0])),
        "bits_per_byte": {
            "model": bits_per_byte(model, tokenizer, test, model.params.max_seq_len),
            "5-gram": NGram(encoded[0], tokenizer.n_vocab, tokenizer.bos_id).bits(encoded[1]) / n_bytes,
            "xz": xz_bits_per_byte(train, test),
        },
        "samples": dict(
            zip(PROMPTS, complete(model, tokenizer, list(PROMPTS), Sampling(max_new_tokens=60, seed=1)), strict=True)
        ),
    }
    (config.model / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    draw_loss(json.loads((config.model / "training.json").read_text())["history"], config.model / "loss.png")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
