"""The shape of a Llama: one frozen dataclass, read from Meta's `params.json` or Hugging Face's `config.json`."""

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; names and values as in `config.json` of the published checkpoints."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    rope_scaling: RopeScaling | None = None
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
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not is_number or not (value >= least if kind is int else value > 0):
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


SUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Settings of a `config.json` that change the computation, with the one value that this model runs."""


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
    names = [field.name for field in fields(RopeScaling)]
    if unknown := sorted(set(rope) - set(names)):
        raise ValueError(f"config.json: unknown RoPE setting(s) {', '.join(unknown)}; expected only {', '.join(names)}")
    if kind == "default":
        return theta, None
    _require("config.json", rope, *names)
    return theta, RopeScaling(**rope)
