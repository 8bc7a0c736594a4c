"""A patched model and the store of a file's `corpus`."""

import pytest
from corpus_cases import SMALL, patched

from gistkern import compress_corpus


@pytest.fixture(scope="module")
def handle():
    return patched()


@pytest.fixture
def store(handle, corpus, tmp_path):
    return compress_corpus(handle.model, corpus, tmp_path / "store", **SMALL)
