"""The report: complete, without a network, safe against hostile text, and the same bytes from the same inputs."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from core.artifact import building, open_artifact, verify
from core.cli import StageConfig
from interpretability import report
from interpretability.pages import page as html_page
from interpretability.pages.report_features import (
    by_level,
    density_histogram,
    differing,
    nearest_that_fire,
)
from interpretability.records import (
    EXPLANATIONS_FILE,
    HISTOGRAM_BINS,
    LATENT_SCHEMA,
    LATENTS_FILE,
    TOP_FILE,
    TOP_SCHEMA,
    Explanation,
    TopSentence,
    compressed,
    explanation_lines,
    parquet_bytes,
)
from interpretability.report import BLOCK, REPORT_FILE, ReportConfig
from interpretability.search import Neighbour, neighbours
from sae.accumulator import Accumulator
from sae.evaluating.figures import DEFINITIONS, described, figures_of
from sae.model import SAE, SAEConfig, load
from tests.interp_folders import solo

HOSTILE = "</script><script>alert(1)</script><!--"
N_LATENTS = 12
DEAD = 11


@dataclass(frozen=True, kw_only=True)
class TopConfig(StageConfig):
    aggregations: tuple[str, ...] = ("max",)


def make_sae(run: Path, n_latents: int = N_LATENTS) -> str:
    """A run's folder with `sae/` and `metrics.jsonl`; returns the SAE's hash."""
    sae = SAE(SAEConfig(d_model=8, n_latents=n_latents, k=2, norm="none", provenance={"model": "demo"}))
    sae.initialise_()
    sae.save(run / "sae")
    lines = [
        {"step": i, "tokens": 4096 * i, "loss": 3.0 / i, "fvu": 1.0 / i, "dead_fraction": 0.5 if i < 900 else None}
        for i in range(1, 1001)
    ]
    lines[-1]["val_fvu"] = 0.125
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sae.weights_hash


def sentence_rows(latent: int, tokens: list[str], n: int) -> list[dict[str, Any]]:
    """`n` sentences with the same tokens, the second of them firing."""
    values = [float(2 * n - rank) for rank in range(n)]
    return [
        {
            "latent": latent,
            "aggregation": "max",
            "rank": rank,
            "value": value,
            "sentence_id": 10 * latent + rank,
            "document": "book",
            "label": "war" if rank else None,
            "text": "".join(tokens),
            "tokens": tokens,
            "activations": [0.0, value, *[0.0] * (len(tokens) - 2)],
        }
        for rank, value in enumerate(values)
    ]


def make_top(path: Path, sae_hash: str, tokens: list[str]) -> Path:
    top = [row for latent in range(N_LATENTS) if latent != DEAD for row in sentence_rows(latent, tokens, 7)]
    latents = [
        {
            "latent": latent,
            "firing_count": 0 if latent == DEAD else 7,
            "sentence_count": 0 if latent == DEAD else 7,
            "max": 0.0 if latent == DEAD else 14.0,
            "mean": 0.0 if latent == DEAD else 11.0,
            "density": 0.0 if latent == DEAD else 0.001 * (latent + 1),
            "histogram": [0] * 12 + ([0] if latent == DEAD else [7]) + [0] * (HISTOGRAM_BINS - 13),
            "promoted": [" war", HOSTILE],
            "suppressed": [],
        }
        for latent in range(N_LATENTS)
    ]
    provenance = {"sae_hash": sae_hash, "model": "demo", "site": "layers.1.resid_post"}
    with building(path, "top_sentences", TopConfig(), solo(), provenance=provenance) as builder:
        builder.publish(TOP_FILE, parquet_bytes(TOP_SCHEMA, [pa.Table.from_pylist(top, TOP_SCHEMA)]))
        builder.publish(LATENTS_FILE, parquet_bytes(LATENT_SCHEMA, [pa.Table.from_pylist(latents, LATENT_SCHEMA)]))
        builder.finish([TOP_FILE, LATENTS_FILE], {"tokens": 7000, "sentences": 400})
    return path


def explained(latent: int, **changes: Any) -> Explanation:
    texts = {"title": f"title of {latent} é<b>", "explanation": HOSTILE, "method": "token_statistics", "model": ""}
    values: dict[str, Any] = {"latent": latent, "state": "valid", "score": 0.5 + latent / 100} | texts | changes
    return Explanation(**values)


def make_explanations(path: Path, sae_hash: str) -> Path:
    rows = [explained(latent) for latent in range(N_LATENTS - 3)]
    rows.append(explained(N_LATENTS - 3, title="", state="failed", reason="no JSON", score=None))
    with building(path, "explanations", StageConfig(), solo(), provenance={"sae_hash": sae_hash}) as builder:
        builder.publish(EXPLANATIONS_FILE, compressed(explanation_lines(rows)))
        builder.finish([EXPLANATIONS_FILE], {"valid": N_LATENTS - 3})
    return path


def make_evaluation(path: Path, sae_hash: str, values: dict[str, float | None]) -> Path:
    """An evaluation of these figures in the form that sae.evaluate writes."""
    conditions = {"tokens": 1234, "split": "validation documents"}
    found = {
        name: {"value": value, "definition": f"what {name} is", "conditions": conditions} for name, value in values.items()
    }
    with building(path, "evaluation", StageConfig(), solo(), provenance={"sae_hash": sae_hash}) as builder:
        builder.publish("evaluation.json", json.dumps(found).encode())
        builder.finish(["evaluation.json"], {})
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`run`, `top`, `explanations` and `evaluation` of one SAE."""
    sae_hash = make_sae(tmp_path / "run")
    make_top(tmp_path / "top", sae_hash, [" The", f" {HOSTILE}", " naïve", " 日本", "\x7f", "."])
    make_explanations(tmp_path / "explanations", sae_hash)
    make_evaluation(tmp_path / "evaluation", sae_hash, {"fvu": 0.25, "l0": 2, "ce_recovered": 0.9, "kl": None, "fvu_pca": 0.5})
    return tmp_path


