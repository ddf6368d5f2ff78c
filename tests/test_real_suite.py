"""SmolLM2 answers every prompt of the suite right: what is attributed there is an answer that the model knows."""

from pathlib import Path

import pytest
import torch

from interpretability.causal.records import read_suite
from llama3 import load_model, load_tokenizer

pytestmark = pytest.mark.real


@torch.inference_mode()
def test_every_answer_is_the_likeliest_next_token(smollm2_file: Path) -> None:
    model, tokenizer = load_model(smollm2_file).eval(), load_tokenizer(smollm2_file)
    wrong = []
    for row in read_suite():
        answer, baseline = (tokenizer.encode(text) for text in (row.answer, row.baseline))
        assert len(answer) == len(baseline) == 1, row
        logits = model(torch.tensor([tokenizer.encode_prompt(row.prompt)]), last_only=True)[0, 0]
        if int(logits.argmax()) != answer[0]:
            wrong.append(f"{row.prompt!r}: {tokenizer.decode([int(logits.argmax())])!r} in place of {row.answer!r}")
    assert not wrong, "\n".join(wrong)
