"""The evaluate program, run in this process."""

import errno
import json
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from clex_train.cli import evaluate as program
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.evaluation import perplexity
from clex_train.report import evidence
from clex_train.token_store.store import TokenStore
from clex_train.tracking.run_folder import as_yaml
from clex_train.utils import files
from data_prep import evaluation_sets
from data_prep.config import EvaluationSetsVerb
from tests.evaluation.evaluate_program import call
from tests.evaluation.evaluation_models import CONTEXT_LEN
from tests.evaluation.model_directories import save_clex_model, save_model


def test_a_model_directory_is_evaluated_and_the_table_printed(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "deep" / "result.json"
    status = call(
        monkeypatch,
        "--local_rank=0",
        f"model={places['model']}",
        f"data={places['store']}",
        "lengths=[16,32,64]",
        "methods=[none,ntk]",
        "protocols=[one_shot,chunked]",
        "chunk_len=24",
        "precision=fp32",
        f"output={output}",
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert "ntk, chunked" in printed
    content = json.loads(output.read_text())
    assert set(content["metrics"]) == {
        f"perplexity/{m}/{p}/{n}" for m in ("none", "ntk") for p in ("one_shot", "chunked") for n in (16, 32, 64)
    }
    assert content["context_len"] == CONTEXT_LEN
    assert content["label"] == "base"
    assert content["windows"]["count"] == 4
    assert len(content["model"]["hash"]) == 16
    assert content["data"]["path"] == places["store"]


def test_one_command_evaluates_every_windowed_protocol_with_errors_and_curves(
    places, tmp_path, monkeypatch, capsys
) -> None:
    output = tmp_path / "all.json"
    names = ["one_shot", "chunked", "sliding", "per_position", "last_k"]
    keys = ["lengths=[16,32]", "methods=[none]", f"protocols=[{','.join(names)}]", "stride=8", "last_k=12"]
    assert call(monkeypatch, f"model={places['model']}", f"data={places['store']}", *keys, f"output={output}") == 0
    content, printed = json.loads(output.read_text()), " ".join(capsys.readouterr().out.split())
    assert set(content["metrics"]) == {f"perplexity/none/{name}/{n}" for name in names for n in (16, 32)}
    assert [s["num_tokens"] for s in content["scores"]] == [240, 240, 240, 240, 248, 248, 240, 240, 96, 96]
    assert all(s["standard_error"] > 0 and s["standard_error_note"] == "" for s in content["scores"])
    assert {s["protocol"] for s in content["scores"] if s["curve"]} == {"per_position"}
    assert "last_k: 96" in printed
    assert "±" in printed


def test_one_document_has_no_standard_error_with_a_reason(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "one.json"
    keys = ["lengths=[64,128]", "methods=[none]"]
    assert call(monkeypatch, f"model={places['model']}", f"data={places['store']}", *keys, f"output={output}") == 0
    scores = json.loads(output.read_text())["scores"]
    assert {score["standard_error"] for score in scores} == {None}
    assert {score["standard_error_note"] for score in scores} == {"all windows are from one document"}
    assert "±" not in capsys.readouterr().out


def test_all_held_out_text_can_be_read_as_one_stream(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "stream.json"
    status = call(
        monkeypatch,
        f"model={places['model']}",
        f"data={places['store']}",
        "protocols=[streaming]",
        "methods=[lm_infinite,none]",
        "n_local=12",
        "n_global=2",
        "chunk_len=50",
        f"output={output}",
    )
    content = json.loads(output.read_text())
    num_tokens = 293 // CONTEXT_LEN * CONTEXT_LEN
    assert status == 0
    assert set(content["metrics"]) == {
        f"perplexity/none/windows/{CONTEXT_LEN}",
        f"perplexity/lm_infinite/streaming/{num_tokens}",
        f"perplexity/none/streaming/{num_tokens}",
    }
    assert len(set(content["metrics"].values())) == 3
    assert "documents in one stream" in " ".join(capsys.readouterr().out.split())


def test_an_evaluation_set_is_read_like_its_store(places, tmp_path, monkeypatch) -> None:
    sets = EvaluationSetsVerb(store=places["store"], output=str(tmp_path / "sets"), lengths=[16, 64])
    evaluation_sets.run(sets)
    found = []
    for data in (places["store"], f"{tmp_path}/sets/64"):
        arguments = [f"model={places['model']}", f"data={data}", "lengths=[16,64]", "num_windows=2", "precision=fp32"]
        assert call(monkeypatch, *arguments, f"output={tmp_path / 'out.json'}") == 0
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert [content["windows"]["count"] for content in found] == [2, 2]
    assert set(found[0]["metrics"]) == set(found[1]["metrics"])
    assert TokenStore(tmp_path / "sets" / "64", "validation").num_documents == 2


def test_the_numbers_do_not_depend_on_batching(places, tmp_path, monkeypatch) -> None:
    found = []
    for name, feeding in (("a", ["chunk_len=5"]), ("b", ["chunk_len=64", "batch_tokens=300"])):
        arguments = [f"model={places['model']}", f"data={places['store']}", "lengths=[16,64]", "precision=fp32"]
        assert call(monkeypatch, *arguments, *feeding, f"output={tmp_path / name}") == 0
        found.append(json.loads((tmp_path / name).read_text())["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert set(found[0]) == {"perplexity/trained/one_shot/16", "perplexity/trained/one_shot/64"}


def test_a_clex_run_is_evaluated_with_its_table_lengths_and_data(places, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "my_run"
    save_clex_model(run / "final")
    config = Config(output_dir=str(run))
    config.data.path, config.evaluation.lengths = places["store"], [16, 32, 64]
    (run / "config.yaml").write_text(as_yaml(config))

    assert call(monkeypatch, f"run={run}", "methods=[trained,ntk,clex]", "precision=fp32") == 0
    assert "my_run.json" in capsys.readouterr().out
    content = json.loads((run / "evaluation" / "my_run.json").read_text())
    assert [(s["frequencies"], s["length"], s["t"]) for s in content["scores"][:3]] == [
        ("clex", 16, 1.0),
        ("clex", 32, 2.0),
        ("clex", 64, 4.0),
    ]
    metrics = content["metrics"]
    assert metrics["perplexity/trained/one_shot/64"] == metrics["perplexity/clex/one_shot/64"]
    assert metrics["perplexity/trained/one_shot/16"] == pytest.approx(metrics["perplexity/ntk/one_shot/16"], rel=1e-6)
    assert metrics["perplexity/trained/one_shot/64"] != pytest.approx(metrics["perplexity/ntk/one_shot/64"], rel=1e-3)
    assert call(monkeypatch, f"run={run}", "lengths=[16,128]") == console.USER_ERROR
    assert "num_tokens=128: beyond t_max * L = 4 * 16" in capsys.readouterr().err
    monkeypatch.setattr(program, "load", lambda *_: pytest.fail("weights were read"))
    for t in ("1.7", "5"):
        assert call(monkeypatch, f"run={run}", "methods=[lm_infinite]", f"lm_infinite_t={t}") == console.USER_ERROR
        assert f"error: lm_infinite_t={t}: t={t}: not on the table's grid" in capsys.readouterr().err


def test_unwritable_results_are_printed_and_the_old_file_is_kept(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "x.json"
    output.write_text("earlier")
    publish = files.publish

    def fill_up(file: BinaryIO, path: Path) -> None:
        if path == output:  # The disk still had room for the finished cells.
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(file, path)

    keys = [f"model={places['model']}", f"data={places['store']}", "lengths=[16]", "methods=[none]"]
    monkeypatch.setattr(files, "publish", fill_up)
    assert call(monkeypatch, *keys, f"output={output}") == console.STOPPED
    printed = capsys.readouterr()
    assert "none" in printed.out
    assert "written to" not in printed.out
    assert "Traceback" not in printed.err
    said = printed.err.strip().splitlines()[-1]
    assert said.startswith(f"error: output={output}: cannot be written (No space left on device); the results are ")
    [kept] = tmp_path.glob("x.*.partial")
    assert sorted(tmp_path.iterdir()) == sorted([kept, output])
    assert output.read_text() == "earlier"


def test_evaluating_again_replaces_repeated_cells_and_keeps_the_rest(places, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        save_model(tmp_path / name / "final")
        (tmp_path / name / "config.yaml").write_text(as_yaml(Config()))
    save_model(tmp_path / "other" / "final")
    (tmp_path / "a" / "final" / "clex_note.bin").write_text("other weights than b's")
    data = (f"data={places['store']}", "lengths=[16]")

    def written_cells() -> dict[str, list[str]]:
        files = sorted((tmp_path / "runs").rglob("*.json"))
        return {
            str(file.relative_to(tmp_path / "runs")): sorted(json.loads(file.read_text())["metrics"]) for file in files
        }

    def evaluate_again(*arguments: str) -> None:
        assert call(monkeypatch, *arguments) == 0

    with caplog.at_level("INFO", logger="clex_train"):
        evaluate_again("model=a/final", *data, "methods=[none]")
        evaluate_again("model=b/final", *data, "methods=[none]")
        evaluate_again("model=other/final", *data, "methods=[none]")
        evaluate_again("model=a/final", *data, "methods=[none]", "chunk_len=8", "batch_tokens=16")
        assert "writing this one to" not in caplog.text
        none = ["perplexity/none/one_shot/16"]
        expected = {"a/evaluation/a.json": none, "b/evaluation/b.json": none, "final/evaluation/final.json": none}
        assert written_cells() == expected
        evaluate_again("model=a/final", *data, "methods=[ntk]")
        evaluate_again("model=a/final", *data, "methods=[none]", "num_windows=2")
        assert "runs/a/evaluation/a.json is another evaluation and is kept; writing this one to " in caplog.text
    evaluate_again("model=a/final", *data, "methods=[ntk]")
    expected |= {"a/evaluation/a_2.json": ["perplexity/ntk/one_shot/16"], "a/evaluation/a_3.json": none}
    assert written_cells() == expected
    evaluate_again("model=b/final", "label=a", *data, "methods=[none]")
    assert written_cells() == expected | {"a/evaluation/a_4.json": none}
    evaluate_again("model=b/final", *data, "methods=[pi]", "output=runs/b/evaluation/b.json")
    assert written_cells()["b/evaluation/b.json"] == ["perplexity/pi/one_shot/16"]

    found = evidence.collect([tmp_path / "runs" / "a"])
    labels = {curve.label for table in found.tables for curve in table.curves}
    assert labels == {"none"}, "the newest is of other weights than the rest"
    (tmp_path / "runs" / "a" / "evaluation" / "a_4.json").unlink()
    found = evidence.collect([tmp_path / "runs" / "a"])
    labels = {curve.label for table in found.tables for curve in table.curves}
    assert labels == {"a: none", "a/a_2: ntk", "a/a_3: none"}


def test_cells_out_of_memory_are_reported_and_only_fail_if_nothing_fits(
    places, tmp_path, monkeypatch, capsys, caplog
) -> None:
    base = (f"model={places['model']}", f"data={places['store']}", "lengths=[16,64]", "methods=[none]")
    output, most = tmp_path / "x.json", [16]
    score = perplexity.score_chunk

    def fill_up(model, targets, **inputs):
        if inputs["input_ids"].shape[1] > most[0]:
            raise MemoryError
        return score(model, targets, **inputs)

    monkeypatch.setattr(perplexity, "score_chunk", fill_up)
    assert call(monkeypatch, *base, "chunk_len=64", "batch_tokens=16", f"output={output}") == 0
    content = json.loads(output.read_text())
    assert list(content["metrics"]) == ["perplexity/none/one_shot/16"]
    assert [(row["length"], row["reason"]) for row in content["missing"]] == [(64, "rank 0: MemoryError")]
    assert "out of memory (OOM): none at 64" in " ".join(capsys.readouterr().out.split())
    most[0], output = 0, tmp_path / "y.json"
    assert call(monkeypatch, *base, f"output={output}") == console.STOPPED
    assert "error: out of memory: nothing fitted, see above (rank 0: MemoryError)" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it changes where the cache is")
def test_offloading_the_cache_on_a_cpu_is_reported_as_having_no_effect(places, tmp_path, monkeypatch, caplog) -> None:
    base = (f"model={places['model']}", f"data={places['store']}", "lengths=[16,64]", "methods=[none]", "chunk_len=10")
    with caplog.at_level("INFO", logger="clex_train"):
        for offload in ("false", "true"):
            assert call(monkeypatch, *base, f"offload_cache={offload}", f"output={tmp_path / offload}.json") == 0
    assert sum("offload_cache=true changes nothing here" in record.getMessage() for record in caplog.records) == 1
    found = [json.loads((tmp_path / f"{offload}.json").read_text())["metrics"] for offload in ("false", "true")]
    assert found[0] == found[1]


def test_a_dry_run_predicts_the_forwards_and_writes_nothing(places, tmp_path, monkeypatch, capsys) -> None:
    forwards, score = [], perplexity.score_chunk
    monkeypatch.setattr(
        perplexity, "score_chunk", lambda *args, **inputs: (forwards.append(1), score(*args, **inputs))[1]
    )
    monkeypatch.chdir(tmp_path)
    asked = [f"model={places['model']}", f"data={places['store']}", "methods=[none,ntk]", "lengths=[16,32,64]"]
    asked += ["protocols=[one_shot,chunked,sliding]", "stride=8", "chunk_len=24", "precision=fp32"]
    assert call(monkeypatch, *asked, "dry_run=true") == 0
    printed = capsys.readouterr()
    assert "none: a dry run times one chunk" in printed.err
    said = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert list(said) == ["cells", "forwards", "tokens", "memory", "time"]
    assert said["cells"] == "18, of which 3 equal others and are copied"
    assert said["memory"].startswith("weights 0.00 GiB a rank, keys and values at most 0.00 GiB")
    assert said["time"].startswith("about ")
    assert forwards == []
    assert list(tmp_path.iterdir()) == []
    assert call(monkeypatch, *asked) == 0
    assert int(said["forwards"].split()[0].replace(",", "")) == len(forwards)


def test_the_top_middle_keys_are_configurable(places, tmp_path, monkeypatch, capsys) -> None:
    asked = [f"model={places['model']}", f"data={places['store']}", "methods=[lm_infinite]", "lengths=[64]"]
    asked += ["n_local=8", "n_global=2", "chunk_len=64", "precision=fp32"]
    found = {}
    for name, more in {
        "off": [],
        "one": ["lm_infinite_top_k=1", "lm_infinite_top_k_layer=1"],
        "all": ["lm_infinite_top_k=64", "lm_infinite_top_k_layer=0"],
    }.items():
        assert call(monkeypatch, *asked, *more, f"output={tmp_path / name}") == 0
        content = json.loads((tmp_path / name).read_text())
        found[name] = content["metrics"]["perplexity/lm_infinite/one_shot/64"]
        assert ("lm_infinite_top_k" in content["request"]) == bool(more)
    assert len(set(found.values())) == 3
    assert call(monkeypatch, *asked, "lm_infinite_top_k=5") == console.USER_ERROR
    assert "lm_infinite_top_k_layer=5: the model has 2 layers; name one of them, from 0" in capsys.readouterr().err
    streaming = [*asked, "protocols=[streaming]", "lm_infinite_top_k=5", "lm_infinite_top_k_layer=0"]
    assert call(monkeypatch, *streaming) == console.USER_ERROR
    assert "lm_infinite_top_k=5: a stream uses a cache of constant size" in capsys.readouterr().err


def test_an_empty_list_of_lengths_means_the_multiples_of_l(places) -> None:
    """Take the defaults of training; neither text nor the recorded lengths of a run are read for that."""
    model, data = f"model={places['model']}", f"data={places['store']}"
    empty, unsaid, said = (
        program.make_plan(program.parse([model, data, *more])).spec.lengths
        for more in (["lengths=[]"], [], ["lengths=[16]"])
    )
    assert empty == unsaid
    assert empty[0] == program.make_plan(program.parse([model, data])).context_len
    assert said == [16]
