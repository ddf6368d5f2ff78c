"""sae.adopt: what a foreign SAE is, found by measuring it on the embedded model, or said to be undecided."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from capture.activations import ActivationsConfig
from capture.sentences import SentencesConfig
from capture.sentences import run as cut
from core.artifact import verify
from core.runtime import Runtime
from inference.session import InferenceConfig, open_session
from inference.steering import Edit, Recipe
from interpretability.top_sentences import TopSentencesConfig
from interpretability.top_sentences import run as find_top
from llama3 import load_model, load_tokenizer
from sae import adopt
from sae.adopt import CAPTURE, AdoptConfig, run
from sae.adopting import source
from sae.adopting.candidates import Candidate, Convention, Reading, Rows, conventions, meant, shuffled, sites_of
from sae.adopting.decision import Decision, Measured, Stated, Undecided, decide, table
from sae.adopting.measuring import Losses, Reader, fit
from sae.convert import dense_codes
from sae.evaluate import EvaluateConfig, evaluate_batch
from sae.evaluate import run as evaluate
from sae.evaluating.bootstrap import whole
from sae.evaluating.contenders import of_sae
from sae.evaluating.figures import measures
from sae.evaluating.subject import Batch as EvaluatedBatch
from sae.evaluating.subject import Subject
from sae.formats import FORMATS
from sae.formats.plain import PLAIN
from sae.model import SAE, load
from tests.made_saes import HIDDEN, LAYOUTS, SITE, WRITERS, K, in_raw_units, make, noise, rows, threshold_of, trained
from tests.published import PUBLISHED
from tests.sae_folders import ALONE

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"model": "demo", "sentences": 80, "rows": 1000, "max_length": 48}
AS_READ = Convention()


class Remembering(Reader):
    """A reader whose model runs once for each way to read."""

    def rows(self, sites: Sequence[str], bos: str, text: str, n: int, seed: int) -> dict[str, Rows]:
        known = _all_rows(self, bos, text, n, seed)
        return {site: known[site] for site in sites}


@cache
def _all_rows(reader: Reader, bos: str, text: str, n: int, seed: int) -> dict[str, Rows]:
    own = [site for site, width in reader.widths.items() if width == reader.model.params.dim]
    return Reader.rows(reader, own, bos, text, n, seed)


@cache
def _remembering() -> Remembering:
    own = adopt._reader(AdoptConfig(source="", out=Path(), **SMALL), CPU)
    return Remembering(own.model, own.tokenizer, own.texts, own.max_length, 256)


@pytest.fixture
def one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases on the same texts share what the model gave, and their losses are measured on few tokens."""
    reader = _remembering()
    monkeypatch.setattr("sae.adopt._reader", lambda config, device: reader)
    monkeypatch.setattr("sae.adopting.search.CE_TOKENS", 200)


def adopted(path: Path, out: Path, **flags: Any) -> SAE:
    run(AdoptConfig(source=str(path), out=out, **SMALL | flags), ALONE)
    return load(out)


IN_CI = ("site-dictionary_learning", "norm-params.npz", "bias-saelens")
"""Those that need one SAE trained; all twenty take minutes."""
CASES = [
    pytest.param(hidden, layout, marks=() if f"{hidden}-{layout}" in IN_CI else pytest.mark.real, id=f"{hidden}-{layout}")
    for hidden in HIDDEN
    for layout in LAYOUTS
]


@pytest.mark.usefixtures("one_reader")
@pytest.mark.parametrize(("hidden", "layout"), CASES)
def test_what_the_files_do_not_say_is_found(hidden: str, layout: str, tmp_path: Path) -> None:
    made = make(hidden, layout, tmp_path)
    sae = adopted(made.path, tmp_path / "out")
    facts, how = sae.cfg.provenance, sae.cfg.provenance["adopted"]
    assert (facts["site"], facts["bos"], how["text"], how["norm"], how["bias"]) == made[1:]
    wanted = {"site": "site", "bos": "bos", "text": "text"}.get(hidden, "convention")
    assert "fits best" in how["why"][wanted], "found by measuring, not by falling back"
    x, bos, text = rows(made.bos, made.text)[:500], made.bos, made.text
    original = trained(bos, text, "layer" if made.norm == "layer" else "dataset")
    torch.testing.assert_close(sae(x), original(x), rtol=0.05, atol=3.0 if "sae" in layout or layout == "sparsify" else 60.0)