def make_report(folders: Path, out: str = "report", **flags: Any) -> str:
    """The page that `flags` give."""
    paths = {"top": folders / "top", "explanations": folders / "explanations", "out": folders / out}
    report.run(ReportConfig(**(paths | flags)), solo())
    return (folders / out / REPORT_FILE).read_text(encoding="utf-8")


def data_of(page: str, element: str = 'id="data"') -> Any:
    """What the page's script will read there: the text up to the first thing that ends a script element."""
    start = page.index(f'<script type="application/json" {element}')
    text = page[page.index(">", start) + 1 :]
    return json.loads(text[: text.lower().index("</script")])


def file_of(report_folder: Path, name: str) -> Any:
    """What a file beside the page hands over to it: one call, with its own name and JSON."""
    text = (report_folder / f"{name}.js").read_text(encoding="utf-8")
    call, _, value = text.partition(",")
    assert call == f'loaded("{name}"'
    assert value.endswith(");\n")
    return json.loads(value[:-3])


def with_all(folders: Path) -> dict[str, Any]:
    return {"run": folders / "run", "evaluation": folders / "evaluation"}


def test_page_holds_every_feature(folders: Path) -> None:
    data = data_of(make_report(folders, sentences=5, **with_all(folders)))
    assert verify(folders / "report").kind == "report"
    assert data["latents"]["title"] == [f"title of {i} é<b>" for i in range(N_LATENTS - 3)] + [""] * 3
    assert data["best"]["latents"] == list(range(N_LATENTS - 3)), "all peak at the same word, so by number"
    assert [len(rows) for rows in data["best"]["examples"]] == [1] * (N_LATENTS - 3), "all its sentences are the same"
    assert data["order"] == [*data["best"]["latents"], 9, 10, DEAD]
    assert data["failed"] == [N_LATENTS - 3]
    assert data["block"] == BLOCK
    block = file_of(folders / "report", "features/00000")
    features = block["features"]
    assert [len(feature["top"]["max"]) for feature in features] == [5] * (N_LATENTS - 1) + [0]
    tokens = block["pool"]["tokens"][features[3]["top"]["max"][0][0]]
    assert tokens.split("\x7f") == [" The", f" {HOSTILE}", " naïve", " 日本", "\ufffd", "."]
    assert features[3]["top"]["max"][0][1:] == [1, 1000]
    assert features[3]["top"]["max"][4][1:] == [1, round(1000 * 10 / 14)]
    assert features[0]["histogram"] == [12, 7]
    assert features[DEAD]["histogram"] == []
    assert features[0]["promoted"] == f" war\x7f{HOSTILE}"
    assert features[N_LATENTS - 3]["explanation"] == "no JSON"
    assert [latent for latent, _ in features[0]["near"]] == [row.latent for row in _near(folders, 0)]
    words = file_of(folders / "report", "words/00000")
    assert words[0] == f"{HOSTILE} war {HOSTILE}"
    assert words[DEAD] == f"war {HOSTILE}"


