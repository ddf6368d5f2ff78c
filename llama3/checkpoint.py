"""Load a model and its tokenizer from Meta's or Hugging Face's layout or a GGUF file: checked first,
then copied once, to the device."""

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from core.text import read_json
from llama3.gguf import read_header
from llama3.gguf_tokenizer import tokenizer_from_gguf
from llama3.hub import TOKENIZER_FILES, locate
from llama3.layouts import Layout, find_layout, interleave_
from llama3.model import Transformer
from llama3.seen import check_seen
from llama3.tokenizer import N_SPECIAL_TOKENS, Tokenizer
from llama3.tokenizer_json import read_tokenizer_json
from llama3.weight_files import open_weights
from llama3.weights import DTYPES, WeightFile


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model that `path` names (see `llama3.hub.locate`), for inference: no parameter asks for gradients.

    `dtype` None is float32 on the CPU and on a GPU the checkpoint's own, bfloat16 for a quantised one.
    `weights_hash` of the result is the xxh3-64, in 16 hexadecimal digits, of the bytes of the weight
    files in order of name. Raises ValueError, before any weight is read, for a layout, shape, name or
    vocabulary that does not fit.
    """
    layout = find_layout(locate(path))
    _check_tokenizer_model(layout)
    files = [open_weights(file) for file in layout.files]
    _check_size(layout, files)
    with torch.device("meta"):
        model = Transformer(layout.args)
    places = _places(layout, files, model)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else _own_dtype(files)
    _allocate(model, device, dtype)
    with torch.no_grad():
        hashes = _fill(layout, files, places, model)
    model.weights_hash = hashes[-1]
    check_seen(layout.files, hashes)
    _check_finite(model, layout)
    return model.eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder, a GGUF file, a Hub id or `demo`. ValueError where there is none that can be read, or one with
    more tokens than the model described beside it."""
    folder = locate(path, TOKENIZER_FILES)
    if folder.is_file():
        return _gguf_tokenizer(folder)
    names = ["tokenizer.json", "original/tokenizer.model", "tokenizer.model"]
    if (folder / "params.json").is_file():
        names.reverse()
    for name in names:
        file = folder / name
        if file.is_file():
            found = Tokenizer(*read_tokenizer_json(file)) if file.suffix == ".json" else Tokenizer.from_file(file)
            _check_vocabulary(file, found.n_vocab)
            return found
    raise ValueError(f"{folder}: holds no tokenizer: expected tokenizer.model (Meta) or tokenizer.json (Hugging Face)")


def _gguf_tokenizer(file: Path) -> Tokenizer:
    header = read_header(file)
    found = tokenizer_from_gguf(header.metadata, str(file))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and found.n_vocab > embedding.shape[0]:
        raise ValueError(
            f"{file}: its tokenizer has {found.n_vocab:,} tokens, its embedding {embedding.shape[0]:,} rows; it is damaged"
        )
    return found


def _own_dtype(files: list[WeightFile]) -> torch.dtype:
    """That of the largest tensor: in GGUF files the norms are float32 whatever the matrices are."""
    entries = [entry for file in files for entry in file.entries.values() if entry.dtype in DTYPES.values()]
    return max(entries, key=lambda entry: math.prod(entry.shape)).dtype


def _check_size(layout: Layout, files: list[WeightFile]) -> None:
    """ValueError where a configuration describes more than the files can hold, before anything of that size is made."""
    held = [math.prod(entry.shape) for file in files for entry in file.entries.values()]
    args, numbers = layout.args, sum(held)
    widest = max(("vocab_size", "hidden_dim"), key=lambda name: getattr(args, name))
    for what, described, there in (
        (f"n_layers {args.n_layers:,}", args.n_layers, len(held)),
        (f"dim {args.dim:,} and {widest} {getattr(args, widest):,}", args.dim * getattr(args, widest), numbers),
        (f"n_heads {args.n_heads:,} of head_dim {args.head_dim:,}", args.n_heads * args.head_dim * args.dim, numbers),
    ):
        if described > there:
            place = layout.files[0] if layout.kind == "GGUF" else layout.files[0].parent
            raise ValueError(
                f"{place}: the configuration says {what}, more than the {len(held)} tensors ({numbers:,} "
                f"numbers) of {len(files)} weight file(s) can hold; wrong params.json or config.json, or files missing"
            )


