"""Fixtures of the retrieval tests."""

from typing import Any

import pytest

from tests.retrieval.local_tokenizers import byte_level, sentencepiece_like


@pytest.fixture(scope="session", params=[byte_level, sentencepiece_like], ids=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    return byte_level()
