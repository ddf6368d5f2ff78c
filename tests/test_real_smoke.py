"""Text to a steered SmolLM2 by the demo's own command lines, as small as they go: of the real model, what CI runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import llama3_sae as ls
from core.artifact import verify
from core.shipped import shipped_for
from demo.chain import run_all
from demo.plan import REAL, Plan

pytestmark = [pytest.mark.real, pytest.mark.smoke]

SMALL = replace(REAL, units=48, passage=64, n_latents=1024, k=32, evaluated=4)


@pytest.fixture(scope="module")
def plan(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Every stage done: the SAE that ships trained further, or where it does not ship a fresh one."""
    made = Plan("smollm2", SMALL, tmp_path_factory.mktemp("smoke"), "", "", 0, shipped_for("smollm2"))
    made.write_documents()
    run_all(made.stages())
    return made


def test_every_folder_is_whole(plan: Plan) -> None:
    for stage in plan.stages():
        assert verify(plan.out / "run" / "sae" if stage.name == "train" else stage.out).complete, stage.name


def test_the_sae_stands_in_for_the_activation(plan: Plan) -> None:
    found = json.loads((plan.out / "evaluation" / "evaluation.json").read_text())
    fvu, recovered = (found[name]["value"] for name in ("fvu", "ce_recovered"))
    if plan.base:
        assert fvu < 0.35
        assert recovered > 0.9
    else:  # a few steps from random weights
        assert fvu < 1


def test_a_feature_of_it_steers(plan: Plan) -> None:
    """The strongest of a text, turned up, changes what the model writes; at strength 0 nothing changes."""
    session = ls.open("smollm2", plan.out / "run" / "sae", plan.out / "top", plan.out / "explanations")
    prompt = "The ship left the harbour before the storm"
    found = [latent for token in session.features(prompt, n=1) for latent in token.latents if latent.share]
    feature = max(found, key=lambda latent: latent.value).feature
    assert session.feature(feature).sentences
    plain = session.complete(prompt, max_new_tokens=12, temperature=0).text
    assert session.steer({feature: 0.0}).complete(prompt, max_new_tokens=12, temperature=0).text == plain
    assert session.steer({feature: 4.0}).complete(prompt, max_new_tokens=12, temperature=0).text != plain