SHARED_BY_RANKS = ("attention.wk.weight", "attention.wv.weight")
"""Matrices of which each rank of Meta's holds at least one head, be there fewer heads than ranks."""


class Place(NamedTuple):
    """Where a tensor of a file belongs: from `start` on along dimension `dim` of a parameter."""

    parameter: str
    dim: int
    start: int
    copy: bool
    """Whether it must equal what an earlier file holds for the same place: key and value heads that several ranks share."""


def _places(layout: Layout, files: list[WeightFile], model: Transformer) -> list[dict[str, Place]]:
    """For each file, the place of each of its tensors. ValueError where names or shapes are not those of the model."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _refuse_quantised(layout, files, wanted)
    found: dict[str, list[tuple[int, str]]] = {}  # parameter: (file, name in that file) of each part
    for index, file in enumerate(files):
        for name in file.entries:
            parameter = layout.parameter(name)
            if parameter is None or (parameter == "output.weight" and layout.args.tie_word_embeddings):
                continue
            if parameter not in wanted:
                if file.entries[name].dtype not in DTYPES.values():
                    continue  # a buffer
                raise ValueError(f"{file.path}: holds {name}, which a Llama of {layout.args.n_layers} layers does not have")
            found.setdefault(parameter, []).append((index, name))
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{layout.place}: {len(missing)} of {len(wanted)} tensors missing from {len(files)} file(s), the first is "
            f"{missing[0]}{_tie_hint(missing)}"
        )
    places: list[dict[str, Place]] = [{} for _ in files]
    for parameter, parts in found.items():
        shapes = [files[index].entries[name].shape for index, name in parts]
        shared = parameter.endswith(SHARED_BY_RANKS) and layout.kind == "Meta"
        full = wanted[parameter]
        copies = _copies(full, shapes) if shared else 1
        dim = _split_dimension((full[0] * copies, *full[1:]), shapes)
        if dim is None or (layout.kind == "Hugging Face" and len(parts) > 1):
            raise ValueError(
                f"{files[parts[0][0]].path}: {parts[0][1]} is {' + '.join(str(list(shape)) for shape in shapes)}, expected "
                f"{list(wanted[parameter])} {_source_of_shapes(layout)}"
            )
        start = 0
        for number, ((index, name), shape) in enumerate(zip(parts, shapes, strict=True), 1):
            here, filled = start % full[dim], start >= full[dim] or (number - 1) % copies > 0
            places[index][name] = Place(parameter, dim, here, shared and filled)
            start += shape[dim] * (number % copies == 0)
    return places


def _refuse_quantised(layout: Layout, files: list[WeightFile], wanted: Container[str]) -> None:
    for file in files:
        for name, entry in file.entries.items():
            if layout.parameter(name) in wanted and entry.dtype not in DTYPES.values():
                stored = str(entry.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{file.path}: {name} is stored as {stored}: quantised weights of this kind "
                    "cannot be read; give the checkpoint in bfloat16, float16 or float32, or as a .gguf file"
                )


def _copies(full: tuple[int, ...], parts: list[tuple[int, ...]]) -> int:
    """How many neighbouring ranks hold the same rows of `wk` or `wv`: several where there are more ranks than heads."""
    rows = sum(part[0] for part in parts)
    alike = len(set(parts)) == 1 and parts[0] != full
    return rows // full[0] if alike and rows % full[0] == 0 and len(parts) % (rows // full[0] or 1) == 0 else 1


def _source_of_shapes(layout: Layout) -> str:
    if layout.kind == "GGUF":
        return "by the file's own metadata; it is damaged or was converted wrongly"
    return "by the configuration beside it; wrong params.json or config.json, or shards missing"


def _tie_hint(missing: list[str]) -> str:
    return '; if the head is tied, add "tie_word_embeddings": true' if missing == ["output.weight"] else ""


def _split_dimension(full: tuple[int, ...], parts: list[tuple[int, ...]]) -> int | None:
    """The dimension along which `parts`, one per model-parallel rank, make up `full`; 0 where each is the whole. None: neither.

    Which one it is depends on the matrix: Meta splits `wq wk wv w1 w3 output` by output and `wo w2` by input, and holds norms
    on every rank.
    """
    if all(part == full for part in parts):
        return 0
    for dim in range(len(full)):
        rest = full[:dim] + full[dim + 1 :]
        fits = all(len(part) == len(full) and part[:dim] + part[dim + 1 :] == rest for part in parts)
        if fits and sum(part[dim] for part in parts) == full[dim]:
            return dim
    return None


def _allocate(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Give the model, which is on the meta device, memory for its parameters."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        state = {name: nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for name, shape in shapes.items()}
    except torch.OutOfMemoryError:
        size = sum(map(math.prod, shapes.values())) * dtype.itemsize
        raise ValueError(
            f"the model needs {size / 2**30:.1f} GiB in {dtype}, more than is free on {device}; "
            "choose a smaller dtype or the CPU"
        ) from None
    if model.params.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    model.freqs_cis = model.rope_table().to(device)


def _fill(layout: Layout, files: list[WeightFile], places: list[dict[str, Place]], model: Transformer) -> list[str]:
    """Copy every file into the model; returns the hash of their bytes up to the end of each."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    digest, hashes = xxhash.xxh3_64(), []
    for file, part in zip(files, places, strict=True):
        targets = {
            name: parameters[place.parameter].narrow(place.dim, place.start, file.entries[name].shape[place.dim])
            for name, place in part.items()
        }
        earlier = {name: targets[name].clone() for name, place in part.items() if place.copy}
        file.copy_to(targets, digest)
        hashes.append(digest.hexdigest())
        for name, expected in earlier.items():
            if not torch.equal(targets[name], expected):
                raise ValueError(
                    f"{file.path}: {name} is no copy of the one in the file before, as it must be where there are more files "
                    "than key heads; params.json is of another model, or a file is damaged"
                )
    if layout.kind == "Hugging Face":  # GGUF files hold them in Meta's order
        for name, parameter in parameters.items():
            if name.endswith(("wq.weight", "wk.weight")):
                interleave_(parameter, layout.args.head_dim)
    return hashes


