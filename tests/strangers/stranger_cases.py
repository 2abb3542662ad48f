"""Cases of corrupted files and arguments: each kind takes a folder and a generator and returns an action.

`run_case` runs the action and returns what was wrong: a traceback, a hang, a printed secret, a read outside the
folder; or None if the case was read or refused in one line.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clex_train.checkpoint import manifest as checkpoint_manifest
from clex_train.checkpoint.safe_load import tensors_only
from clex_train.checkpoint.store import Checkpoints
from clex_train.cli.evaluation_plan import EvaluateConfig
from clex_train.config.checkpoint import CheckpointConfig
from clex_train.config.root import Config
from clex_train.console import arguments, program
from clex_train.console.errors import explain
from clex_train.evaluation import results, tables
from clex_train.evaluation.results import Origin, Results, Score
from clex_train.models import directory, weight_files
from clex_train.report import evidence
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.longrope import read_longrope_factors
from clex_train.token_store.manifest import MANIFEST
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import vocabulary
from clex_train.token_store.writer import write_store
from clex_train.tracking import run_folder, saved_config
from data_prep import inspect as inspect_verb
from data_prep import resume, statistics
from tests.helpers.composing import composed
from tests.strangers.spoiling import (
    OUTSIDE_SECRET,
    SECRET,
    SECRET_NAME,
    as_text,
    spoil_bytes,
    spoil_file,
    spoil_json,
    yaml_bomb,
)

SECONDS = 10
"""Processor time in seconds that a case may take, since wall time depends on the load of the machine."""
PATIENCE = 120
"""Wall time in seconds after which a case counts as waiting."""
Action = Callable[[], object]


class Hang(BaseException):
    """Raised if a case takes longer than `SECONDS`, or waits."""


def prepare(folder: Path) -> Path:
    """Write one valid example of each kind of file, which every case copies and corrupts."""
    good = folder / "good"
    documents = {"train": [list(range(1, 40)), [5] * 100, [7, 8]], "validation": [[3] * 50]}
    write_store(good / "store", documents, vocab_size=64)
    _write_run(good / "run")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").write_text(f'{{"{OUTSIDE_SECRET}": 1}}')
    os.environ[SECRET_NAME] = SECRET
    return good


def _write_run(run: Path) -> None:
    run.mkdir(parents=True)
    config = Config(output_dir=str(run), name="strangers")
    run_folder.write_config(config)
    _write_checkpoint(run / "checkpoints" / "step_3", config)
    (run / "checkpoints" / "latest").write_text("step_3\n")
    (run / "final").mkdir()
    clex = Clex(torch.logspace(0, -3, 4, dtype=torch.float64), t_max=4.0)
    directory.write_clex(run / "final", clex, clex.table(scale_grid(4.0)), context_len=32)
    names = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
    (run / "final" / "model.safetensors.index.json").write_text(json.dumps(names))
    (run / "final" / "model-1.safetensors").write_bytes(b"x")
    tokens = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "c", "id": 2}]}
    (run / "final" / "tokenizer.json").write_text(json.dumps(tokens))
    (run / "final" / "factors.json").write_text(json.dumps({"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}))
    score = Score("none", "one_shot", 128, "none", 1.0, [300.0, 310.0], 200, 0.1, "f", 0.5, 0.1)
    origin = Origin("a", ["evaluate"], {"path": "x", "hash": "h", "step": 3}, {"path": "s", "fingerprint": "f"})
    windows = {"count": 2, "length": 128, "documents": [0, 1], "fingerprint": "f"}
    (run / "evaluation").mkdir()
    results.write(run / "evaluation" / "step_3.json", Results([score], 128, windows), origin)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 2.0 / n}) + "\n" for n in (1, 2, 3)))
    (run / "environment.json").write_text(json.dumps({"command": ["a"], "packages": {"torch": "2"}, "python": "3"}))


def _write_checkpoint(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True)
    clex = Clex(torch.logspace(0, -3, 4, dtype=torch.float64), t_max=4.0)
    torch.save({"clex": clex.state_dict(), "adamw": {"state": {}, "param_groups": [{"lr": 0.1}]}}, folder / "ode.pt")
    _sign(folder, {**_fields(config), "step": 3, "rows_consumed": 12, "files": {}, "sha256": {}})


def _fields(config: Config) -> dict[str, Any]:
    return vars(checkpoint_manifest.Manifest.from_config(config, "architecture", "data"))


def _sign(folder: Path, fields: dict[str, Any], files: bool = True) -> None:
    """Write the manifest with matching checksums, as the author of a checkpoint can."""
    if files:
        content = (folder / "ode.pt").read_bytes()
        fields |= {"files": {"ode.pt": len(content)}, "sha256": {"ode.pt": hashlib.sha256(content).hexdigest()}}
    text = json.dumps({**fields, "checksum": ""}, indent=2) + "\n"
    signed = {**fields, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(signed, indent=2) + "\n")


def _spoil(path: Path, folder: Path, draw: random.Random) -> None:
    """Corrupt one JSON or binary file in one of three ways."""
    way = draw.random()
    if way < 0.6 and path.suffix == ".json":
        path.write_bytes(as_text(spoil_json(json.loads(path.read_bytes()), draw)))
    elif way < 0.85:
        path.write_bytes(spoil_bytes(path.read_bytes(), draw))
    else:
        spoil_file(path, folder / "outside", draw)


def store_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt a manifest or file of a store, and read it as training and `inspect` do."""
    store = folder / "store"
    names = [MANIFEST] * 5 + [f"train/00000.{suffix}" for suffix in ("tokens", "documents", "blocks")]
    _spoil(store / draw.choice(names), folder, draw)
    if draw.random() < 0.3 and (store / MANIFEST).is_file() and (store / MANIFEST).stat().st_size < 10**6:
        _resign_store(store)

    def read() -> None:
        opened = TokenStore(store)
        opened.tokens(0, opened.num_tokens)
        opened.segments(0, opened.num_tokens)
        program.echo("\n".join(inspect_verb._summary(opened)))
        found = statistics.collect(opened)
        program.echo("\n".join(inspect_verb._domain_lines("train", statistics.domains(opened.manifest.sources, found))))
        program.echo(opened.place(0))
        inspect_verb.verify(opened)

    return read


