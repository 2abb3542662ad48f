"""Layers of an inspection: families that do not rotate somewhere, have windows, or layers without attention."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from clex_train.inspection import layers
from tests.inspection.saved_configs import inspect


def save(folder: Path, model_type: str, num_layers: int = 8, **facts: Any) -> Path:
    AutoConfig.for_model(model_type, num_hidden_layers=num_layers, **facts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", [("0-7", "RoPE, full attention")]),
        ("smollm3", [("0-2, 4-6", "RoPE, full attention"), ("3, 7", "no RoPE, full attention")]),
        ("cohere2", [("0-2, 4-6", "RoPE, window of 4,096 tokens"), ("3, 7", "no RoPE, full attention")]),
        ("gpt_oss", [("0, 2, 4, 6", "RoPE, window of 128 tokens"), ("1, 3, 5, 7", "RoPE, full attention")]),
        (
            "gemma3_text",
            [
                ("0-4, 6-7", "RoPE of sliding_attention, window of 4,096 tokens"),
                ("5", "RoPE of full_attention, full attention"),
            ],
        ),
        ("qwen3_next", [("0-2, 4-6", "no attention with positions"), ("3, 7", "RoPE, full attention")]),
        ("llama4_text", [("0-2, 4-6", "RoPE, window of 8,192 tokens"), ("3, 7", "no RoPE, full attention")]),
        ("deepseek_v2", [("0-7", "RoPE, full attention")]),
        ("deepseek_v3", [("0-7", "RoPE, full attention")]),
    ],
)
def test_layers_are_read_one_by_one(model_type: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    found = inspect(save(tmp_path, model_type))
    assert list(layers.grouped(found.layers)) == expected
    assert [layer.index for layer in found.layers] == list(range(8))


def test_a_model_with_several_equal_rotary_modules_names_one(tmp_path: Path) -> None:
    found = inspect(save(tmp_path, "granite_swa"))
    assert [rope.name for rope in found.ropes] == ["model.rotary_emb"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1, 2, 5], "0-2, 5"),
        ([3, 7, 11, 15], "3, 7, 11, 15"),
        ([3, 7, 11, 15, 19, 23], "3, 7, ..., 23"),
    ],
)
def test_ranges_are_short(numbers: list[int], text: str) -> None:
    assert layers.ranges(numbers) == text
