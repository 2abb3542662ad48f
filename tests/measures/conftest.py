"""Fixtures of the tests of measures."""

from typing import Any

import pytest

from clex_train.token_store.store import TokenStore
from tests.evaluation.conftest import places  # noqa: F401
from tests.measures.forced_models import text_store
from tests.retrieval.local_tokenizers import byte_level, sentencepiece_like


@pytest.fixture(scope="session", params=[byte_level, sentencepiece_like], ids=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="session")
def store(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return text_store(tokenizer, tmp_path_factory.mktemp("texts") / "store")
