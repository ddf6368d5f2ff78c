"""Loading: the same numbers as transformers for every layout, one copy, one clear line for every checkpoint that is wrong."""

import http.server
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from llama3 import Transformer, load_model, load_tokenizer
from llama3.hub import DEMO, locate, model_name
from llama3.layouts import interleave_
from tests.tiny import tiny_args, tiny_llama

SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "MHA: as many key heads as query heads": {"num_key_value_heads": 4},
    "GQA: the grouping of Llama 3": {"num_key_value_heads": 2},
    "MQA: one key head for all": {"num_key_value_heads": 1},
    "tied head: no lm_head in the file": {"tie_word_embeddings": True},
    "RoPE of 3.1": {"rope_parameters": SCALED | {"factor": 8.0, "rope_theta": 10_000.0}},
    "RoPE of 3.2, tied": {"rope_parameters": SCALED | {"factor": 32.0, "rope_theta": 500.0}, "tie_word_embeddings": True},
    "odd vocabulary: no multiple of anything": {"vocab_size": 97},
    "head_dim that is not dim / n_heads": {"head_dim": 12, "num_key_value_heads": 2},
}


def save_transformers(folder: Path, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random LlamaForCausalLM, saved to `folder`; its weights are large enough for every part to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(shape | overrides))).eval().requires_grad_(False)
    for parameter in model.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_greedy_tokens_are_those_of_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = save_transformers(tmp_path, **overrides), load_model(tmp_path)
    tokens = torch.randint(0, ours.params.vocab_size, (3, 40))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    prompt = tokens[:, :8]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    cache, found = ours.new_cache(3, 72), [prompt]
    for _ in range(64):
        found.append(ours(found[-1], cache=cache, last_only=True).argmax(-1))
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_hugging_face_shards_with_an_index(tmp_path: Path) -> None:
    theirs = save_transformers(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = torch.randint(0, 64, (2, 10))
    torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_old_files_with_rope_tables_load(tmp_path: Path) -> None:
    """transformers before 4.32 saved `rotary_emb.inv_freq`; tied models saved as untied hold a `lm_head` that is not used."""
    theirs = save_transformers(tmp_path, tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = torch.zeros(64, 32)
    save_file(weights, tmp_path / "model.safetensors")
    tokens = torch.randint(0, 64, (2, 10))
    torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_interleave_moves_each_row_where_meta_has_it() -> None:
    """Row i of a head goes to 2i, row i + K/2 to 2i + 1, for every head alone."""
    weight = torch.arange(12.0)[:, None].repeat(1, 3)  # two heads of six rows
    interleave_(weight, 6)
    assert weight[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# --- Meta's layout --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny", tie_word_embeddings=False)


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    return load_model(folder, **options)(torch.arange(20)[None])


def as_pth(folder: Path, *parts: dict[str, torch.Tensor]) -> None:
    (folder / "consolidated.safetensors").unlink()
    for rank, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def model_parallel(weights: dict[str, torch.Tensor], ranks: int, embedding_dim: int = 0) -> list[dict[str, torch.Tensor]]:
    """Cut as fairscale's layers cut: column-parallel by output, row-parallel by input, norms whole on every rank."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, weight in weights.items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else embedding_dim if "tok_embeddings" in name else 0
        pieces = [weight] * ranks if weight.ndim == 1 else weight.chunk(ranks, dim)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["Llama 3 embedding", "Llama 2 embedding"])
def test_meta_pth_by_model_parallel_rank(tiny: Path, ranks: int, embedding_dim: int) -> None:
    expected, weights = logits_of(tiny), load_file(tiny / "consolidated.safetensors")
    as_pth(tiny, *model_parallel(weights, ranks, embedding_dim))
    assert torch.equal(logits_of(tiny), expected)


def test_meta_safetensors_in_parts(tiny: Path) -> None:
    """Both ways to cut: by model-parallel rank, and whole tensors spread over files."""
    expected, weights = logits_of(tiny), load_file(tiny / "consolidated.safetensors")
    (tiny / "consolidated.safetensors").unlink()
    names = sorted(weights)
    for cut in (model_parallel(weights, 2), [{n: weights[n] for n in names[:7]}, {n: weights[n] for n in names[7:]}]):
        for rank, part in enumerate(cut):
            save_file({"rope.freqs": torch.ones(4)} | part, tiny / f"consolidated.{rank:02d}.safetensors")
        assert torch.equal(logits_of(tiny), expected)


def with_shared_heads(weights: dict[str, torch.Tensor], ranks: int, head_dim: int) -> list[dict[str, torch.Tensor]]:
    """Cut for more ranks than key heads: rank r of R holds head r * H // R, the one that its query heads look at."""
    parts = model_parallel(weights, ranks)
    for name in (name for name in weights if name.endswith(("wk.weight", "wv.weight"))):
        heads = weights[name].split(head_dim)
        for rank, part in enumerate(parts):
            part[name] = heads[rank * len(heads) // ranks].clone()
    return parts


@pytest.mark.parametrize(("kv_heads", "ranks"), [(2, 4), (2, 8), (4, 8), (1, 2), (1, 4)])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_meta_parts_that_outnumber_the_key_heads(tmp_path: Path, kv_heads: int, ranks: int, kind: str) -> None:
    folder = tiny_llama(tmp_path, n_heads=8, n_kv_heads=kv_heads, tie_word_embeddings=False)
    expected, weights = logits_of(folder), load_file(folder / "consolidated.safetensors")
    parts = with_shared_heads(weights, ranks, 4)
    as_pth(folder, *parts)
    if kind == "safetensors":
        for rank, part in enumerate(parts):
            (folder / f"consolidated.{rank:02d}.pth").unlink()
            save_file(part, folder / f"consolidated.{rank:02d}.safetensors")
    assert torch.equal(logits_of(folder), expected)


@pytest.mark.parametrize(("kv_heads", "ranks"), [(2, 4), (1, 2)])
def test_heads_that_ranks_share_must_be_equal(tmp_path: Path, kv_heads: int, ranks: int) -> None:
    folder = tiny_llama(tmp_path, n_heads=8, n_kv_heads=kv_heads, tie_word_embeddings=False)
    parts = with_shared_heads(load_file(folder / "consolidated.safetensors"), ranks, 4)
    parts[1]["layers.2.attention.wv.weight"][3, 5] += 1
    as_pth(folder, *parts)
    refused(folder, r"consolidated\.01\.pth: layers\.2\.attention\.wv\.weight is no copy of the one in the file before")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_buffers_that_are_no_weights_are_left_out(tiny: Path, dtype: torch.dtype, kind: str) -> None:
    expected, weights = logits_of(tiny), load_file(tiny / "consolidated.safetensors")
    weights["layers.0.attention.mask"] = torch.ones(7, 3).to(dtype)
    as_pth(tiny, weights) if kind == "pth" else save_file(weights, tiny / "consolidated.safetensors")
    assert torch.equal(logits_of(tiny), expected)


def test_hash_is_that_of_the_bytes_of_the_weight_files(tiny: Path) -> None:
    weights = load_file(tiny / "consolidated.safetensors")
    single = (tiny / "consolidated.safetensors").read_bytes()
    assert load_model(tiny).weights_hash == load_model(tiny).weights_hash == xxhash.xxh3_64(single).hexdigest()
    as_pth(tiny, *model_parallel(weights, 2))
    joined = b"".join((tiny / f"consolidated.{rank:02d}.pth").read_bytes() for rank in range(2))
    assert load_model(tiny).weights_hash == xxhash.xxh3_64(joined).hexdigest()
    assert len(load_model(tiny).weights_hash) == 16


def test_large_tensors_are_copied_block_by_block(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size must give the same weights and hash; 100 bytes is less than a row of most matrices here."""
    expected = load_model(tiny)
    for size in (1, 100, 1000):
        monkeypatch.setattr("llama3.weights.BLOCK", size)
        found = load_model(tiny)
        assert found.weights_hash == expected.weights_hash
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_header_of_odd_length_loads(tiny: Path) -> None:
    """Safetensors asks for no alignment: numbers may start at any byte."""
    expected, file = logits_of(tiny), tiny / "consolidated.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2 == 1
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert torch.equal(logits_of(tiny), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_dtypes(tiny: Path, stored: torch.dtype, kind: str) -> None:
    file = tiny / "consolidated.safetensors"
    weights = {name: weight.to(stored) for name, weight in load_file(file).items()}
    save_file(weights, file) if kind == "safetensors" else as_pth(tiny, weights)
    model = load_model(tiny)
    assert model.dtype == torch.float32, "on the CPU, float32 unless asked otherwise"
    assert torch.equal(model.layers[0].attention.wq.weight, weights["layers.0.attention.wq.weight"].float())
    half = load_model(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.freqs_cis.dtype == torch.float32


def test_loaded_models_stand_alone(tiny: Path) -> None:
    """No gradient, no parameter on the meta device, and nothing mapped: the file may be overwritten afterwards."""
    model = load_model(tiny)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    assert not before.requires_grad
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    raw = (tiny / "consolidated.safetensors").read_bytes()
    with (tiny / "consolidated.safetensors").open("r+b") as file:
        file.write(bytes(len(raw)))
    assert torch.equal(model(tokens), before)


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    model = load_model(tiny_llama(tmp_path, tie_word_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight


def test_loading_changes_nothing_global(tiny: Path) -> None:
    torch.manual_seed(3)
    before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
    load_model(tiny, dtype=torch.bfloat16)
    after = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
    assert after == before


def test_loading_and_running_import_no_compiler(tiny: Path) -> None:
    """torch._dynamo takes as long to import as torch itself, and every stage would pay for it."""
    code = f"""if True:
        import sys, torch, llama3
        llama3.load_model({str(tiny)!r}).capture(torch.arange(20)[None], ["layers.1.resid_post"])
        sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_loading_reads_no_weight_before_everything_is_checked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two shards is wrong; the first must not have been copied when that is said."""
    weights = load_file(tiny / "consolidated.safetensors")
    (tiny / "consolidated.safetensors").unlink()
    first, second = model_parallel(weights, 2)
    save_file(first, tiny / "consolidated.00.safetensors")
    save_file(second | {"norm.weight": torch.ones(31)}, tiny / "consolidated.01.safetensors")
    monkeypatch.setattr("llama3.weights.Safetensors.copy_to", None)
    with pytest.raises(ValueError, match=r"norm\.weight is \[32\] \+ \[31\], expected \[32\]"):
        load_model(tiny)


# --- what is refused ------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, load: Any = load_model) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, "header", "half", "all but one"])
def test_truncated_safetensors(tiny: Path, keep: int | str) -> None:
    file = tiny / "consolidated.safetensors"
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    n = {"header": header, "half": len(raw) // 2, "all but one": len(raw) - 1}.get(str(keep), keep)
    assert isinstance(n, int)
    file.write_bytes(raw[:n])
    refused(tiny, r"consolidated\.safetensors: truncated or damaged")


def test_a_flipped_bit_in_the_header_is_always_refused(tiny: Path) -> None:
    """Every bit of the header's length and of 33 bytes of its text, at a stride that meets names, types, shapes, offsets."""
    file = tiny / "consolidated.safetensors"
    raw = bytearray(file.read_bytes())
    for at in [*range(8), *range(8, 437, 13)]:
        for bit in range(8):
            raw[at] ^= 1 << bit
            file.write_bytes(raw)
            refused(tiny, "consolidated.safetensors|tensors missing")
            raw[at] ^= 1 << bit
    file.write_bytes(raw)
    load_model(tiny)


def test_a_flipped_bit_in_the_numbers_changes_the_hash_or_is_refused(tiny: Path) -> None:
    """The top bit of an exponent makes a number so large that it is caught; others are seen by whoever compares the hash."""
    file = tiny / "consolidated.safetensors"
    before, raw = load_model(tiny).weights_hash, bytearray(file.read_bytes())
    raw[-1] ^= 0b0000_0001
    file.write_bytes(raw)
    assert load_model(tiny).weights_hash != before
    raw[-4:] = b"\0\0\xc0\x7f"  # NaN
    file.write_bytes(raw)
    refused(tiny, "holds NaN or infinity in torch.float32; the file is damaged")


def test_a_number_beyond_float16_is_refused(tiny: Path) -> None:
    weights = load_file(tiny / "consolidated.safetensors")
    weights["norm.weight"][3] = 70_000.0
    save_file(weights, tiny / "consolidated.safetensors")
    load_model(tiny, dtype=torch.bfloat16)
    refused(tiny, "norm.weight holds NaN or infinity in torch.float16", lambda f: load_model(f, dtype=torch.float16))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_pth(tiny: Path, keep: float) -> None:
    as_pth(tiny, load_file(tiny / "consolidated.safetensors"))
    file = tiny / "consolidated.00.pth"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else int(keep)])
    refused(tiny, r"consolidated\.00\.pth: truncated, damaged or no torch file")


class _Attack:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["torch.save", "bare pickle", "zip with a foreign pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tiny: Path, form: str) -> None:
    marker, file = tiny / "ran", tiny / "consolidated.00.pth"
    as_pth(tiny, load_file(tiny / "consolidated.safetensors"))
    if form == "torch.save":
        torch.save({"norm.weight": _Attack(marker)}, file)
    elif form == "bare pickle":
        file.write_bytes(pickle.dumps(_Attack(marker)))
    else:
        shutil.copy(file, tiny / "old")
        with zipfile.ZipFile(tiny / "old") as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
            for item in old.infolist():
                evil = item.filename.endswith("data.pkl")
                new.writestr(item.filename, pickle.dumps(_Attack(marker)) if evil else old.read(item))
    refused(tiny, r"consolidated\.00\.pth: ")
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"norm.weight": torch.ones(2)}}, {1: torch.ones(2)}], ids=str)
def test_a_pth_of_another_kind(tiny: Path, content: Any) -> None:
    (tiny / "consolidated.safetensors").unlink()
    torch.save(content, tiny / "consolidated.00.pth")
    refused(tiny, "expected a dict of tensors by name")


