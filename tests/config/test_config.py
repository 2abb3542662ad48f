"""The schema and conf/: every option composes and is documented, and invalid values are refused by key."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clex_train.config import root as configuration
from clex_train.config.docs import describe
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.models import architecture
from clex_train.tracking import run_folder
from tests.helpers.composing import CONF, EXPERIMENTS, composed

GROUPS = sorted({path.parent.name for path in CONF.glob("*/*.yaml")} - {"corpus"})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_is_named_after_its_file(name):
    config = composed(f"+experiment={name}")
    assert config.name == name
    assert config.output_dir == f"runs/{name}"


def test_the_documented_experiments_exist():
    told = """tiny_base tiny_clex tiny_continued llama2_7b_clex llama2_7b_clex_16k llama2_7b_clex_64k llama2_13b_clex
    gpt_neox_20b_clex phi2_clex_32k mixtral_8x7b_clex_32k llama3_8b_clex mistral_7b_clex qwen3_8b_clex
    llama3_8b_clex_1m llama2_7b_clex_paper llama2_13b_clex_paper gpt_neox_20b_clex_paper mixtral_8x7b_clex_32k_paper
    llama3_1_8b_clex qwen2_5_7b_clex olmo3_7b_clex smollm3_3b_clex smollm2_360m_clex gemma3_4b_clex
    phi4_mini_clex llama2_7b_clex_chat llama2_7b_clex_chat_skip"""
    assert set(told.split()) <= set(EXPERIMENTS)


OURS = [name for name in EXPERIMENTS if (CONF / f"experiment/{name}.yaml").read_text().count("/scaling: clex\n")]


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "experiment"])
def test_every_option_of_a_group_composes(group):
    for file in (CONF / group).glob("*.yaml"):
        composed(f"{group}={file.stem}", "dry_run=true")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_scales_to_every_length_that_it_evaluates(name):
    config = composed(f"+experiment={name}")
    model = architecture.stand_in(config.model)
    own = architecture.to_read(model)
    if model.context_len is not None:
        assert model.context_len < own.max_position_embeddings, "L is the architecture's own, or what it was trained on"
    # By our recipe t is drawn to twice what is served, since the last positions of t_max are hardly ever seen.
    served = config.scaling.t_max / (2 if name in OURS else 1) * architecture.context_length(model, own)
    assert config.scaling.name is Method.none or max(config.evaluation.lengths) == served


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if not name.startswith(("tiny", "study")) and "chat" not in name]
)
def test_large_experiments_take_two_million_tokens_a_step_and_two_billion_in_all(name):
    config = composed(f"+experiment={name}")
    tokens = config.optim.batch_rows * config.data.seq_len
    assert tokens == 2**21
    assert tokens * config.optim.steps == pytest.approx(2e9, rel=0.001)


@pytest.mark.parametrize("name", OURS)
def test_rows_of_our_recipe_are_at_most_l_tokens_and_each_value_is_the_measured_one(name):
    config = composed(f"+experiment={name}")
    model = architecture.stand_in(config.model)
    # docs/results.md has no measurement of rows longer than L.
    assert config.data.seq_len <= architecture.context_length(model, architecture.to_read(model))
    scaling = config.scaling
    assert (scaling.field.name, scaling.drift.name, scaling.lr_scale) == ("log_time", "yarn", 1)
    assert (scaling.positions.name, scaling.as_used, scaling.log_scale.name) == ("skip", 0.2, "off")
    assert scaling.t_factor == 1


def test_papers_presets_differ_from_ours_in_the_scaling_alone():
    papers = [name for name in EXPERIMENTS if name.endswith("_paper")]
    assert len(papers) == 4
    for name in papers:
        theirs, own = composed(f"+experiment={name}"), composed(f"+experiment={name.removesuffix('_paper')}")
        assert (theirs.scaling.positions.name, theirs.scaling.lr_scale, theirs.scaling.t_factor) == ("random", 1, 1)
        assert own.scaling.t_max == 2 * theirs.scaling.t_max
        for part in ("model", "data", "optim", "engine", "evaluation", "seed"):
            assert getattr(theirs, part) == getattr(own, part)


def test_the_llama_2_7b_experiment_follows_the_paper():
    config = composed("+experiment=llama2_7b_clex_paper")
    assert (config.data.seq_len, config.scaling.t_max, config.optim.lr) == (4096, 16, 2e-5)
    assert (config.optim.warmup, config.optim.schedule.name, config.optim.weight_decay) == (0.03, "cosine", 0)
    assert (config.engine.precision.name, config.engine.zero_stage) == ("bf16", 3)
    assert config.engine.activation_checkpointing
    assert config.evaluation.lengths == [4096, 8192, 16384, 32768, 65536]


def test_the_tiny_runs_differ_only_in_the_scaling():
    clex, continued = composed("+experiment=tiny_clex"), composed("+experiment=tiny_continued")
    assert clex.scaling.name is Method.clex
    assert continued.scaling.name is Method.none
    for part in ("model", "data", "optim", "engine", "seed"):
        assert getattr(clex, part) == getattr(continued, part)
    assert clex.evaluation.lengths == continued.evaluation.lengths
    assert clex.evaluation.num_windows == continued.evaluation.num_windows


def test_every_file_of_conf_opens_with_a_comment():
    for file in CONF.rglob("*.yaml"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), file


def test_hydra_writes_no_file_and_no_folder():
    configuration.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", return_hydra_config=True, overrides=["hydra.runtime.output_dir=."]).hydra
    assert (hydra.run.dir, hydra.output_subdir) == (".", None)
    assert hydra.job_logging.root is None
    assert hydra.hydra_logging.root is None
    assert hydra.sweep.dir.startswith("runs/")


def test_every_key_has_a_description_and_a_type():
    rows = describe(Config)
    assert len({key for key, *_ in rows}) == len(rows) > 50
    assert all(kind and meaning for _, kind, _, meaning in rows)


def test_a_written_configuration_composes_to_itself(tmp_path):
    config = composed("+experiment=tiny_clex", "optim.lr=3e-4")
    (tmp_path / "config.yaml").write_text(run_folder.as_yaml(config))
    read = OmegaConf.merge(OmegaConf.structured(configuration.Config), OmegaConf.load(tmp_path / "config.yaml"))
    assert configuration.to_config(read) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scaling.t_max=0.5", "scaling.t_max=0.5: a scale factor is at least 1"),
        ("data.seq_len=1", "data.seq_len=1"),
        ("engine.zero_stage=4", "engine.zero_stage=4: 0, 1, 2 or 3"),
        ("evaluation.lengths=[128,192]", "evaluation.lengths=[128, 192]"),
        ("optim.warmup=1", "optim.warmup=1"),
        ("optim.batch_rows=0", "optim.batch_rows=0: at least 1 row"),
        ("seed=-1", "seed=-1"),
        ("scaling.param_factor=0", "scaling.param_factor=0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_a_remedy(override, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        composed("+experiment=tiny_clex", override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [("+optim.lrr=1", "optim.lr"), ("+t_max=4", "scaling.t_max"), ("+scaling.lr=1", "optim.lr")],
)
def test_a_plus_sign_does_not_carry_an_unknown_key_past_the_schema(override, remedy):
    with pytest.raises(ValueError, match=rf"no such key; did you mean .*{remedy}"):
        composed("+experiment=tiny_clex", override)


def test_default_evaluation_lengths_are_those_of_the_model():
    config = composed("scaling=clex", "scaling.t_max=4", "dry_run=true")
    assert (config.data.seq_len, config.evaluation.lengths) == (0, [])
    told = configuration.with_lengths(config, 1000)
    assert (told.data.seq_len, told.evaluation.lengths) == (1000, [1000, 2000, 4000])


def test_given_evaluation_lengths_are_unchanged():
    config = composed("data.seq_len=64", "evaluation.lengths=[64,512]", "dry_run=true")
    assert configuration.with_lengths(config, 1000, longest_document=100) == config


@pytest.mark.parametrize(
    ("t_max", "longest_document", "lengths"),
    [(None, None, [8, 16, 32, 64, 128]), (None, 63, [8, 16, 32]), (2.5, 63, [8, 16]), (16, 7, [8])],
)
def test_default_lengths_end_at_the_limit_of_scaling_or_documents(t_max, longest_document, lengths):
    assert configuration.default_lengths(8, t_max, longest_document) == lengths


def test_an_evaluation_only_method_is_refused_in_training():
    with pytest.raises(
        ValueError, match=r"^scaling\.name=lm_infinite: reads a model in evaluation .*; train by clex, "
    ):
        composed("+experiment=tiny_clex", "scaling.name=lm_infinite")
