"""The shape of a Llama: one frozen dataclass, read from Meta's `params.json`, Hugging Face's
`config.json` or the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; names and values as in `config.json` of the published checkpoints."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for item in fields(self):
            if not _is_positive(value := getattr(self, item.name)):
                raise ValueError(f"{item.name} of RoPE must be a number above 0; found {value!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor of RoPE must be below high_freq_factor; found {self}")


@dataclass(frozen=True)
class RopeFactors:
    """What each pair's frequency is divided by, K/2 numbers; GGUF files store a scaling in this form."""

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        if wrong := [value for value in self.divisors if not _is_positive(value)]:
            raise ValueError(f"divisors of RoPE must be numbers above 0; found {wrong[0]!r}")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Names of Meta's reference implementation; `hidden_dim`, `head_dim` and `rope_scaling` are derived when not given."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int = 0
    """Key and value heads shared by groups of query heads (GQA). 0: as many as `n_heads`."""
    head_dim: int = 0
    """Width of one head. 0: `dim / n_heads`."""
    hidden_dim: int = 0
    """Width of the SwiGLU layer. 0: Meta's rule from `multiple_of` and `ffn_dim_multiplier`."""
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | RopeFactors | None = None
    tie_word_embeddings: bool = False
    """Whether the output head is the transposed token embedding."""
    max_seq_len: int = 8192
    """Longest sequence, in tokens, that the model was trained for."""

    def __post_init__(self) -> None:
        for item in fields(self):
            self._check_number(item.name, item.type)
        derived = {"n_kv_heads": self.n_heads, "head_dim": self.dim // self.n_heads, "hidden_dim": self._swiglu_width()}
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        for name in WIDTHS:
            if getattr(self, name) > (most := MOST.get(name, MOST_WIDTH)):
                raise ValueError(f"{name} must be at most {most:,}; found {getattr(self, name):,}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads; found n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because RoPE rotates pairs; found {self.head_dim}")

    def _check_number(self, name: str, kind: object) -> None:
        value = getattr(self, name)
        if kind not in (int, float):
            return
        least = 0 if name in ("n_kv_heads", "head_dim", "hidden_dim") else 1
        if not (_is_number(value, int) and value >= least if kind is int else _is_positive(value)):
            wanted = f"a whole number of at least {least}" if kind is int else "a number above 0"
            raise ValueError(f"{name} must be {wanted}; found {value!r}")

    def _swiglu_width(self) -> int:
        """Two thirds of `4 dim`, times `ffn_dim_multiplier`, rounded up to `multiple_of` (Meta's `FeedForward`)."""
        try:
            width = int(self.ffn_dim_multiplier * int(8 * self.dim / 3))
        except OverflowError:
            raise ValueError("dim and ffn_dim_multiplier make a hidden layer wider than any number") from None
        return self.multiple_of * -(-width // self.multiple_of)

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> "ModelArgs":
        """From Meta's `params.json`. Unknown keys are refused by name.

        `use_scaled_rope` does not say which factor: it is 32 for the Llama 3.2 text models (1B and 3B: `dim` of 3,072 or
        less) and 8 for all others (3.1, 3.3 and the language part of 3.2 vision), by the `config.json` of each release.
        """
        params = {key: value for key, value in params.items() if value is not None}
        scaled = params.pop("use_scaled_rope", False)
        known = {field.name for field in fields(cls)} - {"rope_scaling"}
        if unknown := sorted(set(params) - known):
            raise ValueError(f"params.json: unknown key(s) {', '.join(unknown)}; expected only {', '.join(sorted(known))}")
        _require("params.json", params, "dim", "n_layers", "n_heads", "vocab_size")
        try:
            args = cls(**params)
        except ValueError as error:
            raise ValueError(f"params.json: {error}") from None
        if not scaled:
            return args
        scaling = RopeScaling(factor=32.0 if args.dim <= 3072 else 8.0)
        return replace(args, rope_scaling=scaling, max_seq_len=params.get("max_seq_len", 131_072))

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "ModelArgs":
        """From Hugging Face's `config.json` of architecture `LlamaForCausalLM`; what we cannot run is refused by name."""
        architectures = config.get("architectures") or ["LlamaForCausalLM"]
        if config.get("model_type") != "llama" or "LlamaForCausalLM" not in architectures:
            raise ValueError(
                f"config.json: expected model_type llama (LlamaForCausalLM), found {config.get('model_type')!r} {architectures}"
            )
        for key, wanted in SUPPORTED.items():
            if config.get(key, wanted) != wanted:
                raise ValueError(f"config.json: {key} = {config[key]!r} is not supported; expected {wanted!r}")
        _require(
            "config.json", config, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"
        )
        theta, scaling = _rope(config)
        try:
            return cls(
                dim=config["hidden_size"],
                n_layers=config["num_hidden_layers"],
                n_heads=config["num_attention_heads"],
                n_kv_heads=config.get("num_key_value_heads") or 0,
                head_dim=config.get("head_dim") or 0,
                hidden_dim=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                norm_eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                max_seq_len=config.get("max_position_embeddings", 2048),
            )
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], vocab_size: int, tied: bool, divisors: tuple[float, ...] = ()
    ) -> "ModelArgs":
        """From the metadata of a GGUF file of architecture `llama`; what we cannot run is refused by name.

        `vocab_size`, `tied` and `divisors` (those of the tensor `rope_freqs.weight`, if there is one)
        are what its tensors say.
        """
        if (found := metadata.get("general.architecture")) != "llama":
            raise ValueError(f"general.architecture is {found!r}, expected 'llama'; other models are not supported")
        data = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
        _require("metadata llama.*", data, *GGUF_NAMES.values())
        args = cls(
            **{name: data[key] for name, key in GGUF_NAMES.items()},
            n_kv_heads=data.get("attention.head_count_kv", 0),
            head_dim=data.get("attention.key_length", 0),
            vocab_size=data.get("vocab_size", vocab_size),
            rope_theta=data.get("rope.freq_base", 10_000.0),
            tie_word_embeddings=tied,
        )
        whole_head = {"attention.value_length": args.head_dim, "rope.dimension_count": args.head_dim}
        for key, wanted in (GGUF_SUPPORTED | whole_head).items():
            if data.get(key, wanted) != wanted:
                raise ValueError(f"llama.{key} = {data[key]!r} is not supported; expected {wanted!r}")
        return replace(args, rope_scaling=_gguf_scaling(data, divisors, args.head_dim // 2))


WIDTHS = ("dim", "n_layers", "n_heads", "vocab_size", "head_dim", "hidden_dim", "max_seq_len")
MOST = {"n_layers": 2**12, "n_heads": 2**14, "head_dim": 2**14, "max_seq_len": 2**30}
MOST_WIDTH = 2**28
"""Far above every model there is: a damaged description is refused before it asks for memory."""

GGUF_NAMES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "hidden_dim": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "max_seq_len": "context_length",
}
"""Keys below `llama.` that a GGUF file must have."""

GGUF_SUPPORTED: dict[str, Any] = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
}
"""Keys below `llama.` that change the computation, with the one value that this model runs."""

SUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Settings of a `config.json` that change the computation, with the one value that this model runs."""

ROPE_SUPPORTED = {"partial_rotary_factor": 1.0, "attention_factor": 1.0}
"""The same within `rope_parameters`."""


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _require(file: str, data: dict[str, Any], *keys: str) -> None:
    if missing := [key for key in keys if data.get(key) is None]:
        raise ValueError(f"{file}: missing key(s) {', '.join(missing)}")


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE. transformers 5 writes both into `rope_parameters`; 4 wrote them at the top level."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10_000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; expected 'default' or 'llama3'")
    for key, wanted in ROPE_SUPPORTED.items():
        if (value := rope.pop(key, None)) not in (None, wanted):
            raise ValueError(f"config.json: {key} = {value!r} of RoPE is not supported; expected {wanted!r}")
    names = [field.name for field in fields(RopeScaling)]
    if unknown := sorted(set(rope) - set(names)):
        raise ValueError(f"config.json: unknown RoPE setting(s) {', '.join(unknown)}; expected only {', '.join(names)}")
    if kind == "default":
        return theta, None
    _require("config.json", rope, *names)
    return theta, RopeScaling(**rope)


def _gguf_scaling(data: dict[str, Any], divisors: tuple[float, ...], n_pairs: int) -> RopeScaling | RopeFactors | None:
    """The scaling of RoPE: `divisors`, which llama.cpp's converter writes for Llama 3.1 and later; or by keys.

    A factor without a type is linear, and divides what `divisors` divide once more (llama.cpp's `llama_context`).
    """
    kind = data.get("rope.scaling.type", "linear")
    factor = data.get("rope.scaling.factor", data.get("rope.scale_linear", 1.0)) or 1.0
    if kind not in ("none", "linear", "llama3"):
        raise ValueError(f"llama.rope.scaling.type = {kind!r} is not supported; expected 'none', 'linear' or 'llama3'")
    if not _is_positive(factor):
        raise ValueError(f"llama.rope.scaling.factor must be a number above 0; found {factor!r}")
    if divisors and len(divisors) != n_pairs:
        raise ValueError(f"rope_freqs.weight has {len(divisors)} values, expected {n_pairs}: half of head_dim")
    if kind == "llama3" and not divisors:
        names = {"original_max_position_embeddings": "original_context_length"}
        given = {field.name: data.get(f"rope.scaling.{names.get(field.name, field.name)}") for field in fields(RopeScaling)}
        return RopeScaling(**{name: value for name, value in given.items() if value is not None})
    linear = factor if kind == "linear" else 1.0
    all_divisors = tuple(linear * divisor for divisor in divisors or (1.0,) * n_pairs)
    return None if set(all_divisors) == {1.0} else RopeFactors(all_divisors)
