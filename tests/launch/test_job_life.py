"""Requeueing, stopping and restarting of jobs, with stand-ins for SLURM's commands; tests/slurm uses real ones."""

import socket

import pytest


@pytest.mark.parametrize(
    ("case", "facts", "requeued"),
    [
        ("finished", {}, False),
        ("stopped with a checkpoint", {"SRUN_ANSWERS": "1", "RANK_ANSWERS": "75"}, True),
        ("the same without a record of the rank's", {"SRUN_ANSWERS": "75"}, True),
        ("bad input", {"SRUN_ANSWERS": "1", "RANK_ANSWERS": "2", "CHECKPOINT": "step_5"}, False),
        ("stopped to protect the run", {"SRUN_ANSWERS": "1", "RANK_ANSWERS": "3", "CHECKPOINT": "step_5"}, False),
        ("a crash that got further", {"SRUN_ANSWERS": "1", "CHECKPOINT": "step_5"}, True),
        ("a crash that got nowhere", {"SRUN_ANSWERS": "1"}, False),
        ("a killed rank that got further", {"SRUN_ANSWERS": "137", "CHECKPOINT": "step_5"}, True),
        ("a killed launcher that answers 0", {"SRUN_ANSWERS": "0", "NO_FINAL": "yes", "CHECKPOINT": "step_5"}, True),
        ("the same while its ranks save", {"SRUN_ANSWERS": "0", "NO_FINAL": "yes", "RANK_ANSWERS": "75"}, True),
        ("cancelled", {"SRUN_ANSWERS": "75", "JOB_STATE": "COMPLETING"}, False),
        ("the last restart but one", {"SRUN_ANSWERS": "75", "SLURM_RESTART_COUNT": "2"}, True),
        ("no restart left", {"SRUN_ANSWERS": "75", "SLURM_RESTART_COUNT": "3"}, False),
        ("signalled before its limit", {"SRUN_ANSWERS": "75", "SIGNAL": "USR1"}, True),
        ("preempted with a grace time", {"SRUN_ANSWERS": "75", "SIGNAL": "TERM"}, True),
        ("a stop file of the user's", {"SRUN_ANSWERS": "75", "STOP_FILE": "yes"}, False),
        ("signalled, and finished all the same", {"SIGNAL": "USR1"}, False),
    ],
)
def test_a_job_is_requeued_if_it_can_resume(lab, case, facts, requeued):
    done = lab.life(lab.script("launch.max_restarts=3"), **facts)
    assert lab.was_requeued == requeued, f"{case}: {done.stdout}{done.stderr}"
    if not requeued:
        assert done.returncode == int(facts.get("RANK_ANSWERS") or facts.get("SRUN_ANSWERS", "0"))


def test_a_job_that_slurm_requeued_too_often_does_not_start(lab):
    done = lab.life(lab.script("launch.max_restarts=3"), SLURM_RESTART_COUNT="4")
    assert done.returncode == 1
    assert "launch.max_restarts=3" in done.stdout
    assert not (lab.folder / "srun_arguments").exists()


def test_an_old_stop_request_does_not_reach_the_next_launch(lab):
    (lab.folder / "run" / "stop").touch()
    assert lab.life(lab.script()).returncode == 0
    assert not (lab.folder / "run" / "stop").exists()


def test_the_exit_code_of_an_earlier_launch_is_not_reused(lab):
    (lab.submission / "exit_code").write_text("75\n")
    assert lab.life(lab.script(), SRUN_ANSWERS="1").returncode == 1
    assert not lab.was_requeued


def test_an_srun_that_outlives_its_ranks_is_ended_and_their_exit_code_counts(lab):
    done = lab.life(lab.script("launch.linger=1"), LINGERS="yes", RANK_ANSWERS="75")
    assert lab.was_requeued, done.stdout + done.stderr
    assert "srun still waits" in done.stdout


def test_a_signal_before_training_starts_is_not_lost(lab):
    script = lab.script().replace("\n    meet\n", "\n    meet\n    kill -s USR1 $$\n")
    done = lab.life(script, AWAITS_STOP="yes", SRUN_ANSWERS="75")
    assert lab.was_requeued, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("facts", "launches", "code"),
    [
        ({"SRUN_ANSWERS": "143", "FALLS": "1"}, 2, 0),
        ({"SRUN_ANSWERS": "1", "RANK_ANSWERS": "4", "FALLS": "1"}, 2, 0),
        ({"SRUN_ANSWERS": "1"}, 2, 1),
        ({"SRUN_ANSWERS": "143", "JOB_STATE": "COMPLETING"}, 1, 143),
        ({"SRUN_ANSWERS": "1", "RANK_ANSWERS": "2"}, 1, 2),
        ({"SRUN_ANSWERS": "143", "SIGNAL": "TERM"}, 1, 143),
    ],
    ids=["signalled", "a rank lost", "a bug", "cancelled", "bad input", "asked to stop"],
)
def test_training_that_fails_at_the_start_is_launched_once_more(lab, facts, launches, code):
    done = lab.life(lab.script(), **facts)
    assert done.returncode == code, done.stdout + done.stderr
    ports = (lab.folder / "launches").read_text().split()
    assert len(set(ports)) == len(ports) == launches
    assert not lab.was_requeued


def test_training_that_fails_after_a_while_is_not_launched_again(lab):
    done = lab.life(lab.script().replace("START_SECONDS=600", "START_SECONDS=0"), SRUN_ANSWERS="1")
    assert done.returncode == 1
    assert len((lab.folder / "launches").read_text().split()) == 1


def test_ranks_meet_at_the_first_host_at_a_new_port_in_each_launch(lab):
    script = lab.script("launch.ranks_per_node=4", "launch.gpus_per_node=4").replace(
        "\nmain\n", "\nlife=$SLURM_RESTART_COUNT launches=1; meet; echo $MASTER_ADDR $MASTER_PORT\n"
    )
    ports = set()
    for count in range(3):
        host, port = lab.life(script, SLURM_RESTART_COUNT=str(count)).stdout.split()
        assert host == "n1"
        assert 20000 <= int(port) < 30000
        ports.add(port)
    assert len(ports) == 3
    assert (lab.submission / "hostfile").read_text() == "n1 slots=4\nn2 slots=4\n"


def test_a_port_used_by_another_job_on_the_first_node_is_skipped(lab):
    script = lab.script().replace("\nmain\n", "\nlife=0 launches=1; meet; echo $MASTER_PORT\n")
    first = int(lab.life(script).stdout)
    with socket.create_server(("", first)):
        assert int(lab.life(script).stdout) > first
    assert int(lab.life(script).stdout) == first


def test_modules_are_loaded_and_a_missing_one_ends_the_job(lab):
    script = lab.script("launch.modules=[cuda/12.8,nccl]")
    assert lab.life(script).returncode == 0
    assert (lab.folder / "modules").read_text() == "module load cuda/12.8\nmodule load nccl\n"
    (lab.folder / "bin" / "module").write_text("#!/bin/bash\nexit 1\n")
    assert lab.life(script).returncode == 2
