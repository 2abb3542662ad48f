"""The figures of a report: plotted data, captions, colours and labels."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_train.evaluation import results
from clex_train.evaluation.results import Results, Score
from clex_train.evaluation.tables import from_results
from clex_train.report import figures, frequencies, plotting
from clex_train.report.evidence import Evidence, collect
from clex_train.report.plotting import Absent, Figure
from clex_train.scaling.methods.ntk import ntk_table
from tests.report.evaluation_files import LLAMA, ORIGIN, add_to_file, make_run, outcome, relabelled, task_row

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Collect a plain run and one with CLEX, the second with retrieval."""
    folder = tmp_path_factory.mktemp("runs")
    base = make_run(folder / "base", {"none": [35, 60, 900], "ntk": [35, 34, 50]}, learned=False)
    clex = make_run(folder / "clex", {"trained": [34, 33, 36]}, learned=True)
    rows = [task_row("trained", n, d, int(10 * d)) for n in (256, 2048) for d in (0.0, 0.5, 1.0)]
    add_to_file(
        clex / "evaluation" / "clex.json", tasks=[*rows, task_row("trained", 256, None, 3, "variable_tracking")]
    )
    return collect([base, clex])


def figures_by_name(collected: Evidence) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures.collect_figures(collected)[0]}


def test_a_full_report_has_every_figure_of_its_runs(collected: Evidence) -> None:
    shown, absent = figures.collect_figures(collected)
    assert [figure.name for figure in shown] == [
        "perplexity",
        "perplexity_enlarged",
        "retrieval_passkey",
        "frequencies",
        "frequencies_learned",
        "loss",
        "scale_factor",
        "throughput",
    ]
    assert [each.title for each in absent] == ["Loss against position"]


def test_figures_without_data_name_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results.write(path, outcome({"none": [3, 4, 5]}), ORIGIN)
    shown, absent = figures.collect_figures(collect([path]))
    assert [figure.name for figure in shown] == ["perplexity"]
    assert len(absent) == 6
    assert all(each.reason and ("clex_train.cli" in each.remedy or "scaling=clex" in each.remedy) for each in absent)


def test_perplexity_lines_plot_the_scores(collected: Evidence) -> None:
    [axes] = figures_by_name(collected)["perplexity"].draw().axes
    drawn = {tuple(line.get_ydata().round(6)) for line in axes.lines if len(line.get_xdata()) == 3}
    assert drawn == {(35, 60, 900), (35, 34, 50), (34, 33, 36)}
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] == [128]


def test_an_outlier_row_adds_an_enlarged_figure_of_the_others(collected: Evidence) -> None:
    [table] = collected.tables
    top = figures.lowest_part(table)
    assert top == pytest.approx(54)
    [axes] = figures_by_name(collected)["perplexity_enlarged"].draw().axes
    assert axes.get_ylim()[1] == pytest.approx(54)
    calm = from_results(outcome({"none": [35, 36, 37], "pi": [35, 36, 38], "ntk": [35, 36, 39]}), ORIGIN)
    assert figures.lowest_part(calm) is None


def test_non_finite_values_leave_a_gap_noted_in_the_caption(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results.write(path, outcome({"none": [3, float("inf"), 5]}), ORIGIN)
    figure = figures_by_name(collect([path]))["perplexity"]
    assert "not finite are left out" in figure.caption
    assert figure.draw().axes[0].lines[0].get_xdata().tolist() == [128, 2048]


def test_twelve_methods_get_distinct_colours_per_panel_and_names_do_not_overlap() -> None:
    methods = {f"method_{i}": [10 + 0.01 * i, 11 + 0.01 * i, 12 + 0.01 * i] for i in range(12)}
    figure = figures.draw_perplexity(from_results(outcome(methods), ORIGIN))
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
    named = []
    for axes in figure.axes:
        drawn = [line for line in axes.lines if line.get_marker() not in ("None", None)]
        assert len({line.get_color() for line in drawn}) == len(drawn) == 6
        faint = [line for line in axes.lines if line.get_color() == plotting.GRID]
        assert len(faint) == 6, "the rows of the other panel"
        texts = axes.get_legend().get_texts()
        named += [text.get_text() for text in texts]
        boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))
        assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert sorted(named) == sorted(methods)


def test_a_legend_lists_lines_in_the_order_of_their_ends(collected: Evidence) -> None:
    [axes] = figures_by_name(collected)["perplexity"].draw().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base: none", "base: ntk", "clex: trained"]


def test_a_label_is_shown_literally() -> None:
    assert plotting.as_text("a $x^2$") == r"a \$x^2\$"
    assert plotting.as_text("_hidden") == " _hidden"
    assert plotting.as_text("n" * 50) == "n" * 35 + "…"


def test_standard_errors_are_drawn_as_bars() -> None:
    result = outcome({"none": [3, 4, 5]})
    result = replace(result, scores=[replace(score, standard_error=0.5) for score in result.scores])
    line = figures.perplexity_line(from_results(result, ORIGIN).curves[0])
    assert line.errors is not None
    assert line.errors.tolist() == [0.5] * 3


def test_a_curve_over_positions_is_plotted_as_evaluated(tmp_path: Path) -> None:
    bins = {128: ((32, 5.0, 10), (96, 4.0, 10)), 256: (), 2048: ((512, 4.5, 9), (1536, float("nan"), 9))}
    result = outcome({"none": [3, 4, 5]}, protocol="per_position")
    path = tmp_path / "x.json"
    scores = [replace(score, curve=bins[score.length]) for score in result.scores]
    results.write(path, replace(result, scores=scores), ORIGIN)
    figure = figures_by_name(collect([path]))["per_position"]
    assert figure.caption.startswith("Mean negative log-likelihood in windows of 2,048 tokens. 100 held-out tokens")
    line = figure.draw().axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([512], [4.5])