def _check_finite(model: Transformer, layout: Layout) -> None:
    """ValueError for NaN and infinity, as a flipped bit or too narrow a dtype makes; other flips change `weights_hash`."""
    for name, parameter in model.named_parameters():
        # In parts: a sum in float32 first makes a float32 copy of what it sums.
        if not all(math.isfinite(part.sum(dtype=torch.float32).item()) for part in torch.split(parameter, 1024)):
            raise ValueError(
                f"{layout.place}: {name} holds NaN or infinity in {parameter.dtype}; the file is damaged, "
                "or the dtype too narrow for it"
            )


def _check_tokenizer_model(layout: Layout) -> None:
    """Meta's tokenizer.model is quick to count, so that a wrong one is named before the weights are read."""
    file = layout.files[0].with_name("tokenizer.model")
    if layout.kind == "Meta" and file.is_file():
        _check_vocabulary(file, len(file.read_bytes().splitlines()) + N_SPECIAL_TOKENS)


def _check_vocabulary(file: Path, n_tokens: int) -> None:
    """ValueError where a tokenizer of `n_tokens` has more of them than the model described beside `file`."""
    for config in (file.with_name("params.json"), file.with_name("config.json")):
        vocab_size = read_json(config).get("vocab_size") if config.is_file() else None
        if isinstance(vocab_size, int) and n_tokens > vocab_size:
            raise ValueError(
                f"{file.parent}: {file.name} has {n_tokens:,} tokens with the special ones, {config.name} says vocab_size "
                f"{vocab_size:,}; they do not belong together"
            )
