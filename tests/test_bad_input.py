"""What a user can get wrong ends with exit code 2 and one clear line, and harms nothing that is finished."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.artifact import verify
from core.cli import run_stage
from demo.corpus import passages
from tests.tiny import tiny_llama

Command = Callable[..., str]

STAGES = {
    "capture.sentences": "SentencesConfig",
    "capture.activations": "ActivationsConfig",
    "sae.preprocess": "PreprocessConfig",
    "sae.train": "TrainConfig",
    "sae.evaluate": "EvaluateConfig",
    "interpretability.top_sentences": "TopSentencesConfig",
}
SHORT = ("--max-length", 96)  # the tiny model's context is 128 tokens


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a stage as its command line would; returns its error line. Fails where it succeeds or says more than a line."""

    def call(stage: str, *flags: object, fails: bool = True) -> str:
        module = importlib.import_module(stage)
        monkeypatch.setattr(sys, "argv", [stage, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_stage(getattr(module, STAGES[stage]), module.run, module.__doc__ or "")
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        if not fails:
            assert ended.value.code == 0, errors
            return ""
        assert ended.value.code == 2
        assert len(errors) == 1, errors
        return errors[0]

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(d._asdict()) + "\n" for d in list(passages())[:30]))
    return path


@pytest.fixture
def corpus(command: Command, source: Path, tmp_path: Path) -> Path:
    command("capture.sentences", "--source", source, "--out", tmp_path / "corpus", fails=False)
    return tmp_path / "corpus"


