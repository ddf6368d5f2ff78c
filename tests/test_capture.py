"""Activations: right rows for every sentence, the same bytes whatever the ranks and kills, and clear refusals."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import activations, plan, sentences
from capture.activations import ActivationsConfig
from capture.batches import ChunkTokens, batches, tokenise
from capture.chunks import ChunkCapture, NonFinite, start_chunk
from capture.sentences import SentencesConfig
from capture.store import Chunk, open_activations, open_corpus
from capture.writer import FileToWrite, Writer
from core import files
from core.artifact import Builder, FileRecord, verify
from core.cli import one_line_errors, parse
from core.runtime import Runtime, Solo
from llama3 import Transformer, load_model, load_tokenizer
from llama3.sites import default_site
from tests.conftest import Launch
from tests.faults import ForkServer, fail_at
from tests.tiny import tiny_llama

SITES = ("layers.1.resid_post", "layers.0.attn_norm")
CHUNK = 16  # sentences


def solo() -> Runtime:
    return Runtime(0, 1, torch.device("cpu"), Solo())


def write_corpus(folder: Path, n_documents: int = 12) -> Path:
    """`folder`/corpus: sentences of very different lengths, one of them with an @, one longer than max_length."""
    lines = []
    for i in range(n_documents):
        texts = [f"Here are {'very ' * (j * i % 13)}short words {i * j}." for j in range(i % 5 + 3)]
        lines.append({"name": f"doc{i}", "label": "even" if i % 2 == 0 else None, "text": " ".join(texts)})
    lines[3]["text"] = "Write to a@b.org today. " + "The long one goes on and on " * 8 + "."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SentencesConfig(source=str(folder / "docs.jsonl"), out=folder / "corpus", sentences_per_file=10, threads=1)
    sentences.run(config, solo())
    return folder / "corpus"


def capture(model: Path | str, corpus: Path | str, out: Path | str, **flags: Any) -> None:
    """The stage in this process."""
    shared: dict[str, Any] = {"chunk_sentences": CHUNK, "batch_tokens": 200, "max_length": 90, "threads": 1, "sites": SITES}
    activations.run(ActivationsConfig(model=str(model), corpus=Path(corpus), out=Path(out), **(shared | flags)), solo())


FLAGS = (
    "--chunk-sentences", CHUNK, "--batch-tokens", 200, "--max-length", 90, "--threads", 1, "--device", "cpu", "--sites", *SITES,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `corpus`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(folder / "model")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def clean(tiny: Path) -> dict[str, bytes]:
    """The bytes of an uninterrupted run."""
    capture(tiny / "model", tiny / "corpus", tiny / "clean")
    return contents(tiny / "clean")


# --- right rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["none", "feed"])
def test_every_sentence_has_its_own_rows(tiny: Path, tmp_path: Path, bos: str) -> None:
    """Against each sentence alone, without padding."""
    capture(tiny / "model", tiny / "corpus", tmp_path / "acts", storage="fp32", bos=bos)
    model, tokenizer, corpus = load_model(tiny / "model"), load_tokenizer(tiny / "model"), open_corpus(tiny / "corpus")
    for site in SITES:
        store = open_activations(tmp_path / "acts", site)
        assert store.n_sentences == corpus.n_sentences
        tokens = 0
        for sentence_id, text in enumerate(corpus.texts(range(corpus.n_sentences))):
            ids = tokenizer.encode(text)[:90]
            with torch.no_grad():
                alone = model.capture(torch.tensor([[tokenizer.bos_id, *ids] if bos == "feed" else ids]), [site])[site][0]
            rows, token_ids = store.sentence(sentence_id)
            assert token_ids.tolist() == ids
            torch.testing.assert_close(rows, alone[-len(ids) :], rtol=0, atol=1e-5)
            tokens += len(ids)
        assert store.n_tokens == tokens


def test_counts(tiny: Path, clean: dict[str, bytes]) -> None:
    manifest = verify(tiny / "clean")
    corpus, tokenizer = open_corpus(tiny / "corpus"), load_tokenizer(tiny / "model")
    lengths = [len(tokenizer.encode(text)) for text in corpus.texts(range(corpus.n_sentences))]
    counts = manifest.counts
    assert counts["tokens"] == sum(min(n, 90) for n in lengths)
    assert counts["truncated_sentences"] == sum(n > 90 for n in lengths) > 0
    assert (counts["empty_sentences"], counts["nonfinite_sentences"]) == (0, 0)
    assert 0 < counts["padding_share"] <= 0.05
    assert manifest.provenance["model"] == "model"
    assert str(tiny) not in manifest.to_json()


def test_bf16_is_the_rounded_fp32(tiny: Path, tmp_path: Path, clean: dict[str, bytes]) -> None:
    capture(tiny / "model", tiny / "corpus", tmp_path / "fp32", storage="fp32")
    pairs = zip(open_activations(tmp_path / "fp32", SITES[0]), open_activations(tiny / "clean", SITES[0]), strict=True)
    for full, half in pairs:
        assert half.activations.dtype == torch.bfloat16
        assert torch.equal(full.activations.bfloat16(), half.activations)


def test_abnormal_norms_are_counted_by_chunk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Transformer.capture

    def with_sink(self: Transformer, tokens: torch.Tensor, sites: Any, mask: Any = None) -> dict[str, torch.Tensor]:
        acts = plain(self, tokens, sites, mask)
        acts[SITES[0]] = torch.cat((acts[SITES[0]][:, :1] * 1000, acts[SITES[0]][:, 1:]), dim=1)
        return acts

    monkeypatch.setattr(Transformer, "capture", with_sink)
    capture(tiny / "model", tiny / "corpus", tmp_path / "acts", bos="none")
    manifest = verify(tmp_path / "acts")
    expected = 0
    for chunk in open_activations(tmp_path / "acts", SITES[0]):
        norms = chunk.activations.float().norm(dim=1)
        expected += int((norms > 10 * norms.median()).sum())
    assert manifest.counts["abnormal_norm_rows"] == {SITES[0]: expected, SITES[1]: 0}
    assert expected == manifest.counts["sentences"]
    assert manifest.counts["abnormal_norm_share"][SITES[0]] == round(expected / manifest.counts["tokens"], 6)


def test_a_string_counts_as_one_site(tiny: Path) -> None:
    assert ActivationsConfig(model="demo", corpus=Path("c"), out=Path("o"), sites=SITES[0]).sites == SITES[:1]  # type: ignore[arg-type]
    assert how(tiny, sites=SITES[0]).sites == SITES[:1]


def test_default_site_is_at_five_sixths() -> None:
    assert [default_site(n) for n in (1, 3, 6, 28)] == [f"layers.{i}.resid_post" for i in (0, 1, 4, 22)]


# --- batches ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    budget=st.integers(1, 300),
    max_padding=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_batches_hold_every_token_once_within_their_limits(lengths: list[int], budget: int, max_padding: float) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = len(lengths)
    chunk = ChunkTokens(torch.arange(n), torch.zeros(n), torch.arange(sum(lengths)) + 7, offsets, truncated=0)
    seen: list[int] = []
    for batch in batches(chunk, budget, max_padding):
        B, T = batch.tokens.shape
        assert B == 1 or budget >= B * T
        assert 1 - len(batch.slots) / (B * T) <= max_padding + 1e-9
        assert torch.equal(batch.tokens.flatten()[batch.slots], chunk.token_ids[batch.rows])
        sentence_of = torch.searchsorted(offsets, batch.rows, right=True) - 1
        place = batch.slots % T
        assert torch.equal(place, batch.rows - offsets[sentence_of])  # padding stands on the right
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(sum(lengths)))


def test_empty_text_has_no_rows(tiny: Path) -> None:
    table = pa.table({"text": ["", "Two words", ""], "sentence_id": [5, 6, 7], "document_id": [1, 1, 2]})
    chunk = tokenise(table, load_tokenizer(tiny / "model"), 90)
    assert chunk.lengths.tolist()[::2] == [0, 0]
    captured = start_chunk(how(tiny), chunk, before_batch=lambda: None).result
    assert captured.rows[SITES[0]].activations.shape == (int(chunk.lengths[1]), 32)
    assert captured.counts["empty"] == 2
    nothing = start_chunk(how(tiny), tokenise(table.slice(0, 1), load_tokenizer(tiny / "model"), 90), lambda: None).result
    assert nothing.rows[SITES[0]].activations.shape == (0, 32)


def how(tiny: Path, **changes: Any) -> ChunkCapture:
    given: dict[str, Any] = {
        "model": load_model(tiny / "model"), "sites": SITES, "storage": "fp32", "batch_tokens": 200, "max_padding": 0.05,
        "bos_id": None, "skip_nonfinite": False,
    }  # fmt: skip
    return ChunkCapture(**(given | changes))


# --- NaN -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nan", "-inf"])
def nan_at_sign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers an @ with NaN or an infinity, in one dimension at one site."""
    plain = Transformer.capture

    def poisoned(self: Transformer, tokens: torch.Tensor, sites: Any, mask: Any = None) -> dict[str, torch.Tensor]:
        acts = plain(self, tokens, sites, mask)
        acts[SITES[1]] = acts[SITES[1]].clone()
        acts[SITES[1]][..., 3][tokens == ord("@")] = float(request.param)
        return acts

    monkeypatch.setattr(Transformer, "capture", poisoned)


