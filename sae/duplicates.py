"""Which sentences repeat an earlier one, token by token: found before rows are dealt out, so that none is in both splits.

A sentence is known by a 64-bit hash of its token ids. Two different ones among n are taken for the same with a chance of
n^2 / 2^65: 2e-5 for 25 million.
"""

from itertools import pairwise

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from capture.store import Activations, Chunk
from core.artifact import Builder
from core.cli import progress
from core.runtime import Runtime
from sae.scratch import SCRATCH, read_scratch

REPEATED = f"{SCRATCH}/.repeated.safetensors"


def find_repeated(activations: Activations, builder: Builder, runtime: Runtime) -> Tensor:
    """Which sentences have the token ids of one with a lower id: bool [n_sentences]. All ranks call it."""
    if not builder.has(REPEATED):
        todo = [i for i in runtime.share(len(activations)) if not builder.has(_hashes_name(i))]
        for index in progress(todo, "hashing", len(todo), "chunks", runtime):
            hashes = sentence_hashes(activations.chunk(index))
            builder.publish(_hashes_name(index), safetensors.torch.save({"hashes": hashes}))
    runtime.barrier()
    if runtime.is_main and not builder.has(REPEATED):
        parts = [read_scratch(builder.path, _hashes_name(index))["hashes"] for index in range(len(activations))]
        builder.publish(REPEATED, safetensors.torch.save({"repeated": repeated(torch.cat(parts))}))
    runtime.barrier()
    return read_scratch(builder.path, REPEATED)["repeated"]


def _hashes_name(index: int) -> str:
    return f"{SCRATCH}/.hashes-{index:06d}.safetensors"


def sentence_hashes(chunk: Chunk) -> Tensor:
    """xxh3 of each sentence's token ids: int64 [n]."""
    tokens, offsets = chunk.token_ids.contiguous().numpy(), chunk.offsets.tolist()
    hashes = [xxhash.xxh3_64_intdigest(tokens[a:b].tobytes()) for a, b in pairwise(offsets)]
    return torch.from_numpy(np.array(hashes, dtype=np.uint64).view(np.int64))


def repeated(hashes: Tensor) -> Tensor:
    """Which of `hashes` [n] stood further ahead already: bool [n]."""
    found = torch.ones(len(hashes), dtype=torch.bool)
    found[torch.from_numpy(np.unique(hashes.numpy(), return_index=True)[1])] = False
    return found
