"""`data_prep chat`: layouts of records, masks on disk, truncation, resuming, refusals, and what `show` prints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError
from data_prep.chat import run as chat
from data_prep.chat import show
from data_prep.chat.config import ChatTokenizer, ChatVerb, Color, Layout, Scored, ShowVerb
from data_prep.config import CorpusConfig, OnBadRecord

TALKS = [[("user", f"Count to {n}."), ("assistant", " ".join(map(str, range(n))))] for n in range(3, 23)]
MESSAGES = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
WRITTEN: dict[Layout, list[dict[str, Any]]] = {
    Layout.messages: [{"messages": messages, "id": n} for n, messages in enumerate(MESSAGES)],
    Layout.prompt_completion: [{"prompt": user, "completion": answer} for (_, user), (_, answer) in TALKS],
    Layout.sharegpt: [
        {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]}
        for (_, user), (_, answer) in TALKS
    ],
}


@pytest.fixture(scope="module")
def model_dir(chat_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat_model") / "tokenizer"
    chat_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def prepare(model_dir: Path, tmp_path: Path) -> Callable[..., TokenStore]:
    """Return a function that writes records as a file of JSON lines and makes a store of them."""

    def make(records: list[dict[str, Any]], name: str = "store", **options: Any) -> TokenStore:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        corpus = CorpusConfig(paths=[str(path)], validation_share=options.pop("validation_share", 0))
        corpus.on_bad_record = options.pop("on_bad_record", OnBadRecord.error)
        tokenizer = ChatTokenizer(path=str(model_dir))
        chat.run(ChatVerb(corpus=corpus, tokenizer=tokenizer, output=str(tmp_path / name), **options))
        return TokenStore(tmp_path / name)

    return make


def documents(store: TokenStore, tokenizer: Any) -> list[tuple[str, str]]:
    """Return (text, scored text) of every document."""
    found = []
    for _, start, stop in store.documents():
        tokens, scored = store.tokens(start, stop), store.scored(start, stop)
        assert scored is not None
        found.append((tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[scored].tolist())))
    return found


def test_every_layout_gives_the_same_store(prepare, chat_tokenizer, tmp_path: Path, model_dir: Path) -> None:
    stores = [prepare(WRITTEN[layout], layout.name, layout=layout) for layout in Layout]
    table = pyarrow.Table.from_pylist(WRITTEN[Layout.messages])
    pyarrow.parquet.write_table(table, tmp_path / "talks.parquet")
    corpus = CorpusConfig(paths=[str(tmp_path / "talks.parquet")], validation_share=0)
    tokenizer = ChatTokenizer(path=str(model_dir))
    chat.run(ChatVerb(corpus=corpus, tokenizer=tokenizer, output=str(tmp_path / "parquet")))
    stores.append(TokenStore(tmp_path / "parquet"))
    assert len({store.fingerprint for store in stores}) == 1
    rendered = chat_tokenizer()
    texts = documents(stores[0], rendered)
    for messages, (text, scored) in zip(MESSAGES, texts, strict=True):
        assert text == rendered.apply_chat_template(messages, tokenize=False) + "</s>"
        assert scored == f"{messages[1]['content']}<|im_end|>\n"


def test_prompts_and_completions_may_be_lists_of_messages(prepare) -> None:
    plain = prepare(WRITTEN[Layout.prompt_completion], "plain", layout=Layout.prompt_completion)
    lists = [{"prompt": messages[:1], "completion": messages[1:]} for messages in MESSAGES]
    assert prepare(lists, "lists", layout=Layout.prompt_completion).fingerprint == plain.fingerprint


def test_the_held_out_conversations_do_not_depend_on_the_layout(prepare) -> None:
    stores = [prepare(WRITTEN[layout], layout.name, layout=layout, validation_share=0.3) for layout in Layout]
    assert len({store.fingerprint for store in stores}) == 1
    assert 1 < stores[0].split("validation").num_documents < len(TALKS) // 2 + 1


def test_long_conversations_are_cut_counted_and_said(prepare, caplog) -> None:
    caplog.set_level("INFO")
    store = prepare(WRITTEN[Layout.messages], max_tokens=48)
    lengths = [stop - start for _, start, stop in store.documents()]
    assert max(lengths) == 48
    counts = store.manifest.sources[0].counts
    assert counts["truncated"] == lengths.count(48)
    assert f"{lengths.count(48)} conversations were cut to max_tokens=48" in caplog.text
    # EOS closes a document that was cut, and is no target there.
    cut = next((start, stop) for _, start, stop in store.documents() if stop - start == 48)
    scored = store.scored(*cut)
    assert scored is not None
    assert store.tokens(*cut)[-1] == store.eos_id
    assert not scored[-1]


def test_a_cut_that_leaves_nothing_to_learn_is_counted_and_a_store_of_them_refused(prepare, caplog) -> None:
    long_question = {"messages": [{"role": "user", "content": "why " * 50}, {"role": "assistant", "content": "so"}]}
    store = prepare([*WRITTEN[Layout.messages], long_question], max_tokens=60)
    assert store.num_documents == len(TALKS)
    assert store.manifest.sources[0].counts["without_scored_tokens"] == 1
    assert "1 conversations were left out" in caplog.text
    with pytest.raises(ConfigError, match=r"20 without scored tokens.*raise max_tokens"):
        prepare(WRITTEN[Layout.messages], "empty", max_tokens=10)


def test_an_interrupted_store_is_finished_by_the_same_command(prepare, monkeypatch, tmp_path: Path) -> None:
    whole = prepare(WRITTEN[Layout.messages], "whole")
    with monkeypatch.context() as broken:
        broken.setattr(chat, "publish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(WRITTEN[Layout.messages], "parts")
    assert not (tmp_path / "parts").exists()
    assert prepare(WRITTEN[Layout.messages], "parts").fingerprint == whole.fingerprint
    with pytest.raises(ConfigError, match=r"exists with other content.*scored"):
        prepare(WRITTEN[Layout.messages], "parts", scored=Scored.all)


BAD = [
    ({"text": "hello"}, "no field 'messages'.*set field=NAME"),
    ({"conversations": []}, "set field=conversations, and layout=sharegpt"),
    ({"prompt": "a", "completion": "b"}, "set layout=prompt_completion"),
    ({"messages": [{"from": "human", "value": "a"}]}, "turn 1 has no 'role'.*set layout=sharegpt"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
    ({"messages": "a"}, "must be a list of turns, but is a text"),
    ({"messages": []}, "must be a list of turns, but is empty"),
    ({"messages": [{"role": "user", "content": ["a"]}, MESSAGES[0][1]]}, "'content' of turn 1 must be a text"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "turn 1 has 'tool_calls'"),
    ({"messages": [{"role": "assistant", "content": "a", "function_call": {}, "weight": 0}]}, "weight 0"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "turn 1 has 'reasoning_content'"),
    ({"messages": [{"role": "tool", "content": "a"}, MESSAGES[0][1]]}, "turn 1 is that of a tool"),
    ({"messages": MESSAGES[0], "tools": [{"name": "f"}]}, "field 'tools' beside 'messages' describes tools"),
    ({"messages": [None, MESSAGES[0][1]]}, "turn 1 is null instead of an object"),
    ({"messages": [{"role": "user", "content": "\ufdd0"}, MESSAGES[0][1]]}, "reserves"),
    ({"messages": [{"role": "user", "content": "\udc00"}, MESSAGES[0][1]]}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_an_unusable_record_is_refused_with_its_place(prepare, record, message: str) -> None:
    records = [*WRITTEN[Layout.messages][:2], record]
    with pytest.raises(ConfigError, match=rf"line 3.*{message}"):
        prepare(records)
    store = prepare(records, "skipping", on_bad_record=OnBadRecord.skip)
    assert store.num_documents == 2
    assert store.manifest.sources[0].counts["bad_records"] == 1


def test_a_template_file_replaces_that_of_the_tokenizer_and_is_kept(prepare, tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{{ '<|assistant|>\\n' if add_generation_prompt }}"
    )
    (tmp_path / "zephyr.jinja").write_text(text)
    store = prepare(WRITTEN[Layout.messages], template=str(tmp_path / "zephyr.jinja"))
    assert (store.tokenizer_path / "chat_template.jinja").read_text() == text
    with pytest.raises(ConfigError, match=r"template=.*no such file"):
        prepare(WRITTEN[Layout.messages], "other", template=str(tmp_path / "none.jinja"))


def test_a_template_that_ends_with_eos_gets_no_second_one(prepare, tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    (tmp_path / "plain.jinja").write_text(text)
    store = prepare(WRITTEN[Layout.messages], template=str(tmp_path / "plain.jinja"))
    _, start, stop = next(store.documents())
    tokens, scored = store.tokens(start, stop), store.scored(start, stop)
    assert scored is not None
    assert tokens.tolist().count(store.eos_id) == 2
    assert tokens[-1] == store.eos_id
    assert scored[-1]


def test_without_a_control_token_eos_teaches_to_stop(prepare, tmp_path: Path, caplog) -> None:
    text = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    (tmp_path / "plain.jinja").write_text(text)
    store = prepare(WRITTEN[Layout.messages], template=str(tmp_path / "plain.jinja"))
    scored = store.scored(0, store.num_tokens)
    assert scored is not None
    assert scored[store.tokens(0, store.num_tokens) == store.eos_id].all()
    assert "learns to stop at the last turn of a conversation only" in caplog.text


def test_show_marks_the_scored_tokens(prepare, capsys) -> None:
    store = prepare([{"messages": [*MESSAGES[0][:1], {"role": "assistant", "content": "0 \x1b[0m 1"}]}])
    show.run(ShowVerb(store=str(store.path)))
    printed = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[0 \\x1b[0m 1<|im_end|>\n]]</s>" in printed
    show.run(ShowVerb(store=str(store.path), color=Color.always))
    assert f"{show.GREEN}0 " in capsys.readouterr().out


def test_workers_write_the_same_store(prepare, tmp_path: Path, model_dir: Path) -> None:
    for part in range(2):
        lines = "".join(json.dumps(record) + "\n" for record in WRITTEN[Layout.messages][part::2])
        (tmp_path / f"part_{part}.jsonl").write_text(lines)
    stores = []
    for workers in (1, 2):
        corpus = CorpusConfig(paths=[str(tmp_path / f"part_{part}.jsonl") for part in range(2)], validation_share=0)
        tokenizer, output = ChatTokenizer(path=str(model_dir)), tmp_path / f"workers_{workers}"
        chat.run(ChatVerb(corpus=corpus, tokenizer=tokenizer, output=str(output), workers=workers))
        stores.append(TokenStore(output).fingerprint)
    assert stores[0] == stores[1]


def test_a_conversation_that_the_template_refuses_is_named_or_left_out(prepare, tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('never') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    (tmp_path / "strict.jinja").write_text(text)
    bad = {"messages": [{"role": "user", "content": "bad"}, MESSAGES[0][1]]}
    records, options = [*WRITTEN[Layout.messages][:2], bad], {"template": str(tmp_path / "strict.jinja")}
    with pytest.raises(ConfigError, match=r"line 3.*the chat template refuses it \(never\)"):
        prepare(records, **options)
    store = prepare(records, "skipping", on_bad_record=OnBadRecord.skip, **options)
    assert store.num_documents == 2
    assert store.manifest.sources[0].counts == {**store.manifest.sources[0].counts, "documents": 2, "bad_records": 1}


def test_a_conversation_may_begin_with_the_assistant(prepare, chat_tokenizer) -> None:
    talk = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi."}, {"from": "gpt", "value": "So?"}]
    store = prepare([{"conversations": talk}, WRITTEN[Layout.sharegpt][0]], layout=Layout.sharegpt)
    assert "Hello.<|im_end|>\nSo?<|im_end|>\n" in [scored for _, scored in documents(store, chat_tokenizer())]


def test_a_system_field_becomes_the_first_message(prepare, chat_tokenizer) -> None:
    store = prepare([{**WRITTEN[Layout.messages][0], "system": "Be brief."}, WRITTEN[Layout.messages][1]])
    assert documents(store, chat_tokenizer())[0][0].startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )


def test_an_empty_template_and_one_without_messages_are_refused(prepare, tmp_path: Path) -> None:
    for content, message in (("", "there is no chat template"), ("nothing", "writes no turn of the assistant")):
        (tmp_path / "bad.jinja").write_text(content)
        with pytest.raises(ConfigError, match=message):
            prepare(WRITTEN[Layout.messages], template=str(tmp_path / "bad.jinja"))


def test_a_text_field_is_refused(model_dir: Path) -> None:
    corpus, tokenizer = CorpusConfig(paths=["a.jsonl"], text_field="talk"), ChatTokenizer(path=str(model_dir))
    with pytest.raises(ConfigError, match=r"corpus.text_field=talk: a conversation is in `field`"):
        chat.run(ChatVerb(corpus=corpus, tokenizer=tokenizer))
