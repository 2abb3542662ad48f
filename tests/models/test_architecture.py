"""Reading an architecture before its weights: L and its origin, and refusals of invalid config.json files."""

import json

import pytest
import torch
from transformers import BloomConfig, Gemma3TextConfig, LlamaConfig

from clex_train import api
from clex_train.config.method import Method
from clex_train.config.model import Init, ModelConfig
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.console.errors import explain
from clex_train.console.loading_keys import NamedModel
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import architecture, hub, official
from clex_train.rope import recipes
from clex_train.scaling.clex import Clex
from tests.helpers.composing import CONF, composed
from tests.helpers.tiny_causal_lm import save_tiny_llama, tiny_llama

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ORIGINAL = 64


def scaled(rope_type: str, *, stated: int, **parameters) -> LlamaConfig:
    """Make a config with a maximum of `stated` tokens and a scaling."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **parameters}
    return LlamaConfig(**SIZES, max_position_embeddings=stated, rope_parameters=rope)


def source(config, **keys) -> tuple[int, str]:
    return tuple(architecture.context_source(ModelConfig(path="a/b", **keys), config))


YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES, max_position_embeddings=96), (96, "max_position_embeddings")),
        # Qwen's model cards state the original length or slightly more, DeepSeek's the extended one.
        (scaled("yarn", stated=64, **YARN), (256, "yarn factor 4 * original 64")),
        (scaled("yarn", stated=80, **YARN), (256, "yarn factor 4 * original 64")),
        (scaled("yarn", stated=256, **YARN), (256, "max_position_embeddings")),
        (scaled("linear", stated=64, **YARN), (256, "linear factor 4 * original 64")),
        # A factor of 1 scales nothing.
        (scaled("linear", stated=64, factor=1.0), (64, "max_position_embeddings")),
        # Llama 3.1: 16 times the original length at factor 8.
        (scaled("llama3", stated=1024, **LLAMA3), (1024, "max_position_embeddings")),
        # Dynamic scalings serve the stated length before they change anything.
        (scaled("dynamic", stated=64, factor=4.0), (64, "max_position_embeddings")),
        (BloomConfig(n_layer=1, seq_length=2048), (2048, "seq_length")),
        # Gemma 3 of 4B and more: 8 times its original training length.
        (
            Gemma3TextConfig(
                **SIZES,
                max_position_embeddings=131072,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            (131072, "max_position_embeddings"),
        ),
    ],
)
def test_l_is_the_length_that_the_config_supports_with_its_origin(config, expected):
    assert source(config) == expected
    assert architecture.context_length(ModelConfig(path="a/b"), config) == expected[0]


def test_longrope_starts_at_its_original_length():
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    rope = {"rope_type": "longrope", **factors, "original_max_position_embeddings": ORIGINAL}
    config = LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=rope | {"rope_theta": 1e4})
    assert source(config) == (ORIGINAL, "original_max_position_embeddings of its longrope")


@pytest.mark.parametrize(
    "config",
    [
        scaled("linear", stated=64, factor=4.0),
        scaled("yarn", stated=512, **YARN),
        scaled("llama3", stated=64, **LLAMA3),
    ],
)
def test_l_must_be_given_if_a_scaling_leaves_it_open(config):
    with pytest.raises(ValueError, match=r"^model\.context_len: the config scales RoPE by .* set the length"):
        source(config)
    assert source(config, context_len=1000) == (1000, "model.context_len")
    assert architecture.own_context(ModelConfig(path="a/b"), config) is None


def test_an_evaluation_program_names_its_own_key():
    model = NamedModel(path="a/b")
    with pytest.raises(ValueError, match=r"^context_len: the config scales RoPE by "):
        architecture.context_source(model, scaled("linear", stated=64, factor=4.0))
    with pytest.raises(ValueError, match=r"^context_len=1: at least 2"):
        NamedModel(path="a/b", context_len=1)


def test_a_config_with_the_path_of_another_model_is_reported_as_unused(tmp_path, caplog):
    caplog.set_level("INFO", logger="clex_train")
    own = save_tiny_llama(tmp_path / "Llama-2-7b-hf")
    for overrides in (
        ["model=llama2_7b"],
        ["model=llama2_7b", f"model.path={tmp_path}/Llama-2-7b-hf"],
        [f"model.path={tmp_path}", "model.config=null"],
    ):
        architecture.warn_of_unused_config(composed(*overrides, "dry_run=true").model)
    assert not caplog.messages
    architecture.warn_of_unused_config(composed(f"model.path={tmp_path}", "dry_run=true").model)
    own.config.save_pretrained(tmp_path / "other")
    architecture.warn_of_unused_config(ModelConfig(path=str(tmp_path), config=str(tmp_path / "other")))
    assert [line.partition(" (")[0] for line in caplog.messages] == [
        "model.config=conf/model/architectures/tiny",
        f"model.config={tmp_path}/other",
    ]
    assert all(f"is not used: model.path={tmp_path} has" in line for line in caplog.messages)


def test_the_library_uses_the_same_length():
    model = tiny_llama(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    )
    applied = api.apply_clex(model)
    assert applied.handle.context_len == 64
    applied.undo()


def test_a_recipe_writes_the_length_of_its_base():
    scaling = ScalingConfig(name=Method.yarn, positions=Positions.skip)
    config = recipes.scaled(LlamaConfig(**SIZES, max_position_embeddings=64), scaling, 4.0, 64)
    assert source(config) == (64, "original_max_position_embeddings")


def test_a_field_records_its_training_length(tmp_path):
    from clex_train.models import directory

    model = save_tiny_llama(tmp_path)
    field = Clex(api.apply_clex(model).handle.base_inv_freq, t_max=4.0)
    table = field.table([1.0, 2.0, 4.0])
    directory.write_clex(tmp_path, field, table, context_len=8)
    config = architecture.to_read(ModelConfig(path=str(tmp_path)))
    assert architecture.context_source(ModelConfig(path=str(tmp_path)), config) == (8, "clex.json")


# Configs seen in practice, which transformers or huggingface_hub refuse with different kinds of errors.
UNREADABLE = {
    "su, the first config of Phi-3-mini-128k": {
        "model_type": "phi3",
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_parameters": None,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    "a scaling without a factor": {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
    "a width that heads do not divide": {"hidden_size": 33},
    "a text for a number": {"num_hidden_layers": "two"},
    "a list for a number": {"vocab_size": [61]},
    "an unknown model type": {"model_type": "no_such_family"},
    "no model type": {"model_type": None},
    "a scaling that is a text": {"rope_parameters": None, "rope_scaling": "yarn"},
    "a scaling of no known type": {"rope_parameters": {"rope_type": "no_such_scaling", "rope_theta": 1e4}},
}


@pytest.mark.parametrize("changes", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unusable_config_is_refused_in_one_line_with_exit_code_2(tmp_path, changes):
    save_tiny_llama(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(facts))
    model = ModelConfig(path=str(tmp_path))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        architecture.to_train(model)
    line = explain(raised.value)
    assert line is not None
    path = f"model.path={tmp_path}"
    assert line.startswith((f"{path}: no readable config.json (", f"{path}: its config.json has ", "model_type="))
    assert not line.endswith(":)")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"no readable config\.json \("):
        architecture.to_read(ModelConfig(path=str(tmp_path)))


def test_sizes_that_the_code_of_a_family_refuses_are_named_with_it():
    with pytest.raises(ValueError, match=r"^model_type=llama: cannot build a causal language model \("):
        model_on_meta(LlamaConfig(**SIZES | {"hidden_act": "no_such_activation"}))


def test_weights_of_a_path_are_used_unless_it_only_has_a_config(tmp_path):
    assert ModelConfig(path="a/b").is_pretrained
    assert ModelConfig(path="a/b", config="c").is_pretrained
    assert not ModelConfig(config="c").is_pretrained
    assert not ModelConfig(path="a/b", init=Init.random).is_pretrained
    assert composed("model.path=/my/model", "dry_run=true").model.is_pretrained, "whatever the preset is"
    assert not composed("model=tiny").model.is_pretrained


@pytest.mark.parametrize("named", ["directory", "hub"])
def test_random_weights_are_refused_if_weights_are_named(tmp_path, named):
    save_tiny_llama(tmp_path)
    path = str(tmp_path) if named == "directory" else "owner/model"
    with pytest.raises(
        ValueError, match=r"^model\.init=random: the weights of model\.path=.* model\.config=DIR model\.path=null"
    ):
        architecture.to_read(ModelConfig(path=path, init=Init.random))


def test_random_weights_are_used_for_a_directory_without_weights(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert architecture.to_read(ModelConfig(path=str(tmp_path), init=Init.random)).model_type == "llama"


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
def test_a_preset_does_not_repeat_its_architecture(name):
    preset = composed(f"model={name}", "dry_run=true").model
    assert (preset.init, preset.context_len) == (None, None), "so that it cannot outlive another model.path"
    shown = architecture.stand_in(preset)
    assert shown.path is None
    facts = json.loads((CONF.parent / str(shown.config) / "config.json").read_text())
    # A multimodal model has its language model's facts in a part.
    text = facts.get("text_config", facts)
    # Phi-4-mini changes its frequencies beyond the length that it was trained on first.
    source = next(key for key in ("original_max_position_embeddings", "max_position_embeddings") if key in text)
    assert architecture.context_source(shown, architecture.to_train(shown)) == (int(text[source]), source)


def test_the_name_in_a_shipped_config_is_not_part_of_the_architecture(tmp_path):
    shipped = CONF / "model/architectures/llama2_7b/config.json"
    facts = json.loads(shipped.read_text())
    assert facts.pop("_name_or_path") == "meta-llama/Llama-2-7b-hf"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    named, nameless = (architecture.to_read(ModelConfig(config=str(each))) for each in (shipped.parent, tmp_path))
    assert architecture.digest(named) == architecture.digest(nameless)


def test_an_offline_hub_is_reported_with_a_remedy(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^model\.path=owner/model: no readable config\.json \(the hub cannot be reached"
    ) as raised:
        architecture.to_read(ModelConfig(path="owner/model"))
    assert "`hf download owner/model`" in str(raised.value)


def test_an_unresponsive_hub_is_contacted_once(monkeypatch, caplog):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    hub.unreachable.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"the hub cannot be reached, Name or service not known, and its cache here"
        ):
            architecture.to_read(ModelConfig(path="owner/model"))
        assert hub.options("owner/another") == {"local_files_only": True}
        assert hub.options(str(CONF)) == {}, "a directory needs no hub"
    finally:
        hub.unreachable.cache_clear()
    assert len(asked) == 1
    assert caplog.text.count("cannot be reached") == 1


def test_a_damaged_official_directory_is_refused_in_one_line(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rope_scaling": "clex"}))
    assert not official.is_official(tmp_path)
    scaling = {"type": "clex", "max_factor": "many"}
    file.write_text(json.dumps({"rope_scaling": scaling, "max_position_embeddings": 64}))
    with pytest.raises(ValueError, match=r"config\.json: max_factor=many: not a number"):
        official.max_factor(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        official.read_official_field(tmp_path, torch.ones(4, dtype=torch.float64))
    assert str(explain(raised.value)).startswith(f"{tmp_path}: ")


def test_a_shipped_architecture_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = architecture.to_train(ModelConfig(path=None, config="conf/model/architectures/llama2_7b"))
    assert (found.num_hidden_layers, found.hidden_size) == (32, 4096)
