"""Our SAE on a Llama of transformers, and our capture for others: the lines of docs/python.md as they stand there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_llama3_checkpoint import save_transformers
from tests.tiny import tiny_tokenizer
from tests.tiny_features import tiny_sae

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
LAYER = 1


def example() -> str:
    """The block of Python under "In transformers"."""
    section = PAGE.read_text(encoding="utf-8").split("## In transformers\n")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_example_runs_and_reads_what_our_capture_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    theirs = save_transformers(folder, vocab_size=tiny_tokenizer(folder), num_hidden_layers=3)
    tiny_sae(folder, f"layers.{LAYER}.resid_post").save(tmp_path / "sae")
    names: dict[str, Any] = {"M": str(folder), "X": str(tmp_path / "sae"), "i": LAYER, "torch": torch}
    with torch.no_grad():
        exec(example().replace("from_pretrained(M)", f"from_pretrained(M, dtype={dtype})"), names)
        model, rows, ids, autoencoder = (names[name] for name in ("model", "rows", "ids", "autoencoder"))
        assert rows.dtype == dtype
        captured = names["s"].capture("The ship left the harbour.", f"layers.{LAYER}.resid_post")
        torch.testing.assert_close(rows[0].float(), captured, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
        latents = autoencoder.encode(rows)
        assert torch.equal(latents.values, names["latents"].values)
        seen: list[torch.Tensor] = []
        model.model.layers[LAYER + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        spliced = model(ids)
        names["hook"].remove()
        assert spliced.logits.dtype == dtype
        torch.testing.assert_close(seen[0], autoencoder(rows), rtol=0, atol=0)
        assert not torch.equal(spliced.logits, model(ids).logits)
        if dtype == torch.float32:
            torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
