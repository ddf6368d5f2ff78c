"""Sites that are not as wide as the model: every stage from the model to steering, in one small run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from capture.activations import ActivationsConfig
from capture.activations import run as capture
from capture.store import open_activations
from core.artifact import verify
from inference.session import Feature, InferenceConfig, Session, open_session
from inference.steering import Edit, Recipe
from inference.web.finding import by_text
from inference.web.handlers import N_SLOTS, NO_SLOTS, Controls, Handlers
from inference.web.validation import Knobs
from interpretability.top_sentences import TopSentencesConfig
from interpretability.top_sentences import run as find_top
from llama3 import Sampling, generate
from sae import load
from sae.convert import ConvertConfig
from sae.convert import run as convert
from sae.evaluate import EvaluateConfig
from sae.evaluate import run as evaluate
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.train import TrainConfig
from sae.train import run as train
from tests.interp_folders import make_corpus, random_texts, solo
from tests.tiny import tiny_llama

WIDTHS = {"layers.1.attn_heads": 48, "layers.1.ffn_hidden": 96, "layers.1.resid_post": 32}
STRENGTH = 40.0  # at which the tiny model writes another text
PLACE: dict[str, Any] = {"device": "cpu", "threads": 1}


class Run(NamedTuple):
    """Folders of a run at one site."""

    site: str
    root: Path
    """Holds model, corpus and acts, which all sites share."""
    own: Path
    """Holds batches, run/sae, evaluation and top."""

    def session(self) -> Session:
        flags = InferenceConfig(model=str(self.root / "model"), sae=(self.own / "run/sae",), top=(self.own / "top",))
        return open_session(flags, torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose four heads of 12 are wider than itself, and activations of three widths in one folder."""
    root = tmp_path_factory.mktemp("widths")
    tiny_llama(root / "model", head_dim=12)
    make_corpus(root / "corpus", random_texts(150))
    flags: dict[str, Any] = {"storage": "fp32", "max_length": 60, "chunk_sentences": 64, "batch_tokens": 512}
    config = ActivationsConfig(
        model=str(root / "model"), corpus=root / "corpus", out=root / "acts", sites=tuple(WIDTHS), **flags, **PLACE
    )
    capture(config, solo())
    return root


@pytest.fixture(scope="module", params=["layers.1.attn_heads", "layers.1.ffn_hidden"])
def chain(root: Path, request: pytest.FixtureRequest) -> Run:
    """Activations to top sentences at one site: 64 latents, k = 4, 40 steps of 256 rows."""
    site: str = request.param
    own = root / site
    preprocess(PreprocessConfig(activations=root / "acts", out=own / "batches", site=site, batch_rows=256, **PLACE), solo())
    shape = {"n_latents": 64, "k": 4, "batch_size": 256, "epochs": 20, "max_steps": 40, "lr": 3e-3, "warmup_steps": 5}
    train(TrainConfig(batches=own / "batches", out=own / "run", wandb="off", **shape, **PLACE), solo())
    inputs: dict[str, Any] = {"sae": own / "run/sae", "model": str(root / "model"), "corpus": root / "corpus"}
    evaluate(EvaluateConfig(out=own / "evaluation", **inputs, **PLACE), solo())
    find_top(TopSentencesConfig(activations=root / "acts", out=own / "top", n=5, **inputs, **PLACE), solo())
    find_top(TopSentencesConfig(out=own / "live", n=5, **inputs, **PLACE), solo())
    return Run(site, root, own)


def test_each_site_of_a_folder_has_its_width(root: Path) -> None:
    assert verify(root / "acts").provenance["widths"] == WIDTHS
    for site, width in WIDTHS.items():
        opened = open_activations(root / "acts", site)
        assert opened.d_model == opened.provenance["d_model"] == width
        assert {chunk.activations.shape[1] for chunk in opened} == {width}


def test_every_folder_is_whole_and_of_the_sites_width(chain: Run) -> None:
    for name in ("batches", "run/sae", "evaluation", "top"):
        assert verify(chain.own / name).provenance["site"] == chain.site
    sae = load(chain.own / "run/sae")
    assert (sae.site, sae.cfg.d_model) == (chain.site, WIDTHS[chain.site])
    assert sae.cfg.provenance["d_model"] == WIDTHS[chain.site]
    assert {sae.cfg.provenance[name] for name in ("chunk_sentences", "batch_tokens")} == {64, 512}