def test_missing_shards(tiny: Path, tmp_path: Path) -> None:
    parts = model_parallel(load_file(tiny / "consolidated.safetensors"), 2)
    as_pth(tiny, *parts)
    (tiny / "consolidated.01.pth").unlink()
    refused(tiny, r"is \[\d+, 32\], expected \[\d+, 32\] by the configuration beside it; .*shards missing")
    (tiny / "consolidated.00.pth").rename(tiny / "consolidated.01.pth")
    refused(tiny, r"shard 00 is missing; found consolidated\.01\.pth")
    (tiny / "consolidated.01.pth").unlink()
    refused(tiny, r"neither consolidated\*\.safetensors nor consolidated\.\*\.pth")
    hf = tmp_path / "hf"
    save_transformers(hf, max_shard_size="12KB")
    gone = sorted(hf.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(hf, rf"1 of \d+ shards missing; the first is {gone.name}")
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, "neither model.safetensors nor model.safetensors.index.json")


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    save_transformers(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "names a file outside its folder")


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("layers.0.attention.wq.weight", torch.ones(31, 32), r"wq\.weight is \[31, 32\], expected \[32, 32\]"),
        ("layers.0.attention.wq.weight", torch.ones(32), r"wq\.weight is \[32\], expected \[32, 32\]"),
        (
            "layers.0.attention.wq.weight",
            None,
            r"1 of 30 tensors missing from 1 file\(s\), the first is layers\.0\.attention\.wq",
        ),
        ("output.weight", None, 'the first is output.weight; if the head is tied, add "tie_word_embeddings": true'),
        (
            "layers.3.ffn_norm.weight",
            torch.ones(32),
            r"holds layers\.3\.ffn_norm\.weight, which a Llama of 3 layers does not have",
        ),
        ("layers.0.attention.wq.bias", torch.ones(32), r"holds layers\.0\.attention\.wq\.bias, which a Llama"),
        (
            "norm.weight",
            torch.ones(32, dtype=torch.int8),
            r"consolidated\.safetensors: norm\.weight is stored as int8: quantised weights of this kind cannot be read",
        ),
        (
            "layers.1.attention.wo.weight",
            torch.ones(32, 32).to(torch.float8_e4m3fn),
            r"layers\.1\.attention\.wo\.weight is stored as float8_e4m3fn: quantised weights .* bfloat16",
        ),
    ],
)
def test_wrong_tensors_are_named(tiny: Path, name: str, weight: torch.Tensor | None, message: str) -> None:
    file = tiny / "consolidated.safetensors"
    weights = load_file(file)
    weights.pop(name, None)
    save_file(weights if weight is None else weights | {name: weight}, file)
    refused(tiny, message)


