"""One training step and one reconstruction of each library, behind the same two calls.

Each class drives the library's own model, loss and optimizer the way its own training loop does, without that loop's data loading,
logging and saving. Rows come in normalised to a mean norm of sqrt(d), for all alike. Without `defaults` a library starts from our
weights and takes our learning rate at each step and our Adam: what is left is its own model, loss, clipping and AuxK. With
`defaults` everything is its own. Snapshots: see benchmarks/requirements.txt.
"""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")

from sae.hyperparameters import Hyperparameters
from sae.loss import ALONE, LossConfig, aux_weight, default_k_aux
from sae.model import SAE, SAEConfig, best_encoder_norm
from sae.optimizer_step import optimizer_step

NEVER = 10**9  # since when a latent that is to count as dead has not fired


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all libraries are given alike."""

    d: int
    n: int
    k: int
    batch: int
    steps: int = 10_000
    """Length of the run, for schedules."""
    seed: int = 0
    device: str = "cpu"
    dead_after: int = 10_000_000
    """Rows without firing after which a latent is dead."""

    lr: float = 0.0
    """Peak learning rate; 0: that of `sae.train`."""

    centre: Tensor | None = None
    """Mean of all rows that the library will see, [d]; None: the first batch's mean stands for it."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        """`sae.train` with no flag but the numbers of latents and k, and the learning rate."""
        return Hyperparameters(n_latents=self.n, k=self.k, lr=self.lr)

    def lr_at(self, step: int) -> float:
        """Our learning rate at `step`. The peaks of sparsify (Adam) and dictionary_learning are 2e-4 / sqrt(n / 16,384)."""
        return self.hyperparameters.lr_at(step, self.steps)

    def adam(self) -> dict[str, Any]:
        """Our Adam, as entries of a parameter group."""
        return {"betas": self.hyperparameters.betas, "eps": self.hyperparameters.eps}

    def start(self) -> "Start":
        """The weights that our trainer starts from, with this seed."""
        sae = SAE(SAEConfig(d_model=self.d, n_latents=self.n, k=self.k, norm="none"))
        norm = self.hyperparameters.encoder_norm or best_encoder_norm(self.n, self.k, self.d)
        sae.initialise_("tied", torch.Generator().manual_seed(self.seed), encoder_norm=norm)
        return Start(sae.W_enc.detach(), sae.W_dec.detach())

    def centre_of(self, z: Tensor) -> Tensor:
        """Where b_pre starts, [d], like `z`, the first batch [N, d]."""
        return z.mean(0) if self.centre is None else self.centre.to(z)


class Start(NamedTuple):
    """Weights to start from; b_enc is zero, and b_pre comes with the first batch (`Setup.centre_of`)."""

    W_enc: Tensor
    """[n, d], rows of the norm at which random ones reconstruct best."""
    W_dec: Tensor
    """[n, d], the same directions with unit norm."""


class Library(Protocol):
    """What is timed and compared."""

    def step(self, z: Tensor) -> None:
        """One training step on rows `z` [N, d]."""

    def reconstruct(self, z: Tensor) -> Tensor:
        """`z_hat` [N, d]."""

    def set_dead(self, dead: Tensor) -> None:
        """Have the latents `dead` count as dead in the next step, and keep them from firing."""

    def dead_count(self) -> int:
        """Latents dead by the library's own count."""


