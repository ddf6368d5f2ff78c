"""The terminal commands: text, pipes, JSON, recipes, watching, and what they say when something is wrong."""

import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import inference.chat
import inference.complete
from core.cli import parse, run_stage
from inference.chat import ChatConfig
from inference.complete import CompleteConfig
from inference.dialogue import prepare, style_of
from inference.recipes import parse_edits
from inference.session import InferenceConfig, Session, open_session
from inference.steering import Edit, Recipe
from llama3.chat import encode_dialog
from llama3.chat_format import Message
from llama3.generate import Piece, generate
from sae.model import load
from tests.tiny import tiny_llama
from tests.tiny_features import Features, alone, tiny_sae, write_features

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_llama(folder / "model")
    return write_features(folder, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture
def recipe_file(paths: Features, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(Recipe((Edit(latent=3, strength=12.0),), load(paths.sae).weights_hash).to_json())
    return path


def complete(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    inference.complete.run(parse(CompleteConfig, "", [*flags, "--max-new-tokens", "6", "--temperature", "0"]), alone())
    return capsys.readouterr().out


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool = False) -> None:
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=text.buffer, isatty=lambda: terminal, readline=text.readline))


def test_complete_streams_one_prompt(paths: Features, capsys: pytest.CaptureFixture[str]) -> None:
    out = complete([*paths.flags, "--prompt", "the storm"], capsys)
    assert out.startswith("the storm")
    assert len(out) > len("the storm\n")
    assert out == complete(["--model", str(paths.model), "--prompt", "the storm"], capsys), (
        "an SAE nobody uses changes the text"
    )


def test_complete_reads_a_prompt_a_line(
    paths: Features, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, "the storm\n\nshe read é\n".encode())
    records = [json.loads(line) for line in complete([*paths.flags, "--json"], capsys).splitlines()]
    assert [record["prompt"] for record in records] == ["the storm", "she read é"]
    assert all(record["finished"] in ("length", "stop") and not record["steered"] for record in records)
    stdin(monkeypatch, b"the storm\n\nshe read\n")
    whole = json.loads(complete([*paths.flags, "--json", "--whole"], capsys))
    assert whole["prompt"] == "the storm\n\nshe read"


