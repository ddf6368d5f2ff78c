"""GGUF models: the same weights as the folder they came from, every quantised type, and one tensor in memory at a time."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import xxhash
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama3 import ModelArgs, RopeScaling, Transformer, load_model
from llama3.args import RopeFactors
from llama3.gguf import read_header
from llama3.rope import frequencies
from tests.ggml_blocks import TWINS, random_block
from tests.gguf_files import INT32, UINT64, Stored, Typed, ggml_name, gguf_bytes, llama_gguf, llama_metadata, write
from tests.tiny import tiny_args, tiny_llama

TOKENS = torch.arange(20)[None]
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def random_model(seed: int = 0, **overrides: Any) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(tiny_args(**({"vocab_size": 96, "hidden_dim": 64} | overrides))).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_and_its_gguf_are_the_same_model(tmp_path: Path, tied: bool) -> None:
    folder = load_model(tiny_llama(tmp_path / "meta", tie_word_embeddings=tied))
    found = load_model(llama_gguf(tmp_path / "x.gguf", folder))
    derived_once = replace(folder.params, multiple_of=256, norm_eps=found.params.norm_eps)
    assert found.params == derived_once
    assert found.params.norm_eps == pytest.approx(folder.params.norm_eps)  # float32 in the file
    assert (found.output.weight is found.tok_embeddings.weight) == tied
    assert torch.equal(found(TOKENS), folder(TOKENS))


def test_heads_of_another_width(tmp_path: Path) -> None:
    """Key and value lengths: `head_dim` that is not `dim / n_heads`."""
    model = random_model(head_dim=12)
    lengths = {"llama__attention__key_length": 12, "llama__attention__value_length": 12}
    found = load_model(llama_gguf(tmp_path / "x.gguf", model, **lengths))
    assert found.params.head_dim == 12
    assert torch.equal(found(TOKENS), model(TOKENS))


def test_hash_is_that_of_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "x.gguf", random_model(), "Q8_0")
    assert load_model(path).weights_hash == xxhash.xxh3_64(path.read_bytes()).hexdigest()


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    """Ollama's blobs have no suffix."""
    path = llama_gguf(tmp_path / "sha256-0123", random_model())
    assert load_model(str(path)).params.n_layers == 3


# --- types ----------------------------------------------------------------------------------------------------------------