class Ours:
    """This repository."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.sae = SAE(SAEConfig(d_model=setup.d, n_latents=setup.n, k=setup.k, norm="none"))
        start = setup.start()
        self.sae.load_state_dict({"W_enc": start.W_enc, "W_dec": start.W_dec}, strict=False)
        self.sae.to(setup.device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), **setup.adam(), decoupled_weight_decay=True, fused=True)
        config = setup.hyperparameters
        self.loss_config = LossConfig.at(config, 0, setup.d, torch.device(setup.device))
        self.optimizer_step = optimizer_step(config, self.sae, self.optimizer, ALONE, 0)
        self.since = torch.zeros(setup.n, dtype=torch.long, device=setup.device)
        self.count = 0

    @torch.no_grad()
    def step(self, z: Tensor) -> None:
        if self.count == 0:
            self.sae.b_pre.copy_(self.setup.centre_of(z))
        dead = (self.since >= self.setup.dead_after).nonzero()[:, 0]
        part = self.optimizer_step.add(z, self.loss_config, 1 / z.numel(), dead, len(dead))
        assert self.optimizer_step.finite()
        self.optimizer_step.update(self.setup.lr_at(self.count))
        self.since += len(z)
        self.since[part.fired > 0] = 0
        self.count += 1

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        return self.sae(z)

    @torch.no_grad()
    def set_dead(self, dead: Tensor) -> None:
        self.since.zero_()[dead] = NEVER
        self.sae.b_enc[dead] = -10

    def dead_count(self) -> int:
        return int((self.since >= self.setup.dead_after).sum())


class DenseStep:
    """The reference run's step, from its formula: everything dense, autograd, AdamW; decoder rows kept at unit norm.

    Its two slips (no averaging over GPUs, the wrong axis of the decoder) are left out: they would not change the time. It computes
    in float32; `autocast` has its products in bfloat16, for a stronger rival.
    """

    def __init__(self, setup: Setup, autocast: bool = False) -> None:
        self.setup, self.autocast = setup, autocast
        generator = torch.Generator().manual_seed(setup.seed)
        rows = F.normalize(torch.randn(setup.n, setup.d, generator=generator), dim=1)
        self.W_enc = rows.clone().to(setup.device).requires_grad_()
        self.W_dec = rows.T.contiguous().to(setup.device).requires_grad_()  # (d, n), as nn.Linear holds it
        self.b_enc = torch.zeros(setup.n, device=setup.device, requires_grad=True)
        self.b_pre = torch.zeros(setup.d, device=setup.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [self.W_enc, self.W_dec, self.b_enc, self.b_pre], lr=5e-5, betas=(0.85, 0.9999), eps=6.25e-10
        )
        self.since = torch.zeros(setup.n, dtype=torch.long, device=setup.device)
        self.k_aux = default_k_aux(setup.d)

    def _kept(self, h: Tensor, k: int) -> Tensor:
        values, indices = h.topk(k)
        return torch.zeros_like(h).scatter(1, indices, values.relu())

    def step(self, z: Tensor) -> None:
        dead = self.since >= self.setup.dead_after
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.autocast):
            h = F.linear(z - self.b_pre, self.W_enc, self.b_enc)
            kept = self._kept(h, self.setup.k)
            z_hat = F.linear(kept, self.W_dec) + self.b_pre
            loss = F.mse_loss(z_hat, z)
            if n_dead := int(dead.sum()):
                among_dead = self._kept(h.masked_fill(~dead, float("-inf")), min(self.k_aux, n_dead))
                e_hat = F.linear(among_dead, self.W_dec)
                loss = loss + aux_weight(n_dead, self.k_aux, 1 / 32) * F.mse_loss(e_hat, (z - z_hat).detach())
        loss.backward()
        with torch.no_grad():
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(0) * self.W_dec
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.W_dec /= self.W_dec.norm(dim=0)
            self.since += len(z)
            self.since[(kept > 0).any(0)] = 0

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        kept = self._kept(F.linear(z - self.b_pre, self.W_enc, self.b_enc), self.setup.k)
        return F.linear(kept, self.W_dec) + self.b_pre

    @torch.no_grad()
    def set_dead(self, dead: Tensor) -> None:
        self.since.zero_()[dead] = NEVER
        self.b_enc[dead] = -10

    def dead_count(self) -> int:
        return int((self.since >= self.setup.dead_after).sum())


class Sparsify:
    """sparsify (eai-sparsify): the body of Trainer.fit. `defaults`: signum, no AuxK; else Adam, which it offers, and AuxK at 1/32."""

    def __init__(self, setup: Setup, defaults: bool = False) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(setup.seed)
        self.setup, self.defaults = setup, defaults
        self.sae = SparseCoder(setup.d, SparseCoderConfig(num_latents=setup.n, k=setup.k), setup.device, dtype=torch.float32)
        self.alpha = 0.0 if defaults else 1 / 32
        if defaults:
            self.optimizer: Any = ScheduleFreeWrapper(
                SignSGD(self.sae.parameters(), lr=5e-3 / (setup.n / 2**14) ** 0.5), momentum=0.95
            )
            self.optimizer.train()
        else:
            start = setup.start()
            self.sae.encoder.weight.data.copy_(start.W_enc)
            self.sae.W_dec.data.copy_(start.W_dec)
            self.optimizer = torch.optim.Adam(self.sae.parameters(), **setup.adam())
        self.since = torch.zeros(setup.n, dtype=torch.long, device=setup.device)
        self.count = 0

    def step(self, z: Tensor) -> None:
        if self.count == 0:
            self.sae.b_dec.data = z.mean(0) if self.defaults else self.setup.centre_of(z)
        self.sae.set_decoder_norm_to_unit_norm()
        dead_mask = self.since > self.setup.dead_after if self.alpha > 0 else None
        out = self.sae(z, dead_mask=dead_mask)
        (out.fvu + self.alpha * out.auxk_loss).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        if not self.defaults:
            self.optimizer.param_groups[0]["lr"] = self.setup.lr_at(self.count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since += len(z)
        self.since[out.latent_indices.flatten()] = 0
        self.count += 1

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        if self.defaults:
            self.optimizer.eval()
        z_hat = self.sae(z).sae_out
        if self.defaults:
            self.optimizer.train()
        return z_hat

    @torch.no_grad()
    def set_dead(self, dead: Tensor) -> None:
        self.since.zero_()[dead] = NEVER
        self.sae.encoder.bias[dead] = -10

    def dead_count(self) -> int:
        return int((self.since > self.setup.dead_after).sum())


class SAELens:
    """SAELens: TopKTrainingSAE in SAETrainer.step. `defaults`: decoder rows of norm 0.1, `b_dec` at zero, lr 3e-4 constant, AuxK at
    1; else AuxK at 1/32.
    """

    def __init__(self, setup: Setup, defaults: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(setup.seed)
        self.setup, self.defaults = setup, defaults
        coefficient = {} if defaults else {"aux_loss_coefficient": 1 / 32}
        cfg = TopKTrainingSAEConfig(d_in=setup.d, d_sae=setup.n, k=setup.k, device=setup.device, **coefficient)
        window = setup.dead_after // setup.batch
        options = {"lr_end": 3e-5} if defaults else {"lr_end": 1e-5, "dead_feature_window": window}
        trainer_cfg = SAETrainerConfig(
            total_training_samples=setup.steps * setup.batch,
            train_batch_size_samples=setup.batch,
            device=setup.device,
            **options,
        )
        self.trainer = SAETrainer(cfg=trainer_cfg, sae=TopKTrainingSAE(cfg), data_provider=iter(()))
        if not defaults:
            start = setup.start()
            self.trainer.sae.W_enc.data.copy_(start.W_enc.T)
            self.trainer.sae.W_dec.data.copy_(start.W_dec)
            self.trainer.optimizer.param_groups[0].update(setup.adam())

    def step(self, z: Tensor) -> None:
        if not self.defaults:
            if self.trainer.n_training_steps == 0:
                self.trainer.sae.b_dec.data.copy_(self.setup.centre_of(z))
            self.trainer.optimizer.param_groups[0]["lr"] = self.setup.lr_at(self.trainer.n_training_steps)
        self.trainer.step(z)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        return self.trainer.sae(z)

    @torch.no_grad()
    def set_dead(self, dead: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.zero_()[dead] = NEVER
        self.trainer.sae.b_enc[dead] = -10

    def dead_count(self) -> int:
        return int(self.trainer.dead_neurons.sum())


class DictionaryLearning:
    """dictionary_learning: TopKTrainer.update. `defaults`: encoder rows of unit norm, `b_dec` at the first batch's geometric median,
    a warm-up of 1,000 steps and no decay.
    """

    def __init__(self, setup: Setup, defaults: bool = False) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.setup, self.defaults = setup, defaults
        self.trainer = TopKTrainer(
            steps=setup.steps, activation_dim=setup.d, dict_size=setup.n, k=setup.k, layer=0, lm_name="", seed=setup.seed,
            device=setup.device, warmup_steps=min(1000, setup.steps // 20),
        )  # fmt: skip
        self.trainer.dead_feature_threshold = setup.dead_after
        if not defaults:
            start = setup.start()
            self.trainer.ae.encoder.weight.data.copy_(start.W_enc)
            self.trainer.ae.encoder.bias.data.zero_()
            self.trainer.ae.decoder.weight.data.copy_(start.W_dec.T)
            self.trainer.optimizer.param_groups[0].update(setup.adam())
        self.count = 0

    def step(self, z: Tensor) -> None:
        number = self.count
        if not self.defaults:
            if self.count == 0:
                self.trainer.ae.b_dec.data.copy_(self.setup.centre_of(z))
            self.trainer.optimizer.param_groups[0]["lr"] = self.setup.lr_at(self.count)
            number += 1  # at step 0 it would set b_dec itself
        self.trainer.update(number, z)
        self.count += 1

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        return self.trainer.ae(z)

    @torch.no_grad()
    def set_dead(self, dead: Tensor) -> None:
        self.trainer.num_tokens_since_fired.zero_()[dead] = NEVER
        self.trainer.ae.encoder.bias[dead] = -10

    def dead_count(self) -> int:
        return int((self.trainer.num_tokens_since_fired >= self.setup.dead_after).sum())