def _resign_store(store: Path) -> None:
    """Update the checksums of a shard, as the sender of a store can."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        manifest = json.loads((store / MANIFEST).read_bytes())
        for shard in manifest["splits"]["train"]:
            for suffix in ("tokens", "documents", "blocks"):
                file = store / "train" / f"00000.{suffix}"
                if file.is_file() and file.stat().st_size < 10**6 and not file.is_symlink():
                    shard[f"{suffix}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
                    if suffix == "documents":
                        shard["num_documents"] = file.stat().st_size // 28
        (store / MANIFEST).write_text(json.dumps(manifest))


def checkpoint_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt a manifest, signed again or not, `latest` or a file of a checkpoint, and choose a checkpoint."""
    checkpoints, step = folder / "run" / "checkpoints", folder / "run" / "checkpoints" / "step_3"
    way = draw.random()
    if way < 0.5:
        fields = spoil_json(json.loads((step / "manifest.json").read_bytes()), draw)
        if isinstance(fields, dict):
            with contextlib.suppress(UnicodeEncodeError):
                _sign(step, fields, files=False)
        else:
            (step / "manifest.json").write_bytes(as_text(fields))
    elif way < 0.65:
        _spoil(checkpoints / "latest", folder, draw)
    else:
        _spoil(step / draw.choice(("manifest.json", "ode.pt")), folder, draw)
    return lambda: _choose(folder)


def _choose(folder: Path) -> None:
    identity = checkpoint_manifest.Manifest(**_fields(Config()))
    found = Checkpoints(folder / "run", CheckpointConfig(), identity)
    chosen = found.choose()
    if chosen and (chosen.path / "ode.pt").is_file():
        with tensors_only(chosen.path):
            torch.load(chosen.path / "ode.pt", weights_only=True)


