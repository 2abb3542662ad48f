"""Subprocess that converts a checkpoint to DeepSpeed's universal format, and ends with the process that started it.

python -m clex_train.checkpoint.convert CHECKPOINT FOLDER
"""

import argparse
import os
import signal
import threading
from pathlib import Path

WORKERS = 2
"""Processes that convert in parallel; each loads whole shards, so more of them risk the host's memory."""


def end_with_parent() -> None:
    """Kill this process group as soon as the process that started the conversion is gone."""
    # Nothing is ever written to the pipe, so the read returns only at its end.
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Convert one checkpoint into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    # Before the imports that take seconds: a parent killed meanwhile would leave an orphan for as long.
    threading.Thread(target=end_with_parent, daemon=True).start()
    from deepspeed.checkpoint import ds_to_universal

    from clex_train.checkpoint.safe_load import tensors_only

    given.folder.mkdir(parents=True)
    with tensors_only(given.checkpoint):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(given.checkpoint),
                output_folder=str(given.folder),
                num_extract_workers=WORKERS,
                num_merge_workers=WORKERS,
                keep_temp_folder=False,
                strict=True,
                # ZeRO-1 and 2 checkpoints of ours carry no description of tensor parallelism, which is required
                # otherwise.
                inject_missing_state=True,
            )
        )


if __name__ == "__main__":
    main()