@pytest.fixture
def acts(command: Command, corpus: Path, model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "acts"
    command("capture.activations", "--model", model, "--corpus", corpus, "--out", out, "--threads", 1, *SHORT, fails=False)
    return out


@pytest.fixture
def batches(command: Command, acts: Path, tmp_path: Path) -> Path:
    command("sae.preprocess", "--activations", acts, "--out", tmp_path / "batches", "--threads", 1, fails=False)
    return tmp_path / "batches"


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_flag_is_named(command: Command, stage: str) -> None:
    assert "--no-such-flag" in command(stage, "--no-such-flag", "1")


def test_missing_folders_are_named(command: Command, model: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in command("capture.sentences", "--source", nowhere, "--out", tmp_path / "a")
    assert str(nowhere) in command("capture.activations", "--model", model, "--corpus", nowhere, "--out", tmp_path / "b")
    assert str(nowhere) in command("sae.preprocess", "--activations", nowhere, "--out", tmp_path / "c")
    assert str(nowhere) in command("sae.train", "--batches", nowhere, "--out", tmp_path / "d", "--wandb", "off")


def test_an_empty_corpus_is_refused(command: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "empty.txt" in command("capture.sentences", "--source", empty, "--out", tmp_path / "corpus")


def test_text_that_is_not_utf8_names_file_and_byte(command: Command, tmp_path: Path) -> None:
    broken = tmp_path / "latin.txt"
    broken.write_bytes("A sentence with an é in Latin-1 that is long enough.".encode("latin-1"))
    line = command("capture.sentences", "--source", broken, "--out", tmp_path / "corpus")
    assert "latin.txt" in line
    assert "--encoding" in line
    command("capture.sentences", "--source", broken, "--out", tmp_path / "ok", "--encoding", "latin-1", fails=False)


def test_a_corpus_of_one_sentence_goes_all_the_way_or_says_why_not(command: Command, model: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("The ship left the harbour before the storm came in from the west.")
    command("capture.sentences", "--source", one, "--out", tmp_path / "corpus", fails=False)
    flags = ("--model", model, "--corpus", tmp_path / "corpus", "--out", tmp_path / "acts", "--threads", 1, *SHORT)
    command("capture.activations", *flags, fails=False)
    command("sae.preprocess", "--activations", tmp_path / "acts", "--out", tmp_path / "batches", "--threads", 1, fails=False)
    small = ("--n-latents", 8, "--k", 2, "--wandb", "off", "--threads", 1)
    line = command("sae.train", "--batches", tmp_path / "batches", "--out", tmp_path / "run", *small)
    assert "batch" in line


def test_a_folder_of_another_kind_is_refused(command: Command, corpus: Path, acts: Path, tmp_path: Path) -> None:
    line = command("sae.preprocess", "--activations", corpus, "--out", tmp_path / "batches")
    assert "activations" in line
    assert "corpus" in line
    line = command("sae.train", "--batches", acts, "--out", tmp_path / "run", "--wandb", "off")
    assert "batches" in line


def test_a_truncated_chunk_is_refused_and_nothing_else_harmed(
    command: Command, corpus: Path, acts: Path, tmp_path: Path
) -> None:
    chunk = next(acts.rglob("chunk-*.safetensors"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    line = command("sae.preprocess", "--activations", acts, "--out", tmp_path / "batches")
    assert chunk.name in line
    assert f"{len(whole):,}" in line
    assert verify(corpus).complete


def test_a_flipped_bit_is_refused(command: Command, acts: Path, tmp_path: Path) -> None:
    chunk = next(acts.rglob("chunk-*.safetensors"))
    data = bytearray(chunk.read_bytes())
    data[-100] ^= 1
    chunk.write_bytes(bytes(data))
    assert chunk.name in command("sae.preprocess", "--activations", acts, "--out", tmp_path / "batches")


def test_k_beyond_the_latents_is_refused(command: Command, batches: Path, tmp_path: Path) -> None:
    line = command("sae.train", "--batches", batches, "--out", tmp_path / "run", "--n-latents", 16, "--k", 17)
    assert "17" in line
    assert "16" in line


def test_other_flags_on_a_finished_folder_are_refused_and_it_stays(command: Command, acts: Path, batches: Path) -> None:
    before = {path: path.read_bytes() for path in batches.iterdir()}
    line = command("sae.preprocess", "--activations", acts, "--out", batches, "--batch-rows", 77, "--threads", 1)
    assert "--batch-rows" in line
    assert {path: path.read_bytes() for path in batches.iterdir()} == before


def test_another_model_is_refused_by_the_evaluation(
    command: Command, corpus: Path, batches: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = (
        "--n-latents",
        16,
        "--k",
        2,
        "--batch-size",
        64,
        "--max-steps",
        3,
        "--warmup-steps",
        1,
        "--wandb",
        "off",
        "--threads",
        1,
    )
    command("sae.train", "--batches", batches, "--out", tmp_path / "run", *small, fails=False)
    other = tiny_llama(tmp_path_factory.mktemp("other"), seed=1)
    flags = ("--sae", tmp_path / "run/sae", "--model", other, "--corpus", corpus, "--out", tmp_path / "evaluation")
    assert "model_hash" in command("sae.evaluate", *flags)
    assert not (tmp_path / "evaluation/manifest.json").exists()


def test_a_full_disk_is_explained_and_the_same_command_continues(
    command: Command, corpus: Path, model: Path, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE makes every write beyond 64 KiB fail half way, as a full disk does, without root.

    tests/test_core_files.py fills a real one.
    """
    import resource

    flags = ("--model", model, "--corpus", corpus, "--out", tmp_path / "acts", "--threads", 1, "--storage", "fp32", *SHORT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        line = command("capture.activations", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "chunk-000000" in line
    assert "bytes" in line
    assert "give the same command again" in line
    assert verify(corpus).complete
    command("capture.activations", *flags, fails=False)
    resumed = {
        path.relative_to(tmp_path / "acts"): path.read_bytes() for path in (tmp_path / "acts").rglob("*") if path.is_file()
    }
    shutil.rmtree(tmp_path / "acts")
    command("capture.activations", *flags, fails=False)
    clean = {
        path.relative_to(tmp_path / "acts"): path.read_bytes() for path in (tmp_path / "acts").rglob("*") if path.is_file()
    }
    assert resumed == clean