def record_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt a `.pt` record, with a manifest signed for it."""
    step = folder / "run" / "checkpoints" / "step_3"
    path = step / "ode.pt"
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content if draw.random() < 0.7 else spoil_bytes(bytes(content[:2000]), draw))
    _sign(step, json.loads((step / "manifest.json").read_bytes()))
    return lambda: _choose(folder)


def config_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt config.yaml of a run folder, and evaluate and resume the run."""
    path = folder / "run" / "config.yaml"
    way = draw.random()
    if way < 0.5:
        import yaml

        content = spoil_json(yaml.safe_load(path.read_text()), draw)
        path.write_bytes(yaml.safe_dump(content).encode("utf-8", "replace"))
    elif way < 0.7:
        path.write_text(yaml_bomb(draw))
    else:
        _spoil(path, folder, draw)

    def read() -> None:
        config = Config(output_dir=str(folder / "run"), name="strangers")
        program.echo(str(saved_config.read(path)))
        run_folder.check_config(config, has_checkpoint=True)

    return read


def model_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt a record, field, table, weight index, tokenizer or factors of a model directory."""
    final = folder / "run" / "final"
    # Model directories of the hub's cache consist of links to elsewhere, which may be followed.
    (folder / "outside" / "secret").write_text("{}")
    name = draw.choice(
        ("clex.json",) * 4
        + ("clex.safetensors", "frequencies.safetensors", "tokenizer.json", "factors.json")
        + ("model.safetensors.index.json",)
    )
    _spoil(final / name, folder, draw)

    def read() -> None:
        if name == "tokenizer.json":
            vocabulary(final)
        elif name == "factors.json":
            read_longrope_factors(str(final / name), 4)
        elif name == "model.safetensors.index.json":
            weight_files.files(final)
        else:
            clex, table, record = directory.read_clex(final)
            program.echo(f"{clex.inv_freq(record.t_max).shape} {table.at(1.0).t}")

    return read


def report_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt an evaluation, log or environment of a run, and report on it."""
    run = folder / "run"
    name = draw.choice(("evaluation/step_3.json",) * 4 + ("metrics.jsonl", "environment.json", "config.yaml"))
    _spoil(run / name, folder, draw)

    def read() -> None:
        found = evidence.collect([run])
        for each in found.runs:
            each.column("loss")
            evidence.training_source(each)
        for table in found.tables:
            for curve in table.curves:
                program.echo(str(evidence.evaluation_source(curve.path, curve.origin, found.runs)))
        program.echo(tables.markdown(found.tables))

    return read


def unit_case(folder: Path, draw: random.Random) -> Action:
    """Corrupt the partial output of an earlier `data_prep tokenize`."""
    begun = folder / "output.partial"
    (begun / "units").mkdir(parents=True)
    (begun / "request.json").write_text(json.dumps({"bos": False}))
    (begun / "units" / "00000.json").write_text(json.dumps({"shards": {"train": {}}, "sources": [], "engine": "x"}))
    _spoil(begun / draw.choice(("request.json", "units/00000.json")), folder, draw)

    def read() -> None:
        with resume.open_partial(folder / "output", {"bos": False}, overwrite=False):
            pass

    return read


