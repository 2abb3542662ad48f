"""Job scripts: quoting of site values, directives, and refused values."""

import os
import subprocess
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clex_train.config import root as configuration
from clex_train.config.launch import Container, LaunchConfig, seconds
from clex_train.config.root import Config
from launch import job_script
from launch.containers import entrance
from tests.helpers.composing import composed
from tests.launch.job_runs import BASE

NASTY = (
    "$(touch pwned)",
    "`touch pwned`",
    "a'b\"c",
    "; touch pwned #",
    "a b  c",
    "\\",
    "${HOME}",
    "*",
    "!x",
    "-n",
    "é λ",
)
text = st.one_of(
    st.sampled_from(NASTY), st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
).filter(str.isprintable)


@pytest.fixture(scope="module")
def plain_run() -> Config:
    return composed(*BASE, "output_dir=run")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(value=text, other=text, values=st.lists(text, max_size=3))
def test_site_values_reach_the_job_unchanged_and_are_not_executed(tmp_path, plain_run, value, other, values):
    launch = LaunchConfig(
        account=value, partition=other, python=value, network_interface=other, environment={"SITE": value}
    )
    launch.srun_options = [f"--x={item}" for item in values]
    script = job_script.render(replace(plain_run, launch=launch), tmp_path / "run" / "launch" / "one", tmp_path)
    head = script.partition("# --- one task")[0]
    assert sum(line.startswith("#SBATCH") for line in head.splitlines()) == 13, "no value begins a line of its own"
    printed = 'printf "%s\\0" "$python" "$SITE" "$NCCL_SOCKET_IFNAME" "$GLOO_SOCKET_IFNAME" "${srun_options[@]}"'
    done = subprocess.run(["bash", "-c", f"{head}\n{printed}"], cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b""
    assert done.stdout.decode().split("\0")[:-1] == [value, value, other, other, *launch.srun_options]
    assert not (tmp_path / "pwned").exists()


def test_arguments_of_a_task_arrive_unchanged(lab):
    """Check through `declare -p` and a second bash, as srun starts it."""
    config = composed(*BASE, f"output_dir={lab.folder / 'run'}", "launch.layout=task_per_rank")
    config.launch.python = str(lab.folder / "bin" / "an 'interpreter' $(touch pwned)")
    script = job_script.render(config, lab.submission, lab.folder)
    program = lab.folder / "bin" / "an 'interpreter' $(touch pwned)"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$RANK/$WORLD_SIZE/$LOCAL_RANK" "$@" >"$LAB/train_arguments"\n')
    program.chmod(0o755)
    (lab.folder / "bin" / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (lab.folder / "run" / "final").mkdir()
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n2"}
    done = lab.life(script, **task)
    assert done.returncode == 0, done.stderr
    assert (lab.folder / "train_arguments").read_text().splitlines() == [
        "3/4/1",
        f"{lab.submission}/code/train.py",
        f"--config-path={lab.submission}",
        "--config-name=config",
    ]
    assert not (lab.folder / "pwned").exists()


@pytest.mark.parametrize(
    "layout", ["torchrun", "deepspeed", "task_per_rank", "h100_infiniband", "cpu", "pyxis", "apptainer"]
)
def test_every_preset_gives_a_valid_bash_script(lab, layout):
    script = lab.script(f"launch={layout}", "launch.nodes=2")
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--kill-on-bad-exit=1" in script
    tasks = 8 if layout == "task_per_rank" else 1
    assert f"#SBATCH --ntasks-per-node={tasks}\n" in script


def test_directives_follow_the_configuration(lab):
    overrides = ("launch.nodes=4", "launch.gpus_per_node=8", "launch.cpus_per_rank=12", "launch.time=1-12:00:00")
    site = (
        "launch.account=me",
        "launch.qos=high",
        'launch.constraint="a&b"',
        'launch.sbatch_options=["--mail-type=END"]',
    )
    lines = lab.script(*overrides, *site, "launch.exclusive=true", "launch.signal_before=600").splitlines()
    for line in (
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--time=1-12:00:00",
        "--signal=B:USR1@600",
        "--requeue",
        "--exclusive",
        "--account=me",
        "--qos=high",
        "--constraint=a&b",
        "--mail-type=END",
        "--dependency=singleton",
    ):
        assert f"#SBATCH {line}" in lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch.nodes=0", "launch.nodes=0: at least 1 node"),
        ("launch.gpus_per_node=-1", "launch.gpus_per_node=-1: 0 or a number of GPUs"),
        ("launch.ranks_per_node=4", "launch.ranks_per_node=4: one rank for each of launch.gpus_per_node=8 GPUs"),
        ("launch.time=soon", "launch.time=soon: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
        ("launch.time=0", "launch.time=0: longer than nothing"),
        ("launch.time=3", "launch.signal_before=300: must leave time to train: launch.time=3 is 180 s"),
        ("launch.max_restarts=-1", "launch.max_restarts=-1: 0 (never) or a number"),
        ('launch.account="a\\nb"', "launch.account='a\\nb': one line of printable characters"),
        ('launch.setup=["a\\nb"]', "launch.setup='a\\nb': one line of printable characters"),
        ("launch.sbatch_options=[-p x]", "launch.sbatch_options=-p x: write each as --name or --name=value"),
        ("+launch.environment={a-b: c}", "launch.environment=a-b: not the name of an environment variable"),
        ("launch.container=pyxis", "launch.container_image: launch.container=pyxis needs an image"),
        ("launch.container_image=x", "launch.container=none: choose pyxis or apptainer"),
    ],
)
def test_an_invalid_value_is_named_with_a_remedy(override, message):
    # Hydra's grammar has no escape for a newline, so the value contains a literal one.
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        composed(*BASE, override.replace("\\n", "\n"))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(days=st.integers(0, 30), hours=st.integers(0, 23), minutes=st.integers(0, 59), rest=st.integers(1, 59))
def test_every_form_of_a_time_limit_is_parsed(days, hours, minutes, rest):
    clock = hours * 3600 + minutes * 60 + rest
    assert seconds(f"{days}-{hours:02}:{minutes:02}:{rest:02}") == days * 86400 + clock
    assert seconds(f"{hours:02}:{minutes:02}:{rest:02}") == clock
    assert seconds(f"{minutes}:{rest:02}") == minutes * 60 + rest
    assert seconds(f"{rest}") == rest * 60
    assert seconds(f"{days + 1}-{hours}") == (days + 1) * 86400 + hours * 3600
    assert seconds(f"{days}-{hours}:{rest}") == days * 86400 + hours * 3600 + rest * 60


def test_the_configuration_of_a_job_composes_to_the_submitted_one(tmp_path):
    asked = composed("+experiment=tiny_clex", f"output_dir={tmp_path}", "data.path=a b", "launch.account=me")
    (tmp_path / "config.yaml").write_text(job_script.configuration_text(asked, tmp_path), encoding="utf-8")
    configuration.register()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        read = configuration.to_config(compose("config"))
    assert read.launch == LaunchConfig(), "where a run is launched is no part of it"
    assert read.model.config == f"{tmp_path}/code/conf/model/architectures/tiny", "the snapshot's, not the checkout's"
    read.launch, read.model.config = asked.launch, asked.model.config
    assert read == asked


def test_a_container_mounts_the_run_and_the_current_folder(tmp_path):
    launch = LaunchConfig(container_image="x.sqsh", container=Container.pyxis, container_mounts=["/data", "/a:/b"])
    folders = [tmp_path / "here", tmp_path / "run"]
    assert entrance(launch, folders).srun_options[1] == (
        f"--container-mounts={tmp_path}/here:{tmp_path}/here,{tmp_path}/run:{tmp_path}/run,/data:/data,/a:/b"
    )
    launch.container = Container.apptainer
    words = entrance(launch, folders).prefix
    assert words[:3] == ("apptainer", "exec", "--nv")
    assert words[-1] == "x.sqsh"
    assert os.path.join(tmp_path, "run") in words