def _near(folders: Path, latent: int) -> list[Neighbour]:
    rows = neighbours(load(folders / "run" / "sae").W_dec, latent, N_LATENTS)
    return [row for row in rows if row.latent != DEAD][:8]


def test_many_blocks_hold_what_one_does(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five latents, of which the last is not full, and words of four."""
    make_report(folders, "whole", **with_all(folders))
    monkeypatch.setattr(report, "BLOCK", 5)
    monkeypatch.setattr(report, "WORDS_BLOCK", 4)
    make_report(folders, "cut", **with_all(folders))
    whole = file_of(folders / "whole", "features/00000")
    cut = [file_of(folders / "cut", f"features/{i:05d}") for i in range(3)]
    assert [len(block["features"]) for block in cut] == [5, 5, 2]

    def resolved(block: Any, feature: Any) -> Any:
        text = block["pool"]["tokens"]
        return feature | {"top": {name: [[text[row[0]], *row[1:]] for row in rows] for name, rows in feature["top"].items()}}

    found = [resolved(block, feature) for block in cut for feature in block["features"]]
    assert found == [resolved(whole, feature) for feature in whole["features"]]
    words = [text for i in range(3) for text in file_of(folders / "cut", f"words/{i:05d}")]
    assert words == file_of(folders / "whole", "words/00000")


def test_one_file_holds_the_same(folders: Path) -> None:
    make_report(folders, "many", **with_all(folders))
    page = make_report(folders, "one", one_file=True, **with_all(folders))
    assert sorted(path.name for path in (folders / "one").iterdir()) == ["manifest.json", REPORT_FILE]
    for name in ("features/00000", "words/00000"):
        assert data_of(page, f'data-file="{name}"') == file_of(folders / "many", name)
    assert data_of(page) == data_of((folders / "many" / REPORT_FILE).read_text(encoding="utf-8"))


def test_levels_go_by_the_bin_of_the_histogram() -> None:
    rows = [TopSentence(0, "level", i, value, i, "", None, "", [], []) for i, value in enumerate([5.0, 4.0, 3.9, 1e-9, 1e9])]
    assert [(bin_, [row.rank for row in found]) for bin_, found in by_level(rows)] == [
        (19, [4]),
        (12, [0, 1]),
        (11, [2]),
        (0, [3]),
    ]


def test_nothing_from_a_network_and_no_markup_from_text(folders: Path) -> None:
    page = make_report(folders, **with_all(folders))
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(|fetch\(|XMLHttpRequest|innerHTML", page)
    assert page.count("</script>") == html_page.asset("report.html").count("</script>")
    for text in (page, *(path.read_text(encoding="utf-8") for path in (folders / "report").rglob("*.js"))):
        assert "alert(1)</script" not in text
        assert "<!--" not in text


def test_training_curves_and_evaluation(folders: Path) -> None:
    data = data_of(make_report(folders, **with_all(folders)))
    curves = data["curves"]
    assert len(curves["loss"]) <= 401
    assert curves["loss"][-1] == [4096 * 1000, 0.003]
    assert curves["val_fvu"] == [[4096 * 1000, 0.125]]
    assert len(curves["dead_fraction"]) < len(curves["loss"])
    assert data["evaluation"] == {
        "values": {"fvu": 0.25, "l0": 2.0, "ce_recovered": 0.9, "fvu_pca": 0.5},
        "fvu": [["this SAE", 0.25], ["PCA", 0.5]],
        "figures": [
            ["Active latents a token", 2.0, False, "what l0 is"],
            ["Cross-entropy recovered", 0.9, True, "what ce_recovered is"],
        ],
        "conditions": "1,234 tokens, validation documents",
    }


def test_evaluation_is_read_in_the_form_that_it_is_written(folders: Path) -> None:
    sae, accumulated, x = load(folders / "run" / "sae"), Accumulator.none(8, N_LATENTS, 2), torch.randn(5, 8)
    with torch.no_grad():
        latents = sae.encode(x)
        accumulated.add_reconstruction(x, sae.decode(latents), latents)
    found = figures_of(accumulated, 0, 0)
    written = described(found | {"fvu_pca": found["fvu"]}, accumulated, sae.cfg, {"tokens": 5, "split": "all"})
    (folders / "evaluation.json").write_text(json.dumps(written))
    read = report.read_evaluation(folders / "evaluation.json")
    assert read["conditions"] == "5 tokens, all"
    assert read["values"]["fvu"] == pytest.approx(written["fvu"]["value"], rel=1e-3)
    assert [name for name, _ in read["fvu"]] == ["this SAE", "PCA"]
    assert "kl" not in read["values"], "no model was run, so there is no KL"


def test_every_figure_of_the_report_is_one_that_an_evaluation_has() -> None:
    assert DEFINITIONS.keys() >= report.BARS.keys() | report.FIGURES.keys()


@pytest.mark.parametrize("text", ["[1]", '{"fvu": 1}', "{"])
def test_refuses_a_damaged_evaluation(folders: Path, text: str) -> None:
    (folders / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json: expected figures"):
        report.read_evaluation(folders / "evaluation.json")


def test_without_run_and_evaluation(folders: Path) -> None:
    data = data_of(make_report(folders, best=1))
    assert (data["curves"], data["evaluation"]) == (None, None)
    assert data["best"]["latents"] == [0]
    assert {len(feature["near"]) for feature in file_of(folders / "report", "features/00000")["features"]} == {0}


def test_same_inputs_same_bytes_and_second_run_does_nothing(folders: Path) -> None:
    first = make_report(folders, "one", **with_all(folders))
    assert make_report(folders, "two", **with_all(folders)) == first
    assert (folders / "one" / "manifest.json").read_bytes() == (folders / "two" / "manifest.json").read_bytes()
    written = (folders / "one" / REPORT_FILE).stat().st_mtime_ns
    make_report(folders, "one", **with_all(folders))
    assert (folders / "one" / REPORT_FILE).stat().st_mtime_ns == written


@pytest.mark.parametrize("flag", ["explanations", "run", "evaluation"])
def test_refuses_folders_of_another_sae(folders: Path, flag: str) -> None:
    other = folders / "other"
    if flag == "run":
        make_sae(other, N_LATENTS + 1)
    elif flag == "evaluation":
        make_evaluation(other, "beef", {})
    else:
        make_explanations(other, "beef")
    with pytest.raises(ValueError, match=r"sae_hash is .* do not belong together") as error:
        make_report(folders, **dict[str, Any]({flag: other}))
    assert "\n" not in str(error.value)
    assert open_artifact(folders / "top").manifest.provenance["sae_hash"] in str(error.value)
    assert not (folders / "report").exists()


@pytest.mark.parametrize("text", ["[1]\n", '{"step": 1}\n', "{}}\n"])
def test_refuses_damaged_metrics(folders: Path, text: str) -> None:
    (folders / "run" / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 "):
        make_report(folders, run=folders / "run")


def test_command_line_reports_in_one_line(folders: Path) -> None:
    make_explanations(folders / "other", "beef")
    paths = {"top": folders / "top", "explanations": folders / "other", "out": folders / "report"}
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "interpretability.report", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert "sae_hash is 'beef'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_sentences_that_differ_where_a_latent_fires() -> None:
    texts = ["a b c d e f g h PEAK i", "x b c d e f g h PEAK i", "a b c d e f g H PEAK i", "PEAK i"]
    rows = [
        TopSentence(0, "max", i, 1.0, i, "", None, text, text.split(), [float(word == "PEAK") for word in text.split()])
        for i, text in enumerate(texts)
    ]
    assert [row.rank for row in differing(rows, 9)] == [0, 2, 3]
    assert [row.rank for row in differing(rows, 2)] == [0, 2]


def test_neighbours_against_the_plain_way() -> None:
    directions = torch.randn(17, 6, generator=torch.Generator().manual_seed(0))
    counts = [0 if i in (3, 9) else 1 for i in range(17)]
    for i, row in enumerate(nearest_that_fire(directions, counts, 4)):
        others = [j for j in range(17) if j != i and counts[j]]
        cosine = {j: float(torch.cosine_similarity(directions[i], directions[j], dim=0)) for j in others}
        expected = sorted(others, key=lambda j: -cosine[j])[:4] if counts[i] else []
        assert [latent for latent, _ in row] == expected
        assert [value for _, value in row] == pytest.approx([1000 * cosine[j] for j in expected], abs=0.51)


def test_density_histogram_bins() -> None:
    found = density_histogram([0.0, 1e-4, 1.1e-4, 0.5])
    assert found["first"] == -16
    assert found["counts"] == [2] + [0] * 13 + [1]
