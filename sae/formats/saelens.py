"""SAELens: `cfg.json` and `sae_weights.safetensors`, with `W_enc` [d, n].

Read from sae-lens 6.54.12: saes/sae.py (SAEConfig, the normalisations),
saes/{standard,topk,batchtopk,jumprelu}_sae.py (encode and decode),
loading/pretrained_sae_loaders.py (handle_pre_6_0_config: what files from before version 6 mean).
"""

from pathlib import Path
from typing import Any

import safetensors.torch

from sae.architectures import architecture
from sae.formats.keys import Keys
from sae.formats.plain import Norm, Plain, as_json, fold, kinds, name_of, plain_of, sae_of, tensor_names, unfolded
from sae.formats.sites import hook_name, model_name, site_of_hook
from sae.formats.weights import read_safetensors, taken
from sae.model import SAE

FILES = ("cfg.json", "sae_weights.safetensors")
# In checkpoints of a training alone: what is exported is a jumprelu.
CHECKPOINTS = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}
TRANSCODER = "a transcoder reads at one site and writes at another; only SAEs of one site can be read"
REFUSED = {
    "abstopk": "the largest absolute values fire, negative ones too",
    "matching_pursuit": "latents are chosen one after the other, each on what the others left",
    "temporal": "it needs the tokens before as well",
    **dict.fromkeys(("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"), TRANSCODER),
}
RESCALED = ("topk", *CHECKPOINTS)  # have rescale_acts_by_decoder_norm
LAYER_EPS = 1e-5  # of its `layer_norm`, which puts the std back without it
SCALER = "activation_scaler.json"
# Keys of the TrainingSAEConfigs of 6.54.12 that matter while training alone.
TRAINING = (
    *("decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations", "topk_threshold_lr", "matryoshka_widths"),
    *("use_matryoshka_aux_loss", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    *("jumprelu_ste_to_input", "pre_act_loss_coefficient", "target_l0"),
)


def write(sae: SAE) -> dict[str, bytes]:
    """All architectures, or what they are at inference. A `layer` norm is kept, with SAELens'
    epsilon in place of ours.
    """
    cfg, layer = sae.cfg, sae.cfg.norm == "layer"
    plain = unfolded(sae) if layer else fold(sae, "SAELens")
    tensors = {"W_enc": plain.W_enc.T.contiguous(), "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.r_mag is not None:
        W_gate, b_gate = plain.gate()
        tensors |= {"W_enc": W_gate.T.contiguous(), "b_gate": b_gate, "r_mag": plain.r_mag, "b_mag": tensors.pop("b_enc")}
    elif plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    site = str(cfg.provenance.get("site", ""))
    values: dict[str, Any] = {
        "architecture": name_of("saelens", cfg),
        "d_in": cfg.d_model,
        "d_sae": cfg.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if layer else "none",
        "reshape_activations": "hook_z" if site.endswith(".attn_heads") else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # the format's; without it the nested names are dropped
            "sae_lens_training_version": None,
            "model_name": model_name(cfg.provenance.get("model")),
            "hook_name": hook_name(site),
            "hook_head_index": None,
            "context_size": cfg.provenance.get("max_length"),
            "prepend_bos": cfg.provenance.get("bos") == "feed",
            "llama3_sae": cfg.provenance,
        },
    }
    if sae.selects_top_k:
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return {"cfg.json": as_json(values), "sae_weights.safetensors": safetensors.torch.save(tensors)}


def read(folder: Path) -> SAE:
    """Folders of any version. ValueError names what cannot be computed here, and what is missing or not known."""
    cfg, weights = Keys.read(folder / "cfg.json"), folder / "sae_weights.safetensors"
    metadata = cfg.object("metadata")
    early = _version(cfg, metadata) < 6
    kind, k = _early_kind(cfg) if early else _kind(cfg)
    for keys in (cfg, metadata):
        keys.one_of("hook_head_index", None, default=None)  # one head's rows alone
        keys.one_of("hook_name_out", None, default=None)  # a transcoder's
    cfg.one_of("finetuning_scaling_factor", False, None, default=False)  # a factor for each latent, of early versions
    hook = str(metadata.note("hook_name") or cfg.note("hook_name") or cfg.note("hook_point") or "")
    model = metadata.note("model_name") or cfg.note("model_name")
    # Both defaults: SAEConfig and handle_pre_6_0_config of sae-lens 6.54.12.
    subtracts = cfg.get("apply_b_dec_to_input", bool, True)
    cfg.one_of("reshape_activations", "none", *["hook_z"] * hook.endswith("hook_z"), default="none")
    rescales = cfg.one_of("rescale_acts_by_decoder_norm", False, *[True] * (kind in RESCALED), default=False)
    norm = _norm(cfg, folder)
    shape = (cfg.need("d_in", int), cfg.need("d_sae", int))
    provenance = metadata.object("llama3_sae").values or {"site": site_of_hook(hook), "model": model} | _bos(cfg, metadata)
    if not early:  # its own loader drops other keys of earlier files, which held every flag of the training
        cfg.skip("dtype", "device", *TRAINING)
        cfg.refuse_others()
    plain = _tensors(weights, kind)
    if tuple(plain.W_enc.T.shape) != shape:
        raise ValueError(f"{weights}: W_enc is {list(plain.W_enc.T.shape)}, but cfg.json says d_in, d_sae {list(shape)}")
    if rescales:  # h times the rows' norms, and rows of unit norm; the threshold is compared with the product
        plain = plain.unit_rows()._replace(threshold=plain.threshold)
    if not subtracts:
        plain = plain.absorbed(sign=1)
    return sae_of(plain, _ours()[kind], k, provenance, norm)


def _bos(cfg: Keys, metadata: Keys) -> dict[str, str]:
    """Whether BOS stood before the texts of its training, where the file says."""
    said = metadata.note("prepend_bos") if "prepend_bos" in metadata else cfg.note("prepend_bos")
    return {"bos": "feed" if said else "none"} if isinstance(said, bool) else {}


def _version(cfg: Keys, metadata: Keys) -> int:
    """The major version of SAELens that wrote the file, 0 where it does not say;
    handle_config_defaulting asks the same.
    """
    version = cfg.note("sae_lens_version") or metadata.note("sae_lens_version")
    major = str(version or "0").partition(".")[0]
    if not major.isdigit():
        raise ValueError(f"{cfg.where}: sae_lens_version is {version!r}; expected a version like 6.54.12")
    return int(major)


def _ours() -> dict[str, str]:
    """Our names of the architectures that can be read, by those of SAELens."""
    return kinds("saelens") | CHECKPOINTS


def _kind(cfg: Keys) -> tuple[str, int | None]:
    """Architecture and k of a file of version 6 or later. `k` is never supposed: every such file of
    a topk holds it.
    """
    kind = str(cfg.one_of("architecture", *_ours(), refused=REFUSED))
    if kind in CHECKPOINTS:
        return kind, max(1, round(cfg.need("k", float)))
    return kind, cfg.need("k", int) if architecture(_ours()[kind]).sets_k else None


def _early_kind(cfg: Keys) -> tuple[str, int | None]:
    """Architecture and k of a file from before version 6, as handle_pre_6_0_config of sae-lens
    6.54.12 finds them.

    There the activation function decides, not the architecture: topk stood as `standard` with
    `activation_fn_str: "topk"`.
    """
    kind = cfg.one_of("architecture", *kinds("saelens"), default="standard", refused=REFUSED)
    functions = {str(cfg.one_of(name, "relu", "topk")) for name in ("activation_fn", "activation_fn_str") if name in cfg}
    if len(functions) > 1:
        raise ValueError(f"{cfg.where}: activation_fn and activation_fn_str differ; which of them holds is not known")
    details = cfg.object("activation_fn_kwargs")
    details.one_of("signed", False, default=False)
    details.skip("use_sparse_activations")
    k = details if "k" in details else cfg
    cfg.one_of("hook_point_head_index", None, default=None)
    if "topk" in functions and kind == "standard":
        kind = "topk"
    if "topk" in functions and kind != "topk":
        raise ValueError(f"{cfg.where}: architecture {kind!r} with the activation function 'topk' cannot be computed here")
    if kind != "topk":
        details.note("k")
        details.refuse_others()
        return kind, None
    count = k.need("k", int)
    details.refuse_others()
    return kind, count


def _norm(cfg: Keys, folder: Path) -> Norm:
    """What `normalize_activations` stands for. A checkpoint of a training keeps the factor for all
    rows in a file beside it.
    """
    if cfg.values.get("normalize_activations") is None or isinstance(cfg.values["normalize_activations"], bool):
        # handle_pre_6_0_config; a version 6 file without the key has SAEConfig's default, "none"
        name = "expected_average_only_in" if cfg.note("normalize_activations") else "none"
    else:
        name = cfg.one_of("normalize_activations", "none", "layer_norm", "expected_average_only_in")
    if name == "layer_norm":
        return Norm("layer", norm_eps=LAYER_EPS)
    if name == "none":
        return Norm()
    if not (folder / SCALER).is_file():
        raise ValueError(
            f"{folder}: normalize_activations 'expected_average_only_in' keeps its factor elsewhere; expected {SCALER} beside "
            "cfg.json, or the factor folded into the weights (fold_activation_norm_scaling_factor in SAELens)"
        )
    return Norm("dataset", scale=Keys.read(folder / SCALER).positive("scaling_factor"))


def _tensors(path: Path, kind: str) -> Plain:
    tensors = read_safetensors(path)
    ones = tensors.get("scaling_factor")  # read_sae_components_from_disk of sae-lens 6.54.12 drops it where it does nothing
    if ones is not None and bool((ones == 1).all()):
        del tensors["scaling_factor"]
    fields = tensor_names(_ours()[kind])
    if "r_mag" in fields:
        W_gate, *others = taken(tensors, path, ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"))
        return Plain.gated((W_gate.T, others[0]), *others[1:])
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if "threshold" in fields:
        names.append("topk_threshold" if kind in CHECKPOINTS else "threshold")
    W_enc, *others = taken(tensors, path, names)
    return plain_of(W_enc.T, *others)