KEYS = (
    "optim.lr", "optim.steps", "optim.betas", "data.path", "data.domains", "data.domains.x.path", "data.weights_at",
    "data.skip_rows", "evaluation.lengths", "evaluation.methods", "launch.environment", "launch.environment.A", "name",
    "seed", "engine.micro_batch", "scaling.t_max", "model.path", "max_runtime", "+experiment", "scaling", "hydra.x", "",
    "optim", "~seed", "++x", "+optim.y", "model.allow_missing", "data.domains.x", "output_dir", "a.b.c",
)  # fmt: skip
TEXTS = (
    "", "1", "-1", "1e400", "nan", "null", "[]", "[1,2", "{}", "{a:1}", "{a:[1,{b:2}]}", "'x", '"y', "a,b", "[[1],[2]]",
    "${data.path}", "${oc.env:HOME}", "${nothing}", "${", "???", "\x1b[31m", "\ud800", "x" * 5000, "&a [*a]", "*a",
    "!!python/object:os.system x", "choice(1,2)", "range(1,5)", "glob(*)", "a=b", "\\", "\n", "é", "{1:2}", "[null]",
    "true", "2024-01-01", "0x1F", "1_000", "[" * 500, "{a:" * 100, "int(3)", "str(x)", "extend_list(1)", ":", "a:b:c",
)  # fmt: skip


def override_case(folder: Path, draw: random.Random) -> Action:
    """Draw random arguments of `train.py` and of `cli.evaluate`."""
    words = [f"{draw.choice(KEYS)}={draw.choice(TEXTS)}" for _ in range(draw.randint(1, 2))]
    if draw.random() < 0.2:
        words.append("".join(draw.choice("=.[]{}()'\"\\,:+~@- \tax1$&*!") for _ in range(draw.randint(1, 12))))
    keys = [*EvaluateConfig.__dataclass_fields__, "x", ""]
    asked = [f"{draw.choice(keys)}={draw.choice(TEXTS)}" for _ in range(2)]
    if draw.random() < 0.5:
        return lambda: arguments.parse(EvaluateConfig, asked)
    return lambda: composed(*words)


KINDS: dict[str, Callable[[Path, random.Random], Action]] = {
    "store": store_case,
    "checkpoint": checkpoint_case,
    "record": record_case,
    "config": config_case,
    "model": model_case,
    "report": report_case,
    "unit": unit_case,
    "override": override_case,
}


def run_case(base: Path, kind: str, seed: int) -> str | None:
    """Run one case in `base`, which `prepare` filled; return what went wrong, or None."""
    draw, folder = random.Random(f"{kind} {seed}"), base / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "good", folder)
    shutil.copytree(base / "outside", folder / "outside")
    action = KINDS[kind](folder, draw)
    output, outside = io.StringIO(), folder / ("nowhere" if kind == "model" else "outside")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), _watched(outside) as read:
        wrong = _outcome(action, output)
    printed = output.getvalue()
    if wrong is None and (SECRET in printed or OUTSIDE_SECRET in printed):
        wrong = f"a secret was printed: {printed[:300]}"
    if wrong is None and "\x1b" in printed:
        wrong = f"an escape sequence was printed: {printed[:300]!r}"
    if wrong is None and read:
        wrong = f"another folder was read: {read}"
    return wrong


def _outcome(action: Action, output: io.StringIO) -> str | None:
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _hangs)
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        action()
    except Hang:
        return f"took more than {SECONDS} s: {traceback.format_exc()[-1500:]}"
    except Exception as error:
        _stop_clocks()
        line, code = program._classify(error)
        if line is None or "\n" in line or explain(error) is None:
            return "".join(traceback.format_exception(error))[-1500:]
        program.report(error)
        assert code == program.USER_ERROR
    finally:
        _stop_clocks()
    return None


def _stop_clocks() -> None:
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _hangs(*_: object) -> None:
    raise Hang


_watching: list[tuple[Path, list[str]]] = []


def _hook(event: str, details: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(details[0], (str, bytes, os.PathLike)):
        outside, found = _watching[-1]
        if os.path.realpath(os.fsdecode(details[0])).startswith(f"{outside}/"):
            found.append(os.fsdecode(details[0]))


@contextlib.contextmanager
def _watched(outside: Path) -> Iterator[list[str]]:
    """Collect the files that are opened in a folder inside the context."""
    if not getattr(_hook, "added", False):
        sys.addaudithook(_hook)
        _hook.added = True  # type: ignore[attr-defined]
    found: list[str] = []
    _watching.append((Path(os.path.realpath(outside)), found))
    try:
        yield found
    finally:
        _watching.pop()
