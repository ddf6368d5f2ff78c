"""An SAE to the Hugging Face Hub, with a model card made from its manifest and its evaluation.

python -m sae.push run/sae owner/name --evaluation evaluation/
python -m sae.push run/sae owner/name:layers.15.resid_post --private

The files go up in one commit: all of them or none. `--plan` prints the card and the files, and writes nothing. A README.md that
lies in the folder is taken as it is in place of a card. `python -m sae.pull`, and `sae.load` in Python, read what lies there.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from core.artifact import MANIFEST, verify
from core.cli import one_line_errors, parse, set_up_logging
from llama3.hub import upload
from sae.card import Subject, card, read_evaluation
from sae.formats.hub import parted
from sae.loading import is_ours
from sae.model import load

log = logging.getLogger("sae.push")
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Flags of the upload."""

    sae: Positional[Path]
    """Folder of an SAE of ours: run/sae, or what sae.adopt and sae.convert write."""
    to: Positional[str]
    """Where it is to lie: owner/name, or owner/name:folder where a repository holds several."""
    evaluation: Path | None = None
    """Folder of sae.evaluate, whose figures and conditions the card shows."""
    licence: str = ""
    """Licence named in the card's header, as the Hub spells it: mit, apache-2.0, llama3.2."""
    private: bool = False
    """Make the repository private where it is new."""
    plan: bool = False
    """Print the card and the files, and write nothing."""


def push(config: PushConfig) -> str:
    """Verify the folder, make its card, upload; the commit's address, or the plan's text. ValueError in one line."""
    repository, place = parted(config.to)
    if not config.sae.exists() or not is_ours(config.sae):
        raise ValueError(f"{config.sae}: no SAE of ours; sae.adopt makes one of a published SAE")
    manifest = verify(config.sae)
    sae = load(config.sae)
    evaluation = None if config.evaluation is None else read_evaluation(config.evaluation, sae)
    content: dict[str, Path | bytes] = {name: config.sae / name for name in [*(one.name for one in manifest.files), MANIFEST]}
    own = config.sae / CARD
    if own.is_file():
        log.info("%s is taken as the card", own)
        text = own.read_text(encoding="utf-8")
    else:
        text = card(Subject(sae, config.to, config.licence, evaluation))
    content[CARD] = text.encode()
    if config.plan:
        sizes = [f"{len(one) if isinstance(one, bytes) else one.stat().st_size:>15,}  {name}" for name, one in content.items()]
        return "\n".join([text, f"Bytes that would go to {config.to}:", *sizes])
    named = {f"{place}/{name}" if place else name: one for name, one in content.items()}
    return upload(repository, named, f"SAE {sae.weights_hash}", config.private)


def main() -> None:
    set_up_logging()
    with one_line_errors():
        print(push(parse(PushConfig, __doc__ or "")))


if __name__ == "__main__":
    main()
