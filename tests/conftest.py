"""Fixtures and settings shared by all tests."""

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests.helpers import typechecking
from tests.helpers.full_disk import mounted

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run, without deadlines, since another process may use the core.
# `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Shapes are types in the mathematics; they are checked in tests only, and cost nothing in a run.
install_import_hook(
    [
        "clex_train.data.position_sampling",
        "clex_train.scaling",
        "clex_train.rope",
        "clex_train.attention",
        "clex_train.lm_infinite",
        "clex_train.models.official",
        "clex_train.models.official_field",
    ],
    f"{typechecking.__name__}.check",
)


LONGEST = ("test_your_model_page.py", "test_training_runs.py", "test_engines.py")


def pytest_configure() -> None:
    """Restore the default handling of SIGINT, which a suite started in the background of a script ignores."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files, so that at the end one core does not wait for the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Exclude imported objects from later garbage collections; those of torch alone take a third of a second."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _use_one_thread() -> Iterator[None]:
    """Use one thread: models this small only lose time to a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Undo the logging set-up of programs called in a test, whose stderr ends with the test."""
    known = [logging.getLogger(name) for name in (None, "clex_train", "data_prep", "launch")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in known]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    with mounted(tmp_path / "disk", "64k") as folder:
        yield folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder of outputs of the original CLEX and LM-Infinite code for small random models (see README)."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def complete_goldens() -> Path:
    """Return the complete set, a superset of `goldens`: also models under LM-Infinite and longer texts."""
    folder = ROOT.parent / "shared" / "goldens"
    if not (folder / "lmi_eval.safetensors").exists():
        pytest.skip("needs the complete goldens in ../shared/goldens; tests/goldens holds 3 MB of them")
    return folder


@pytest.fixture(params=["subset", "complete"])
def logit_goldens(request: pytest.FixtureRequest) -> Path:
    """Return each of the two sets, for tests that both support."""
    return request.getfixturevalue("goldens" if request.param == "subset" else "complete_goldens")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real long text in RedPajama's layout, next to the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("no real text: ../shared/data is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """Tokenize real Python sources: the `json`, `email` and `logging` packages of the standard library."""
    from data_prep import train_tokenizer
    from data_prep.config import CorpusConfig, TokenizerConfig, TokenizeVerb, TrainTokenizerVerb
    from data_prep.tokenize import run as tokenize

    folder = tmp_path_factory.mktemp("corpus")
    texts, library = folder / "texts", Path(os.__file__).parent
    texts.mkdir()
    for python in [*library.glob("json/*.py"), *library.glob("email/*.py"), *library.glob("logging/*.py")]:
        (texts / f"{python.parent.name}_{python.stem}.txt").write_text(python.read_text(encoding="utf-8"))
    corpus = CorpusConfig(paths=[str(texts)], name="tiny")
    train_tokenizer.run(TrainTokenizerVerb(corpus=corpus, output=str(folder / "tokenizer"), vocab_size=512))
    held_out = replace(corpus, validation_share=0.2)
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer"))
    tokenize.run(TokenizeVerb(corpus=held_out, tokenizer=tokenizer, output=str(folder / "store")))
    return folder / "store"


@pytest.fixture(scope="session")
def tiny_architecture(tmp_path_factory) -> Path:
    """Write the config.json of a Llama of about thirty thousand parameters, L = 32."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("architecture")
    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_store, tiny_architecture) -> Callable[..., Any]:
    """Return a function that configures a run of seconds: `tiny_run(folder, *overrides)`, rows of L = 32 tokens."""
    from tests.helpers.composing import composed

    def configuration(folder: Path, *overrides: str) -> Any:
        return composed(
            "+experiment=tiny_base",
            f"output_dir={folder}",
            f"data.path={tiny_store}",
            f"model.config={tiny_architecture}",
            "model.context_len=32",
            "data.seq_len=32",
            "evaluation.lengths=[32,64]",
            *overrides,
        )

    return configuration
