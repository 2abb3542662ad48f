"""Write a trained model in another program's layout.

    python -m clex_train.cli.export run=runs/llama2_7b_clex format=official output=exports/llama2_7b_clex
    python -m clex_train.cli.export model=path/to/final format=official output=exports/my_model

`official` is the layout of the original CLEX code (DAMO-NLP-SG/CLEX). Needs no GPU, only memory for the weights.
`--help` lists every key.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.cli import loading
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.console import arguments, program
from clex_train.export.official import require_known, write_official
from clex_train.models import architecture, directory, load
from clex_train.utils import files, log
from clex_train.utils.errors import require


class Format(Enum):
    """Layouts of another program that a model can be written in."""

    official = "official"


@dataclass
class ExportConfig:
    """Arguments of the export program."""

    run: str | None = None
    """Folder of a finished run: its `final/` is exported."""
    model: str | None = None
    """Model directory instead of a run: the `final/` of a run, or one in the official layout."""
    format: Format = Format.official
    """`official`: what the original CLEX code reads."""
    output: str | None = None
    """Directory to write; it must not exist yet."""
    log_scale: LogScale | None = None
    """What the exported config says, `off` or `official`; by default the policy the model was trained with."""


def main() -> None:
    """Export what the command line names; whatever can be refused is refused before weights are read."""
    asked = arguments.parse(ExportConfig, sys.argv[1:])
    source = _source(asked)
    _require_known(asked.log_scale, source)
    output = Path(asked.output)
    print(log.printable(f"export {source} as {asked.format.value} to {output}"), file=sys.stderr, flush=True)
    loaded = load.load_for_evaluation(ModelConfig(path=str(source)), dtype="auto")
    write_official(output, loaded, asked.log_scale)
    print(f"written to {output}")


def usage() -> str:
    """The module's own text and a line for every key."""
    return arguments.usage(__doc__, ExportConfig)


def _source(asked: ExportConfig) -> Path:
    """Return the model directory that is asked for; `ConfigError` names the key that is missing or wrong."""
    require((asked.run is None) != (asked.model is None), "run", asked.run, "name either run=FOLDER or model=DIR")
    require(bool(asked.output), "output", asked.output or None, "name the directory to write, output=DIR")
    output = Path(str(asked.output))
    files.require_writable_folder("output", output, output.parent, files.SAVING + output.name)
    require(not output.exists(), "output", asked.output, "exists already; name another directory")
    if asked.model is not None:
        require(architecture.has_field(asked.model), "model", asked.model, "no directory with a CLEX field in it")
        return Path(asked.model)
    final = Path(str(asked.run)) / "final"
    require(final.is_dir(), "run", asked.run, "no final/ in it; give the output_dir of a finished training run")
    loading.require_whole(Path(str(asked.run)))
    require(architecture.has_field(str(final)), "run", asked.run, "was trained without CLEX: it has nothing to export")
    return final


def _require_known(asked: LogScale | None, source: Path) -> None:
    """Refuse a policy that the format does not know: `asked`, or the one that the model was trained with."""
    if asked is not None:
        require_known(asked)
    elif directory.has_clex(source):
        require_known(LogScale(directory.read_record(source).log_scale))


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