@pytest.mark.usefixtures("nan_at_sign")
def test_nan_stops_and_names_sentence_and_site(tiny: Path, tmp_path: Path) -> None:
    texts = open_corpus(tiny / "corpus").texts(range(open_corpus(tiny / "corpus").n_sentences))
    sentence = next(i for i, text in enumerate(texts) if "@" in text)
    place = len(load_tokenizer(tiny / "model").encode(texts[sentence].split("@")[0]))
    with pytest.raises(NonFinite, match=f"sentence {sentence}, token {place}: NaN or Inf at site {SITES[1]}.*--nonfinite skip"):
        capture(tiny / "model", tiny / "corpus", tmp_path / "acts")
    with pytest.raises(ValueError, match="no such folder"):  # nothing was finished, so nothing is claimed
        open_activations(tmp_path / "acts", SITES[0])


@pytest.mark.usefixtures("nan_at_sign")
def test_nan_skips_the_sentence_at_all_sites(tiny: Path, tmp_path: Path, clean: dict[str, bytes]) -> None:
    capture(tiny / "model", tiny / "corpus", tmp_path / "acts", nonfinite="skip")
    texts = open_corpus(tiny / "corpus").texts(range(open_corpus(tiny / "corpus").n_sentences))
    assert verify(tmp_path / "acts").counts["nonfinite_sentences"] == 1
    for site in SITES:
        store, whole = open_activations(tmp_path / "acts", site), open_activations(tiny / "clean", site)
        for sentence_id, text in enumerate(texts):
            rows, token_ids = store.sentence(sentence_id)
            expected = whole.sentence(sentence_id)
            assert torch.equal(rows, expected.activations[:0] if "@" in text else expected.activations)
            assert torch.equal(token_ids, expected.token_ids[:0] if "@" in text else expected.token_ids)