def test_a_vocabulary_that_does_not_fit(tiny: Path) -> None:
    params = json.loads((tiny / "params.json").read_text())
    with (tiny / "tokenizer.model").open("a") as file:
        file.write(f"AAAAAA== {params['vocab_size'] - 256}\n")
    refused(
        tiny, rf"tokenizer\.model has {params['vocab_size'] + 1} tokens .* params\.json says vocab_size {params['vocab_size']}"
    )
    refused(tiny, "they do not belong together", load_tokenizer)
    (tiny / "params.json").rename(
        tiny / "config.json"
    )  # the layout of Hugging Face, where loading the model reads no tokenizer
    refused(tiny, r"tokenizer\.model has .* config\.json says", load_tokenizer)


def test_folders_of_neither_layout(tmp_path: Path) -> None:
    refused(tmp_path, "expected a checkpoint: params.json .* or config.json .*; found nothing")
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, "found model.gguf")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "is a file; expected a GGUF file or the folder of a checkpoint")
    refused(
        tmp_path / "absent",
        r"no such folder or file; expected a folder .*, a \.gguf file, a Hub id .*, ollama:NAME, smollm2 or demo",
    )
    refused(tmp_path, "holds no tokenizer", load_tokenizer)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_damaged_json(tiny: Path, text: str) -> None:
    (tiny / "params.json").write_bytes(text.encode("latin-1"))
    refused(tiny, r"params\.json: (not valid JSON|expected a JSON object, found a list)")


