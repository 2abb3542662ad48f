"""Evaluate model directories with weights sharded over the ranks; run by torchrun.

    python -m torch.distributed.run --nproc_per_node 2 tests/evaluation/sharded_loading.py FOLDER NAME...

For each NAME, evaluate FOLDER/NAME/model on FOLDER/store as the command line would, with parameters in host memory if
the name ends in `_offloaded`. FOLDER/NAME/<rank>.json records the fraction of the weights on the rank.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from clex_train.cli import evaluate as program  # noqa: E402
from clex_train.cli import load_model  # noqa: E402
from clex_train.utils import distributed  # noqa: E402

ARGUMENTS = ["lengths=[16,32,64]", "methods=[trained,ntk]", "protocols=[one_shot,chunked]", "chunk_len=24"]


def main(folder: Path, names: list[str]) -> None:
    """Evaluate each of the directories."""
    torch.set_num_threads(1)
    for name in names:
        program.load = recording_load(folder / name)  # type: ignore[assignment]
        offload = [f"offload_parameters={str(name.endswith('_offloaded')).lower()}"]
        sys.argv = [sys.argv[0], *arguments(folder, name), "sharded=true", *offload]
        program.main()


def arguments(folder: Path, name: str) -> list[str]:
    """Return the command line for a directory, without the options that shard it."""
    places = [f"model={folder / name / 'model'}", f"data={folder / 'store'}", f"output={folder / name / 'result.json'}"]
    return [*places, *ARGUMENTS]


def recording_load(folder: Path):
    """Wrap `load_model.load` to record the fraction of the weights on this rank."""

    def load(asked, model):
        loaded, dtype = load_model.load(asked, model)
        whole = sum(parameter.ds_numel for parameter in loaded.model.parameters())
        kept = sum(parameter.ds_tensor.numel() for parameter in loaded.model.parameters())
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(kept / whole))
        return loaded, dtype

    return load


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