def test_large_finite_values_are_no_infinity(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Transformer.capture
    monkeypatch.setattr(Transformer, "capture", lambda *a, **k: {s: x * 1e30 for s, x in plain(*a, **k).items()})
    table = pa.table({"text": ["Two words"], "sentence_id": [0], "document_id": [0]})
    captured = start_chunk(how(tiny), tokenise(table, load_tokenizer(tiny / "model"), 90), lambda: None).result
    assert bool(captured.rows[SITES[0]].activations.isfinite().all())
    assert float(captured.norms[SITES[0]].min()) > 1e30


# --- the same bytes --------------------------------------------------------------------------------------------------------


def test_again_and_a_site_alone(tiny: Path, tmp_path: Path, clean: dict[str, bytes]) -> None:
    capture(tiny / "model", tiny / "corpus", tiny / "clean")  # complete: nothing changes
    assert contents(tiny / "clean") == clean
    capture(tiny / "model", tiny / "corpus", tmp_path / "alone", sites=SITES[1:])
    alone = contents(tmp_path / "alone")
    for name in alone.keys() - {"manifest.json"}:
        assert alone[name] == clean[name]


def test_two_ranks_write_what_one_does(tiny: Path, tmp_path: Path, clean: dict[str, bytes], launch: Launch) -> None:
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", *FLAGS)
    done = launch("-m", "capture.activations", *flags, "--out", tmp_path / "two", ranks=2, limit=400)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == clean


def test_killed_and_continued_by_another_number_of_ranks(
    tiny: Path, tmp_path: Path, clean: dict[str, bytes], fork_server: ForkServer
) -> None:
    assert fork_server.run(capture, tiny / "model", tiny / "corpus", tmp_path / "acts", exit_at=40) == 9
    begun = contents(tmp_path / "acts")
    assert 0 < sum(name.endswith(".safetensors") for name in begun) < sum(name.endswith(".safetensors") for name in clean)
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", *FLAGS)
    done = fork_server.ranks(2, "capture.activations", *flags, "--out", tmp_path / "acts")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "acts") == clean


def test_a_fault_at_many_file_operations_then_the_same_bytes(tiny: Path, tmp_path: Path, clean: dict[str, bytes]) -> None:
    paths = (tiny / "model", tiny / "corpus")
    operations: list[str] = []
    files.before_operation = fail_at(0, operations)
    capture(*paths, tmp_path / "whole")
    for n in range(2, len(operations), 11):
        out = tmp_path / f"at{n}"
        files.before_operation = fail_at(n)
        with pytest.raises(OSError, match="injected"):
            capture(*paths, out)
        files.before_operation = fail_at(0)
        capture(*paths, out)
        assert contents(out) == clean, f"fault at file operation {n}"


