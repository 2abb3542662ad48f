"""Building rows from a configuration: domain checks, reports, mixtures and resuming."""

import logging
from pathlib import Path

import pytest

from clex_train.config.data import DataConfig, DomainConfig, Packing, parse_ranges
from clex_train.config.optim import OptimConfig
from clex_train.data import build
from clex_train.data.identity import consumed_order, data_order
from clex_train.token_store.writer import write_store


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    for name, base in (("book", 10), ("code", 50)):
        write_store(tmp_path / name, {"train": [[base + d] * 9 for d in range(40)]}, vocab_size=100)
    domains = {"book": DomainConfig(str(tmp_path / "book"), 3), "code": DomainConfig(str(tmp_path / "code"), 1)}
    return DataConfig(domains=domains, seq_len=10)


@pytest.mark.parametrize("packing", list(Packing))
def test_a_mixture_reads_each_store_by_its_weight_under_every_packing(mixture: DataConfig, packing: Packing) -> None:
    mixture.packing = packing
    rows = build.build_rows(build.pack(build.open_stores(mixture), mixture), mixture, 0, batch_rows=10)
    of_code = [int(rows[i].tokens[0]) >= 50 for i in range(160)]
    assert sum(of_code) == 40
    assert [rows[i].index for i in range(3)] == [0, 1, 2]


def test_weights_change_at_the_first_row_of_a_step(mixture: DataConfig) -> None:
    mixture.weights_at = {2: {"book": 0}}
    rows = build.build_rows(build.pack(build.open_stores(mixture), mixture), mixture, 0, batch_rows=10)
    assert {int(rows[i].tokens[0]) >= 50 for i in range(20)} == {True, False}
    assert all(int(rows[i].tokens[0]) >= 50 for i in range(20, 60))


def test_passes_over_each_domain_are_reported_with_a_warning_for_many(
    mixture: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    stores, optim = build.open_stores(mixture), OptimConfig(steps=25, batch_rows=10)
    packed = build.pack(stores, mixture)
    book, code = (mixture.domains[name].path for name in ("book", "code"))
    packing = ("packing", "concat: 100 % of their tokens used, 0 documents cut, 1 documents a sequence")
    begin = ("begin", "documents have no BOS")
    assert list(build.describe(stores, packed, mixture, optim)) == [
        ("data", f"book: {book}: 40 sequences, 4.7 epochs"),
        begin,
        packing,
        ("data", f"code: {code}: 40 sequences, 1.55 epochs"),
        begin,
        packing,
        ("mixture", "book 75 %, code 25 %"),
    ]
    with caplog.at_level(logging.INFO, logger="clex_train"):
        build.warn_about_repetition(packed, mixture, optim)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith("book is read for 4.7 epochs")


def test_the_plan_counts_passes_from_manifests_and_names_missing_stores(mixture: DataConfig) -> None:
    mixture.domains["code"].path = "/no/such/store"
    planned = build.planned_epochs(mixture, OptimConfig(steps=25, batch_rows=10))
    assert planned.startswith("book 4.7 times, code unknown (620 tokens, no store at /no/such/store")


def test_stores_of_two_tokenizers_are_refused(mixture: DataConfig, tmp_path: Path) -> None:
    write_store(tmp_path / "other", {"train": [[1] * 50]}, vocab_size=99)
    mixture.domains["code"].path = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"data.domains.code.path=.*its tokenizer \(99 tokens\) is not that of .*book"):
        build.open_stores(mixture)


def test_a_missing_store_of_a_domain_is_named_by_its_key(mixture: DataConfig) -> None:
    mixture.domains["code"].path = "/no/such/store"
    with pytest.raises(ValueError, match=r"^data.domains.code.path=/no/such/store: no such directory"):
        build.open_stores(mixture)


def test_the_fingerprint_of_a_mixture_depends_on_contents_and_names(mixture: DataConfig, tmp_path: Path) -> None:
    before = build.fingerprint(build.open_stores(mixture))
    (tmp_path / "code").rename(tmp_path / "moved")
    mixture.domains["code"].path = str(tmp_path / "moved")
    assert build.fingerprint(build.open_stores(mixture)) == before
    mixture.domains["prose"] = mixture.domains.pop("code")
    assert build.fingerprint(build.open_stores(mixture)) != before


def test_only_data_after_a_checkpoint_may_change() -> None:
    def order(weight: float = 3, skip: tuple[str, ...] = (), **weights_at: float) -> dict[str, list]:
        domains = {"book": DomainConfig("a", weight), "code": DomainConfig("b", 1)}
        at = {int(step.removeprefix("s")): {"code": value} for step, value in weights_at.items()}
        return data_order(DataConfig(domains=domains, weights_at=at, skip_rows=list(skip)), batch_rows=10)

    at_step_5 = consumed_order(order(), 50)
    assert consumed_order(order(s5=9.0), 50) == at_step_5 != consumed_order(order(s4=9.0), 50)
    assert consumed_order(order(skip=("50-70",)), 50) == at_step_5 != consumed_order(order(skip=("49-70",)), 50)
    assert consumed_order(order(weight=2), 50) != at_step_5
    assert consumed_order(order(weight=2), 0) == consumed_order(order(), 0) == consumed_order({}, 0)


def test_skipped_rows_are_read_as_indices_and_closed_ranges() -> None:
    assert parse_ranges(["17", "100-199", "18", "150-250"]) == [(17, 19), (100, 251)]
    for wrong in ("a", "5-3", "-4", "1-", "1.5", ""):
        with pytest.raises(ValueError, match=r"^data.skip_rows=.*: a row's index, or a range FIRST-LAST"):
            parse_ranges([wrong])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights_at": {5: {"cod": 1}}}, r"data.weights_at.5.cod=1: no such domain; data.domains has book, code"),
        ({"weights_at": {5: {"book": -1}}}, r"data.weights_at.5.book=-1: a weight is a number from 0 to"),
        ({"weights_at": {5: {"book": "much"}}}, r"data.weights_at.5.book=much: a weight"),
        ({"weights_at": {5: {"book": 0, "code": 0}}}, r"data.weights_at.5=.*at least one domain needs a weight"),
        ({"weights_at": {0: {"book": 2}}}, r"data.weights_at.0=.*a step of at least 1"),
        ({"weights_at": {"soon": {"book": 2}}}, r"data.weights_at=soon: a step"),
        ({"domains": {"book": DomainConfig("a", -2)}}, r"data.domains.book.weight=-2: a weight"),
        ({"domains": {"book": DomainConfig("a", 0)}}, r"data.domains=.*at least one domain needs a weight"),
        ({"packing": Packing.long_documents, "min_document_tokens": 99}, r"data.min_document_tokens=99: a row lies"),
        ({"min_document_tokens": 5000}, r"data.min_document_tokens=5000: only for data.packing=long_documents"),
    ],
)
def test_invalid_settings_are_refused_with_their_key(fields: dict, message: str) -> None:
    domains = {"book": DomainConfig("a", 1), "code": DomainConfig("b", 1)}
    with pytest.raises(ValueError, match="^" + message):
        DataConfig(**{"domains": domains, "seq_len": 100, **fields})
