"""Resuming the evaluate program by the same command, in this process."""

import json

import pytest

from clex_train.evaluation import partial_results, perplexity, streaming
from tests.evaluation.evaluate_program import call


class Interrupted(BaseException):
    """Interrupt the program in the middle."""


def test_the_same_command_resumes_where_it_was_interrupted(places, tmp_path, monkeypatch, caplog) -> None:
    asked = [f"model={places['model']}", f"data={places['store']}", "methods=[none,ntk]", "precision=fp32"]
    asked += ["lengths=[16,32,64]", "protocols=[one_shot,chunked]", "chunk_len=24"]
    output, most, forwards = tmp_path / "result.json", [10**9], []
    score = perplexity.score_chunk

    def counted(model, targets, **inputs):
        if len(forwards) == most[0]:
            raise Interrupted
        forwards.append(1)
        return score(model, targets, **inputs)

    monkeypatch.setattr(perplexity, "score_chunk", counted)
    monkeypatch.setattr(partial_results, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(partial_results, "WRITES", 0)
    assert call(monkeypatch, *asked, f"output={tmp_path / 'whole.json'}") == 0
    whole, undisturbed = json.loads((tmp_path / "whole.json").read_text()), len(forwards)
    forwards.clear()
    for stop in (undisturbed // 2, undisturbed - 3):
        most[0] = stop
        with pytest.raises(Interrupted):
            call(monkeypatch, *asked, f"output={output}")
        assert len(list(tmp_path.glob("result.*.partial"))) == 1
    most[0] = 10**9
    with caplog.at_level("INFO", logger="clex_train"):
        assert call(monkeypatch, *asked, "num_windows=2", f"output={output}") == 0
        assert "with other num_windows, windows and is not used; repeat that command" in caplog.text
        spent = len(forwards)
        forwards[:] = forwards[: undisturbed - 3]
        caplog.clear()
        assert call(monkeypatch, *asked, f"output={output}") == 0
    assert "11 of 12 cells found from an interrupted evaluation" in caplog.text
    assert spent > undisturbed - 3
    assert len(forwards) <= undisturbed + 2 * 3, "what a kill loses is a window of three chunks, at most"
    content = json.loads(output.read_text())
    for row in (*whole["scores"], *content["scores"]):
        del row["seconds"]
    same = ("metrics", "scores", "windows", "request", "model", "data")
    assert {key: content[key] for key in same} == {key: whole[key] for key in same}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "whole.json"]


def test_an_interrupted_stream_resumes_with_the_unfinished_reading(places, tmp_path, monkeypatch, caplog) -> None:
    asked = [f"model={places['model']}", f"data={places['store']}", "protocols=[streaming]", "precision=fp32"]
    asked += ["methods=[lm_infinite,none]", "n_local=12", "n_global=2", "chunk_len=50"]
    assert call(monkeypatch, *asked, f"output={tmp_path / 'whole.json'}") == 0
    read, most, streamed = [], [1], streaming.streamed

    def counted(*args):
        if len(read) == most[0]:
            raise Interrupted
        read.append(1)
        return streamed(*args)

    monkeypatch.setattr(streaming, "streamed", counted)
    with pytest.raises(Interrupted):
        call(monkeypatch, *asked, f"output={tmp_path / 'x.json'}")
    most[0] = 2
    with caplog.at_level("INFO", logger="clex_train"):
        assert call(monkeypatch, *asked, f"output={tmp_path / 'x.json'}") == 0
    assert "2 of 3 cells found from an interrupted evaluation" in caplog.text
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("x", "whole")]
    for row in (*found[0]["scores"], *found[1]["scores"]):
        del row["seconds"]
    assert found[0]["scores"] == found[1]["scores"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.json", "x.json"]
