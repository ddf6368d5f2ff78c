"""What decides the trained weights, besides the data and the seed: the flags of training, and the schedules they stand for."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sae import architectures

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[architectures.names()]

NOT_NEGATIVE = (
    "max_steps", "lr", "lr_end", "warmup_steps", "eps", "weight_decay", "aux_k", "aux_coefficient", "clip_norm", "sparsity",
    "sparsity_warmup_steps", "patience", "jump_threshold", "encoder_norm", "k_start", "k_anneal_steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Flags."""

    architecture: Architecture = "topk"
    """topk keeps k latents of each row; batchtopk k per row on average over a batch; matryoshka is topk whose first latents
    reconstruct on their own too; relu, jumprelu and gated keep what is positive, above a learned threshold or let through by a
    learned gate, and --sparsity penalises them."""
    n_latents: int = 65_536
    """Rows of W_enc and W_dec."""
    k: int = 64
    """Active latents per row: at most, or on average for batchtopk; not used where --sparsity decides."""
    k_start: int = 0
    """Active latents per row at the first step, falling linearly to k over `k_anneal_steps`; 0: k from the start."""
    k_anneal_steps: int = 0
    """Steps over which k falls from `k_start`."""
    norm: Literal["dataset", "layer", "none"] = "dataset"
    """Normalisation of rows: by the dataset's mean norm, per row by mean and std, or none."""
    init: Literal["tied", "orthogonal"] = "tied"
    """Random unit rows in the decoder, parallel ones in the encoder; orthogonal: d_model at a time orthogonal to each other."""
    encoder_norm: float = 0.0
    """Norm of the encoder's rows at the start; 0: that at which random rows reconstruct best, or 1 where --sparsity decides."""
    b_pre: Literal["mean", "geometric_median"] = "mean"
    """Where b_pre starts: at the mean of z, or at its geometric median (sae.preprocess --median-rows)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and products; float64 is for checks."""
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    """topk on a GPU: type of what is multiplied; sums, weights and moments stay in --dtype. auto: bfloat16 where --dtype is
    float32. A CPU multiplies in --dtype."""
    batch_size: int = 1024
    """Rows per step, all ranks together."""
    accumulate: int = 1
    """Parts that a rank cuts its rows of a step into, one after the other, to save memory; batchtopk chooses within each."""
    epochs: int = 1
    """Passes over the training rows."""
    rows_seed: int = 0
    """Seed of the order of rows: with --batches of later epochs, with --model of everything, and of which documents are held
    out. --seed is that of the first weights."""
    max_steps: int = 0
    """Stop, and end the schedule, after so many steps; 0: after `epochs`."""
    lr: float = 0.0
    """Peak learning rate; 0: 5e-4 / sqrt(n_latents / 16,384). The scaling is that of Gao et al. 2024, figure 3, whose factor of
    2e-4 belongs to batches of 131,072 rows and far longer runs."""
    lr_end: float = 0.0
    """Learning rate at the last step, reached along a cosine."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the gradient's mean and square."""
    eps: float = 6.25e-10
    """Adam's epsilon, on the scale of a gradient (Gao et al. 2024, A.3)."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    aux_k: int = 0
    """Dead latents that reconstruct the error of each row; 0: the power of two nearest to d_model / 2."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss of topk, batchtopk and matryoshka; 0: off."""
    sparsity: float = 1e-3
    """Weight of the penalty: relu, sum of f_i ||W_dec_i|| per row; jumprelu, active latents per row; gated, sum of the
    gates' positive pre-activations per row. It stands beside the
    squared error's MEAN over entries: where a paper sums over them, divide its weight by d_model."""
    sparsity_warmup_steps: int = 0
    """Steps over which the penalty's weight rises linearly."""
    jump_threshold: float = 0.01
    """jumprelu: all thresholds at the start, in units of z."""
    jump_bandwidth: float = 0.05
    """jumprelu: width of the window around a threshold in which values move it, in units of z."""
    matryoshka: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """matryoshka: shares of the latents that must reconstruct on their own."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead that has not fired for so many rows, seen by all ranks together."""
    clip_norm: float = 0.0
    """Largest norm of the gradient, all parameters together; 0: no clipping."""
    patience: int = 0
    """Stop after so many validations in a row without a new lowest val_loss; 0: never. Needs --validate-every."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_latents:
            raise ValueError(f"--k must be between 1 and --n-latents {self.n_latents}; found {self.k}; lower --k")
        if self.k_start and not self.k <= self.k_start <= self.n_latents:
            raise ValueError(f"--k-start must lie between --k {self.k} and --n-latents {self.n_latents}; found {self.k_start}")
        for name in ("n_latents", "batch_size", "accumulate", "epochs", "dead_after_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; found {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative; found {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must lie in [0, 1); found {self.betas}")
        if not self.jump_bandwidth > 0:
            raise ValueError(f"--jump-bandwidth must be positive; found {self.jump_bandwidth}")
        architectures.architecture(self.architecture).check(self)

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight."""
        return {"float32": 4, "float64": 8}[self.dtype]

    @property
    def peak_lr(self) -> float:
        return self.lr or 5e-4 / math.sqrt(self.n_latents / 2**14)

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, then a cosine that ends at `lr_end` with the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        return self.lr_end + (self.peak_lr - self.lr_end) * (1 + math.cos(math.pi * min(1.0, share))) / 2

    def k_at(self, step: int) -> int:
        """Active latents per row in step `step` (from 0)."""
        extra = max(0, self.k_start - self.k)
        left = max(0.0, 1 - step / self.k_anneal_steps) if self.k_anneal_steps else 0.0
        return self.k + round(extra * left)

    def never_reached(self, total_steps: int) -> str:
        """Which flags speak of a moment after the end of a run of so many steps, in one line; empty where none does."""
        rows = total_steps * self.batch_size
        found = []
        if self.aux_coefficient and self.dead_after_tokens >= rows:
            found.append(
                f"--dead-after-tokens {self.dead_after_tokens:,} is not below the {rows:,} rows of the run, so no latent can "
                f"count as dead and none is revived; a fifth of the run is {max(1, rows // 5):,}"
            )
        for name, why in (
            ("warmup_steps", "the learning rate never gets to its peak"),
            ("sparsity_warmup_steps", "the penalty never gets to its weight"),
            ("k_anneal_steps", "k never gets to --k"),
        ):
            steps, used = getattr(self, name), name != "k_anneal_steps" or self.k_start
            if used and steps > total_steps:
                found.append(f"--{name.replace('_', '-')} {steps:,} exceeds the {total_steps:,} steps of the run: {why}")
        return "; ".join(found)
