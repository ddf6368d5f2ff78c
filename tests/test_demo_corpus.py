"""The embedded corpus: passages varied and labelled, documentation reduced to prose."""

import hashlib

import numpy as np
import pytest

from demo.corpus import MORE_PASSAGES, PASSAGES, all_passages, documents, passage_statistics, passages, topics
from demo.documentation import documentation, prose
from scripts.ngram import NGram


def test_passages_are_many_varied_and_of_the_promised_length() -> None:
    found = list(passages())
    statistics = passage_statistics()
    assert len(found) >= 600
    lengths = [len(document.text.split()) for document in found]
    assert min(lengths) >= 80
    assert max(lengths) <= 200
    topics = [document.label for document in found]
    assert len(set(topics)) >= 60
    assert all(topics.count(topic) >= 10 for topic in set(topics))
    assert len({document.name for document in found}) == len(found)
    assert statistics["repeated_4gram_percent"] < 1
    assert statistics["vocabulary"] > 10_000


def test_further_passages_are_as_long_on_topics_of_their_own() -> None:
    found, embedded = list(passages(MORE_PASSAGES)), list(passages())
    assert len(found) == 690
    lengths = [len(document.text.split()) for document in found]
    assert min(lengths) >= 80
    assert max(lengths) <= 200
    labels = [document.label for document in found]
    assert {labels.count(topic) for topic in set(labels)} == {3}
    assert set(labels).isdisjoint(document.label for document in embedded)
    assert len({document.name for document in all_passages()}) == len(found) + len(embedded)
    assert len({" ".join(document.text.split()[:3]) for document in found}) > 0.98 * len(found)
    assert topics() == [*dict.fromkeys(document.label for document in embedded), *dict.fromkeys(labels)]


def test_the_embedded_corpus_is_what_its_model_was_trained_on() -> None:
    """The SAE in demo/ and every figure of the embedded model belong to these bytes."""
    assert (
        hashlib.sha256(PASSAGES.read_bytes()).hexdigest() == "5c40b4f97b077feafea9e3a233f64984e4af2d24553035fc6108ee47aeec4cb7"
    )
    assert {document.source for document in documents(())} == {"passages"}
    assert len(list(documents(()))) == 810


def test_docstrings_are_reduced_to_their_prose() -> None:
    docstring = """Return the sum of two numbers, as :func:`add` does.

    The result is *exact* whenever both ``a`` and `b` are integers [1]_.

    .. math:: a + b

    Parameters
    ----------
    a : int
        The first number of the two that are added.

    - Bullets that read as a sentence are kept as well.

    >>> add(1, 2)
    3

    See http://example.com for more than this about adding numbers.
    """
    assert prose(docstring).splitlines() == [
        "Return the sum of two numbers, as add does.",
        "The result is exact whenever both a and b are integers.",
        "The first number of the two that are added.",
        "Bullets that read as a sentence are kept as well.",
    ]


def test_documentation_names_module_and_object_and_imports_nothing() -> None:
    found = {item.name: item.text for item in documentation(("networkx",))}
    assert "networkx.algorithms.shortest_paths.generic.shortest_path" in found
    assert len(found) > 800
    assert len(set(found.values())) == len(found)
    with pytest.raises(ValueError, match="no_such_package_here is not installed"):
        list(documentation(("no_such_package_here",)))


def test_the_ngram_model_is_a_probability_distribution() -> None:
    """Kneser-Ney's discounts and backoff weights must cancel: over the vocabulary the probabilities sum to one."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 12, size=n).tolist() for n in random.integers(1, 60, size=80)]
    model = NGram(documents, n_vocab=16, pad=15)
    for context in ([], documents[3][:4], [14, 14], [0, 14, 3, 2, 1]):
        base = model.bits([context]) if context else 0.0
        total = sum(2.0 ** -(model.bits([[*context, word]]) - base) for word in range(16))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_the_ngram_model_learns_what_repeats() -> None:
    documents = [[1, 2, 3, 4, 5] * 6 for _ in range(20)]
    model = NGram(documents, n_vocab=8, pad=7)
    assert model.bits([[1, 2, 3, 4, 5]]) < model.bits([[5, 3, 1, 4, 2]]) / 3
