"""A tiny model and launches of it, shared by the tests of whole runs."""

import pytest
from distributed_runs import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, tiny_store) -> Launcher:
    """Launches in one session folder, so that a finished run serves several tests."""
    folder = tmp_path_factory.mktemp("runs")
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    ).save_pretrained(folder / "architecture")
    return Launcher(folder, tiny_store)
