"""Training runs on a real SLURM of two nodes: signalled, requeued, killed, losing a node, cancelled."""

import re

import pytest

from launch import slurm
from tests.helpers.composing import composed
from tests.slurm.slurm_cluster import wait_for
from tests.slurm.slurm_jobs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def uninterrupted(jobs):
    """Train a run without interruptions, one task per node with torchrun inside."""
    job = jobs.submit("uninterrupted")
    assert jobs.wait_for_end(job, "uninterrupted") == "COMPLETED", jobs.log("uninterrupted")
    return "uninterrupted"


def test_a_run_stopped_three_times_reads_every_row_once_and_ends_bitwise_equal(jobs, uninterrupted):
    """Save, requeue and resume automatically each time, after a stray signal that ends the first launch."""
    job = jobs.submit("stopped", "launch.max_restarts=3")
    wait_for(lambda: jobs.ranks("stopped"), 300, f"the first ranks\n{jobs.log('stopped')}")
    jobs.cluster.run("scancel", "--signal=KILL", f"{job}.0")
    wait_for(lambda: "once more" in jobs.log("stopped"), 300, f"the second launch\n{jobs.log('stopped')}")
    for life, (step, signal) in enumerate([(20, "USR1"), (50, "TERM"), (80, "USR1")], 1):
        # Steps of this launch, however far the previous one came before its signal.
        jobs.wait_for_step(job, "stopped", max(step, jobs.last_step("stopped") + 2))
        jobs.cluster.run("scancel", "--batch", f"--signal={signal}", job)
        wait_for(lambda life=life: jobs.restarts(job) >= life, 300, f"requeue {life}\n{jobs.log('stopped')}")
    assert jobs.wait_for_end(job, "stopped") == "COMPLETED", jobs.log("stopped")
    assert len(set(re.findall(r"resumed step (\d+)", jobs.log("stopped")))) == 3
    assert_same_run(jobs, "stopped", uninterrupted)


def test_a_run_survives_a_killed_rank_and_a_lost_node(jobs, cluster, uninterrupted):
    """Start every rank by srun. SLURM waits for a node that is down, because there is no other."""
    job = jobs.submit("bereft", "launch=task_per_rank")
    jobs.wait_for_step(job, "bereft", 30)
    jobs.wait_for_checkpoint("bereft")
    jobs.kill_rank("bereft", 1)
    wait_for(lambda: jobs.restarts(job) >= 1, 300, f"the requeue after a crash\n{jobs.log('bereft')}")
    jobs.wait_for_step(job, "bereft", 60)
    before = jobs.restarts(job)
    cluster.kill_node(cluster.nodes[1])
    try:
        wait_for(lambda: jobs.restarts(job) > before, 300, f"the requeue by SLURM\n{jobs.log('bereft')}")
    finally:
        cluster.start_node(cluster.nodes[1])
    assert jobs.wait_for_end(job, "bereft") == "COMPLETED", jobs.log("bereft")
    assert_same_run(jobs, "bereft", uninterrupted)


def test_a_job_near_its_limit_is_requeued_and_a_cancelled_one_is_not(jobs, cluster):
    """Use DeepSpeed's launcher on each node, with too many long steps to finish before SLURM's signal."""
    limit = ("launch.time=2", "launch.signal_before=60", "optim.steps=1000", "checkpoint.every=0")
    job = jobs.submit("cancelled", "launch=deepspeed", "optim.batch_rows=64", *limit)
    wait_for(lambda: jobs.restarts(job) >= 1, 300, f"the requeue\n{jobs.log('cancelled')}")
    assert "time limit is near" in jobs.log("cancelled")
    assert "training ended with exit code 75" in jobs.log("cancelled")
    # Otherwise the signal would come repeatedly before a slow machine has started the next launch.
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")
    jobs.wait_for_step(job, "cancelled", jobs.last_step("cancelled") + 2, 400)
    cluster.run("scancel", job)
    assert jobs.wait_for_end(job, "cancelled") == "CANCELLED"
    wait_for(lambda: not jobs.processes("cancelled"), 120, "the end of every process")
    latest = (jobs.folder / "cancelled" / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step_")) >= jobs.last_step("cancelled")
    assert "Traceback" not in jobs.log("cancelled"), jobs.log("cancelled")


def test_a_refusal_of_the_cluster_is_quoted(jobs):
    with pytest.raises(AssertionError, match=r"error: sbatch refuses the job: .*invalid partition specified: nope"):
        jobs.submit("refused", "launch.partition=nope")


def test_values_of_the_site_reach_slurm_unchanged(jobs, cluster, monkeypatch):
    """Use names with every character that a shell or the parser of sbatch could misread."""
    nasty = 'it\'s "a" $(touch pwned) `touch pwned` ${HOME} #1 %j \\ end'
    folder = jobs.folder / nasty.replace("\\", "").replace("/", "")
    options = ("launch.gpus_per_node=0", "launch.time=10", f"data.path={jobs.store}")
    config = composed("+experiment=tiny_base", *options)
    config.output_dir, config.name = str(folder), nasty
    config.launch.sbatch_options, config.launch.python = [f"--comment={nasty}"], "/bin/false"
    monkeypatch.chdir(jobs.folder)
    slurm.write(config, folder / "launch" / "one")
    job = cluster.run("sbatch", "--parsable", str(folder / "launch" / "one" / "job.sh")).stdout.strip()
    said = cluster.run("scontrol", "-o", "show", "job", job).stdout
    assert f" JobName={nasty}-" in said
    assert f" Comment={nasty} " in said
    assert jobs.wait_for_end(job, folder.name) == "FAILED"
    assert "training ended with exit code 1" in jobs.log(folder.name), "it is where it was asked for"
    assert not list(jobs.folder.rglob("pwned"))
