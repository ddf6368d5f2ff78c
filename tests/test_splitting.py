"""Feature splitting: parents against a loop over pairs, firing against a loop over tokens, a planted split, the stage."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from capture.store import open_activations
from core.artifact import verify
from core.cli import parse
from interpretability import splitting
from interpretability.splitting import SPLITTING_FILE, SUMMARY_FILE, Parents, SplittingConfig, count_firing, parents_of
from sae.model import SAE, load
from tests.interp_folders import Folders, make_folders, make_sae, random_texts, solo


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("splitting"), random_texts(60, seed=4), n_latents=48, k=5)


@pytest.fixture(scope="module")
def small(folders: Folders) -> Path:
    return make_sae(folders.sae.parent / "small", folders.activations, 16, 3)


def test_parents_against_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that divide nothing, two equal rows, and rows of any length."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(13, 6, generator=generator) * torch.arange(1, 14)[:, None]
    large = torch.randn(31, 6, generator=generator)
    small[9], large[4] = small[2], 3 * small[2]
    monkeypatch.setattr(splitting, "BLOCK_LATENTS", 7)
    found = parents_of(large, small)
    for i in range(31):
        cosines = [float(torch.cosine_similarity(large[i], small[j], dim=0)) for j in range(13)]
        best = max(range(13), key=lambda j: (round(cosines[j], 5), -j))
        assert int(found.latents[i]) == best
        assert float(found.cosines[i]) == pytest.approx(cosines[best], abs=1e-6)
    assert int(found.latents[4]) == 2


def test_firing_against_a_loop_over_tokens(folders: Folders, small: Path) -> None:
    few, many, activations = load(small), load(folders.sae), open_activations(folders.activations)
    parents = parents_of(many.W_dec, few.W_dec)
    descends = parents.cosines > float(parents.cosines.median())
    found = count_firing(few, many, parents, descends, iter(activations), torch.device("cpu"))
    fires, covered = [0] * 16, [0] * 16
    large, together = [0] * 48, [0] * 48
    tokens = 0
    for chunk in activations:
        firsts = set(chunk.offsets[:-1].tolist())
        for x in (row for i, row in enumerate(chunk.activations) if i not in firsts):
            tokens += 1
            own, hits = (
                {int(i) for v, i in zip(*(part[0].tolist() for part in sae.encode(x[None])), strict=True) if v > 0}
                for sae in (few, many)
            )
            for i in own:
                fires[i] += 1
                covered[i] += any(int(parents.latents[j]) == i and bool(descends[j]) for j in hits)
            for j in hits:
                large[j] += 1
                together[j] += int(parents.latents[j]) in own
    assert found.tokens == tokens
    assert found.small.tolist() == fires
    assert found.covered.tolist() == covered
    assert found.large.tolist() == large
    assert found.with_parent.tolist() == together
    assert 0 < sum(covered) < sum(fires)
    assert 0 < sum(together) < sum(large)


def config(folders: Folders, small: Path, out: Path, **flags: object) -> SplittingConfig:
    found = SplittingConfig(small=small, large=folders.sae, out=out, activations=folders.activations, tokens=0)
    return replace(found, **flags)  # type: ignore[arg-type]


def test_a_planted_split_is_found(folders: Folders, small: Path, tmp_path: Path) -> None:
    """Latent 0 of the small SAE in two copies, latent 1 in one, 2 in none; the other rows of the large one are orthogonal."""
    few = load(small)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(7))).Q
        few.W_dec.copy_(basis[:16])
        many = SAE(replace(few.cfg, n_latents=20))
        many.initialise_()
        many.W_dec[:16] = basis[16:32]
        many.W_dec[16:18], many.W_dec[18], many.W_dec[19] = basis[0], basis[1], basis[16] + 0.1 * basis[2]
        many.normalise_decoder_()
    few.save(tmp_path / "few")
    many.save(tmp_path / "many")
    flags = {"large": tmp_path / "many", "activations": None}
    splitting.run(config(folders, tmp_path / "few", tmp_path / "out", **flags), solo())
    assert verify(tmp_path / "out").kind == "splitting"
    rows = pq.read_table(tmp_path / "out" / SPLITTING_FILE).to_pylist()
    assert [row["large"] for row in rows if row["descends"]] == [16, 17, 18]
    assert [row["parent"] for row in rows[16:19]] == [0, 0, 1]
    assert {row["fires"] for row in rows} == {None}
    text = (tmp_path / "out" / SUMMARY_FILE).read_text(encoding="utf-8")
    assert "| split into several | 1 | 6.2% |\n| kept as one | 1 | 6.2% |\n| gone | 14 | 87.5% |" in text
    assert "3 of 20 large latents (15.0%) descend" in text
    assert text.index("**0**") < text.index("**1**"), "those that were split come first"


def test_the_stage_with_tokens(folders: Folders, small: Path, tmp_path: Path) -> None:
    splitting.run(config(folders, small, tmp_path / "out", min_cosine=0.2), solo())
    rows = pq.read_table(tmp_path / "out" / SPLITTING_FILE).to_pylist()
    assert any(row["with_parent"] for row in rows)
    assert all(row["with_parent"] <= row["fires"] for row in rows)
    text = (tmp_path / "out" / SUMMARY_FILE).read_text(encoding="utf-8")
    read = sum(int((chunk.offsets.diff() - 1).clamp_min(0).sum()) for chunk in open_activations(folders.activations))
    assert f"On {read:,} tokens" in text, "the first token of a sentence without BOS is not read"
    assert "% covered)" in text


def test_pairs_that_cannot_be_compared_are_refused(folders: Folders, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 48 latents, more than the 16 of --large .*the other way round"):
        splitting.run(config(folders, folders.sae, tmp_path / "a", large=small), solo())
    other = make_sae(tmp_path / "other", folders.activations, 64, 3, model_hash="beef")
    with pytest.raises(ValueError, match="model_hash is 'beef'"):
        splitting.run(config(folders, small, tmp_path / "b", large=other), solo())
    elsewhere = make_folders(tmp_path / "elsewhere", random_texts(9))
    few = make_sae(tmp_path / "few", folders.activations, 8, 3, bos="feed")
    many = make_sae(tmp_path / "many", folders.activations, 9, 3, bos="feed")
    with pytest.raises(ValueError, match="bos"):
        splitting.run(config(folders, few, tmp_path / "c", large=many, activations=elsewhere.activations), solo())
    for flags in (["--min-cosine", "1"], ["--tokens", "-1"]):
        with pytest.raises(ValueError, match="must be"):
            parse(SplittingConfig, "", ["--small", "a", "--large", "b", "--out", "c", *flags])


def test_ties_and_zero_tokens_divide_nothing() -> None:
    nothing = torch.zeros(2, dtype=torch.int64)
    firing = splitting.Counts(0, nothing, nothing, nothing, nothing)
    text = "".join(splitting._agreement(firing, torch.tensor([True, False])))
    assert "0.0%" in text
    assert parents_of(torch.zeros(1, 3), torch.eye(3)) == Parents(torch.tensor([0]), torch.tensor([0.0]))
