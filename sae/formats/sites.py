"""Where an SAE of another library reads: the names of TransformerLens and of Hugging Face's
modules, as sites of ours.
"""

import re
from pathlib import Path

HOOKS = {
    "attn_heads": "attn.hook_z",  # [B, T, heads, head_dim] there
    "attn_out": "hook_attn_out",
    "ffn_hidden": "mlp.hook_post",
    "ffn_out": "hook_mlp_out",
} | {name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post")}
# Outputs of the modules of a Llama in transformers.
MODULES = {
    "": "resid_post",
    "mlp": "ffn_out",
    "self_attn": "attn_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"embed_tokens": "embed", "norm": "final_norm"}

META = r"(Meta-)?Llama-3(\.[123])?-(1B|3B|8B|70B|405B)(-Instruct)?"


def model_name(model: object) -> str | None:
    """The model's name on the Hub, which other libraries ask for: a release of Meta's that was read from
    a folder of its name gets its owner back.
    """
    if model is None:
        return None
    return f"meta-llama/{model}" if re.fullmatch(META, str(model)) else str(model)


def hook_name(site: str) -> str | None:
    """TransformerLens' name of a site, `layers.3.resid_post` being `blocks.3.hook_resid_post`; None
    where it has none.
    """
    _, _, rest = site.partition("layers.")
    layer, _, place = rest.partition(".")
    return f"blocks.{layer}.{HOOKS[place]}" if place in HOOKS else None


def site_of_hook(hook: str) -> str | None:
    """The other way round."""
    _, _, rest = hook.partition("blocks.")
    layer, _, place = rest.partition(".")
    return next((f"layers.{layer}.{name}" for name, theirs in HOOKS.items() if theirs == place), None)


def site_of_module(name: str) -> str | None:
    """The site that is the output of a module: `layers.5.mlp` is `layers.5.ffn_out`. None where it
    is no site of ours.
    """
    found = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)(?:\.(\w+))?|(embed_tokens|norm))", name)
    if not found:
        return None
    layer, place, outside = found.groups()
    if outside:
        return OUTSIDE[outside]
    return f"layers.{layer}.{MODULES[place]}" if (place := place or "") in MODULES else None


def layer_in(path: Path, pattern: str) -> int | None:
    """The number that `pattern` finds in the last part of `path` that holds one."""
    found = (re.search(pattern, part) for part in reversed(path.parts))
    return next((int(match[1]) for match in found if match), None)
