"""docs/extending.md: its example is an architecture, with nothing but the file and the test that
the page shows.
"""

import re
from pathlib import Path

import pytest

from sae.model import load
from tests.conftest import ROOT, Launch
from tests.sae_folders import make_batches, sparse_rows

START = """
import runpy, sys
import sae.architectures
sae.architectures.__path__.append({folder!r})
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The blocks of the page, each under the name in its first line; and `start.py`, which runs a
    module with them.
    """
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == {"sae/architectures/tanh.py", "tests/test_tanh.py"}
    (tmp_path / "own").mkdir()
    for path, block in blocks.items():
        (tmp_path / "own" / Path(path).name).write_text(block, encoding="utf-8")
    (tmp_path / "own" / "test_tanh.py").rename(tmp_path / "test_tanh.py")
    (tmp_path / "start.py").write_text(START.format(folder=str(tmp_path / "own")), encoding="utf-8")
    return tmp_path


def test_the_example_is_an_architecture(example: Path, launch: Launch) -> None:
    """Its own test passes; it is trained, resumed to a finished run, and exported as what it
    computes.
    """
    batches = make_batches(example, sparse_rows(900, 10, 30, active=3)[0], batch_rows=32)
    start, run = example / "start.py", example / "run"
    flags = (
        "--architecture",
        "tanh",
        "--n-latents",
        96,
        "--batch-size",
        60,
        "--epochs",
        4,
        "--sparsity",
        "3e-3",
        "--wandb",
        "off",
    )
    for command in (
        ("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", example, example / "test_tanh.py"),
        ("sae.train", "--batches", batches, "--out", run, *flags),
        ("sae.convert", "--sae", run / "sae", "--to", "saelens", "--out", example / "exported"),
    ):
        done = launch(start, *command, limit=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert '"standard"' in (example / "exported" / "cfg.json").read_text(encoding="utf-8")
    refused = launch("-m", "sae.train", "--batches", batches, "--out", run, *flags)
    assert refused.returncode == 2
    assert "architecture" in refused.stderr
    with pytest.raises(ValueError, match="'tanh' is not known"):
        load(run / "sae")


def test_links_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
