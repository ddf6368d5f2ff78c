"""Activations straight from the model: what `capture.activations` would have stored, chunk by chunk, without the disk.

It calls capture's own code with the settings that the SAE's training rows were captured with, so that batches, and with
them the last bits, are the same.
"""

import logging
from typing import Any

from capture.chunks import ChunkCapture, CorpusChunks, NonFinite, start_chunk
from capture.store import Chunk, Corpus
from core.runtime import Runtime
from llama3 import Tokenizer, load_model
from sae.model import SAE

SETTINGS_OF_0_1: dict[str, Any] = {"dtype": "fp32", "chunk_sentences": 2048, "batch_tokens": 8192, "max_padding": 0.05}
"""What version 0.1 used here where the SAE's provenance did not say; of these it recorded only dtype, the storage type."""

log = logging.getLogger("interpretability.evidence.live")


class LiveActivations:
    """Stands in for `capture.store.Activations`; chunks are computed when they are asked for, each once."""

    def __init__(self, model: str, tokenizer: Tokenizer, corpus: Corpus, sae: SAE, site: str, runtime: Runtime) -> None:
        trained = sae.cfg.provenance
        settings = {name: trained.get(name, value) for name, value in SETTINGS_OF_0_1.items()}
        if runtime.is_main and (absent := [f"{name} {value}" for name, value in settings.items() if name not in trained]):
            log.warning(
                "the SAE does not record all settings of its capture; assuming those of version 0.1: %s", ", ".join(absent)
            )
        llama = load_model(model, runtime.device).eval()
        how = ChunkCapture(
            model=llama,
            sites=[site],
            storage=settings["dtype"],
            batch_tokens=settings["batch_tokens"],
            max_padding=settings["max_padding"],
            bos_id=tokenizer.bos_id if trained.get("bos") == "feed" else None,
            skip_nonfinite=False,
        )
        self._chunks = CorpusChunks(
            corpus=corpus,
            tokenizer=tokenizer,
            how=how,
            model_name=str(trained.get("model", "")),
            max_length=int(trained.get("max_length") or llama.params.max_seq_len - 1),
            chunk_sentences=settings["chunk_sentences"],
        )
        self.site, self.n_sentences = site, corpus.n_sentences
        described = self._chunks.provenance()
        del described["widths"]
        self.provenance: dict[str, Any] = described | {
            "site": site,
            "d_model": llama.width(site),
            "bos": trained.get("bos"),
        }

    def __len__(self) -> int:
        return len(self._chunks)

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, computed now. ValueError naming the sentence where an activation is NaN or infinite."""
        tokens = self._chunks.tokens(index)
        try:
            captured = start_chunk(self._chunks.how, tokens).result
        except NonFinite as error:
            found, _, _ = str(error).partition(";")  # what follows is about flags of capture.activations
            raise ValueError(
                f"straight from the model: {found}; store activations with capture.activations --nonfinite skip, and give those"
            ) from None
        return Chunk(
            index,
            captured.rows[self.site].floats(),
            captured.tokens.token_ids.int(),
            captured.tokens.sentence_ids,
            captured.tokens.document_ids,
            captured.tokens.offsets,
        )
