"""How good explanations are, on sentences that their explainer did not see, beside baselines, with confidence intervals.

    python -m interpretability.score --top top/ --explanations explanations/ --out scores/
    python -m interpretability.score --top top/ --explanations explanations/ --out scores/ --backend anthropic --compare other/

The tests are those of `interpretability/judging/scoring_tasks.py`. The default judge, `words`, compares words and
understands nothing; the others are language models. One table holds the explanations, those of --compare, and `shuffled`:
every latent with the explanation of another. Intervals are percentiles of a bootstrap over latents (Efron 1979), since the
examples of one latent are not independent draws.
"""

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from core.artifact import Builder, building, check_provenance, open_artifact
from core.cli import run_stage
from core.runtime import Runtime
from core.terminal import say
from interpretability.explain import chosen
from interpretability.judging.scoring_tasks import TESTS, Test, Trial, TrialMaker, shuffled
from interpretability.judging.word_judge import judge
from interpretability.labels.prompts import MalformedReply
from interpretability.llm.backends import LLMBackend, asker_of
from interpretability.llm.client import AskConfig, Request, check_failures
from interpretability.records import Explanation, TopSentences, open_top, read_explanations

SCORES_FILE, SUMMARY_FILE, TABLE_FILE = "scores.jsonl", "scores.json", "scores.md"
SHUFFLED = "shuffled"
NO_EXPLAINER = "(latent alone)"
"""The explainer of tests that show no explanation."""
RESAMPLES = 2000
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "rubric": 0.0, "intruder": 0.2}
MEASURES = {
    "detection": "balanced accuracy", "fuzzing": "balanced accuracy", "rubric": "mean grade, firing less quiet, / 3",
    "intruder": "share found",
}  # fmt: skip