def test_top_sentences_are_the_same_straight_from_the_model(chain: Run) -> None:
    stored, live = verify(chain.own / "top"), verify(chain.own / "live")
    assert stored.files == live.files
    assert stored.provenance | {"sites": [chain.site]} == live.provenance


def test_steering_edits_the_site_and_the_text(chain: Run) -> None:
    session = chain.session()
    features = session.needs_features()
    sae, latent = features.sae, int(features.max_values.argmax())
    ids = session.tokenizer.encode("the river of winter", bos=True)
    hooks = features.steering.hooks_for([Recipe((Edit(latent=latent, strength=STRENGTH),), sae.weights_hash)], [len(ids)])
    assert hooks is not None
    before = activations(session, ids, chain.site)
    with session.model.hooks(hooks(torch.arange(len(ids))[None])):
        after = activations(session, ids, chain.site)
    added = STRENGTH * features.max_values[latent] * sae.W_dec[latent] / sae.cfg.scale
    torch.testing.assert_close(after[1:], before[1:] + added, atol=1e-4, rtol=1e-4)
    greedy = Sampling(max_new_tokens=6, temperature=0)
    texts = [[p.token_id for p in generate(session.model, session.tokenizer, [ids], greedy, h)] for h in (None, hooks)]
    assert texts[0] != texts[1]


@torch.no_grad()
def activations(session: Session, ids: Sequence[int], site: str) -> Tensor:
    """(T, width)."""
    return session.model.capture(torch.tensor([list(ids)]), site)[site][0]


def test_the_app_finds_and_steers(chain: Run) -> None:
    session = chain.session()
    hits = by_text(session, session.at(chain.site), "the river of winter")
    assert hits
    handlers = Handlers(session, "plain")
    slots = (Feature(chain.site, hits[0].feature.latent), *NO_SLOTS[1:])
    rows = (3.0, "add", "all", *tuple(Controls()) * (N_SLOTS - 1))
    *_, last = handlers.generate("the river", Knobs(max_new_tokens=5, temperature=0), slots, rows)
    assert last.steered is not None
    assert last.steered[0].ids != last.baseline[0].ids


def test_an_import_takes_the_width_of_its_site(root: Path, chain: Run, tmp_path: Path) -> None:
    """Of a folder with several sites, the one that the SAE names; an SAE that names none of them is refused."""
    flags: dict[str, Any] = {"to": "sae", "activations": root / "acts"}
    convert(ConvertConfig(sae=chain.own / "run/sae", out=tmp_path / "same", **flags), solo())
    assert load(tmp_path / "same").site == chain.site
    sae = load(chain.own / "run/sae")
    for site, fragment in ((None, "site is None"), ("layers.1.resid_post", "width 32")):
        sae.cfg.provenance["site"] = site
        sae.save(tmp_path / str(site))
        with pytest.raises(ValueError, match=fragment):
            convert(ConvertConfig(sae=tmp_path / str(site), out=tmp_path / "refused", **flags), solo())


def test_an_sae_of_another_width_is_refused(root: Path, chain: Run, tmp_path: Path) -> None:
    """By every reader that loads the model, with both widths."""
    sae = load(chain.own / "run/sae")
    sae.cfg.provenance["site"] = "layers.1.resid_post"
    sae.save(tmp_path / "sae")
    flags: dict[str, Any] = {"sae": tmp_path / "sae", "model": str(root / "model"), "corpus": root / "corpus"}
    with pytest.raises(ValueError, match=rf"d_model is 32, but {WIDTHS[chain.site]}"):
        evaluate(EvaluateConfig(out=tmp_path / "evaluation", **flags), solo())
    with pytest.raises(ValueError, match=rf"d_model is 32, but {WIDTHS[chain.site]}"):
        find_top(TopSentencesConfig(out=tmp_path / "top", **flags), solo())
    opened = InferenceConfig(model=flags["model"], sae=(tmp_path / "sae",), top=(chain.own / "top",))
    with pytest.raises(ValueError, match=rf"d_model is {WIDTHS[chain.site]}, but .* 32"):
        open_session(opened, torch.device("cpu"))
