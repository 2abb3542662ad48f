"""Print which RoPE frequencies a saved model really loads, and what engines make of them.

    python -m clex_train.cli.rope model=models/qwen3-8b
    python -m clex_train.cli.rope runs/llama2_7b_clex length=16384 figure=wavelengths.png
    python -m clex_train.cli.rope model=exports/my_model other=runs/my_model/final length=16384

Frequencies come by layer type, as wavelengths in tokens and as context; then the longest context that transformers,
vLLM, llama.cpp and SGLang serve, and each trap of the config with its remedy. Reads no weights.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.config.model import ModelConfig
from clex_train.console import arguments, program
from clex_train.inspection import as_json, difference, inspect_model, text
from clex_train.inspection.difference import Difference
from clex_train.inspection.reading import Reading
from clex_train.tracking import saved_config
from clex_train.utils import files, log
from clex_train.utils.errors import InputError, require


@dataclass
class RopeConfig:
    """Arguments of the rope program."""

    run: str | None = None
    """Folder of a finished run: its `final/` is read. A folder may stand without a key."""
    model: str | None = None
    """Model directory or hub name instead of a run."""
    length: int | None = None
    """Tokens of the sequence to read frequencies for: the t of a CLEX field, the list of a longrope. By default the
    most that the model serves."""
    other: str | None = None
    """A second model directory or hub name, to compare with the first at the same length."""
    figure: str | None = None
    """PNG file to write: wavelengths by pair. A file of that name is replaced."""
    json: bool = False
    """Print JSON with every pair instead of text."""
    all_pairs: bool = False
    """Show every pair in the tables instead of twelve."""
    context_len: int | None = None
    """L, the length that plain RoPE was trained on; by default what the model says."""
    trust_remote_code: bool = False
    """Allow Python code from `model` and `other` to run. Only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository `model`."""


def main() -> None:
    """Inspect what the command line names; whatever can be refused is refused before the model is built."""
    args = arguments.parse(RopeConfig, sys.argv[1:])
    figure = _figure(args)
    with arguments.named_as_typed(args):
        first = inspect_model.inspect(_model(args), args.length)
    second = _other(args, first)
    compared = None if second is None else difference.compare(first, second)
    if figure is not None:
        _draw(figure, first, second)
    program.echo(_json(first, second, compared) if args.json else _text(args, first, second, compared))


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, RopeConfig)


def _model(args: RopeConfig) -> ModelConfig:
    require((args.run is None) != (args.model is None), "model", args.model, "name either model=DIR or run=FOLDER")
    require(args.model != "", "model", "''", "name a directory or a hub name owner/model")
    if args.run is not None:
        final = Path(args.run) / saved_config.FINAL
        require(final.is_dir(), "run", args.run, "no final/ in it; give the output_dir of a finished training run")
        return ModelConfig(path=str(final), context_len=args.context_len)
    return ModelConfig(
        path=args.model,
        context_len=args.context_len,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )


def _other(args: RopeConfig, first: Reading) -> Reading | None:
    """Read the second model at the length of the first."""
    if args.other is None:
        return None
    require(args.other != "", "other", "''", "name a directory or a hub name, or leave the key out")
    model = ModelConfig(path=args.other, trust_remote_code=args.trust_remote_code)
    try:
        return inspect_model.inspect(model, first.length)
    except InputError as error:
        # Messages name the key of a model by that of training.
        raise InputError(str(error).replace("model.path", "other")) from error


def _figure(args: RopeConfig) -> Path | None:
    """Return the file to draw into; `ConfigError` if it is no PNG or cannot be written."""
    if args.figure is None:
        return None
    path = Path(args.figure)
    require(path.suffix.lower() == ".png", "figure", args.figure, "name a file that ends in .png")
    require(not path.is_dir(), "figure", args.figure, "is a folder; name a file in it")
    files.require_writable_folder("figure", path, path.parent, files.temporary_path(path).name)
    return path


def _draw(path: Path, first: Reading, second: Reading | None) -> None:
    # matplotlib takes a second to import: only a figure pays for it.
    from clex_train.report import wavelengths

    content = wavelengths.to_png(first, second)
    files.make_folder(path.parent)
    try:
        files.write_atomically(path, content)
    except OSError as error:
        raise program.write_failure(path, error, "make room or name another file") from error
    log.get(__name__).info("written to %s", path)


def _text(args: RopeConfig, first: Reading, second: Reading | None, compared: Difference | None) -> str:
    lines = list(text.lines(first, args.all_pairs))
    if second is not None and compared is not None:
        lines += text.difference_lines(first, second, compared)
    return "\n".join(lines)


def _json(first: Reading, second: Reading | None, compared: Difference | None) -> str:
    return json.dumps(as_json.as_json(first, second, compared), indent=1, allow_nan=False)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
