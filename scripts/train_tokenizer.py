"""Train the embedded model's tokenizer: byte-level BPE on Llama 3's split pattern, written in its `tokenizer.model` format."""

import base64
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainee

from llama3.tokenizer import SPLIT_PATTERN


def train_tokenizer(texts: Iterable[str], n_ranks: int) -> dict[bytes, int]:
    """`n_ranks` byte strings and their ranks, learnt from `texts`: 256 single bytes, then merges in order of frequency."""
    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    to_byte = _printable_bytes()
    return {bytes(to_byte[c] for c in token): rank for token, rank in trainee.get_vocab().items()}


def write_tokenizer(ranks: dict[bytes, int], path: Path) -> None:
    """Write `tokenizer.model`: a line `base64(token) rank` for each token."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda item: item[1])]
    path.write_text("".join(lines))


def _printable_bytes() -> dict[str, int]:
    """The printable character that byte-level BPE files use for each byte, as in GPT-2's `encoder.py`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}
