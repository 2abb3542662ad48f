"""Round trip of all shared text: the tokens of the store decode to the original text."""

import json
from pathlib import Path

from data_prep.corpus.streams import open_stream
from tests.data_prep.small_corpora import stored_texts, tokenize_files


def test_all_shared_text_round_trips_through_a_store(shared_data: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    files = sorted(path for path in shared_data.rglob("*.jsonl.*"))
    store = tokenize_files(list(files), tokenizer_dir, tmp_path / "store")
    found = iter(stored_texts(store))
    for file in files:
        with open_stream(file) as (content, _):
            for line in content:
                assert next(found) == json.loads(line)["text"]
    assert next(found, None) is None
