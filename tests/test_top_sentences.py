"""Top sentences of every latent: against brute force, across ranks, and what is refused."""

import hashlib
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from capture.activations import ActivationsConfig
from capture.activations import run as capture_activations
from capture.store import open_activations, open_corpus
from core import files
from core.artifact import building, open_artifact, verify
from core.cli import parse
from interpretability.evidence.background import Background, cofiring
from interpretability.evidence.ngrams import NgramCounter, ngrams_of
from interpretability.evidence.peaks import variety
from interpretability.evidence.promoted import promoted_by
from interpretability.evidence.raised import contexts_of, response_at
from interpretability.evidence.selection import Hits, Ragged, Sentences, offsets_of
from interpretability.evidence.tables import Once
from interpretability.explain import ExplainConfig
from interpretability.explain import run as run_explain
from interpretability.records import (
    COUNTED,
    HISTOGRAM_BINS,
    HISTOGRAM_FIRST_EXPONENT,
    NEVER_FIRED,
    NOT_SHOWN,
    TopSentences,
    open_top,
    read_explanations,
)
from interpretability.report import ReportConfig
from interpretability.report import run as run_report
from interpretability.top_sentences import TopSentencesConfig, parts_of, run
from llama3 import Transformer, load_model, load_tokenizer
from sae.model import load
from tests.faults import ForkServer
from tests.interp_folders import SITE, ChunkConfig, Folders, make_corpus, make_folders, make_sae, random_texts, solo
from tests.tiny import tiny_llama


def config(folders: Folders, out: Path, *flags: str) -> TopSentencesConfig:
    argv = [*folders.flags(), "--out", str(out), "--device", "cpu", "--threads", "1", *flags]
    return parse(TopSentencesConfig, "", argv)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("inputs"), random_texts(150))


