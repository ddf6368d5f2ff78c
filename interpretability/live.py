"""Activations straight from the model: what `capture.activations` would have stored, chunk by chunk, without the disk.

It calls capture's own code with the settings that the SAE's training rows were captured with, so that batches, and with
them the last bits, are the same.
"""

from typing import Any, Literal

import torch

from capture.batches import tokenise
from capture.chunks import ChunkCapture, NonFinite, start_chunk
from capture.store import Chunk, Corpus
from llama3 import Tokenizer, load_model
from sae.model import SAE

CHUNK_SENTENCES, BATCH_TOKENS, MAX_PADDING = 2048, 8192, 0.05
"""The defaults of capture.activations."""


class LiveActivations:
    """Stands in for `capture.store.Activations`; chunks are computed when they are asked for, each once."""

    def __init__(self, model: str, tokenizer: Tokenizer, corpus: Corpus, sae: SAE, site: str, device: torch.device) -> None:
        trained = sae.cfg.provenance
        self._llama = load_model(model, device).eval()
        self._tokenizer, self._corpus, self.site = tokenizer, corpus, site
        self.d_model, self.n_sentences = self._llama.params.dim, corpus.n_sentences
        self._max_length = int(trained.get("max_length") or self._llama.params.max_seq_len - 1)
        storage: Literal["bf16", "fp32"] = "bf16" if trained.get("dtype") == "bf16" else "fp32"
        self._how = ChunkCapture(
            model=self._llama,
            sites=[site],
            storage=storage,
            batch_tokens=BATCH_TOKENS,
            max_padding=MAX_PADDING,
            bos_id=tokenizer.bos_id if trained.get("bos") == "feed" else None,
            skip_nonfinite=False,
        )
        self.provenance: dict[str, Any] = {
            "model": str(trained.get("model", "")),
            "model_hash": self._llama.weights_hash,
            "tokenizer_hash": tokenizer.hash,
            "sites": [site],
            "site": site,
            "d_model": self.d_model,
            "dtype": trained.get("dtype"),
            "bos": trained.get("bos"),
            "max_length": self._max_length,
            "corpus_hash": corpus.manifest_hash,
        }

    def __len__(self) -> int:
        return -(-self.n_sentences // CHUNK_SENTENCES)

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, computed now. ValueError naming the sentence where an activation is NaN or infinite."""
        first = index * CHUNK_SENTENCES
        table = self._corpus.rows(first, min(first + CHUNK_SENTENCES, self.n_sentences))
        tokens = tokenise(table, self._tokenizer, self._max_length)
        try:
            captured = start_chunk(self._how, tokens, lambda: None).result
        except NonFinite as error:
            found, _, _ = str(error).partition(";")  # what follows is about flags of capture.activations
            raise ValueError(
                f"straight from the model: {found}; store activations with capture.activations --nonfinite skip, and give those"
            ) from None
        return Chunk(
            index,
            captured.rows[self.site].activations,
            captured.tokens.token_ids.int(),
            captured.tokens.sentence_ids,
            captured.tokens.document_ids,
            captured.tokens.offsets,
        )
