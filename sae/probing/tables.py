"""Probes of every label, as JSON values and as a page."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.probing.alarms import latent_alarm
from sae.probing.probes import Split, difference_of_means, logistic
from sae.probing.texts import Texts

LEAST = 5  # sentences with a label, and without, on each side of the split


class Probing(NamedTuple):
    """How labels are probed: the flags of `sae.probe` with these names."""

    latents: tuple[int, ...]
    false_alarms: float
    resamples: int
    seed: int


class Labelled(NamedTuple):
    """Of each of N texts."""

    labels: list[str]
    documents: Tensor
    """int64 [N]."""
    test: Tensor
    """Scored on rather than fitted on, bool [N]."""


def probe_labels(how: Probing, texts: Texts, given: Labelled) -> dict[str, Any]:
    """Probes and alarm of each label against all others; of two labels, of one: the other is its mirror.

    ValueError where no label has enough sentences on both sides of the split.
    """
    labels, test = given.labels, given.test
    names = sorted(set(labels))
    spaces = {"latents": texts.latents, "dimensions": texts.x, "components": components(texts.x, test, max(how.latents))}
    found, left_out = {}, []
    for name in names[:1] if len(names) == 2 else names:
        y = torch.tensor([label == name for label in labels])
        counts = [int(part.sum()) for part in (y & ~test, ~y & ~test, y & test, ~y & test)]
        if min(counts) < LEAST:
            left_out.append(name)
            continue
        splits = {space: _split(values, y, given) for space, values in spaces.items()}
        alarm = latent_alarm(_split(texts.peaks, y, given), how.false_alarms)
        of_label = {"fitted": counts[:2], "tested": counts[2:], "probes": _probes(splits, how)}
        found[name] = of_label | {"alarm": None if alarm is None else alarm.record()}
    if not found:
        raise ValueError(
            f"--corpus: no label has {LEAST} sentences, and {LEAST} without it, both in the documents fitted on and in those "
            "scored on; give more documents or another --test-fraction"
        )
    shares = {"sentences": len(labels), "test_sentences": int(test.sum()), "false_alarms": how.false_alarms}
    return {"conditions": shares | {"seed": how.seed}, "labels": found, "left_out": left_out}


def components(x: Tensor, test: Tensor, k: int) -> Tensor:
    """Principal components of `x` [N, d], fitted on the texts that are not `test`: [N, min(k, d)]."""
    fitted = x[~test]
    centre = fitted.mean(0)
    basis: Tensor = torch.linalg.svd(fitted - centre, full_matrices=False).Vh
    return (x - centre) @ basis[:k].T


def _split(values: Tensor, y: Tensor, given: Labelled) -> Split:
    test = given.test
    return Split(values[~test], y[~test], values[test], y[test], given.documents[test])


def _probes(splits: dict[str, Split], how: Probing) -> dict[str, Any]:
    """By what is read and how much of it."""
    probes = {
        space: {str(k): logistic(split, k, how.resamples, how.seed).record() for k in how.latents}
        for space, split in splits.items()
    }
    raw = splits["dimensions"]
    everything = logistic(raw, raw.x.shape[1], how.resamples, how.seed)._replace(chosen=[])
    probes["all dimensions"] = {"all": everything.record()}
    probes["difference of means"] = {"all": difference_of_means(raw, how.resamples, how.seed).record()}
    return probes


def markdown(found: dict[str, Any]) -> str:
    """AUC of each probe, then the alarms."""
    first = next(iter(found["labels"].values()))["probes"]
    columns = [(space, k) for space, probes in first.items() for k in probes]
    heads = [space if k == "all" else f"{k} {space}" for space, k in columns]
    lines = ["# Probes", "", "AUC on documents that no probe was fitted on; in brackets 95 % intervals over documents.", ""]
    lines += [f"| label | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for label, of_label in found["labels"].items():
        cells = [_shown(of_label["probes"][space][k]["auc"]) for space, k in columns]
        lines.append(f"| {_plain(label)} | {' | '.join(cells)} |")
    rate = found["conditions"]["false_alarms"]
    lines += ["", f"Alarms for {rate:.2%} false alarms; in brackets exact intervals for independent sentences.", ""]
    lines += ["| label | latent | threshold | false alarms | detected |", "|---|---|---|---|---|"]
    for label, of_label in found["labels"].items():
        if alarm := of_label["alarm"]:
            rates = [_shown(alarm[name]) for name in ("false_alarm_rate", "detection_rate")]
            lines.append(f"| {_plain(label)} | {alarm['latent']} | {alarm['threshold']:.4g} | {' | '.join(rates)} |")
    if found["left_out"]:
        lines += ["", "Left out, with too few sentences: " + ", ".join(map(_plain, found["left_out"])) + "."]
    return "\n".join(lines) + "\n"


def _plain(label: str) -> str:
    return label.replace("|", "\\|").replace("\n", " ")


def _shown(rate: dict[str, Any]) -> str:
    if rate["interval"] is None:
        return f"{rate['value']:.3f}"
    low, high = rate["interval"]
    return f"{rate['value']:.3f} ({low:.3f} to {high:.3f})"
