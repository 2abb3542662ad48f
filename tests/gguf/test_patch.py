"""Factors added to an existing GGUF file: tensors unchanged to the byte, and one line for files that are refused."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from clex_train.gguf import files
from clex_train.gguf.files import LONGROPE, ROPE_FREQS, Field, contents
from clex_train.utils.errors import InputError
from clex_train.utils.files import BadFile
from tests.gguf import gguf_models
from tests.gguf.gguf_models import CONTEXT

SERVED, THETA = 4 * CONTEXT, 5e5
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16", "F32"]


def base_file(path: Path, architecture: str = "llama", kind: str = "Q4_1", **own: Any) -> Path:
    """Write a small file as another program might: quantised, scaled, with arrays and a key nobody knows."""
    keys: dict[str, Any] = {
        "general.name": "a model",
        f"{architecture}.context_length": CONTEXT,
        f"{architecture}.rope.dimension_count": 32,
        f"{architecture}.rope.freq_base": THETA,
        f"{architecture}.rope.scaling.type": "linear",
        f"{architecture}.rope.scaling.factor": 4.0,
        "tokenizer.ggml.tokens": ["a", "b", "é▁", b"\xff not UTF-8"],
        "custom.flag": True,
        "custom.numbers": [1, 2, 3],
        **own,
    }
    quantised = gguf.GGMLQuantizationType[kind]
    drawn = np.random.default_rng(0).standard_normal((3, 6, 64)).astype(np.float32)
    entries = []
    for number, rows in enumerate(drawn):
        data = gguf.quants.quantize(rows, quantised)
        entries.append(
            files.Entry(f"blk.{number}.attn_q.weight", data.shape, data.dtype, quantised, lambda data=data: data)
        )
    norm = np.ones(7, dtype=np.float32)
    entries.append(files.Entry("output_norm.weight", (7,), norm.dtype, gguf.GGMLQuantizationType.F32, lambda: norm))
    fields = [Field(key, value) for key, value in keys.items() if value is not None]
    files.write(path, files.Content(architecture, fields, entries, lambda reader: None))
    return path


def add(tmp_path: Path, base: Path, num: int = 16, **options: Any) -> Any:
    """Add factors and return a reader of the new file."""
    gguf_models.add_factors(tmp_path / "out.gguf", base, gguf_models.factors(num), SERVED, rope_theta=THETA, **options)
    return files.read(tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_unchanged_to_the_byte_and_factors_to_the_bit(kind: str, tmp_path: Path) -> None:
    before = files.read(base_file(tmp_path / "base.gguf", kind=kind))
    after = add(tmp_path, tmp_path / "base.gguf")
    assert [each.name for each in after.tensors] == [*(each.name for each in before.tensors), ROPE_FREQS]
    for old, new in zip(before.tensors, after.tensors, strict=False):
        assert (old.tensor_type, old.shape.tolist()) == (new.tensor_type, new.shape.tolist())
        assert old.data.tobytes() == new.data.tobytes()
    assert np.array_equal(after.tensors[-1].data, np.asarray(gguf_models.factors(16), dtype=np.float32))


def test_only_scaling_and_context_change_in_the_header(tmp_path: Path) -> None:
    before = files.read(base_file(tmp_path / "base.gguf"))
    after = add(tmp_path, tmp_path / "base.gguf")
    kept = {
        key for key in before.fields if not key.startswith(("GGUF.", "llama.rope.scaling.", "llama.context_length"))
    }
    for key in kept:
        assert after.fields[key].types == before.fields[key].types
        old, new = (file.fields[key].parts[3:] for file in (before, after))
        assert [part.tobytes() for part in old] == [part.tobytes() for part in new], key
    assert {key for key in after.fields if not key.startswith("GGUF.")} == kept | {"llama.context_length"}
    assert contents(after, "llama.context_length") == SERVED


def test_an_attention_factor_and_another_alignment_are_kept(tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf")
    # A file aligned otherwise, as its own key says.
    reader = files.read(tmp_path / "base.gguf")
    fields = [
        Field("general.alignment", 64),
        Field("llama.rope.dimension_count", 32),
        Field("llama.rope.freq_base", THETA),
    ]
    entries = [
        files.Entry(each.name, tuple(each.data.shape), each.data.dtype, each.tensor_type, lambda data=each.data: data)
        for each in reader.tensors
    ]
    files.write(tmp_path / "wide.gguf", files.Content("llama", fields, entries, lambda reader: None, alignment=64))
    after = add(tmp_path, tmp_path / "wide.gguf", attention_factor=1.15)
    assert all(each.data_offset % 64 == 0 for each in after.tensors)
    assert contents(after, "llama.rope.scaling.attn_factor") == pytest.approx(1.15)
    assert after.tensors[2].data.tobytes() == reader.tensors[2].data.tobytes()


def test_phi3_gets_the_lists_that_it_reads(tmp_path: Path) -> None:
    after = add(tmp_path, base_file(tmp_path / "base.gguf", "phi3"))
    tensors = {each.name: each.data for each in after.tensors}
    assert ROPE_FREQS not in tensors
    assert all(
        np.array_equal(tensors[name], np.asarray(gguf_models.factors(16), dtype=np.float32)) for name in LONGROPE
    )
    assert contents(after, "phi3.rope.scaling.original_context_length") == SERVED
    assert contents(after, "phi3.rope.scaling.attn_factor") == 1.0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: base_file(path, "qwen3"), "llama.cpp gives no factors to RoPE in qwen3, and refuses a file"),
        (lambda path: base_file(path, "mamba"), "architecture mamba; factors are added to llama, phi3"),
        (lambda path: base_file(path, **{"llama.rope.freq_base": 1e6}), "rope.freq_base 1e+06: it is another model"),
        (lambda path: base_file(path, **{"llama.rope.freq_base": None}), "rope.freq_base 10000: it is another model"),
        (lambda path: base_file(path, **{"llama.rope.dimension_count": 64}), "the model rotates 32 pairs"),
        (lambda path: base_file(path, **{"llama.rope.dimension_count": None}), "does not say how many dimensions"),
        (lambda path: base_file(path, **{"split.count": 3}), "one of 3 parts; join them first"),
    ],
)
def test_files_that_cannot_take_factors_are_refused(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base.gguf")
    refused(tmp_path, base, reason)


def test_a_file_that_has_factors_is_refused_with_the_remedy(tmp_path: Path) -> None:
    add(tmp_path, base_file(tmp_path / "base.gguf"))
    has = (tmp_path / "out.gguf").rename(tmp_path / "has.gguf")
    refused(tmp_path, has, "has RoPE factors already (rope_freqs.weight); convert the model again from a config.json")


def refused(tmp_path: Path, base: Path, reason: str) -> None:
    before = {each.name for each in tmp_path.iterdir()}
    with pytest.raises(InputError) as error:
        add(tmp_path, base)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert {each.name for each in tmp_path.iterdir()} == before


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = base_file(tmp_path / "base.gguf").read_bytes()
    rng = np.random.default_rng(0)
    random = rng.integers(0, 256, 1000, dtype=np.uint8).tobytes()
    counts = whole[:8] + b"\xff" * 16 + whole[24:]
    for content in (b"", b"GGUF", random, counts, *(whole[:n] for n in (20, 100, 400, len(whole) - 100))):
        (tmp_path / "base.gguf").write_bytes(content)
        refused(tmp_path, tmp_path / "base.gguf", "not a GGUF file, cut short or damaged")
    with pytest.raises(BadFile, match="not a regular file"):
        add(tmp_path, tmp_path)


def test_flipped_bytes_of_the_header_never_end_in_a_traceback(tmp_path: Path) -> None:
    whole = bytearray(base_file(tmp_path / "base.gguf").read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(150):
        changed = bytearray(whole)
        changed[int(rng.integers(0, 700))] = int(rng.integers(0, 256))
        (tmp_path / "base.gguf").write_bytes(changed)
        with suppress(InputError):
            add(tmp_path, tmp_path / "base.gguf")
        assert {each.name for each in tmp_path.iterdir()} <= {"base.gguf", "out.gguf"}


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_file(tmp_path / "base.gguf")

    def interrupted(writer: Any, tensor: Any, **options: Any) -> None:
        if tensor.shape == (7,):
            raise KeyboardInterrupt
        own(writer, tensor, **options)

    own = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add(tmp_path, base)
    assert [each.name for each in tmp_path.iterdir()] == ["base.gguf"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_file(tmp_path / "base.gguf")
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=base.stat().st_size))
    refused(tmp_path, base, "make room or name another place")