@pytest.mark.usefixtures("one_reader")
@pytest.mark.parametrize("layout", [LAYOUTS[0], *(pytest.param(name, marks=pytest.mark.real) for name in LAYOUTS[1:])])
def test_noise_is_undecided(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Undecided, match="than chance"):
        adopted(noise(layout, tmp_path), tmp_path / "out")
    assert SITE in capsys.readouterr().out, "the table is printed all the same"
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.usefixtures("one_reader")
@pytest.mark.parametrize("scaled", [False, True])
def test_the_unit_of_llama_scopes_threshold_is_measured(scaled: bool, tmp_path: Path) -> None:
    sae, x = trained(), rows("none", "plain")
    plain, d = in_raw_units(sae), sae.cfg.d_model
    mean = float(x.norm(dim=1).mean())
    a = d**0.5 / mean
    threshold = threshold_of(plain, PLAIN, x)  # of raw rows
    made = PUBLISHED["Llama Scope"]
    facts = made.files["hyperparams.json"] | {
        "d_model": d, "d_sae": len(plain.W_enc), "top_k": K, "jump_relu_threshold": threshold * (a if scaled else 1),
        "dataset_average_activation_norm": {"in": mean, "out": mean},
        "hook_point_in": "blocks.4.hook_resid_post", "hook_point_out": "blocks.4.hook_resid_post",
    }  # fmt: skip
    absorbed = plain.absorbed()
    weights = {
        "encoder.weight": plain.W_enc, "encoder.bias": absorbed.b_enc * a, "decoder.weight": plain.W_dec.T.contiguous(),
        "decoder.bias": plain.b_dec * a,
    }  # fmt: skip
    files = {"hyperparams.json": facts, "checkpoints/final.safetensors": weights}
    found = adopted(made._replace(files=files).write(tmp_path), tmp_path / "out")
    assert found.cfg.provenance["adopted"]["threshold"] == ("scaled" if scaled else "as-read")
    assert K / 1.3 < found.cfg.provenance["adopted"]["l0"] < 1.3 * K
    assert "threshold_factor" not in found.cfg.provenance


def corpus(tmp_path: Path) -> Path:
    text = "\n\n".join(
        f"The {a} of the old harbour kept a {b} by the window. Every evening somebody asked about the {b}, and the {a} laughed."
        for a, b in zip(
            ("keeper", "baker", "captain", "widow") * 5, ("lamp", "clock", "parrot", "map", "stove") * 4, strict=True
        )
    )
    (tmp_path / "text.txt").write_text(text)
    cut(SentencesConfig(source=str(tmp_path / "text.txt"), out=tmp_path / "corpus"), ALONE)
    return tmp_path / "corpus"


def test_every_stage_takes_what_is_adopted(tmp_path: Path) -> None:
    """Evaluation, top sentences straight from the model, and steering, of an SAE that no stage of ours trained."""
    made = make("norm", "saelens", tmp_path)
    adopted(made.path, tmp_path / "ours", sentences=40)
    verify(tmp_path / "ours")
    where: dict[str, Any] = {"sae": tmp_path / "ours", "model": "demo", "corpus": corpus(tmp_path)}
    evaluate(EvaluateConfig(**where, out=tmp_path / "evaluation", sentences=10), ALONE)
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert figures["fvu"]["value"] < 0.8
    assert figures["fvu"]["conditions"]["site"] == SITE
    find_top(TopSentencesConfig(**where, out=tmp_path / "top", n=3, n_promoted=2), ALONE)
    session = open_session(InferenceConfig(model="demo", sae=(tmp_path / "ours",), top=(tmp_path / "top",)), CPU)
    known = session.needs_features()
    latent = int(known.max_values.argmax())
    tokens = torch.tensor([session.tokenizer.encode("The keeper of the old harbour")])
    hooks_for = known.steering.hooks_for([Recipe((Edit(latent=latent, strength=4.0),), known.sae.weights_hash)], [1])
    assert hooks_for is not None
    with torch.no_grad():
        plain = session.model(tokens)
        with session.model.hooks(hooks_for(torch.arange(tokens.shape[1])[None])):
            steered = session.model(tokens)
    assert float((plain - steered).abs().max()) > 0.1


