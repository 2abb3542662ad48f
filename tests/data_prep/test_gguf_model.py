"""Parts of the conversion from GGUF that transformers gets wrong."""

import json

import pytest

from clex_train.utils.errors import ConfigError
from data_prep import gguf_model


def test_single_digits_are_put_in_front_of_the_byte_level_split_once(tmp_path):
    file = tmp_path / "tokenizer.json"
    byte_level = {"type": "ByteLevel", "use_regex": True}
    file.write_text(json.dumps({"pre_tokenizer": byte_level, "model": {"vocab": {"é": 0}}}))
    for _ in range(2):
        gguf_model.separate_digits(file)
        made = json.loads(file.read_text(encoding="utf-8"))
        digits = {"type": "Digits", "individual_digits": True}
        assert made["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [digits, byte_level]}
        assert made["model"] == {"vocab": {"é": 0}}


def test_an_existing_directory_is_refused_before_the_file_is_read(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"not read")
    monkeypatch.setattr("sys.argv", ["gguf_model", str(tmp_path / "model.gguf"), str(tmp_path)])
    with pytest.raises(ConfigError, match="exists already; name another"):
        gguf_model.main()