def test_a_stream_is_plotted_as_segment_means(tmp_path: Path) -> None:
    sums = [float(10 * (i % 2) + 100) for i in range(256)]
    scores = [
        Score("none", "windows", 128, "none", 1.0, sums, 256 * 50, 1.0),
        Score("lm_infinite", "streaming", 256 * 128, "none", 1.0, sums[::-1], 256 * 50, 1.0),
    ]
    windows = {"count": 256, "length": 128, "score_stride": 128, "documents": [], "fingerprint": "s"}
    path = tmp_path / "x.json"
    results.write(path, Results(scores, 128, windows), ORIGIN)
    figure = figures_by_name(collect([path]))["per_position"]
    line = figure.draw().axes[0].lines[0]
    assert len(line.get_xdata()) == figures.MAX_SEGMENTS
    np.testing.assert_allclose(line.get_xdata()[:2], [128, 384])
    np.testing.assert_allclose(line.get_ydata(), 105 / 50)


def test_frequencies_are_plotted_relative_to_plain_rope_and_ntk(collected: Evidence) -> None:
    run = collected.runs[1]
    assert run.frequencies is not None
    assert frequencies.scale_factors([run.frequencies]) == [2, 8, 16]
    base = run.frequencies.at(1).inv_freq
    panels = figures_by_name(collected)["frequencies"].draw().axes
    learned, ntk, pi, yarn = (line.get_ydata() for line in panels[2].lines[:4])
    np.testing.assert_allclose(learned, run.frequencies.at(16).inv_freq / base)
    np.testing.assert_allclose(ntk, ntk_table(base, [1.0, 16.0]).at(16).inv_freq / base)
    np.testing.assert_allclose(pi, np.full(12, 1 / 16))
    config = LlamaConfig(**LLAMA)
    config.rope_parameters |= {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    np.testing.assert_allclose(yarn, expected / base, rtol=1e-6)
    [over] = [line.get_ydata() for line in figures_by_name(collected)["frequencies_learned"].draw().axes[2].lines[:1]]
    np.testing.assert_allclose(over, np.full(12, 1.15))


def test_a_model_without_yarn_is_noted_in_the_caption(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"none": [3, 4, 5]}, learned=True)
    (run / "final" / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": LLAMA3_ROPE}))
    figure = figures_by_name(collect([run]))["frequencies"]
    assert "Without yarn: methods=[yarn]: " in figure.caption
    assert len(figure.draw().axes[0].lines) == 3


def test_runs_with_different_base_frequencies_are_plotted_separately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_run(tmp_path / "first", {"none": [3, 4, 5]}, learned=True)
    original = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    second = make_run(tmp_path / "second", {"none": [3, 4, 5]}, learned=True)
    monkeypatch.undo()
    names = [f.name for f in frequencies.figures(collect([first, second])) if isinstance(f, Figure)]
    assert names == ["frequencies", "frequencies_learned", "frequencies_2", "frequencies_learned_2"]


def test_the_heat_map_puts_each_score_at_its_depth_and_length(collected: Evidence) -> None:
    [scores] = [scores for scores in collected.tasks if scores.task == "passkey"]
    cells = figures.retrieval_grid(scores, [256, 1024, 2048], [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(cells, [[0, np.nan, 0], [0.5, np.nan, 0.5], [1, np.nan, 1]])
    figure = figures_by_name(collected)["retrieval_passkey"].draw()
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "0", "50", "50", "100", "100"]
    assert figure.axes[0].get_ylim() == (3, 0)


def test_training_is_plotted_as_interval_means() -> None:
    last, mean, low, high = figures.bin_steps(np.arange(1, 1001), np.arange(1000.0), most=10)
    assert last.tolist() == list(range(100, 1001, 100))
    np.testing.assert_allclose(mean, np.arange(49.5, 1000, 100))
    assert np.all((low < mean) & (mean < high))


def test_every_t_of_a_short_run_is_plotted(collected: Evidence) -> None:
    line = figures_by_name(collected)["scale_factor"].draw().axes[0].lines[0]
    assert line.get_xdata().tolist() == list(range(1, 41))
    assert line.get_ydata().tolist() == [1 + step % 16 for step in range(1, 41)]


def test_pngs_are_large_and_have_the_colours_of_their_lines(collected: Evidence, tmp_path: Path) -> None:
    for name, figure in figures_by_name(collected).items():
        (tmp_path / f"{name}.png").write_bytes(plotting.to_png(figure))
        assert min(Image.open(tmp_path / f"{name}.png").size) >= 300
    image = Image.open(tmp_path / "perplexity.png").convert("RGB")
    present = {colour for _, colour in image.getcolors(maxcolors=2**24)}
    assert [tuple(bytes.fromhex(c[1:])) in present for c in plotting.COLORS] == [True] * 3 + [False] * 5


def test_a_figure_that_cannot_be_drawn_is_reported_with_the_command(collected: Evidence) -> None:
    [absent] = [each for each in figures.loss_by_position(collected) if isinstance(each, Absent)]
    assert "protocols=[per_position]" in absent.remedy


def test_any_label_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for label in ("$x$ _{", "_start", "<b>&"):
        results.write(path, outcome({label: [3, 4, 5]}), relabelled(label))
        assert "<b>" not in plotting.to_svg(figures_by_name(collect([path]))["perplexity"])