# --- closed early ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", [1, 2, 3])
def test_an_unfinished_folder_is_closed_and_read(
    tiny: Path, tmp_path: Path, clean: dict[str, bytes], caplog: pytest.LogCaptureFixture, lacks: int
) -> None:
    """Without `lacks`, the first chunk of which a site is missing; those after it go, journaled or not."""
    out, stray = tmp_path / "acts", tmp_path / "acts" / SITES[1] / "chunk-000004.safetensors"
    gone = out / SITES[0] / f"chunk-{lacks:06d}.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "finish", lambda *_: None)
        capture(tiny / "model", tiny / "corpus", out)
    gone.unlink()
    stray.write_bytes(b"published, but not journaled")
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", out, *FLAGS)
    command(*flags, "--finish")
    manifest = verify(out)
    assert manifest.counts["sentences"] == lacks * CHUNK
    assert [record.name for record in manifest.files] == sorted(
        f"{site}/chunk-{i:06d}.safetensors" for site in SITES for i in range(lacks)
    )
    kept = contents(out)
    for name in kept.keys() - {"manifest.json"}:
        assert kept[name] == clean[name]
    store, whole = open_activations(out, SITES[0]), open_activations(tiny / "clean", SITES[0])
    assert (len(store), store.n_sentences) == (lacks, lacks * CHUNK)
    assert store.n_tokens == manifest.counts["tokens"] == sum(whole.rows(i) for i in range(lacks))
    caplog.set_level("INFO")
    command(*flags)
    left_out = open_corpus(tiny / "corpus").n_sentences - lacks * CHUNK
    assert f"already complete (closed with --finish before the other {left_out:,})" in caplog.text
    assert contents(out) == kept


def test_what_cannot_be_closed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole chunk of 16 sentences"):
        capture(tiny / "model", tiny / "corpus", tmp_path / "acts", finish=True)
    assert not (tmp_path / "acts").exists()
    for other in ({"part": "1/2"}, {"plan": True}):
        with pytest.raises(ValueError, match=f"--finish --{next(iter(other))}"):
            capture(tiny / "model", tiny / "corpus", tmp_path / "acts", finish=True, **other)


# --- the writer ------------------------------------------------------------------------------------------------------------


class FakeBuilder(Builder):
    """Publishes with a function of the test's."""

    def __init__(self, act: Callable[[str, Any, int], Any]) -> None:
        self._act = act

    def publish(self, name: str, content: bytes | Iterable[bytes], rows: int = 0) -> FileRecord:
        self._act(name, content, rows)
        return FileRecord(name, 0, "", rows)


def write_for_ever(builder: FakeBuilder, timeout_s: float) -> None:
    with Writer(builder, timeout_s) as writer:
        while True:
            writer.put(FileToWrite("f", lambda: (b"x", 0)))


