"""The code of docs/library.md, run on small random models under the names it uses."""

import re
from pathlib import Path

import pytest
import torch

from clex_train.models.directory import write_clex
from clex_train.rope.patch import install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from tests.helpers.tiny_causal_lm import save_tiny_llama

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def named_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save `my_model` with L = 16, and the field of a run on it in `runs/my_run/final`."""
    model = save_tiny_llama(tmp_path / "my_model")
    final = tmp_path / "runs" / "my_run" / "final"
    final.mkdir(parents=True)
    clex = Clex(install_rotary(model, 16).base_inv_freq, t_max=4.0)
    torch.nn.init.normal_(clex.down, std=0.3, generator=torch.Generator().manual_seed(1))
    write_clex(final, clex, clex.table(scale_grid(4.0)), 16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_five_lines_apply_generate_pin_and_undo(named_models: Path) -> None:
    torch.manual_seed(0)
    seen: dict[str, object] = {}
    exec(BLOCKS[0], seen)
    model, inputs = seen["model"], seen["inputs"]
    assert seen["answer"].shape == seen["pinned"].shape == (1, inputs["input_ids"].shape[1] + 40)
    assert not torch.equal(seen["answer"], seen["pinned"])
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    applied = re.findall(r"^(?:clex|answer|with|    pinned|clex\.undo).*$", BLOCKS[0], re.MULTILINE)
    assert len(applied) == 5, "the page promises five lines"


def test_the_loop_trains_the_field(named_models: Path) -> None:
    torch.manual_seed(0)
    seen: dict[str, object] = {}
    exec(BLOCKS[1], seen)
    clex = seen["clex"]
    assert bool((clex.field.down != 0).any()), "an untrained field is zero"
    assert clex.table.digest == clex.field.digest()
    assert clex.handle.table is clex.table


def test_every_code_block_is_tested() -> None:
    assert len(BLOCKS) == 2
