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
    """Layouts of other programs."""

    official = "official"


@dataclass
class ExportConfig:
    """Arguments of the export program."""

    run: str | None = None
    """Folder of a finished run: its `final/` is exported."""
    model: str | None = None
    """Model directory instead of a run: the `final/` of a run, or one in the official layout."""
    format: Format = Format.official
    """`official`: the layout of the original CLEX code."""
    output: str | None = None
    """Directory to write; it must not exist yet."""
    log_scale: LogScale | None = None
    """Log-scaling in the exported config, `off` or `official`; by default the policy the model was trained with."""


def main() -> None:
    """Export the model of the command line; refuse unusable input before weights are read."""
    args = arguments.parse(ExportConfig, sys.argv[1:])
    source = _source(args)
    _require_known(args.log_scale, source)
    output = Path(args.output)
    print(log.printable(f"export {source} as {args.format.value} to {output}"), file=sys.stderr, flush=True)
    loaded = load.load_for_evaluation(ModelConfig(path=str(source)), dtype="auto")
    write_official(output, loaded, args.log_scale)
    print(f"written to {output}")


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, ExportConfig)


def _source(args: ExportConfig) -> Path:
    """Return the requested model directory; `ConfigError` names the key that is missing or wrong."""
    require((args.run is None) != (args.model is None), "run", args.run, "name either run=FOLDER or model=DIR")
    require(bool(args.output), "output", args.output or None, "name the directory to write, output=DIR")
    output = Path(str(args.output))
    files.require_writable_folder("output", output, output.parent, files.SAVING + output.name)
    require(not output.exists(), "output", args.output, "exists already; name another directory")
    if args.model is not None:
        require(architecture.has_field(args.model), "model", args.model, "no directory with a CLEX field in it")
        return Path(args.model)
    final = Path(str(args.run)) / "final"
    require(final.is_dir(), "run", args.run, "no final/ in it; give the output_dir of a finished training run")
    loading.require_whole(Path(str(args.run)))
    require(architecture.has_field(str(final)), "run", args.run, "was trained without CLEX: it has nothing to export")
    return final


def _require_known(policy: LogScale | None, source: Path) -> None:
    """Raise `ConfigError` if the format lacks the policy, by default the one that the model was trained with."""
    if policy is not None:
        require_known(policy)
    elif directory.has_clex(source):
        require_known(LogScale(directory.read_record(source).log_scale))


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
