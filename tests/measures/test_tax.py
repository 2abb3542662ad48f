"""The short-context tax: its formula, the column of every table, and baselines that do not compare."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clex_train.cli import report as report_program
from clex_train.console import program as console
from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score
from clex_train.evaluation.tables import console as console_table
from clex_train.evaluation.tables import from_results, markdown
from clex_train.measures import tax
from clex_train.utils.bootstrap import paired_difference
from clex_train.utils.errors import ConfigError
from tests.evaluation.evaluate_program import call

DOCUMENTS = [0, 0, 1, 2, 3]
TOKENS = 40


def evaluation(
    shift: float, seed: int, tokens: str = "t", windows: str = "w", store: str = "s"
) -> tuple[Results, Origin]:
    """Make an evaluation at 16 and 32 tokens whose mean nll is about 2 + `shift`."""
    noise = np.random.default_rng(seed).normal(0, 0.5, len(DOCUMENTS))
    hard = np.random.default_rng(0).normal(80, 9, len(DOCUMENTS))
    scores = [
        results.with_standard_errors(
            Score("none", "one_shot", n, "none", 1.0, (hard + TOKENS * shift + noise).tolist(), 200, 0.0, tokens),
            DOCUMENTS,
        )
        for n in (16, 32)
    ]
    described = {"count": 5, "length": 32, "documents": DOCUMENTS, "fingerprint": windows}
    return Results(scores, 16, described), Origin("label", [], {}, {"path": "books", "fingerprint": store})


@pytest.fixture
def base(tmp_path: Path) -> str:
    results.write(tmp_path / "base.json", *evaluation(0.0, 1))
    return str(tmp_path / "base.json")


def test_the_tax_is_the_ratio_of_perplexities_with_a_paired_error(base: str) -> None:
    own, origin = evaluation(0.02, 2)
    taxed = tax.add(own, origin, base)
    (found,) = taxed.taxes
    first, second = own.scores[0], results.read(Path(base))[0].scores[0]
    assert found.length == 16
    assert found.percent == pytest.approx(100 * (first.perplexity / second.perplexity - 1))
    paired = paired_difference(first.window_nll, second.window_nll, [TOKENS] * 5, DOCUMENTS)
    assert paired.standard_error is not None
    assert found.standard_error == pytest.approx(100 * math.exp(paired.mean_nll) * paired.standard_error)
    assert first.standard_error is not None
    assert found.standard_error < 20 * first.standard_error / first.perplexity, "pairing removes what both find hard"
    assert taxed.metrics()["tax/none/one_shot/16"] == found.percent
    assert tax.add(own, origin, None) == own
    # Of lengths that begin below L, the tax is that at L.
    assert [taxed.length for taxed in tax.add(replace(own, context_len=32), origin, base).taxes] == [32]


def test_the_tax_is_a_column_of_both_tables_and_survives_the_file(base: str, tmp_path: Path) -> None:
    own, origin = evaluation(0.02, 2)
    taxed = tax.add(own, origin, base)
    results.write(tmp_path / "own.json", taxed, origin)
    read = results.read(tmp_path / "own.json")
    assert read[0].taxes == taxed.taxes
    cell = f"{taxed.taxes[0].percent:+.2f} ±{taxed.taxes[0].standard_error:.2f}"
    printed = console_table(from_results(*read))
    assert "tax at 1x, %" in printed
    assert cell in printed
    assert "tax: perplexity above that of label, none, paired by document" in " ".join(printed.split())
    written = markdown([from_results(*read)])
    assert "| 2x (32) | tax at 1x, % |" in written
    assert f"| {cell} |" in written
    assert "tax" not in console_table(from_results(own, origin))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "other"}, "on another store"),
        ({"windows": "other"}, "read other windows"),
        ({"tokens": "other"}, "scored other tokens under one_shot"),
    ],
)
def test_a_baseline_of_other_tokens_is_refused(base: str, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tax.add(*evaluation(0.02, 2, **changes), base)
    known = {"tokens": "t", "windows": "w", "store": "s"} | changes
    tokens = {("one_shot", 16): known["tokens"]}
    with pytest.raises(ConfigError, match=message):
        tax.require_baseline(base, tokens, known["windows"], known["store"])
    tax.require_baseline(base, {("one_shot", 16): "t"}, "w", "s")
    with pytest.raises(ConfigError, match="holds no sliding at 16 tokens"):
        tax.require_baseline(base, {("sliding", 16): "t"}, "w", "s")


def test_the_programs_take_a_baseline(places, tmp_path: Path, monkeypatch, capsys) -> None:
    shared = [f"model={places['model']}", f"data={places['store']}", "precision=fp32", "lengths=[16,32]"]
    base, own = tmp_path / "base.json", tmp_path / "own.json"
    assert call(monkeypatch, *shared, "methods=[none]", "label=base", f"output={base}") == 0
    assert call(monkeypatch, *shared, "methods=[theta]", f"baseline={base}", f"output={own}") == 0
    printed = capsys.readouterr().out
    assert "tax at 1x, %" in printed
    content = json.loads(own.read_text())
    ratio = content["metrics"]["perplexity/theta/one_shot/16"] / results.read(base)[0].scores[0].perplexity
    assert content["metrics"]["tax/theta/one_shot/16"] == pytest.approx(100 * (ratio - 1))
    assert call(monkeypatch, *shared, "methods=[none]", f"baseline={base}", "seed=1", "num_windows=2") == 2
    assert "error: baseline=" in capsys.readouterr().err
    for name, status in ((base, 0), (tmp_path / "none.json", 2)):
        monkeypatch.setattr("sys.argv", ["report", str(own), f"baseline={name}", f"output={tmp_path / 'report'}"])
        assert console.run(report_program.main, report_program.usage) == status
    assert "tax at 1x, %" in (tmp_path / "report" / "index.html").read_text()
    assert "tax at 1x, %" in (tmp_path / "report" / "perplexity.md").read_text()
