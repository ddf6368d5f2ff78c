"""What makes the things that ship for SmolLM2: text that it writes itself, and the chain from documents to the folder."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.cli import parse
from demo.corpus import topics
from scripts import smollm2_sae, smollm2_written
from scripts.smollm2_documents import DocumentsConfig, written
from scripts.smollm2_prompts import Prompt, prompts
from scripts.smollm2_sae import SAEPathConfig, stages
from scripts.smollm2_written import Rules, Writer, WrittenConfig, run, whole_sentences
from tests.interp_folders import solo


def test_prompts_are_varied_and_come_again_with_their_seed() -> None:
    every = prompts(topics(), 0)
    assert len(every) > 15_000
    assert [prompt.kind for prompt in every[:4]] == ["continued", "answered", "continued", "answered"]
    assert len({prompt.text for prompt in every}) == len(every)
    assert not any("{" in prompt.text for prompt in every)
    assert prompts(topics(), 0) == every != prompts(topics(), 1)
    first = every[:1000]
    assert len({prompt.label for prompt in first}) > 250
    assert all(prompt.label.lower() in prompt.text.lower() for prompt in first)


def test_loops_short_texts_and_repetitions_are_dropped() -> None:
    rules = Rules()
    plain = " ".join(f"word{i}" for i in range(100))
    assert rules.fault("word " * 39) == "short"
    assert rules.fault("and so it goes on " * 20) == "loop"
    assert rules.fault(plain) == ""
    rules.keep(plain)
    assert rules.fault(plain.upper()) == "repeats others"
    half = " ".join(f"word{i}" for i in range(50)) + " " + " ".join(f"other{i}" for i in range(50))
    assert rules.fault(half) == "repeats others"
    little = " ".join(f"word{i}" for i in range(20)) + " " + " ".join(f"new{i}" for i in range(80))
    assert rules.fault(little) == ""


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two and a ha", "One."),
        ('He said: "Go!" And then', 'He said: "Go!"'),
        ("Pi is 3.14 and so on", ""),
        ("One.\n\nTwo? Yes.  ", "One.\n\nTwo? Yes."),
        ("", ""),
    ],
)
def test_what_follows_the_last_whole_sentence_is_cut_off(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A writer that needs no model; each third text is too short. Returns the first rows of its batches."""
    batches: list[int] = []

    def write(self: Writer, first: int, batch: Sequence[Prompt]) -> list[str]:
        batches.append(first)
        rows = range(first, first + len(batch))
        return ["Too short." if row % 3 == 0 else " ".join(f"w{row}.{i}" for i in range(60)) + "." for row in rows]

    monkeypatch.setattr(Writer, "write", write)
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(smollm2_written, name, lambda *arguments: None)
    return batches


def config(out: Path, texts: int, *flags: str) -> WrittenConfig:
    return parse(WrittenConfig, "", ["--out", str(out), "--texts", str(texts), "--batch", "8", *flags])


def test_an_interrupted_file_is_continued_to_the_same_bytes(tmp_path: Path, scripted: list[int]) -> None:
    run(config(tmp_path / "whole.jsonl", 40), solo())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert len(records) == 40
    assert [record["row"] for record in records] == [row for row in range(60) if row % 3][:40]
    assert set(records[0]) == {"text", "label", "kind", "prompt", "row", "seed", "xxh3"}
    for size in (0, 1, len(whole) // 3, len(whole) - 5):
        (tmp_path / "cut.jsonl").write_bytes(whole[:size])
        scripted.clear()
        run(config(tmp_path / "cut.jsonl", 40), solo())
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
        assert all(first % 8 == 0 for first in scripted)
    scripted.clear()
    run(config(tmp_path / "whole.jsonl", 40), solo())
    assert not scripted
    with pytest.raises(ValueError, match="--seed"):
        run(config(tmp_path / "whole.jsonl", 50, "--seed", "1"), solo())
    documents = list(written([tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"]))
    assert len({document.name for document in documents}) == 80
    assert documents[0].label == records[0]["label"]


def test_every_command_of_the_chain_has_flags_that_exist(tmp_path: Path) -> None:
    flags = ["--texts", "t", "--written", "a.jsonl", "b.jsonl", "--work", str(tmp_path), "--threads", "2"]
    for more in ([], ["--site", "layers.10.resid_post", "--tokens", "0", "--max-units", "9"]):
        chain = stages(parse(SAEPathConfig, "", [*flags, *more]))
        for stage in chain:
            module = importlib.import_module(stage.module.split()[0])
            configs = [v for n, v in vars(module).items() if n.endswith("Config") and v.__module__ == module.__name__]
            assert len(configs) == 1, stage.module
            parse(configs[0], "", [*stage.module.split()[1:], *stage.flags, "--out", str(stage.out)])
        made = {stage.out for stage in chain}
        read = {Path(flag) for stage in chain for flag in stage.flags if flag.startswith(str(tmp_path))}
        assert {path if path.name != "sae" else path.parent for path in read} <= made


def test_other_sites_go_to_the_cache_and_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    needed = ["--texts", "t", "--written", "w"]
    assert parse(SAEPathConfig, "", needed).folder.parts[-2:] == ("demo", "smollm2")
    other = parse(SAEPathConfig, "", [*needed, "--site", "layers.10.resid_post"])
    assert other.folder == tmp_path / "llama3-sae" / "saes" / "smollm2" / "layers.10.resid_post"
    monkeypatch.setattr(smollm2_sae, "run_all", lambda stages: [])
    monkeypatch.setattr(smollm2_sae, "LIMIT", 10)
    (tmp_path / "out" / "sae").mkdir(parents=True)
    (tmp_path / "out" / "sae" / "x").write_bytes(b"x" * 11)
    monkeypatch.setattr("sys.argv", ["x", *needed, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        smollm2_sae.main()
    assert ended.value.code


def test_what_may_be_shown_and_the_reviews_are_two_things() -> None:
    with pytest.raises(ValueError, match="--shown"):
        parse(DocumentsConfig, "", ["--texts", "t", "--out", "o", "--shown", "--reviews"])


@pytest.mark.real
def test_the_model_writes_texts_of_both_kinds(tmp_path: Path, smollm2_file: Path) -> None:
    flags = ["--out", str(tmp_path / "w.jsonl"), "--texts", "4", "--batch", "8", "--max-new-tokens", "90", "--threads", "1"]
    run(parse(WrittenConfig, "", flags), solo())
    records = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert len(records) == 4
    for record in records:
        assert record["text"].startswith(record["prompt"]) == (record["kind"] == "continued")
        assert len(record["text"].split()) >= 30
        assert "<|" not in record["text"]