def test_texts_do_not_depend_on_the_batch(
    paths: Features, recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, steered and watched: all five at once, two at a time, or each alone; a long one takes no room from others."""
    long = "the other one and then the storm " * 5
    flags = [*paths.flags, "--steer", str(recipe_file), "--watch", "3", "--json", "--max-new-tokens", "30", "--seed", "5"]
    answers = []
    for size in ("5", "2", "1"):
        stdin(monkeypatch, f"the storm\nshe read\n{long}\na\nthe storm\n".encode())
        inference.complete.run(parse(CompleteConfig, "", [*flags, "--batch-size", size]), alone())
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    texts = [[record["completion"] for record in records] for records in answers]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][4], "equal prompts must not give equal texts"
    for together, single in zip(answers[0], answers[2], strict=True):
        assert together["tokens"] == single["tokens"]
        assert together["watch"]["3"][1:-1] == pytest.approx(single["watch"]["3"][1:-1], abs=1e-4)


def test_complete_compares(paths: Features, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*paths.flags, "--prompt", "the storm", "--steer", str(recipe_file), "--json"]
    baseline, steered = (json.loads(line) for line in complete([*flags, "--compare"], capsys).splitlines())
    assert (baseline["steered"], steered["steered"]) == (False, True)
    assert baseline["completion"] != steered["completion"]
    assert json.loads(complete(flags, capsys)) == steered
    out = complete([*flags[:-1], "--compare"], capsys)
    assert out.startswith("[baseline] the storm")
    assert "\n[steered] the storm" in out


def test_complete_watches(paths: Features, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    flags = [*paths.flags, "--prompt", "the storm", "--watch", "3,5"]
    with caplog.at_level(logging.WARNING):
        record = json.loads(complete([*flags, "--alarm", "0.1", "--json"], capsys))
    assert len(record["tokens"]) == len(record["watch"]["3"]) == len(record["watch"]["5"])
    assert record["watch"]["3"][0] is None
    above = {(alarm["latent"], alarm["token"]) for alarm in record["alarms"]}
    rises = [(latent, token) for latent, token in above if (latent, token - 1) not in above]
    said = {warning.getMessage().partition(" (")[0] for warning in caplog.records}
    assert said == {f"ALARM text 1, token {token} {record['tokens'][token]!r}: latent {latent}" for latent, token in rises}
    assert len(caplog.records) == len(rises)
    assert record["maxima"].keys() == {"3", "5"}
    for alarm in record["alarms"]:
        assert record["watch"][str(alarm["latent"])][alarm["token"]] == alarm["value"]
        assert alarm["share_of_maximum"] > 0.1
    table = complete(flags, capsys).splitlines()
    header = next(i for i, line in enumerate(table) if line.startswith("token"))
    assert len(table) - header - 1 == len(record["tokens"])
    assert table[header - 2].startswith("#3: railway bridges; maximum ")
    place, value = next((t, value) for t, value in enumerate(record["watch"]["3"]) if value)
    share = value / record["maxima"]["3"]
    assert table[header + 1 + place].split()[1:3] == [f"{value:.3f}", f"{share:.0%}"]


def test_edits_are_read_from_the_command_line(
    paths: Features, recipe_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*paths.flags, "--prompt", "the storm", "--json"]
    with caplog.at_level(logging.INFO):
        assert complete([*flags, "--steer", "3:12"], capsys) == complete([*flags, "--steer", str(recipe_file)], capsys)
    assert caplog.text.count("steering latent 3 (railway bridges): add +12 times its maximum, positions: all") == 2
    assert parse_edits("7:-2.5:clamp:generated, 20:ablate,4:1:add:9") == (
        Edit(latent=7, strength=-2.5, mode="clamp", positions="generated"),
        Edit(latent=20, mode="ablate"),
        Edit(latent=4, positions=9),
    )
    for text in ("3:", "3:x", "3:1:add:all:5", "3:1:nothing", "3:nan", "3:1:add:late", "12345678901:1"):
        with pytest.raises(ValueError, match=r"latent|LATENT"):
            complete([*flags, "--steer", text], capsys)


def test_comparisons_stand_in_pairs(
    paths: Features, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"the storm\nshe read\n")
    records = [
        json.loads(line) for line in complete([*paths.flags, "--compare", "--steer", "3:12", "--json"], capsys).splitlines()
    ]
    order = [("the storm", False), ("the storm", True), ("she read", False), ("she read", True)]
    assert [(record["prompt"], record["steered"]) for record in records] == order


def test_stop_strings_may_hold_line_breaks() -> None:
    config = parse(CompleteConfig, "", ["--prompt", "x", "--stop", r"a\n\tb", "c"])
    assert config.sampling().stop == ("a\n\tb", "c")


def test_chat_answers_each_line(
    paths: Features, recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*flags: str) -> list[dict[str, Any]]:
        stdin(monkeypatch, b"hello\n\nonce more\n/reset\nhello\n/quit\nnot read\n")
        config = parse(ChatConfig, "", [*paths.flags, "--max-new-tokens", "5", "--temperature", "0", "--json", *flags])
        inference.chat.run(config, alone())
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first, second, third = talk()
    assert [first["message"], second["message"], third["message"]] == ["hello", "once more", "hello"]
    assert first == third, "/reset did not start anew"
    assert talk("--steer", str(recipe_file))[0]["answer"] != first["answer"]
    watched = talk("--watch", "3,5", "--alarm", "0")[1]
    assert watched["answer"] == second["answer"]
    assert len(watched["tokens"]) == len(watched["watch"]["3"]) == 5
    fired = {(latent, t) for latent in (3, 5) for t, value in enumerate(watched["watch"][str(latent)]) if value}
    assert {(alarm["latent"], alarm["token"]) for alarm in watched["alarms"]} == fired
    assert talk("--system", "Be brief.")[0]["answer"] != first["answer"]


def test_chat_survives_a_message_that_is_too_long(
    paths: Features,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the keyboard the conversation goes on as if it had not been sent; in a pipe the command fails."""
    config = parse(ChatConfig, "", [*paths.flags, "--max-new-tokens", "5", "--temperature", "0", "--json"])
    answers = []
    for lines in (b"hello\n" + b"word " * 100 + b"\nonce more\n", b"hello\nonce more\n"):
        stdin(monkeypatch, lines, terminal=True)
        inference.chat.run(config, alone())
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 2
    assert "the context holds 128" in caplog.text
    stdin(monkeypatch, b"word " * 100)
    with pytest.raises(ValueError, match="the context holds 128"):
        inference.chat.run(config, alone())
    stdin(monkeypatch, b"hello \xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        inference.chat.run(config, alone())


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    paths: Features, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the keyboard what was said so far stays; in a pipe the command ends with exit code 130."""

    def interrupted(*arguments: Any) -> Iterator[Piece]:
        for count, piece in enumerate(generate(*arguments)):
            if count == 3 and len(arguments[2][0]) == lengths[0]:
                raise KeyboardInterrupt
            yield piece

    config = parse(ChatConfig, "", [*paths.flags, "--max-new-tokens", "5", "--temperature", "0", "--json"])
    stdin(monkeypatch, b"hello\nonce more\n", terminal=True)
    inference.chat.run(config, alone())
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    session = open_session(config, torch.device("cpu"))
    lengths = [len(encode_dialog(session.tokenizer, [Message("user", "hello")]))]
    monkeypatch.setattr(inference.chat, "generate", interrupted)
    for terminal in (True, False):
        stdin(monkeypatch, b"hello\nonce more\n", terminal=terminal)
        if terminal:
            inference.chat.run(config, alone())
            first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
            assert first["finished"] == "interrupted"
            assert whole[0]["answer"].startswith(first["answer"])
            assert second["message"] == "once more"
            assert second["finished"] != "interrupted"
        else:
            with pytest.raises(SystemExit) as ended:
                inference.chat.run(config, alone())
            assert ended.value.code == 130
            assert capsys.readouterr().err.endswith("interrupted\n")


def test_dialogues_fit_into_the_context(paths: Features) -> None:
    session = open_session(InferenceConfig(model=str(paths.model)), torch.device("cpu"))
    messages = [Message("system", "Be kind.")]
    for i in range(6):
        messages += [Message("user", f"question number {i}"), Message("assistant", f"answer number {i}")]
    messages.append(Message("user", "the last one"))
    turn = prepare(session, messages, "llama3", 30)
    assert turn.dropped > 0
    assert len(turn.ids) + 30 <= session.context
    kept = [messages[0], *messages[1:][turn.dropped :]]
    assert kept[1].role == "user"
    assert turn.ids == encode_dialog(session.tokenizer, kept)
    plain = session.tokenizer.decode(prepare(session, messages[:2], "plain", 30).ids, skip_special=True)
    assert plain == "Be kind.\nQuestion: question number 0\nAnswer:"
    with pytest.raises(ValueError, match="the context holds 128"):
        prepare(session, [Message("user", "word " * 60)], "llama3", 30)
    assert [style_of("auto", model, session.tokenizer) for model in ("demo", "x")] == ["plain", "llama3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--watch", "3;4"], "separated by commas"),
        (["--alarm", "0.5"], "--watch too"),
        (["--compare"], "--steer recipe.json too"),
        (["--alarm", "-1", "--watch", "3"], "0 or more"),
        (["--batch-size", "0"], "at least 1 prompt; found 0"),
        (["--steer", " "], "edits such as 561:1.5; found nothing"),
        (["--model", "m", "--top", "t"], "--sae too"),
        (["--model", "m", "--sae", "s", "--explanations", "e"], "--top too"),
        (["--style", "x"], "Unrecognized"),
    ],
)
def test_flags_that_contradict_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(CompleteConfig, "", flags)


def test_wrong_input_is_named(paths: Features, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases: list[tuple[list[str], bytes, str]] = [
        ([], b"\n  \n", "the prompt is empty"),
        ([], b"\xff\xfe", "not UTF-8"),
        (["--prompt", "word " * 200], b"", "the context holds 128"),
        (["--prompt", "x", "--watch", "99"], b"", "latents 0 to 47"),
        (["--prompt", "x", "--temperature", "nan"], b"", "temperature"),
        (["--prompt", "x", "--steer", str(tmp_path)], b"", "directory"),
    ]
    for flags, data, message in cases:
        stdin(monkeypatch, data)
        with pytest.raises((ValueError, OSError), match=message):
            inference.complete.run(parse(CompleteConfig, "", [*paths.flags, *flags]), alone())
    bare = parse(CompleteConfig, "", ["--model", str(paths.model), "--prompt", "x", "--steer", str(recipe_file)])
    with pytest.raises(ValueError, match="need --sae and --top"):
        inference.complete.run(bare, alone())


def test_a_closed_pipe_ends_quietly(paths: Features) -> None:
    """The real command in a real pipe, read by something that goes away."""
    command = [sys.executable, "-m", "inference.complete", "--model", str(paths.model), "--device", "cpu", "--threads", "1"]
    command += ["--max-new-tokens", "80"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"the storm\n")
        process.stdin.close()
        assert process.stdout.read(9) == b"the storm"
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "redirection", "code", "said"),
    [
        ("complete", ">&-", 2, "error: standard output is closed"),
        ("complete", "<&-", 2, "error: the prompt is empty"),
        ("chat", "<&-", 0, ""),
    ],
)
def test_closed_streams_are_no_surprise(paths: Features, command: str, redirection: str, code: int, said: str) -> None:
    line = f"{sys.executable} -m inference.{command} --model {paths.model} --device cpu --threads 1 {redirection}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_text_is_utf_8_whatever_the_locale(paths: Features) -> None:
    command = [sys.executable, "-m", "inference.complete", "--model", str(paths.model), "--device", "cpu", "--threads", "1"]
    command += ["--max-new-tokens", "1", "--prompt", "the café"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.decode().startswith("the café")


def test_session_without_features(paths: Features) -> None:
    session: Session = open_session(InferenceConfig(model=str(paths.model)), torch.device("cpu"))
    assert session.features == ()
    with pytest.raises(ValueError, match="no SAE is loaded"):
        session.needs_features()


# What does not belong together, as a user meets it: exit code 2 and one line


@pytest.fixture
def strangers(paths: Features, tmp_path: Path) -> dict[str, Path]:
    """Parts that exist and are whole, but belong to something else."""
    other_model = tiny_llama(tmp_path / "other", seed=9)
    other_run = write_features(tmp_path / "run", paths.model, tiny_sae(paths.model, "layers.0.resid_post", seed=5))
    deeper = tiny_sae(paths.model, "layers.1.resid_post", seed=6)
    deeper.cfg.provenance["site"] = "layers.7.resid_post"
    found = {
        "sae_of_another_model": write_features(tmp_path / "m", other_model, tiny_sae(other_model, "layers.1.resid_post")).sae
    }
    deeper.save(tmp_path / "deeper")
    recipe = Recipe((Edit(latent=3),), load(other_run.sae).weights_hash)
    (tmp_path / "recipe_of_another.json").write_text(recipe.to_json())
    (tmp_path / "out_of_range.json").write_text(Recipe((Edit(latent=48),), load(paths.sae).weights_hash).to_json())
    (tmp_path / "broken.json").write_text("{")
    names = {name: tmp_path / f"{name}.json" for name in ("recipe_of_another", "out_of_range", "broken")}
    return (
        found
        | names
        | {"other_sae": other_run.sae, "other_explanations": other_run.explanations, "deeper": tmp_path / "deeper"}
    )


@pytest.mark.parametrize("command", ["complete", "chat"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sae", "sae_of_another_model"], "model_hash is "),
        (["--sae", "deeper"], "unknown site 'layers.7.resid_post'"),
        (["--sae", "other_sae"], "top sentences .*site is 'layers.1.resid_post', but 'layers.0.resid_post' is needed"),
        (["--explanations", "other_explanations"], "explanations .*sae_hash is"),
        (["--steer", "recipe_of_another"], "the recipe belongs to the SAE"),
        (["--steer", "out_of_range"], "latent 48 is out of range; this SAE has latents 0 to 47"),
        (["--steer", "broken"], "broken.json: the recipe is not valid JSON"),
        (["--watch", "99"], "--watch 99: out of range; this SAE has latents 0 to 47"),
        (["--watch", "3;4"], "separated by commas"),
    ],
)
def test_one_line_says_what_does_not_belong(
    paths: Features,
    strangers: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    flags: list[str],
    message: str,
) -> None:
    stage, config = {
        "complete": (inference.complete, CompleteConfig),
        "chat": (inference.chat, ChatConfig),
    }[command]
    stdin(monkeypatch, b"hello\n")
    given = [str(strangers.get(flag, flag)) for flag in flags]
    right = dict(zip(paths.flags[::2], paths.flags[1::2], strict=True))
    right.pop(flags[0], None)
    monkeypatch.setattr(sys, "argv", [command, *itertools.chain(*right.items()), "--device", "cpu", *given])
    with pytest.raises(SystemExit) as ended:
        run_stage(config, stage.run, "")
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert shown.out == "", "something was said before the mistake was found"
