"""An SAE of ours from the Hugging Face Hub to a folder, every byte verified.

python -m sae.pull owner/name --out sae/
python -m sae.pull owner/name:layers.15.resid_post --out sae/

What sae.push put there: manifest, weights and card. SAEs of other libraries become ours by sae.adopt, which measures them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from core import files
from core.artifact import MANIFEST, UNLISTED, Manifest, verify
from core.cli import one_line_errors, parse, set_up_logging
from core.files import locked
from sae.formats.hub import fetched
from sae.loading import is_ours

log = logging.getLogger("sae.pull")


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Flags of the download."""

    source: Positional[str]
    """A Hub id: owner/name, or owner/name:folder."""
    out: Path
    """The folder to write."""


def pull(source: str, out: Path) -> Manifest:
    """Fetch into the Hub's cache, verify, copy. ValueError where it is no SAE of ours, or damaged, or `out` is taken."""
    found = fetched(source)
    if not is_ours(found):
        raise ValueError(f"{source}: an SAE of another library; `python -m sae.adopt {source} --model M --out {out}` reads it")
    manifest = verify(found)
    with locked(out):
        files.sweep(out)
        _check_free(out, manifest)
        names = [record.name for record in manifest.files]
        for name in [*names, *(name for name in UNLISTED if (found / name).is_file()), MANIFEST]:
            files.make_folder((out / name).parent)
            files.publish(out / name, (found / name).read_bytes())
    return verify(out)


def _check_free(out: Path, manifest: Manifest) -> None:
    """ValueError where `out` holds anything but this SAE, whole or in part."""
    known = {record.name for record in manifest.files} | {MANIFEST, *UNLISTED}
    there = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    if MANIFEST in there and Manifest.read(out).hash != manifest.hash:
        raise ValueError(f"{out}: holds another output of a stage; choose another --out")
    if strangers := sorted(set(there) - known):
        raise ValueError(f"{out}: not empty (it holds {strangers[0]}); choose another --out")


def main() -> None:
    set_up_logging()
    with one_line_errors():
        config = parse(PullConfig, __doc__ or "")
        manifest = pull(config.source, config.out)
        log.info("%s: %d files, verified", config.out, len(manifest.files))


if __name__ == "__main__":
    main()