@pytest.fixture(scope="module")
def top(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("top") / "top"
    run(config(folders, out, "--n-sentences", "5"), solo())
    return out


def dense_activations(folders: Folders) -> tuple[list[torch.Tensor], int]:
    """(T, n_latents) of every sentence, and the number of latents: the slow, obvious way. The first token is not read."""
    sae, activations = load(folders.sae), open_activations(folders.activations)
    sentences = []
    for chunk in activations:
        latents = sae.encode(chunk.activations)
        dense = torch.zeros(len(chunk.activations), sae.cfg.n_latents).scatter_add_(1, latents.indices, latents.values)
        dense[chunk.offsets[:-1]] = 0
        sentences += [dense[a:b] for a, b in zip(chunk.offsets[:-1].tolist(), chunk.offsets[1:].tolist(), strict=True)]
    return sentences, sae.cfg.n_latents


def reference_top(values: torch.Tensor, n: int) -> list[tuple[float, int]]:
    """(value, sentence id) by value down and id up, of the sentences whose value is above 0."""
    return [(-v, i) for v, i in sorted((-v, i) for i, v in enumerate(values.tolist()) if v > 0)[:n]]


AGGREGATE = {
    "max": lambda dense: dense.amax(0),
    "mean": lambda dense: dense.double().mean(0).float(),
    "last": lambda dense: dense[-1],
}


@pytest.mark.parametrize("n_sentences", [150, 10_000])
def test_equal_to_brute_force(tmp_path: Path, n_sentences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if n_sentences > 150:  # many parts, joined many times between many merges
        monkeypatch.setattr("interpretability.top_sentences.BATCH_TOKENS", 64)
        monkeypatch.setattr("interpretability.evidence.selection.MIN_PENDING", 5000)
        monkeypatch.setattr("interpretability.evidence.firing.GROUP", 4)  # the fast way, on activations that often tie
    texts = random_texts(n_sentences, longest=12 if n_sentences == 150 else 2)
    folders = make_folders(tmp_path, texts, n_latents=48, k=4, chunk_sentences=16 if n_sentences == 150 else 2048)
    run(config(folders, tmp_path / "top", "--n-sentences", "7"), solo())
    top = open_top(tmp_path / "top")
    sentences, n_latents = dense_activations(folders)
    assert n_latents == top.n_latents == 48
    ties = 0
    for aggregation, aggregate in AGGREGATE.items():
        values = torch.stack([aggregate(dense) for dense in sentences], 1)  # (n_latents, n_sentences)
        for latent in range(n_latents):
            expected = reference_top(values[latent], 7)
            found = top.sentences(latent, aggregation)
            assert [(s.value, s.sentence_id) for s in found] == expected
            assert [s.rank for s in found] == list(range(len(expected)))
            ties += len(expected) - len({value for value, _ in expected})
            for sentence in found:
                assert sentence.activations == sentences[sentence.sentence_id][:, latent].tolist()
                assert sentence.text == texts[sentence.sentence_id] == "".join(sentence.tokens)
    assert ties > 100  # the order among equals was put to the test
    peaks = torch.stack([dense.amax(0) for dense in sentences], 1)
    for latent in range(n_latents):
        found = top.levels(latent)
        assert [s.sentence_id for s in found] == reference_levels(peaks[latent].tolist(), latent, 2)
        assert [s.rank for s in found] == list(range(len(found)))
        assert all(s.value == max(s.activations) == peaks[latent, s.sentence_id] for s in found)
    check_background(top, sentences, texts)


def test_parts_hold_every_sentence_once(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interpretability.top_sentences.BATCH_TOKENS", 20)
    chunk = open_activations(folders.activations).chunk(1)
    parts = list(parts_of(chunk))
    assert len(parts) > 2
    assert torch.equal(torch.cat([part.sentence_ids for part in parts]), chunk.sentence_ids)
    assert torch.equal(torch.cat([part.document_ids for part in parts]), chunk.document_ids)
    for i, sentence_id in enumerate(chunk.sentence_ids.tolist()):
        part = next(part for part in parts if sentence_id in part.sentence_ids)
        rows, wanted = part.sentence(sentence_id), chunk.sentence(sentence_id)
        assert torch.equal(rows.activations, wanted.activations), i
        assert torch.equal(rows.token_ids, wanted.token_ids), i


def test_texts_names_and_labels_are_those_of_the_sentence(folders: Folders, top: Path) -> None:
    corpus, tokenizer = open_corpus(folders.corpus), load_tokenizer(folders.model)
    opened = open_top(top)
    seen = [s for latent in range(opened.n_latents) for s in opened.sentences(latent, "mean")]
    assert any("日本" in s.text for s in seen)  # tokens that are parts of a character
    for sentence in seen:
        i = sentence.sentence_id
        assert sentence.text == corpus.texts([i])[0]
        assert sentence.label == corpus.labels([i])[0]
        assert sentence.document == f"book.{i // 7}"
        assert sentence.tokens == tokenizer.pieces(tokenizer.encode(sentence.text))
        assert len(sentence.activations) == len(sentence.tokens)


def test_statistics_equal_the_plain_ones(folders: Folders, top: Path) -> None:
    dense = torch.cat([rows[1:] for rows in dense_activations(folders)[0]]).double()
    opened = open_top(top)
    assert opened.n_tokens == len(dense)
    edges = [0.0, *(2.0**e for e in range(-9, 10)), np.inf]
    for latent in range(opened.n_latents):
        found, column = opened.statistics(latent), dense[:, latent]
        firing = column[column > 0].numpy()
        assert found.firing_count == len(firing)
        assert found.max == opened.max_values[latent] == (firing.max() if len(firing) else 0)
        assert found.density == len(firing) / len(dense)
        assert found.mean == pytest.approx(firing.mean() if len(firing) else 0, rel=1e-6)
        assert len(found.histogram) == HISTOGRAM_BINS
        assert found.histogram == np.histogram(firing, edges)[0].tolist()
    sentences = [any(s[:, 5] > 0) for s in dense_activations(folders)[0]]
    assert opened.statistics(5).sentence_count == sum(sentences)
    assert opened.statistics(opened.n_latents - 1).firing_count == 0
    assert opened.sentences(opened.n_latents - 1) == []
    assert open_artifact(top).manifest.counts["dead_latents"] >= 2


def test_promoted_tokens_against_a_written_out_product(folders: Folders, tmp_path: Path) -> None:
    model, tokenizer, sae = load_model(folders.model), load_tokenizer(folders.model), load(folders.sae)
    logits = (sae.W_dec[3] * model.norm.weight) @ model.output.weight.T
    n_plain = tokenizer.n_vocab - len(tokenizer.special_tokens)
    order = logits[:n_plain].argsort(descending=True).tolist()
    (promoted,), (suppressed,) = promoted_by(model, SITE, sae.W_dec[3:4], tokenizer, 10)
    assert promoted == [tokenizer.decode([i]) for i in order[:10]]
    assert suppressed == [tokenizer.decode([i]) for i in order[::-1][:10]]
    run(config(folders, tmp_path / "top", "--contexts", "0"), solo())
    found = open_top(tmp_path / "top").statistics(3)
    assert (found.promoted, found.suppressed) == (promoted, suppressed)
    with torch.no_grad():
        model.norm.weight.mul_(torch.linspace(-1, 1, 32))
    other = promoted_by(model, SITE, sae.W_dec[3:4], tokenizer, 3).promoted[0]
    plain = promoted_by(model, "final_norm", sae.W_dec[3:4], tokenizer, 3).promoted[0]
    assert plain == promoted[:3] != other  # at final_norm the norm's weight is behind us already


def test_raised_tokens_against_a_pass_a_coordinate_and_context(folders: Folders, tmp_path: Path) -> None:
    """Each context read whole, each coordinate pushed by itself, the response and the log probabilities written out."""
    model, tokenizer, sae = load_model(folders.model), load_tokenizer(folders.model), load(folders.sae)
    run(config(folders, tmp_path / "top", "--contexts", "12"), solo())
    contexts = contexts_of(open_corpus(folders.corpus), tokenizer, 12, 0)
    assert 8 < len(contexts) <= 12
    assert all(2 <= len(ids) <= 24 for ids in contexts)
    plain, change = torch.zeros(32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    for ids in contexts:
        tokens = torch.tensor([ids])
        x = model.capture(tokens, sites=[SITE])[SITE][0, -1]
        before = model.capture(tokens, sites=["final_norm"])["final_norm"][0, -1].detach()
        plain += before / len(contexts)
        for i in range(32):
            push = 0.1 * x.norm() * torch.eye(32)[i]
            with torch.no_grad(), model.hooks({SITE: lambda x, push=push: torch.cat((x[:, :-1], x[:, -1:] + push), 1)}):
                after = model.capture(tokens, sites=["final_norm"])["final_norm"][0, -1]
            change[i] += (after - before) / 0.1 / len(contexts)
    n_plain = tokenizer.n_vocab - len(tokenizer.special_tokens)
    unembedding = model.output.weight[:n_plain].detach().double()
    for latent in (0, 17, 40):
        row = (sae.W_dec[latent] / sae.W_dec[latent].norm()).double()
        before, after = (x.log_softmax(0) for x in (unembedding @ plain, unembedding @ (plain + 0.4 * row @ change)))
        found = open_top(tmp_path / "top").statistics(latent)
        for names, rise, chances in ((found.promoted, after - before, after), (found.suppressed, before - after, before)):
            likely = chances.argsort(descending=True)[: max(10, n_plain // 16)]
            order = likely[rise[likely].argsort(descending=True)][:10]
            assert names == [tokenizer.decode([i]) for i in order.tolist() if rise[i] > 0]


def test_the_response_foretells_what_turning_a_latent_up_does(folders: Folders) -> None:
    """A pass for each of ten latents and each context, with what the app would add: log probabilities change alike."""
    model, tokenizer, sae = load_model(folders.model), load_tokenizer(folders.model), load(folders.sae)
    contexts = contexts_of(open_corpus(folders.corpus), tokenizer, 32, 0)
    response = response_at(model, SITE, contexts, solo())
    unembedding = model.output.weight.detach().double()

    @torch.no_grad()
    def chances(row: torch.Tensor) -> torch.Tensor:
        def turn_up(x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x[:, :-1], x[:, -1:] + 0.4 * x[:, -1:].norm() * row), 1)

        with model.hooks({SITE: turn_up}):
            return torch.stack([model(torch.tensor([ids]))[0, -1].double() for ids in contexts]).mean(0)

    before, alike = chances(torch.zeros(32)), []
    for latent in range(0, 50, 5):
        row = sae.W_dec[latent].detach() / sae.W_dec[latent].norm()
        told = unembedding @ (0.4 * row.double() @ response.change)
        alike.append(float(torch.corrcoef(torch.stack((chances(row) - before, told)))[0, 1]))
    assert min(alike) > 0.5, alike
    assert sum(alike) > 8, alike


def test_variety_of_peaks(top: Path) -> None:
    """Against the units on which each sentence fires most; a folder without the column gives the same."""
    opened = open_top(top)
    assert opened.peak_variety.min() == 0 < opened.peak_variety.max() <= 1
    for latent in range(0, opened.n_latents, 5):
        words = []
        for sentence in opened.sentences(latent):
            peak = sentence.activations.index(max(sentence.activations))
            start = len("".join(sentence.tokens[:peak])) + len(sentence.tokens[peak]) - len(sentence.tokens[peak].lstrip())
            text = "".join(sentence.tokens)
            words.append(next((m[0].lower() for m in re.finditer(r"\w+|\S", text) if m.start() <= start < m.end()), ""))
        assert float(opened.peak_variety[latent]) == pytest.approx(variety(words)), (latent, words)
    older = open_top(top)
    older._latents = older._latents.drop_columns("peak_variety")
    assert older.peak_variety.tolist() == opened.peak_variety.tolist()
    assert variety(["war", "wars", "War".lower(), "peace"]) == pytest.approx(1 / 3)
    assert variety(["one"]) == variety([]) == 0


@pytest.mark.parametrize(("site", "out"), [("attn_heads", "attn_out"), ("ffn_hidden", "ffn_out")])
def test_promoted_tokens_of_a_site_inside_a_layer_go_through_its_matrix(folders: Folders, site: str, out: str) -> None:
    model, tokenizer, site, out = (
        load_model(folders.model),
        load_tokenizer(folders.model),
        f"layers.1.{site}",
        f"layers.1.{out}",
    )
    direction = torch.randn(1, model.width(site), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.hooks({site: lambda x: direction.expand(1, 1, -1)}):
        written = model.capture(torch.zeros(1, 1, dtype=torch.long), out)[out][0]
    assert promoted_by(model, site, direction, tokenizer, 5) == promoted_by(model, SITE, written, tokenizer, 5)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def on_two_ranks(fork_server: ForkServer, *flags: str) -> None:
    done = fork_server.ranks(2, "interpretability.top_sentences", *flags, "--device", "cpu", "--threads", "1")
    assert done.returncode == 0, done.stderr


def test_two_ranks_write_the_same_bytes_as_one(fork_server: ForkServer, folders: Folders, top: Path, tmp_path: Path) -> None:
    on_two_ranks(fork_server, *folders.flags(), "--out", str(tmp_path / "two"), "--n-sentences", "5")
    assert digest(tmp_path / "two") == digest(top)
    verify(tmp_path / "two")


def test_run_again_is_left_alone_and_other_flags_are_refused(folders: Folders, top: Path) -> None:
    before = digest(top)
    run(config(folders, top, "--n-sentences", "5"), solo())
    assert digest(top) == before
    with pytest.raises(ValueError, match="--n 5, now 6"):
        run(config(folders, top, "--n-sentences", "6"), solo())


def test_continues_after_a_kill(folders: Folders, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(operation: str, path: Path) -> None:
        if (operation, path.name) == ("rename", "latents.parquet"):
            raise KeyboardInterrupt

    half = tmp_path / "half"
    monkeypatch.setattr(files, "before_operation", die)
    with pytest.raises(KeyboardInterrupt):
        run(config(folders, half, "--n-sentences", "5"), solo())
    monkeypatch.undo()
    assert (half / "top_sentences.parquet").exists()
    with pytest.raises(ValueError, match="has not finished"):
        open_top(half)
    run(config(folders, half, "--n-sentences", "5"), solo())
    assert digest(half) == digest(top)


def rewrite_chunk(source_path: Path, out: Path, index: int, **changed: torch.Tensor) -> Path:
    """A copy of an activations folder with tensors of one chunk replaced, manifest and checksums in order."""
    source = open_artifact(source_path, "activations")
    manifest = source.manifest
    step = ChunkConfig(chunk_sentences=manifest.config["chunk_sentences"])
    with building(out, "activations", step, solo(), provenance=manifest.provenance) as builder:
        for i, name in enumerate(source.names):
            tensors = safetensors.torch.load_file(source.file(name)) | (changed if i == index else {})
            builder.publish(name, safetensors.torch.save(tensors), rows=source.rows(name))
        builder.finish(source.names, manifest.counts)
    return out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_naming_the_sentence(folders: Folders, tmp_path: Path, bad: float) -> None:
    rows = open_activations(folders.activations).chunk(2).activations.clone()
    start = int(open_activations(folders.activations).chunk(2).offsets[3])
    rows[start + 1, 7] = bad
    damaged = rewrite_chunk(folders.activations, tmp_path / "acts", 2, activations=rows)
    with pytest.raises(ValueError, match=r"sentence 35 \(chunk 2, token 1 of the sentence\)"):
        run(config(folders._replace(activations=damaged), tmp_path / "top"), solo())


def test_nan_straight_from_the_model_is_refused(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(path: str, device: torch.device) -> Transformer:
        model = load_model(path, device)
        token = load_tokenizer(folders.model).encode(open_corpus(folders.corpus).texts([9])[0])[0]
        with torch.no_grad():
            model.tok_embeddings.weight[token] = torch.nan
        return model

    monkeypatch.setattr("interpretability.evidence.live.load_model", poisoned)
    argv = ["--sae", str(folders.sae), "--model", str(folders.model), "--corpus", str(folders.corpus)]
    with pytest.raises(ValueError, match=rf"straight from the model: .*sentence \d+.*NaN or Inf at site {SITE}; store activ"):
        run(parse(TopSentencesConfig, "", [*argv, "--out", str(tmp_path / "top"), "--device", "cpu"]), solo())


def test_rows_beyond_the_norm_of_training_are_left_out(folders: Folders, tmp_path: Path) -> None:
    chunk = open_activations(folders.activations).chunk(0)
    rows = chunk.activations.clone()
    rows[1] = rows[1] * 1000
    sunk = rewrite_chunk(folders.activations, tmp_path / "acts", 0, activations=rows)
    sae = load(folders.sae)
    for name, limit in (("limited", 500.0), ("free", None)):
        sae.cfg.provenance["max_norm"] = limit
        sae.save(tmp_path / name)
        run(
            config(folders._replace(activations=sunk, sae=tmp_path / name), tmp_path / f"top-{name}", "--n-sentences", "3"),
            solo(),
        )
    limited, free = open_top(tmp_path / "top-limited"), open_top(tmp_path / "top-free")
    assert free.max_values.max() > 100 > limited.max_values.max()
    assert limited.n_tokens == free.n_tokens - 1
    counts = open_artifact(tmp_path / "top-limited").manifest.counts
    assert counts["left_out_tokens"] == counts["sentences"] + 1  # the first of each sentence, and the one of such norm
    assert counts["tokens"] + counts["left_out_tokens"] == sum(len(part.token_ids) for part in open_activations(sunk))


@pytest.mark.parametrize("key", ["model_hash", "tokenizer_hash", "site", "bos"])
def test_an_sae_of_other_activations_is_refused_with_both_values(folders: Folders, tmp_path: Path, key: str) -> None:
    sae = load(folders.sae)
    right, sae.cfg.provenance[key] = sae.cfg.provenance[key], "other"
    sae.save(tmp_path / "sae")
    with pytest.raises(ValueError, match="other") as refused:
        run(config(folders._replace(sae=tmp_path / "sae"), tmp_path / "top"), solo())
    assert right in str(refused.value)
    assert not (tmp_path / "top").exists()


def test_another_corpus_and_another_model_are_refused(folders: Folders, tmp_path: Path) -> None:
    other = make_folders(tmp_path, random_texts(20, seed=5))
    with pytest.raises(ValueError, match="corpus_hash is"):
        run(config(folders._replace(corpus=other.corpus), tmp_path / "top"), solo())
    tokenizer = folders.model / "tokenizer.model"
    (other.model / "tokenizer.model").write_bytes(b"\n".join(tokenizer.read_bytes().splitlines()[:-1]))
    with pytest.raises(ValueError, match="tokenizer_hash is"):
        run(config(folders._replace(model=other.model), tmp_path / "top"), solo())


@pytest.mark.parametrize(("flags", "message"), [
    (["--aggregations", "max,median"], "expected some of max, mean, last"),
    (["--aggregations", "max", "max"], "each once"),
    (["--n-sentences", "0"], "--n-sentences must be at least 1"),
])  # fmt: skip
def test_bad_flags(folders: Folders, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(folders, tmp_path / "top", *flags)


def test_aggregations_by_comma_or_space(folders: Folders, tmp_path: Path) -> None:
    assert config(folders, tmp_path, "--n", "7").n == config(folders, tmp_path, "--n-sentences", "7").n == 7
    for flags in (["--aggregations", "last,max"], ["--aggregations", "last", "max"]):
        assert config(folders, tmp_path, *flags).aggregations == ("last", "max")


def test_readers_refuse_what_is_not_there(top: Path) -> None:
    opened = open_top(top)
    with pytest.raises(ValueError, match="0 to 63"):
        opened.sentences(64)
    with pytest.raises(ValueError, match="holds max, mean, last"):
        opened.sentences(0, "median")
    assert len(opened.sentences(0, "max", 2)) == 2
    assert pq.ParquetFile(top / "top_sentences.parquet").num_row_groups == 1


def test_the_pool_holds_each_sentence_once(top: Path) -> None:
    opened = open_top(top)
    ids = [s.sentence_id for latent in range(64) for a in ("max", "mean", "last") for s in opened.sentences(latent, a)]
    ids += [s.sentence_id for latent in range(64) for s in opened.levels(latent)]
    pool = opened.pool()
    assert [s.sentence_id for s in pool] == sorted(set(ids))


def plain_hash(*keys: int) -> int:
    """SplitMix64's finaliser over each key, in Python's own integers; the upper bits are left out."""
    mixed, mask = 0, 2**64 - 1
    for key in keys:
        mixed = (mixed + key + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed % 2**31


def reference_levels(peaks: list[float], latent: int, n: int) -> list[int]:
    """Ids of the `n` sentences of least hash in each bin of the peak, the highest bin first."""
    found: list[int] = []
    for level in reversed(range(HISTOGRAM_BINS)):
        low = 0 if level == 0 else 2.0 ** (level + HISTOGRAM_FIRST_EXPONENT)
        high = math.inf if level == HISTOGRAM_BINS - 1 else 2.0 ** (level + 1 + HISTOGRAM_FIRST_EXPONENT)
        there = [i for i, peak in enumerate(peaks) if peak > 0 and low <= peak < high]
        found += sorted(there, key=lambda i: (plain_hash(0, latent, i), i))[:n]
    return found


def test_statistics_come_from_another_text_and_sentences_from_this_one(tmp_path: Path) -> None:
    """Every number of a latent is that of the counted text; what none of our sentences fires says so, and is not shown."""
    every = make_folders(tmp_path / "every", random_texts(150), n_latents=48, k=4)
    run(config(every, tmp_path / "all"), solo())
    ours = make_corpus(tmp_path / "ours", random_texts(150)[40:43])
    flags = ["--model", str(every.model), "--sae", str(every.sae), "--corpus", str(ours), "--device", "cpu"]
    for name, more in (("plain", ()), ("top", ("--statistics", str(tmp_path / "all")))):
        run(parse(TopSentencesConfig, "", [*flags, *more, "--out", str(tmp_path / name)]), solo())
    counted, plain, found = (open_top(tmp_path / name) for name in ("all", "plain", "top"))
    reasons = [found.silence(latent) for latent in range(48)]
    assert set(reasons) == {"", NEVER_FIRED, NOT_SHOWN}
    for latent, reason in enumerate(reasons):
        wanted, here, got = counted.statistics(latent), plain.statistics(latent), found.statistics(latent)
        expected = {name: getattr(wanted, name) for name in COUNTED} | {"max": max(wanted.max, here.max)}
        assert {name: getattr(got, name) for name in COUNTED} == expected
        assert got.shown_count == here.sentence_count
        assert found.sentences(latent) == plain.sentences(latent)
        assert (found.sentences(latent) == []) == bool(reason)
        assert (reason == NEVER_FIRED) == (wanted.firing_count == 0)
    manifest = open_artifact(tmp_path / "top").manifest
    assert manifest.provenance["corpus_hash"] == open_corpus(ours).manifest_hash
    assert manifest.provenance["statistics_corpus_hash"] == open_corpus(every.corpus).manifest_hash
    assert manifest.provenance["statistics_hash"] == counted.artifact.manifest.hash
    assert manifest.counts["tokens"] == counted.n_tokens > manifest.counts["shown_tokens"] == plain.n_tokens
    assert manifest.counts["latents_not_shown"] == reasons.count(NOT_SHOWN)
    run_explain(parse(ExplainConfig, "", ["run", "--top", str(tmp_path / "top"), "--out", str(tmp_path / "said")]), solo())
    explained = read_explanations(tmp_path / "said")
    assert [explained[latent].reason for latent in range(48)] == reasons
    folders = ["--top", str(tmp_path / "top"), "--explanations", str(tmp_path / "said")]
    run_report(parse(ReportConfig, "", [*folders, "--out", str(tmp_path / "report")]), solo())
    hidden = [latent for latent, reason in enumerate(reasons) if reason == NOT_SHOWN]
    page = (tmp_path / "report" / "report.html").read_text()
    assert f'"hidden":{json.dumps(hidden, separators=(",", ":"))}' in page


def test_a_compact_folder_reads_the_same(folders: Folders, top: Path, tmp_path: Path) -> None:
    run(
        config(folders, tmp_path / "compact", "--n-sentences", str(open_artifact(top).manifest.config["n"]), "--compact"),
        solo(),
    )
    plain, compact = open_top(top), open_top(tmp_path / "compact")
    for latent in range(plain.n_latents):
        for aggregation in plain.aggregations:
            assert compact.sentences(latent, aggregation) == plain.sentences(latent, aggregation)
        assert compact.levels(latent) == plain.levels(latent)
        assert compact.statistics(latent) == plain.statistics(latent)
    assert compact.pool() == plain.pool()
    assert compact.background()[0].text == plain.background()[0].text
    ids = pq.read_table(tmp_path / "compact" / "sentences.parquet")["sentence_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert "text" not in pq.read_schema(tmp_path / "compact" / "top_sentences.parquet").names


def test_statistics_of_another_sae_are_refused(folders: Folders, top: Path, tmp_path: Path) -> None:
    sae = load(folders.sae)
    sae.b_enc.data += 1
    sae._stored_hash = None
    sae.save(tmp_path / "sae")
    other = folders._replace(sae=tmp_path / "sae")
    with pytest.raises(ValueError, match="sae_hash"):
        run(config(other, tmp_path / "out", "--statistics", str(top)), solo())


def check_background(top: TopSentences, sentences: list[torch.Tensor], texts: list[str]) -> None:
    """The sample and the latents that fire together, against every pair of columns of the dense activations."""
    background = top.background()
    limit = 2**31 * 1000 // len(texts)
    assert [s.sentence_id for s in background] == [i for i in range(len(texts)) if plain_hash(0, -1, i) < limit]
    for found in background:
        dense = torch.zeros_like(sentences[found.sentence_id])
        dense[torch.from_numpy(found.positions), torch.from_numpy(found.latents)] = torch.from_numpy(found.activations)
        assert torch.equal(dense, sentences[found.sentence_id])
        assert found.text == texts[found.sentence_id] == "".join(found.tokens)
    fires = torch.cat([sentences[s.sentence_id] for s in background]) > 0
    both = (fires.double().T @ fires.double()).long()
    alone = both.diagonal()
    for latent in range(top.n_latents):
        others = [i for i in range(top.n_latents) if i != latent and both[latent, i]]
        share = {i: int(both[latent, i]) / int(alone[latent] + alone[i] - both[latent, i]) for i in others}
        expected = sorted(others, key=lambda i: (-share[i], i))[:8]
        together = top.statistics(latent).cofiring
        assert [row["latent"] for row in together] == expected
        assert [row["count"] for row in together] == [int(both[latent, i]) for i in expected]
        assert [row["jaccard"] for row in together] == pytest.approx([share[i] for i in expected], rel=1e-6)


def captured(root: Path, *flags: str) -> Folders:
    """A corpus whose activations were captured by the stage itself, and an SAE of their provenance."""
    made = make_folders(root, random_texts(60), integers=False)
    argv = ["--model", str(made.model), "--corpus", str(made.corpus), "--out", str(root / "acts"), "--sites", SITE]
    argv += ["--max-length", "100", "--device", "cpu", "--threads", "1", *flags]
    capture_activations(parse(ActivationsConfig, "", argv), solo())
    return made._replace(activations=root / "acts", sae=make_sae(root / "sae2", root / "acts", 64, 6))


def live_flags(folders: Folders) -> list[str]:
    return ["--sae", str(folders.sae), "--model", str(folders.model), "--corpus", str(folders.corpus)]


def run_live(folders: Folders, out: Path) -> None:
    run(parse(TopSentencesConfig, "", [*live_flags(folders), "--out", str(out), "--device", "cpu", "--threads", "1"]), solo())


@pytest.mark.parametrize(
    ("storage", "flags"),
    [
        ("bf16", []),
        ("int8", []),
        ("fp32", ["--batch-tokens", "40"]),
        ("fp32", ["--max-padding", "0.5", "--bos", "feed"]),
        ("bf16", ["--chunk-sentences", "7", "--batch-tokens", "64"]),
        ("int8", ["--chunk-sentences", "7", "--batch-tokens", "64", "--max-padding", "0", "--bos", "feed"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_straight_from_the_model_gives_the_same_folder(
    fork_server: ForkServer, tmp_path: Path, storage: str, flags: list[str]
) -> None:
    """Stored by capture.activations and read back, or never stored, by one rank or two: the same tables to the last bit."""
    folders = captured(tmp_path, "--storage", storage, *flags)
    run(config(folders, tmp_path / "from-disk"), solo())
    run_live(folders, tmp_path / "live")
    one, other = digest(tmp_path / "from-disk"), digest(tmp_path / "live")
    assert {name: one[name] for name in one if name != "manifest.json"} == {
        name: other[name] for name in other if name != "manifest.json"
    }
    left, right = (open_artifact(tmp_path / name).manifest for name in ("from-disk", "live"))
    assert (left.counts, left.provenance) == (right.counts, right.provenance)
    assert left.provenance["dtype"] == storage
    if not flags:
        on_two_ranks(fork_server, *live_flags(folders), "--out", str(tmp_path / "two"))
        assert digest(tmp_path / "two") == other


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_sae_of_version_0_1_is_read_with_the_settings_of_that_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = captured(tmp_path)
    run_live(folders, tmp_path / "recorded")
    assert not warnings_of(caplog)
    sae = load(folders.sae)
    for name in ("chunk_sentences", "batch_tokens", "max_padding"):
        del sae.cfg.provenance[name]
    sae.save(tmp_path / "old")
    run_live(folders._replace(sae=tmp_path / "old"), tmp_path / "assumed")
    (warning,) = warnings_of(caplog)
    assert "chunk_sentences 2048, batch_tokens 8192, max_padding 0.05" in warning
    recorded, assumed = (open_artifact(tmp_path / name).manifest for name in ("recorded", "assumed"))
    assert recorded.provenance == assumed.provenance
    assert recorded.files == assumed.files


def test_an_sae_without_a_site_is_refused(folders: Folders, tmp_path: Path) -> None:
    sae = load(folders.sae)
    del sae.cfg.provenance["site"]
    sae.save(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"site.* sae\.adopt.* --activations to sae\.convert"):
        run(config(folders._replace(sae=tmp_path / "sae"), tmp_path / "top"), solo())


def test_another_model_is_refused_when_it_is_asked_live(folders: Folders, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=9)
    argv = ["--sae", str(folders.sae), "--model", str(other), "--corpus", str(folders.corpus), "--out", str(tmp_path / "top")]
    with pytest.raises(ValueError, match="the model of --model: model_hash is") as refused:
        run(parse(TopSentencesConfig, "", argv), solo())
    assert str(load(folders.sae).cfg.provenance["model_hash"]) in str(refused.value)


def test_many_blocks_of_cofiring_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (40,), generator=generator)
    tokens = Ragged(torch.zeros(int(lengths.sum()), dtype=torch.int32), offsets_of(lengths))
    fires = torch.rand(len(tokens.values), 30, generator=generator) < 0.2
    token, latents = fires.nonzero(as_tuple=True)
    rows = torch.searchsorted(tokens.offsets, token, right=True) - 1
    hits = Hits(latents, torch.ones(len(token)), token - tokens.offsets[rows], rows)
    background = Background(Sentences(torch.arange(40), torch.zeros(40), tokens), hits)
    whole = cofiring(background, 30, 5)
    monkeypatch.setattr("interpretability.evidence.background.PAIRS_AT_ONCE", 10)
    assert cofiring(background, 30, 5) == whole
    assert all(len(row) == 5 for row in whole)


def test_ngrams_against_the_formula() -> None:
    rest = [
        "the old harbour master slept",
        "the harbour was calm",
        "bread and butter",
        "a calm sea",
        *["nothing of note"] * 4000,
    ]
    top = ["old harbour lights", "the old harbour burned", "an old harbour"]
    found = NgramCounter(rest).strongest([ngrams_of(text) for text in top], 3)
    assert found[0]["text"] == "old harbour"  # "old" alone is in the same sentences
    n_here, n_rest = (sum(len(gram) == 2 for text in texts for gram in ngrams_of(text)) for texts in (top, rest))
    a = 1000 * 4 / (n_here + n_rest)
    z = math.log((3 + a) / (n_here + 1000 - 3 - a)) - math.log((1 + a) / (n_rest + 1000 - 1 - a))
    assert found[0]["z"] == pytest.approx(z / math.sqrt(1 / (3 + a) + 1 / (1 + a)), abs=0.01)
    assert found[0]["count"] == 3


def test_sentences_that_are_all_there_already_are_not_taken_again(top: Path) -> None:
    rows = pq.read_table(top / "top_sentences.parquet")
    once = Once()
    assert once.taken_from(rows) == once.taken_from(rows)
    assert once.table()["sentence_id"].to_pylist() == sorted(set(rows["sentence_id"].to_pylist()))