def twin(kind: str, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """Block by block, number by number."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    numbers = [TWINS[kind](data[at : at + size]) for at in range(0, len(data), size)]
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("numbers", [1, 100, 10_000])
def test_quantised_by_the_package(tmp_path: Path, kind: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the weights that were quantised, and exactly what the twin reads, however many numbers are read at a time."""
    monkeypatch.setattr("llama3.gguf_weights.NUMBERS", numbers)
    model = random_model()
    found = dict(load_model(llama_gguf(tmp_path / "x.gguf", model, kind)).named_parameters())
    coarse = 1 / 16 if "Q4" in kind else 1 / 32 if "Q5" in kind else 1 / 250
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(found[name], weight)
            continue
        assert (found[name] - weight).abs().max() <= coarse * (weight.max() - weight.min())
        data = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[kind]).tobytes()
        torch.testing.assert_close(found[name].double(), twin(kind, data, tuple(weight.shape)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_plain_numbers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = random_model()
    found = load_model(llama_gguf(tmp_path / "x.gguf", model, kind))
    assert torch.equal(found.layers[0].attention.wq.weight, model.layers[0].attention.wq.weight.to(dtype).float())
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", TWINS)
def test_random_blocks_of_every_type(tmp_path: Path, kind: str) -> None:
    """The package quantises few of them; any bits will do for the others, as long as the scales are finite."""
    model, rng = random_model(dim=256, n_heads=1, n_kv_heads=1, hidden_dim=256, n_layers=1), np.random.default_rng(0)
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    data = b"".join(random_block(kind, size, rng) for _ in range(16 * 256 // block))
    metadata = llama_metadata(model.params) | {"llama.vocab_size": 16}
    tensors = {name: Stored(ggml_name(name), tuple(w.shape), 0, w.numpy().tobytes()) for name, w in model.named_parameters()}
    tensors["tok_embeddings.weight"] = Stored("token_embd.weight", (16, 256), int(number), data)
    found = load_model(write(tmp_path / "x.gguf", list(metadata.items()), list(tensors.values())))
    expected = twin(kind, data, (16, 256))
    torch.testing.assert_close(found.tok_embeddings.weight.double(), expected, rtol=1e-6, atol=1e-9)


def test_the_package_dequantises_what_it_did() -> None:
    """None of the types above is lost with a new version of it."""

    def dequantises(kind: GGMLQuantizationType) -> bool:
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in GGML_QUANT_SIZES if dequantises(kind)} >= set(TWINS)


def test_the_own_dtype_of_a_quantised_model_is_bfloat16(tmp_path: Path) -> None:
    """What a GPU would load it in; the norms, float32 in every GGUF file, do not decide."""
    from llama3.checkpoint import _own_dtype
    from llama3.weight_files import open_weights

    for kind, dtype in {"Q4_1": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.items():
        assert _own_dtype([open_weights(llama_gguf(tmp_path / "x.gguf", random_model(), kind))]) == dtype


# --- memory ---------------------------------------------------------------------------------------------------------------

PEAK = """if True:
    import re, sys, threading, torch, llama3, llama3.gguf_weights
    from pathlib import Path

    def anonymous():
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())

    llama3.load_model(sys.argv[1])  # what is allocated once and kept: threads, caches
    before = peak = anonymous()
    done = False
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = llama3.load_model(sys.argv[2])
    done = True
    watcher.join()
    sizes = [p.numel() * 4 for p in model.parameters()]
    print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Anonymous memory while loading: at most the result and 1.1 times its largest tensor."""
    small = llama_gguf(tmp_path / "small.gguf", random_model(), "Q8_0")
    large = llama_gguf(tmp_path / "large.gguf", random_model(dim=256, hidden_dim=8192, vocab_size=32_768), "Q8_0")
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    peak, total, largest = map(int, done.stdout.split())
    assert total <= peak <= total + 1.1 * largest


# --- RoPE -----------------------------------------------------------------------------------------------------------------


def converted(scaling: RopeScaling, theta: float, head_dim: int) -> Stored:
    """`rope_freqs.weight` as llama.cpp's converter computes it, pair by pair."""
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        smooth = scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        between = 1 / ((1 - smooth) / scaling.factor + smooth)
        factors.append(1.0 if wavelength < high else scaling.factor if wavelength > low else between)
    return Stored("rope_freqs.weight", (len(factors),), 0, struct.pack(f"<{len(factors)}f", *factors))


@pytest.mark.parametrize("factor", [8.0, 32.0], ids=["3.1", "3.2"])
def test_rope_of_llama_31_and_32(tmp_path: Path, factor: float) -> None:
    """Divisors in a tensor, as llama.cpp's converter writes them, or keys: both give what config.json gives."""
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=64)
    model = random_model(rope_scaling=scaling)
    assert not torch.allclose(model(TOKENS), random_model()(TOKENS))
    tensor = converted(scaling, model.params.rope_theta, model.params.head_dim)
    by_tensor = load_model(llama_gguf(tmp_path / "tensor.gguf", model, extra=[tensor]))
    torch.testing.assert_close(by_tensor(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    keys = {"type": "llama3", "factor": factor, "original_context_length": 64}
    by_keys = llama_gguf(tmp_path / "keys.gguf", model, **{f"llama__rope__scaling__{k}": v for k, v in keys.items()})
    assert torch.equal(load_model(by_keys)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("keys", [{"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope__scale_linear": 4.0}])
def test_linear_scaling_divides_all_frequencies(tmp_path: Path, keys: dict[str, Any]) -> None:
    args = load_model(llama_gguf(tmp_path / "x.gguf", random_model(), **{f"llama__{k}": v for k, v in keys.items()})).params
    plain = frequencies(args.head_dim, args.rope_theta, None)
    assert torch.equal(frequencies(args.head_dim, args.rope_theta, args.rope_scaling), plain / 4)
    assert isinstance(args.rope_scaling, RopeFactors)


def test_scaling_that_is_none(tmp_path: Path) -> None:
    keys = {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}
    assert load_model(llama_gguf(tmp_path / "x.gguf", random_model(), **keys)).params.rope_scaling is None


# --- what is refused ------------------------------------------------------------------------------------------------------

NORMS = Stored("rope_freqs.weight", (3,), 0, struct.pack("<3f", 1, 1, 1))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general__architecture": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
    "no architecture": ({"general__architecture": None}, "general.architecture is None"),
    "an adapter": ({"general__type": "adapter"}, "general.type is 'adapter'"),
    "a part of several": ({"split__count": 3}, "is one of 3 parts; join them"),
    "a key missing": ({"llama__block_count": None}, r"missing key\(s\) block_count"),
    "words for a number": ({"llama__block_count": "three"}, "n_layers must be a whole number of at least 1; found 'three'"),
    "key heads by layer": ({"llama__attention__head_count_kv": Typed(INT32, [2, 2, 2])}, r"n_kv_heads must be .* found \[2"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count = 8 is not supported; expected 0"),
    "value length": ({"llama__attention__value_length": 16}, "llama.attention.value_length = 16 is not supported; expected 8"),
    "part of a head": ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported; expected 8"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
    "a factor of 0": ({"llama__rope__scaling__factor": -1.0}, "llama.rope.scaling.factor must be a number above 0"),
    "infinite theta": ({"llama__rope__freq_base": float("inf")}, "rope_theta must be a number above 0; found inf"),
    "2^31 layers": ({"llama__block_count": 2**31}, "n_layers must be at most 4,096; found 2,147,483,648"),
    "2^31 positions": ({"llama__context_length": 2**31}, "max_seq_len must be at most .* found 2,147,483,648"),
    "2^32 wide": ({"llama__embedding_length": 2**32 - 1}, "dim must be at most 268,435,456"),
    "a layer too many": ({"llama__block_count": 4}, r"9 of 38 tensors missing .* layers\.3\.attention"),
    "a layer too few": ({"llama__block_count": 2}, r"holds blk\.2\..*, which a Llama of 2 layers does not have"),
    "another width": ({"llama__feed_forward_length": 65}, r"ffn_.*\.weight is \[.*\], expected \[.*\] by the file's own"),
}


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_metadata_that_we_cannot_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(llama_gguf(tmp_path / "x.gguf", random_model(), **changes), message)


def refusals(path: Path, files: Iterable[bytes]) -> int:
    """How many of `files` are refused, each in one line; the others load."""
    messages = []
    for data in files:
        path.write_bytes(data)
        try:
            load_model(path)
        except ValueError as error:
            messages.append(str(error))
    assert [m for m in messages if "\n" in m or not m.startswith(f"{path}: ")] == []
    return len(messages)


ODD = (Typed(INT32, -1), "x", ["x"], Typed(INT32, [1, 2]), True, float("nan"), Typed(UINT64, 2**63), 0)


def test_odd_values_of_every_key(tmp_path: Path) -> None:
    model = random_model()
    optional = (
        "rope.scaling.type",
        "rope.scaling.factor",
        "attention.key_length",
        "expert_count",
        "rope.scaling.low_freq_factor",
    )
    keys = [*llama_metadata(model.params), "split.count", "general.alignment", *(f"llama.{key}" for key in optional)]
    changes = [{key.replace(".", "__"): value} for key in keys for value in ODD]
    files = [llama_gguf(tmp_path / "x.gguf", model, **change).read_bytes() for change in changes]
    assert refusals(tmp_path / "x.gguf", files) > len(files) // 2


def test_flipped_bits_in_the_header(tmp_path: Path) -> None:
    """Seeded: one to three bits anywhere before the first tensor."""
    rng, path = random.Random(0), llama_gguf(tmp_path / "x.gguf", random_model(), "Q8_0")
    data, end = path.read_bytes(), read_header(path).tensors["token_embd.weight"].offset

    def flipped() -> bytes:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return bytes(changed)

    assert refusals(path, [flipped() for _ in range(300)]) > 200


def numbers(kind: int, n_bytes: int) -> list[Stored]:
    return [Stored("blk.0.attn_q.bias", (32,), kind, bytes(n_bytes))]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([NORMS], "rope_freqs.weight has 3 values, expected 4"),
        ([NORMS._replace(data=struct.pack("<3f", 1, 0, 1))], "must be numbers above 0; found 0.0|has 3 values"),
        (
            [NORMS._replace(shape=(4,), data=struct.pack("<4f", 1, 0, 1, 1))],
            "divisors of RoPE must be numbers above 0; found 0.0",
        ),
        ([NORMS._replace(shape=(6,), kind=1)], r"rope_freqs.weight is F16 \[6\]"),
        (numbers(0, 128), "holds blk.0.attn_q.bias, which a Llama of 3 layers does not have"),
        (numbers(26, 128), r"blk.0.attn_q.bias is I32 \[32\], which gguf .* cannot dequantise"),
        (numbers(8, 34), r"blk.0.attn_q.bias is Q8_0 \[32\]"),
    ],
)
def test_tensors_that_we_cannot_use(tmp_path: Path, extra: list[Stored], message: str) -> None:
    refused(llama_gguf(tmp_path / "x.gguf", random_model(), extra=extra), message)


def test_a_vocabulary_without_a_model(tmp_path: Path) -> None:
    metadata = llama_metadata(random_model().params)
    refused(write(tmp_path / "x.gguf", list(metadata.items())), "holds no token_embd.weight")


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "x.gguf", random_model(), "Q8_0")
    data, at = bytearray(path.read_bytes()), read_header(path).tensors["blk.0.attn_q.weight"].offset
    data[at : at + 2] = b"\0\x7e"  # the scale of the first block: NaN
    path.write_bytes(data)
    refused(path, r"holds NaN or infinity in torch.float32; the file is damaged")


def test_damaged_headers_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([("general.architecture", "llama")], version=1))
    refused(path, "version 1")
    path.write_bytes(b"PK\3\4")
    refused(path, "4 bytes")


def test_a_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "x.gguf", random_model())
    with pytest.raises(ValueError, match=r"a \.gguf file itself; found x\.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 2**40}, "config.json: max_seq_len must be at most"),
        ({"num_hidden_layers": 10**9}, "config.json: n_layers must be at most"),
        ({"rope_theta": float("inf")}, "config.json: rope_theta must be a number above 0; found inf"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "8", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192}}, "factor of RoPE must be a number above 0; found '8'"),
    ],
)  # fmt: skip
def test_other_layouts_are_as_careful(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The neighbours: a config.json with absurd numbers is refused before memory is asked for."""
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48, "vocab_size": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_hf_config(json.loads((tmp_path / "config.json").read_text()))