def test_unknown_keys_of_params_are_named(tiny: Path) -> None:
    params = json.loads((tiny / "params.json").read_text())
    (tiny / "params.json").write_text(json.dumps(params | {"moe_experts": 8}))
    refused(tiny, r"unknown key\(s\) moe_experts")


def test_a_model_of_another_layout_beside_its_original(tmp_path: Path) -> None:
    """A Hub folder of Meta's holds both: Hugging Face's files win; with `original/` alone, that is read."""
    tiny_llama(tmp_path / "original")
    expected = load_model(tmp_path / "original").weights_hash
    assert load_model(tmp_path).weights_hash == expected
    assert load_tokenizer(tmp_path).hash == load_tokenizer(tmp_path / "original").hash


# --- where a checkpoint lies ----------------------------------------------------------------------------------------------


def test_demo_means_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert locate("demo") == DEMO == Path(__file__).resolve().parent.parent / "demo" / "model"
    assert locate("./demo") == Path("./demo")


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: a gated repository lists its files and refuses each; others are unknown, or in trouble."""

    def do_GET(self) -> None:
        status, code, body = 401, "RepoNotFound", b""
        if "/owner/trouble" in self.path:
            status, code = 503, ""
        elif "/api/models/owner/gated/tree" in self.path:
            status, code, body = 200, "", b'[{"type": "file", "path": "config.json", "size": 3, "oid": "a"}]'
        elif "/api/models/owner/gated" in self.path:
            status, code, body = 200, "", b'{"id": "owner/gated", "sha": "abc", "siblings": [{"rfilename": "config.json"}]}'
        elif "/owner/gated/" in self.path:
            status, code = 403, "GatedRepo"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gated",
            "owner/gated: access is granted by its owner alone. Ask for it at https://huggingface.co/owner/gated, then log in",
        ),
        (
            "absent",
            "owner/absent: no such folder here and no such repository on the Hub, or a private one: check the name, or log",
        ),
        (
            "trouble",
            "owner/trouble: no such folder here, not in the Hub's cache, and the Hub does not answer (Server error '503",
        ),
        ("unreachable", "owner/unreachable: no such folder here, not in the Hub's cache, and the Hub does not answer ("),
    ],
)
def test_hub_trouble_is_explained(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's real client, asking a Hub of our own."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if name == "unreachable":
        server.server_close()
        refused(Path(f"owner/{name}"), re.escape(expected))
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        refused(Path(f"owner/{name}"), re.escape(expected))
    finally:
        server.shutdown()
        server.server_close()


def test_a_manifest_calls_a_model_of_the_hub_by_its_whole_id(tmp_path: Path) -> None:
    cached = tmp_path / "models--meta-llama--Llama-3.2-3B" / "snapshots" / "0123abcd"
    folder = tmp_path / "Llama-3.2-3B"
    for made in (cached, folder):
        made.mkdir(parents=True)
    assert model_name("meta-llama/Llama-3.2-3B") == "meta-llama/Llama-3.2-3B"
    assert model_name(cached) == "meta-llama/Llama-3.2-3B"
    assert model_name(folder) == "Llama-3.2-3B"
    assert model_name("demo") == "demo"


def test_a_hub_id_is_fetched_without_the_files_that_are_not_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fake(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert isinstance(load_model("owner/model"), Transformer)
    load_tokenizer("owner/model")
    assert [repository for repository, _ in asked] == ["owner/model"] * 2
    assert "*.safetensors" in asked[0][1]
    assert not any("safetensors" in pattern or "*" in pattern for pattern in asked[1][1]), "a tokenizer needs no weights"


def test_tiny_args_are_what_the_folder_says(tiny: Path) -> None:
    model = load_model(tiny)
    assert model.params == tiny_args(vocab_size=model.params.vocab_size, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 10**9}, "n_layers must be at most .* 1,000,000,000"),
        ({"dim": 2**40}, "dim must be at most"),
        ({"n_layers": 4000}, "n_layers 4,000, more than"),
        ({"dim": 2**26}, "dim 67,108,864 and"),
        ({"n_heads": 2**13, "head_dim": 2**13}, "n_heads 8,192 of head_dim"),
        ({"vocab_size": 2**27}, "vocab_size 134,217,728"),
        ({"ffn_dim_multiplier": 1e300}, "hidden_dim|ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": 1e308, "dim": 10**6}, "ffn_dim_multiplier"),
    ],
)
def test_sizes_are_compared_with_the_files_before_memory_is_taken(
    tmp_path: Path, values: dict[str, float], message: str
) -> None:
    folder = tiny_llama(tmp_path)
    params = json.loads((folder / "params.json").read_text())
    params.pop("hidden_dim", None)
    (folder / "params.json").write_text(json.dumps(params | values))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_long_context_takes_memory_when_it_is_used(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    short = load_model(folder)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text("\ufeff" + json.dumps(params | {"max_seq_len": 10**8}))
    model = load_model(folder)
    assert len(model.freqs_cis) <= 8192
    tokens = torch.arange(100)[None] % 50
    assert torch.equal(model(tokens), short(tokens))
    model.freqs_cis = model.rope_table(7)
    assert torch.equal(model(tokens), short(tokens))
    assert len(model.freqs_cis) == 100


def test_deep_headers_and_descriptions_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    deep = b'{"a": ' + b"[" * 100_000
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ValueError, match=rf"{weights.name}: .*nested"):
        load_model(folder)
    weights.write_bytes((9_000_000).to_bytes(8, "little") + b"{" + b" " * 9_000_000)
    with pytest.raises(ValueError, match=rf"{weights.name}: .*9,000,000"):
        load_model(folder)
    (folder / "params.json").write_bytes(deep)
    with pytest.raises(ValueError, match=r"params\.json: .*nested"):
        load_model(folder)
