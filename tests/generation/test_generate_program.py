"""The generate program, run in this process: its text against transformers, its announcements, and its refusals."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train
from clex_train.cli import generate as program
from clex_train.console import program as console
from clex_train.evaluation.decoding import greedy
from clex_train.generation import run as generation
from clex_train.generation.stream import Stream
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models.directory import read_clex, write_clex
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from tests.helpers.tiny_causal_lm import CONTEXT, save_tiny_llama

T_MAX = 4
PROMPT = "3 7 4 25 9 26 5 35 8 9"
"""Without the digits 0 and 1, which are special tokens of the tokenizer."""
IDS = [int(word) for word in PROMPT.split()]
NUM_NEW = 12
TEMPLATE = "{% for m in messages %}{{ {'system': '52', 'user': '53'}[m.role] }} {{ m.content }} {% endfor %}54"
"""Chat template of words in the vocabulary."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Save a stock model, L = 16, and the prompt in a file in it."""
    folder = tmp_path_factory.mktemp("stock")
    save_tiny_llama(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


@pytest.fixture(scope="module")
def clex(tmp_path_factory) -> Path:
    """Save the same model with a vector field up to t = 4 that changes the frequencies visibly."""
    folder = tmp_path_factory.mktemp("clex")
    save_tiny_llama(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    field = Clex(10000.0 ** -(torch.arange(6, dtype=torch.float64) / 6), t_max=T_MAX, seed=0)
    torch.nn.init.normal_(field.down, std=0.05, generator=torch.Generator().manual_seed(1))
    write_clex(folder, field, field.table(scale_grid(T_MAX)), CONTEXT)
    return folder


def call(monkeypatch, folder: Path, *arguments: str) -> int:
    given = [
        f"model={folder}",
        *([] if any("prompt_file" in a for a in arguments) else [f"prompt_file={folder}/prompt.txt"]),
    ]
    monkeypatch.setattr(sys, "argv", ["generate", *given, *arguments])
    return console.run(program.main, program.usage)


def by_transformers(folder: Path, ids: list[int], num_new: int = NUM_NEW) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return new_tokens(model, ids, num_new)


def new_tokens(model, ids: list[int], num_new: int = NUM_NEW) -> list[int]:
    whole = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=num_new
    )
    return whole[0, len(ids) :].tolist()


def words(out: str) -> list[int]:
    return [int(word) for word in out.split()]


def test_a_trained_model_continues_a_text_as_transformers_does(tiny_run, tmp_path, monkeypatch, capsys):
    train.run(tiny_run(tmp_path / "run", "evaluation=never", "optim.steps=2", "optim.batch_rows=2"))
    (tmp_path / "prompt.txt").write_text("def main(self):\n    return")
    capsys.readouterr()
    monkeypatch.setattr(
        sys,
        "argv",
        ["generate", str(tmp_path / "run"), f"prompt_file={tmp_path}/prompt.txt", f"max_new_tokens={NUM_NEW}"],
    )
    assert console.run(program.main, program.usage) == 0
    final = tmp_path / "run" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    expected = by_transformers(final, tokenizer.encode("def main(self):\n    return"))
    printed = capsys.readouterr()
    assert printed.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert f"{len(expected)} tokens generated; prefill" in printed.err


def test_a_field_is_read_at_the_t_of_each_length_as_announced(clex, monkeypatch, capsys):
    """Compare the announcement with the spectrum of every call."""
    seen: dict[int, float] = {}
    before = RotaryHandle._before_call

    def recording(handle, module, args, kwargs):
        before(handle, module, args, kwargs)
        seen[handle._call.num_tokens] = handle._call.spectrum.t

    monkeypatch.setattr(RotaryHandle, "_before_call", recording)
    assert call(monkeypatch, clex, "max_new_tokens=30") == 0
    announced = re.search(r"  t +(.*)", capsys.readouterr().err)[1]
    assert announced == "1 from 10 tokens, 2 from 17 (after 7 new ones), 3 from 33 (after 23 new ones)"
    assert seen == {n: 1.0 if n <= 16 else 2.0 if n <= 32 else 3.0 for n in range(10, 40)}


def test_a_factor_on_t_reads_every_length_at_t_max_like_a_stock_model_with_those_frequencies(clex, monkeypatch, capsys):
    assert call(monkeypatch, clex, f"t_factor={CONTEXT * T_MAX}", f"max_new_tokens={NUM_NEW}") == 0
    printed = capsys.readouterr()
    assert "4 up to 21 tokens, no change" in printed.err
    reference = AutoModelForCausalLM.from_pretrained(clex, dtype=torch.float32)
    reference.model.rotary_emb.inv_freq = read_clex(clex)[1].at(T_MAX).inv_freq.float()
    expected = new_tokens(reference, IDS)
    assert words(printed.out) == expected != by_transformers(clex, IDS)


@pytest.mark.parametrize(
    ("method", "announced"),
    [
        ("none", "the same frequencies at every length"),
        ("trained", "the same frequencies at every length"),
        ("ntk", "1 from 10 tokens, 2 from 17 (after 7 new ones)"),
    ],
)
def test_a_method_announces_its_own_t(stock, monkeypatch, capsys, method, announced):
    assert call(monkeypatch, stock, f"method={method}", f"max_new_tokens={NUM_NEW}") == 0
    assert re.search(r"  t +(.*)", capsys.readouterr().err)[1] == announced


def test_lm_infinite_generates_what_its_own_decoding_does(stock, monkeypatch, capsys):
    assert call(monkeypatch, stock, "method=lm_infinite", "n_local=8", "n_global=2", f"max_new_tokens={NUM_NEW}") == 0
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    mask = apply_lm_infinite(model, 8, 2)
    with torch.no_grad():
        expected = greedy(model, torch.tensor(IDS), NUM_NEW, 1, mask.new_cache).tolist()
    assert words(capsys.readouterr().out) == expected


def test_a_chat_is_written_by_the_template_of_the_tokenizer(stock, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "chat"
    save_tiny_llama(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert call(monkeypatch, folder, "chat=true", "system=7 8", f"max_new_tokens={NUM_NEW}") == 0
    printed = capsys.readouterr()
    assert words(printed.out) == by_transformers(stock, [52, 7, 8, 53, *IDS, 54])
    assert f"{len(IDS) + 5} tokens of {folder}/prompt.txt, a chat" in printed.err


def test_standard_input_is_a_prompt(stock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert call(monkeypatch, stock, "prompt_file=-", f"max_new_tokens={NUM_NEW}") == 0
    printed = capsys.readouterr()
    assert words(printed.out) == by_transformers(stock, IDS)
    assert "10 tokens of standard input, plain" in printed.err


def test_the_models_own_generation_config_gives_its_end_tokens_and_nothing_else(stock, tmp_path, monkeypatch, capsys):
    expected = by_transformers(stock, IDS)
    folder = tmp_path / "configured"
    save_tiny_llama(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    end = next(token for token in expected[3:] if token not in expected[:3])
    GenerationConfig(do_sample=True, repetition_penalty=9.0, top_k=3, eos_token_id=[end, 60]).save_pretrained(folder)
    assert call(monkeypatch, folder, f"max_new_tokens={NUM_NEW}") == 0
    printed = capsys.readouterr()
    assert words(printed.out) == expected[: expected.index(end) + 1]
    assert "stopped by an end token" in printed.err


def test_samples_follow_the_seed(stock, monkeypatch, capsys):
    texts = []
    for seed in (0, 0, 1):
        assert call(monkeypatch, stock, "temperature=1.5", "top_p=0.95", f"seed={seed}", "max_new_tokens=20") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_ends_the_text_with_the_statistics_in_one_line(stock, monkeypatch, capsys):
    put = Stream.put

    def interrupted(stream, value):
        if len(stream.ids) == 3:
            raise KeyboardInterrupt
        put(stream, value)

    monkeypatch.setattr(Stream, "put", interrupted)
    assert call(monkeypatch, stock, f"max_new_tokens={NUM_NEW}") == 130
    printed = capsys.readouterr()
    assert words(printed.out) == by_transformers(stock, IDS)[:3]
    assert printed.out.endswith("\n")
    line = printed.err.splitlines()[-1]
    assert re.fullmatch(
        r"interrupted by SIGINT; 3 tokens generated; prefill 10 tokens in .* decode 2 tokens in .*", line
    )


class Pieces:
    """A tokenizer whose tokens are bytes, as those of byte-level BPE may be."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def test_each_token_is_printed_once_its_characters_are_whole(capsys):
    stream, printed = Stream(Pieces(), 1), []
    stream.put(torch.tensor([[0]]))
    for byte in "a...é€\x1b[2J.".encode():
        stream.put(torch.tensor([byte]))
        printed.append(capsys.readouterr().out)
    # Control characters do not reach the terminal.
    assert printed == [*"a...", "", "é", "", "", "€", "\\x1b", *"[2J."]
    stream.put(torch.tensor(["é".encode()[0]]))
    stream.end()
    assert capsys.readouterr().out == "\ufffd\n"


def test_the_parts_of_a_streamed_text_make_up_the_text(tiny_store, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_store / "tokenizer")
    text = "def é(self):\n    return '€...' # 日本語\n"
    stream = Stream(tokenizer, 1)
    stream.put(torch.tensor([[0]]))
    for token in tokenizer.encode(text, add_special_tokens=False):
        stream.put(torch.tensor([token]))
    stream.end()
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: cannot be read (No such file or directory)"),
        (["prompt_file="], "prompt_file: name a text file, or - for standard input"),
        (["max_new_tokens=0"], "max_new_tokens=0: at least 1 token"),
        (["temperature=-1"], "temperature=-1.0: 0 or more"),
        (["top_p=0.9"], "top_p=0.9: has no effect at temperature=0"),
        (["system=5"], "system=5: is a message of a chat; add chat=true"),
        (["chat=true"], "chat=True: the tokenizer has no chat template"),
        (["method=clex"], "method=clex: this model holds no CLEX"),
        (["t_factor=2"], "t_factor=2.0: this model holds no CLEX"),
        (["method=static"], "evaluation.methods=static: has learned factors only"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_read(stock, monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(generation, "load_for_evaluation", None)
    assert call(monkeypatch, stock, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}")
    assert printed.out == ""


@pytest.mark.parametrize(("content", "reason"), [(b" \n", "has no text"), (b"\xff\xfe", "not UTF-8 at byte 0")])
def test_a_file_without_text_is_refused(stock, tmp_path, monkeypatch, capsys, content, reason):
    (tmp_path / "bad.txt").write_bytes(content)
    assert call(monkeypatch, stock, f"prompt_file={tmp_path}/bad.txt") == 2
    assert reason in capsys.readouterr().err


def test_a_text_beyond_the_field_is_refused_with_the_room_that_there_is(clex, monkeypatch, capsys):
    # t_max * L = 64 tokens hold the prompt of 10 and 54 new ones, and one more that is only printed.
    assert call(monkeypatch, clex, "max_new_tokens=56") == 2
    assert "the prompt has 10; at most 55" in capsys.readouterr().err
    assert call(monkeypatch, clex, "max_new_tokens=55") == 0


def test_a_template_that_refuses_a_message_is_named(tmp_path, monkeypatch, capsys):
    save_tiny_llama(tmp_path)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}54"
    )
    assert call(monkeypatch, tmp_path, "chat=true", "system=5") == 2
    assert "system=5: the chat template refuses it (no system role); leave the key out" in capsys.readouterr().err
