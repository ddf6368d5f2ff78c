"""Parts of a capture -> one activations folder, the same as one machine would have written.

python -m capture.activations ... --part 1/2 --out acts-1/      (and 2/2 on another machine)
python -m capture.merge --parts acts-1/ acts-2/ --corpus corpus/ --out acts/

Every file is verified while it is copied. Parts may be given in any order, but all of them, of one corpus, model and flags.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.activations import ActivationsConfig, total_counts
from capture.store import chunk_name, open_corpus
from core.artifact import Artifact, building, check_provenance, open_artifact
from core.cli import StageConfig, progress, run_stage
from core.runtime import Runtime

log = logging.getLogger("capture.merge")

READ_BYTES = 2**22


@dataclass(frozen=True, kw_only=True)
class MergeConfig(StageConfig):
    """Flags of the stage."""

    parts: tuple[Path, ...]
    """Folders written with --part."""
    corpus: Path
    """The corpus folder that they were captured from."""
    out: Path
    """The activations folder to write."""


def run(config: MergeConfig, runtime: Runtime) -> None:
    """Write the merged folder; under torchrun, the ranks share the files."""
    parts = [open_artifact(path, "activations-part") for path in config.parts]
    corpus = open_corpus(config.corpus)
    _check(config.parts, parts, corpus.artifact)
    first = parts[0].manifest
    recorded: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in first.config.items()}
    begun = ActivationsConfig(corpus=config.corpus, out=config.out, **recorded)
    home = {name: part for part in parts for name in part.names}
    provenance = {name: value for name, value in first.provenance.items() if name != "part"}
    with building(config.out, "activations", begun, runtime, inputs=[corpus.artifact], provenance=provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        sites, n_chunks = begun.sites or first.provenance["sites"], -(-corpus.n_sentences // begun.chunk_sentences)
        names = [chunk_name(site, index) for site in sites for index in range(n_chunks)]
        if missing := [name for name in names if name not in home]:
            raise ValueError(f"--parts: {len(missing)} of {len(names)} files are in none of them, the first is {missing[0]}")
        mine = [names[i] for i in runtime.share(len(names))]
        for name in progress(mine, "capture.merge", len(mine), "files", runtime):
            if not builder.has(name):
                builder.publish(name, _blocks(home[name].file(name)), home[name].rows(name))
        counts = total_counts(sites, mine, builder, runtime)
        builder.finish(mine, {"sentences": corpus.n_sentences} | counts)
    log.info("%s: %s tokens of %d parts", config.out, f"{counts['tokens']:,}", len(parts))


def _check(paths: Sequence[Path], parts: Sequence[Artifact], corpus: Artifact) -> None:
    """ValueError where parts do not belong together, or one is given twice."""
    first = parts[0].manifest
    seen: dict[str, Path] = {}
    for path, part in zip(paths, parts, strict=True):
        manifest = part.manifest
        check_provenance(f"--parts {path}", first.config, manifest.config, first.config)
        check_provenance(f"--parts {path}", first.provenance, manifest.provenance, first.provenance.keys() - {"part"})
        if manifest.inputs != [corpus.as_input()]:
            raise ValueError(f"--parts {path}: was captured from another corpus than {corpus.path}")
        for name in part.names:
            if name in seen:
                raise ValueError(f"--parts {path}: holds {name}, and so does {seen[name]}; give each part once")
            seen[name] = path


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            yield block


if __name__ == "__main__":
    run_stage(MergeConfig, run, __doc__ or "")