@pytest.mark.usefixtures("one_reader")
def test_what_was_done_is_recorded_and_done_again_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make("norm", "params.npz", tmp_path)
    (made.path / "README.md").write_text("A card.")
    sae = adopted(made.path, tmp_path / "out")
    assert capsys.readouterr().out.count("*") == 1
    how = sae.cfg.provenance["adopted"]
    assert set(how["files"]) == {"params.npz", "README.md"}
    assert how["source"] == "average_l0_16"
    report = json.loads((tmp_path / "out" / "adoption.json").read_text())
    assert report["chosen"]["site"] == SITE
    assert report["candidates"] == sorted(report["candidates"], key=lambda line: line["fvu"])
    assert report["stated"]["l0"] == 16
    assert str(tmp_path) not in (tmp_path / "out" / "cfg.json").read_text() + (tmp_path / "out" / "manifest.json").read_text()
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    adopted(made.path, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_later_stages_capture_as_capture_does() -> None:
    defaults = ActivationsConfig(model="demo", corpus=Path("c"), out=Path("o"))
    assert {name: getattr(defaults, "storage" if name == "dtype" else name) for name in CAPTURE} == CAPTURE
    assert AdoptConfig.max_length == defaults.max_length


@pytest.mark.real
@pytest.mark.usefixtures("one_reader")
def test_k_is_the_measured_l0_where_the_layout_has_none(tmp_path: Path) -> None:
    plain = in_raw_units(trained())
    threshold = torch.full((512,), threshold_of(plain, PLAIN, rows("none", "plain")))
    path = WRITERS["params.npz"](plain.absorbed(), threshold, tmp_path, True)
    bare = tmp_path / "layer_4-res" / "params"
    bare.mkdir(parents=True)
    (path / "params.npz").rename(bare / "params.npz")
    sae = adopted(bare, tmp_path / "out", site=SITE, bos="none", text="plain")
    assert sae.cfg.k == round(sae.cfg.provenance["adopted"]["l0"]) > 1


REFUSED: list[tuple[Callable[[Path], Path], dict[str, Any], str]] = [
    (lambda root: PUBLISHED["Goodfire"].write(root), {}, "width 12, and the model has no site"),
    (lambda root: make("norm", "saelens", root).path, {"site": "layers.9.resid_post"}, "layers.9.resid_post.*does not have"),
    (lambda root: make("norm", "saelens", root).path, {"site": "layers.3.ffn_hidden"}, "width 256, but layers.3.ffn_hidden"),
    (lambda root: Path("demo/sae").resolve(), {}, "ours already"),
    (lambda root: root / "nothing", {}, "no such folder"),
    (lambda root: make("norm", "params.npz", root).path, {"l0": 1.5}, "1.5 active latents per token are stated"),
    (lambda root: make("site", "saelens", root).path, {"site": "layers.0.attn_out"}, "--site|than chance"),
]


@pytest.mark.usefixtures("one_reader")
@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_does_not_fit_is_refused_in_a_line(case: int, tmp_path: Path) -> None:
    path, flags, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        adopted(path(tmp_path), tmp_path / "out", **flags)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_reader")
def test_a_folder_of_several_sites_lists_them(tmp_path: Path) -> None:
    for name in ("layers.3", "layers.4"):
        (tmp_path / "run" / name).mkdir(parents=True)
        for file, content in FORMATS["sparsify"].write(trained()).items():
            (tmp_path / "run" / name / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"2 SAE\(s\).*layers\.3, layers\.4"):
        adopted(tmp_path / "run", tmp_path / "out")


def test_flags_that_make_no_sense_are_refused() -> None:
    for flags in ({"sentences": 0}, {"rows": 0}, {"max_length": 0}, {"l0": -1.0}):
        with pytest.raises(ValueError, match=f"--{next(iter(flags)).replace('_', '-')}"):
            AdoptConfig(source="x", model="demo", out=Path("o"), **flags)
    with pytest.raises(ValueError, match="torchrun"):
        run(AdoptConfig(source="x", model="demo", out=Path("o")), Runtime(0, 2, CPU, ALONE.comm))


def test_a_place_on_the_hub_keeps_its_revision(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abcd" / "layers.4"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text("{}")
    found = source.locate(str(folder))
    assert (found.name, found.revision) == ("owner/name:layers.4", "0123abcd")
    assert set(found.hashes()) == {"cfg.json"}


# --- decisions, on made-up figures -----------------------------------------------------------------------------------------


def measured(fvu: float, site: str = SITE, bos: str = "none", text: str = "plain", **more: Any) -> Measured:
    convention = more.pop("convention", AS_READ)
    return Measured(
        Candidate(Reading(site, bos, text), convention), fvu, **{"l0": 16.0, "chance": 0.9, "fvu_first": fvu} | more
    )


def decision(*found: Measured, **said: Any) -> Decision:
    return decide(found, Stated(**said), ("feed", "plain"))


OTHER = Convention(norm="dataset")


def test_the_files_are_followed_where_they_fit_as_well() -> None:
    near, best = measured(0.301), measured(0.3, convention=OTHER)
    assert decision(near, best).chosen is near, "as the layout says, within the tie"
    assert decision(measured(0.32), best).chosen is best
    stated, better = measured(0.308), measured(0.3, site="layers.3.resid_post")
    assert decision(stated, better, sites=(SITE,)).chosen is stated
    with pytest.raises(Undecided, match=r"files name layers\.4\.resid_post, but layers\.3\.resid_post.*--site"):
        decision(measured(0.32), better, sites=(SITE,))
    with pytest.raises(Undecided, match="undecided between"):
        decision(stated, better)
    by_ce = replace(better, ce_recovered=0.9)
    assert decision(replace(stated, ce_recovered=0.7), by_ce).chosen is by_ce


def test_an_l0_that_is_not_the_stated_one_is_no_fit() -> None:
    dense, sparse = measured(0.2, l0=100.0, convention=OTHER), measured(0.3, l0=17.0)
    assert decision(dense, sparse, l0=16.0).chosen is sparse
    assert decision(dense, sparse).chosen is dense
    with pytest.raises(Undecided, match=r"3 active latents per token are stated.*--l0 0"):
        decision(dense, sparse, l0=3.0)


def test_norms_that_fit_alike_are_undecided_until_the_user_says() -> None:
    layer, dataset = measured(0.3, convention=Convention(norm="layer")), measured(0.3005, convention=OTHER)
    with pytest.raises(Undecided, match=r"norm layer.*norm dataset.*--norm"):
        decision(layer, dataset, measured(0.4))


def test_bos_is_judged_by_first_tokens_and_said_where_it_is_not_settled() -> None:
    none, feed = measured(0.30, fvu_first=0.1), measured(0.28, bos="feed", fvu_first=0.5)
    assert decision(none, feed).chosen is none
    near = replace(feed, fvu_first=0.11)
    assert decision(none, near).chosen is near, "as the model is used"
    assert "undecided" in decision(none, near).why["bos"]
    assert decision(none, near, bos="none").chosen is none
    unknown = [replace(one, fvu_first=float("nan")) for one in (none, feed)]
    assert decision(*unknown).chosen is unknown[1], "by all tokens, where there are no first ones"
    found = decision(none, feed, bos="feed")
    assert found.chosen is none
    assert "though the files say feed" in found.why["bos"]
    chat = measured(0.2, text="chat", bos="feed")
    assert decision(none, chat).chosen is chat
    assert "*" in table([none, chat], chat).splitlines()[1]


# --- candidates and figures, against the obvious --------------------------------------------------------------------------


def test_sites_are_those_of_the_files_and_their_neighbours() -> None:
    widths = {f"layers.{i}.{place}": 8 for i in range(4) for place in ("resid_post", "resid_pre", "ffn_out")}
    widths |= {"layers.1.ffn_hidden": 32, "embed": 8, "final_norm": 8}
    assert sites_of({"site": "layers.2.ffn_out"}, widths, 8)[0] == "layers.2.ffn_out"
    near = sites_of({"site": "layers.2.resid_post"}, widths, 8)
    assert set(near) == {"layers.1.resid_post", "layers.2.resid_post", "layers.2.ffn_out", "layers.3.resid_post"}
    assert near[0] == "layers.2.resid_post"
    both = sites_of(
        {"site": "layers.2.resid_post", "site_candidates": ["layers.2.resid_post", "layers.2.resid_pre"]}, widths, 8
    )
    assert both[:2] == ["layers.2.resid_post", "layers.2.resid_pre"]
    everywhere = sites_of({}, widths, 8)
    assert "layers.1.resid_pre" not in everywhere, "what leaves layer 0 is there by that name"
    assert {"layers.0.resid_pre", "layers.0.resid_post", "layers.3.ffn_out"} < set(everywhere)
    assert "embed" not in everywhere, "which is what enters layer 0"
    assert sites_of({}, widths, 32) == ["layers.1.ffn_hidden"]
    assert sites_of({"site": "layers.0.ffn_out"}, widths, 8, "embed") == ["embed"]


@pytest.fixture(scope="module")
def reader() -> Reader:
    texts = [
        "The old harbour was quiet.",
        "Every evening somebody asked about the lamp.",
        "",
        "Rain fell on the roofs of the town.",
    ]
    return Reader(load_model("demo", CPU), load_tokenizer("demo"), texts, 6, 20)


def test_rows_are_those_of_the_texts(reader: Reader) -> None:
    model, tokenizer = reader.model, reader.tokenizer
    for bos, lead in (("none", []), ("feed", [tokenizer.bos_id])):
        found = reader.rows([SITE], bos, "plain", 1000, 0)[SITE]
        encoded = sorted((tokenizer.encode(text)[:6] for text in reader.texts if text), key=len)
        with torch.inference_mode():
            wanted = torch.cat([model.capture(torch.tensor([lead + ids]), [SITE])[SITE][0, len(lead) :] for ids in encoded])
        norms = wanted.double().norm(dim=1)
        kept = norms <= 10 * norms.median()
        torch.testing.assert_close(found.x, wanted[kept], rtol=1e-4, atol=1e-3)
        assert int(found.first.sum()) == 3
        assert found.mean_norm == pytest.approx(float(norms[kept].mean()), rel=1e-5)
        assert found.mean_square == pytest.approx(float(norms[kept].square().mean()), rel=1e-5)
    assert len(reader.rows([SITE], "none", "plain", 5, 0)[SITE].x) == 5
    assert len(reader.encoded("chat")) == 3


@pytest.mark.parametrize("bos", ["none", "feed"])
def test_figures_are_those_of_an_evaluation(bos: str, reader: Reader) -> None:
    sae = load("demo/sae")
    sae.cfg = replace(sae.cfg, provenance=sae.cfg.provenance | {"bos": bos})
    found = reader.rows([SITE], bos, "plain", 1000, 0)[SITE]
    batches = list(reader.batches(bos, "plain"))
    subject = Subject(sae, reader.model, reader.tokenizer, 4096)
    contender = of_sae("SAE", sae)
    sums = contender.sums(1)
    with torch.inference_mode():
        for tokens, counts in batches:
            real = counts.clone()
            real[:, : len(subject.bos)] = True
            groups = torch.zeros(len(tokens), dtype=torch.long)
            evaluate_batch(subject, EvaluatedBatch(tokens, real, groups), [contender], torch.zeros(256), {"SAE": sums})
    figures = measures(whole(sums.sums))
    ours = fit(sae, found.x)
    assert ours.fvu == pytest.approx(float(figures["fvu"]), rel=1e-4)
    losses = Losses(reader, batches)
    for _ in range(2):
        recovered = losses.recovered(sae, SITE, sae.cfg.provenance["max_norm"])
        assert recovered == pytest.approx(float(figures["ce_recovered"]), rel=1e-4)
    active = (dense_codes(sae, found.x) > 0).sum(1).float().mean()
    assert ours.l0 == pytest.approx(float(active))


def test_conventions_compute_what_they_say(reader: Reader) -> None:
    sae = replace_scale(load("demo/sae"))
    found = reader.rows([SITE], "none", "plain", 1000, 0)[SITE]
    x, d = found.x, 256
    scales = {"none": 1.0, "dataset": d**0.5 / x.norm(dim=1).mean(), "unit": 1 / x.square().sum(1).mean().sqrt()}
    for convention in conventions(sae):
        b_enc = sae.b_enc + {"as-read": 0, "added": 1, "removed": -1}[convention.bias] * (sae.W_enc @ sae.b_pre)
        if convention.norm == "layer":
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        else:
            mean, std = torch.zeros(1), 1 / torch.as_tensor(scales["none" if convention.norm == "as-read" else convention.norm])
        z = (x - mean) / std
        h = (z - sae.b_pre) @ sae.W_enc.T + b_enc
        f = torch.zeros_like(h).scatter(1, h.topk(16).indices, 1.0) * h.relu()
        torch.testing.assert_close(
            meant(sae, convention, found)(x), (f @ sae.W_dec + sae.b_pre) * std + mean, rtol=1e-3, atol=1e-2
        )
    other = shuffled(sae, 0)
    assert sorted(other.W_dec[0].tolist()) == sorted(sae.W_dec[0].tolist())
    torch.testing.assert_close((other.W_enc * other.W_dec).sum(1), (sae.W_enc * sae.W_dec).sum(1), rtol=1e-4, atol=1e-5)
    assert not torch.equal(other.W_dec, sae.W_dec)


def replace_scale(sae: SAE) -> SAE:
    """As a layout without a normalisation would be read."""
    sae.cfg = replace(sae.cfg, norm="none", scale=1.0)
    return sae