log = logging.getLogger("interpretability.score")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(AskConfig):
    """Flags of `python -m interpretability.score`."""

    top: Path
    """Folder of top sentences."""
    explanations: Path
    """Folder of explanations of the same SAE."""
    compare: Path | None = None
    """Other explanations to stand in the same table, such as those of token_statistics."""
    out: Path
    """Folder to write."""
    backend: Literal["words"] | LLMBackend = "words"
    """Who judges. words: compares words, no model. anthropic, openai, llama: as in interpretability.explain."""
    tests: tuple[Test, ...] = TESTS
    """Which tests to make."""
    latents: str = ""
    """Latents to score, such as 0-99,205. Empty: --sample of those with a valid explanation."""
    sample: int = 100
    """Latents drawn, by --seed, where --latents names none. 0: all."""
    examples: int = 10
    """Sentences of each kind, firing and not, in one question, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample < 0 or self.examples < 3:
            raise ValueError(f"--sample must be at least 0 and --examples at least 3; found {self.sample} and {self.examples}")


class Question(NamedTuple):
    """A trial with the explanation to judge."""

    explainer: str
    trial: Trial
    explanation: str


def run(config: ScoreConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `scores`; under torchrun, rank 0 does."""
    top = open_top(config.top)
    inputs, explainers = [top.artifact], {}
    for path in (config.explanations, *([config.compare] if config.compare else [])):
        artifact = open_artifact(path, "explanations")
        check_provenance(f"explanations {path}", top.provenance, artifact.manifest.provenance, ("sae_hash",))
        inputs.append(artifact)
        explainers[path] = read_explanations(path)
    maker = TrialMaker(top, config.examples, config.seed)
    with building(config.out, "scores", config, runtime, inputs, top.provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            check_failures(config, builder.counts["failed"], builder.counts["questions"])
            return
        names, counts = _write(config, builder, runtime, top, maker, explainers) if runtime.is_main else ([], {})
        builder.finish(names, counts)
    if runtime.is_main:
        say((config.out / TABLE_FILE).read_text(encoding="utf-8"))
        check_failures(config, builder.counts["failed"], builder.counts["questions"])


def _write(
    config: ScoreConfig,
    builder: Builder,
    runtime: Runtime,
    top: TopSentences,
    maker: TrialMaker,
    explainers: Mapping[Path, dict[int, Explanation]],
) -> tuple[list[str], dict[str, Any]]:
    texts = described(explainers, config.seed)
    latents = _latents(config, top, texts)
    questions = list(questions_of(maker, latents, config.tests, texts))
    if not questions:
        raise ValueError(f"{config.top}: none of {len(latents)} latents has held-out sentences enough; keep more --n-sentences")
    judged_by, answers, files = _answers(config, builder, runtime, questions)
    rows = [_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
    summary = summary_of(rows, config.seed)
    summary = {"judge": judged_by, "latents": len({row["latent"] for row in rows}), **summary}
    builder.publish(SCORES_FILE, (json.dumps(row).encode() + b"\n" for row in rows), rows=len(rows))
    builder.publish(SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    builder.publish(TABLE_FILE, table_of(summary).encode())
    failed = sum(row["answers"] is None for row in rows)
    return [SCORES_FILE, SUMMARY_FILE, TABLE_FILE, *files], {"questions": len(rows), "failed": failed}


def described(explainers: Mapping[Path, dict[int, Explanation]], seed: int) -> dict[str, dict[int, str]]:
    """What each explainer says of each latent, by name; the baseline last."""
    texts: dict[str, dict[int, str]] = {}
    for path, found in explainers.items():
        valid = {latent: f"{e.title}. {e.explanation}" for latent, e in found.items() if e.state == "valid"}
        methods = Counter(f"{e.method} {e.model}".strip() for e in found.values() if e.state == "valid")
        name = methods.most_common(1)[0][0] if methods else path.name
        texts[name if name not in texts else f"{name} ({path.name})"] = valid
    first = next(iter(texts.values()))
    return texts | {SHUFFLED: shuffled(first, seed)}


def _latents(config: ScoreConfig, top: TopSentences, texts: Mapping[str, Mapping[int, str]]) -> list[int]:
    """Those that all explainers explain, so that every row of the table is about the same latents."""
    common = sorted(set.intersection(*(set(found) for found in texts.values())))
    if not common:
        raise ValueError("no latent has a valid explanation in every folder (two at least are needed); explain some first")
    if config.latents:
        wanted = set(chosen(config.latents, top.n_latents))
        return [latent for latent in common if latent in wanted]
    if config.sample == 0:
        return common
    return sorted(random.Random(f"{config.seed} latents").sample(common, min(config.sample, len(common))))


def questions_of(
    maker: TrialMaker, latents: Sequence[int], tests: Sequence[Test], texts: Mapping[str, Mapping[int, str]]
) -> Iterator[Question]:
    """Every trial with each explanation of its latent; the intruder test once, for it shows none."""
    for latent in latents:
        for trial in maker.trials(latent, tests):
            if trial.test == "intruder":
                yield Question(NO_EXPLAINER, trial, "")
            else:
                for name, found in texts.items():
                    yield Question(name, trial, found[latent])


class Judged(NamedTuple):
    """The answers to a question; None with a reason where there are none."""

    answers: list[int] | None
    reason: str = ""


def _answers(
    config: ScoreConfig, builder: Builder, runtime: Runtime, questions: Sequence[Question]
) -> tuple[str, list[Judged], list[str]]:
    """Who judges, one answer a question, and the files in which raw replies are kept."""
    if config.backend == "words":
        return "words", [Judged(judge(question.trial, question.explanation)) for question in questions], []
    requests = [Request(f"q{i}", q.trial.system(), q.trial.user(q.explanation)) for i, q in enumerate(questions)]
    asker = asker_of(config.backend, config, builder, runtime.device)
    replies = {reply.key: reply for reply in asker.ask(requests)}
    judged = []
    for i, question in enumerate(questions):
        reply = replies[f"q{i}"]
        try:
            judged.append(Judged(None, reply.problem) if reply.problem else Judged(question.trial.parse(reply.text)))
        except MalformedReply as error:
            judged.append(Judged(None, f"malformed reply: {error}"))
    return f"{asker.name} {asker.model}", judged, asker.files


def _row(question: Question, judged: Judged) -> dict[str, Any]:
    """A line of `scores.jsonl`."""
    trial = question.trial
    return {
        "latent": trial.latent,
        "test": trial.test,
        "explainer": question.explainer,
        "score": None if judged.answers is None else trial.score(judged.answers),
        "truth": [example.truth for example in trial.examples],
        "answers": judged.answers,
        "reason": judged.reason,
    }


def summary_of(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Mean score of each test and explainer over latents with its 95 % interval, and mean grades by level of activation."""
    scores: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    failed: Counter[tuple[str, str]] = Counter()
    grades: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = row["test"], row["explainer"]
        if row["score"] is None:
            failed[key] += 1
            continue
        scores[key].append(row["score"])
        if row["test"] == "rubric":
            for level, grade in zip(row["truth"], row["answers"], strict=True):
                grades[row["explainer"]][level].append(grade)
    keys = dict.fromkeys((row["test"], row["explainer"]) for row in rows)
    results = [
        {"test": test, "explainer": explainer, "measure": MEASURES[test], "chance": CHANCE[test],
         "latents": len(scores[test, explainer]), "failed": failed[test, explainer],
         **interval(scores[test, explainer], seed)._asdict()}
        for test, explainer in sorted(keys, key=lambda key: TESTS.index(key[0]))
    ]  # fmt: skip
    by_level = {
        name: {str(level): {"mean": fmean(found), "n": len(found)} for level, found in sorted(levels.items())}
        for name, levels in grades.items()
    }
    return {"results": results, "grades_by_level": by_level}


class Interval(NamedTuple):
    """A mean over latents with its 95 % confidence interval; all None without latents."""

    mean: float | None
    low: float | None
    high: float | None


def interval(values: Sequence[float], seed: int) -> Interval:
    """Percentile bootstrap over `values`, RESAMPLES times."""
    if not values:
        return Interval(None, None, None)
    draw = random.Random(f"{seed} bootstrap")
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Interval(fmean(values), means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))])


def table_of(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        f"Judge: {summary['judge']}; {summary['latents']} latents.",
        "",
        "| test | explainer | mean | 95 % interval | chance | latents | failed | measure |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["results"]:
        mean = "" if row["mean"] is None else f"{row['mean']:.3f}"
        span = "" if row["mean"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        cells = (row["test"], row["explainer"], mean, span, row["chance"], row["latents"], row["failed"], row["measure"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if by_level := summary["grades_by_level"]:
        levels = sorted({int(level) for found in by_level.values() for level in found})
        lines += ["", "Mean grade (0 to 3) by level of activation, in tenths of the latent's maximum; 0: it does not fire.", ""]
        lines += ["| explainer | " + " | ".join(map(str, levels)) + " |", "|---" * (len(levels) + 1) + "|"]
        for name, found in by_level.items():
            means = (f"{found[str(level)]['mean']:.2f}" if str(level) in found else "" for level in levels)
            lines.append(f"| {name} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage(ScoreConfig, run, __doc__ or "")
