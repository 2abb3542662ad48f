"""Text from a prompt, streamed to the terminal by a trained model or any Hugging Face causal LM.

    python -m clex_train.cli.generate run=runs/mine prompt_file=prompt.txt
    python -m clex_train.cli.generate model=models/qwen3-8b prompt_file=- chat=true temperature=0.7

The text goes to standard output, the plan and the speed to standard error. Ctrl-C ends it. `--help` lists every key.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()  # before the imports that take seconds

from clex_train.cli.loading import run_config
from clex_train.console import arguments, program
from clex_train.generation import run
from clex_train.generation.arguments import GenerateConfig, parse
from clex_train.utils import log


def main() -> None:
    """Generate the text of the command line; refuse unusable input before weights are read."""
    args = parse(sys.argv[1:])
    run.generate(args, run_config(Path(args.run)) if args.run else None)


def usage() -> str:
    """Return the text of `--help`."""
    return arguments.usage(__doc__, GenerateConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