def test_an_error_of_the_writer_reaches_the_caller() -> None:
    def full(name: str, content: Any, rows: int) -> None:
        raise OSError(28, "disk full")

    began = time.monotonic()
    with pytest.raises(OSError, match="disk full"):
        write_for_ever(FakeBuilder(full), 60)
    with pytest.raises(OSError, match="disk full"), Writer(FakeBuilder(full), timeout_s=60) as writer:
        writer.put(FileToWrite("only", lambda: (b"x", 0)))  # noticed on leaving
    with pytest.raises(ZeroDivisionError) as raised, Writer(FakeBuilder(full), timeout_s=60) as writer:
        writer.put(FileToWrite("only", lambda: (bytes(1 // 0), 0)))
    assert raised.value.__notes__ == ["the writer ended at only"]
    assert time.monotonic() - began < 10


def test_a_writer_that_hangs_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.writer.DROP_S", 0.1)
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no progress on f for 0 s"):
        write_for_ever(FakeBuilder(lambda *_: release.wait(60)), 0.2)
    assert time.monotonic() - began < 30
    release.set()


def test_the_queue_is_bounded_and_everything_is_written() -> None:
    written, waiting = [], []

    def slow(name: str, content: bytes, rows: int) -> None:
        time.sleep(0.01)
        written.append((name, content, rows))

    with Writer(FakeBuilder(slow), timeout_s=60, depth=2) as writer:
        for i in range(12):
            writer.put(FileToWrite(f"f{i}", partial(lambda n: (bytes(n), n), i)))
            waiting.append(writer.waiting)
    assert written == [(f"f{i}", bytes(i), i) for i in range(12)]
    assert max(waiting) <= 2


# --- refusals --------------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> None:
    """The stage in this process, as its command line would run it."""
    with one_line_errors():
        activations.run(parse(ActivationsConfig, "", [str(argument) for argument in arguments]), solo())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sites", "layers.3.resid_post"), "unknown site 'layers.3.resid_post': expected embed"),
        (("--sites", *SITES, SITES[0]), "a site is named twice"),
        (("--max-length", 129, "--bos", "none"), "the model's context is 128 tokens; give at most 128"),
        (("--max-length", 128, "--bos", "feed"), "give at most 127"),
        (("--batch-tokens", 0), "--batch-tokens 0: expected at least 1"),
        (("--max-padding", 1), "--max-padding 1.0: expected a share"),
        (("--corpus", "/nowhere"), "/nowhere: no such folder"),
        (("--corpus", "clean"), "expected a folder of kind corpus, found activations"),
        (("--corpus", "model"), "holds no manifest.json"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--model", "corpus"), "corpus"),
        (("--storage", "fp8"), "bf16"),
        (("--site", "embed"), "--site"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    tiny: Path,
    tmp_path: Path,
    clean: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    message: str,
) -> None:
    given: dict[str, list[object]] = {"--model": [tiny / "model"], "--corpus": [tiny / "corpus"], "--max-length": [90]}
    given[str(flags[0])] = [tiny / str(f) if str(f) in ("clean", "model", "corpus") else f for f in flags[1:]]
    with pytest.raises(SystemExit) as exit_:
        command(*(part for name, values in given.items() for part in (name, *values)), "--out", tmp_path / "out")
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_model_does_not_continue_the_folder(
    tiny: Path, tmp_path: Path, clean: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_llama(tmp_path / "model", seed=1)
    with pytest.raises(SystemExit):
        command("--model", other, "--corpus", tiny / "corpus", "--out", tiny / "clean", *FLAGS)
    assert "model_hash" in capsys.readouterr().err
    assert contents(tiny / "clean") == clean


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny_llama(tmp_path / "model", vocab_size=100)
    with pytest.raises(SystemExit):
        command("--model", small, "--corpus", tiny / "corpus", "--out", tmp_path / "out", *FLAGS)
    assert "100" in capsys.readouterr().err


def test_the_plan_tells_what_a_run_takes_and_writes_nothing(
    tiny: Path, tmp_path: Path, clean: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PROBE_S", 0.0)
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "out", *FLAGS, "--plan")
    command(*flags)
    said = capsys.readouterr().out
    assert f"tokens     {verify(tiny / 'clean').counts['tokens']:,}\n" in said
    assert "hours" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit):
        command(*flags)
    assert "0.001 MB are free" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(*flags[:-1])
    assert "choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", ["bf16", "fp32", "int8"])
def test_planned_bytes_are_those_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Any) -> None:
    """Headers left out; and from a sample of half the sentences, about the same."""
    sites = (*SITES, "layers.0.ffn_hidden")  # of another width
    capture(tiny / "model", tiny / "corpus", tmp_path / "acts", storage=storage, sites=sites)
    written = sum(p.stat().st_size for p in (tmp_path / "acts").rglob("*.safetensors"))
    corpus, tokenizer = open_corpus(tiny / "corpus"), load_tokenizer(tiny / "model")
    exact = plan.need(corpus, tokenizer, how(tiny, storage=storage, sites=sites), 90)
    assert exact.tokens == verify(tmp_path / "acts").counts["tokens"]
    assert exact.bytes <= written <= exact.bytes + 1000 * len(list((tmp_path / "acts").rglob("*.safetensors")))
    monkeypatch.setattr(plan, "SAMPLE_SENTENCES", 1)
    monkeypatch.setattr(plan, "SAMPLE_BLOCKS", corpus.n_sentences // 2)
    assert plan.need(corpus, tokenizer, how(tiny), 90).tokens == pytest.approx(exact.tokens, rel=0.3)


def test_a_corpus_of_one_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Only one sentence.")
    sentences.run(SentencesConfig(source=str(tmp_path / "one.txt"), out=tmp_path / "corpus"), solo())
    capture(tiny / "model", tmp_path / "corpus", tmp_path / "acts", sites=())
    store = open_activations(tmp_path / "acts")
    assert (store.site, len(store), store.n_sentences) == ("layers.1.resid_post", 1, 1)
    chunk: Chunk = store.chunk(0)
    assert chunk.offsets.tolist() == [0, len(chunk.token_ids)]
