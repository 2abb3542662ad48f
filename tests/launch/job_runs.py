"""Job scripts run by bash without SLURM: stand-ins for its commands record their calls."""

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch import job_script
from tests.helpers.composing import composed

BASE = ("+experiment=tiny_base", "data.path=store")

COMMANDS = {
    "srun": """
printf '%s\\n' "$@" >"$LAB/srun_arguments"
echo "$MASTER_PORT" >>"$LAB/launches"
[ -z "$FALLS" ] || [ "$(wc -l <"$LAB/launches")" -le "$FALLS" ] || SRUN_ANSWERS=0 RANK_ANSWERS=
[ -z "$RANK_ANSWERS" ] || echo "$RANK_ANSWERS" >"$CLEX_TRAIN_EXIT_CODE"
[ -z "$LINGERS" ] || exec sleep 3600
[ -z "$CHECKPOINT" ] || { mkdir -p "$LAB/run/checkpoints"; echo "$CHECKPOINT" >"$LAB/run/checkpoints/latest"; }
[ "$SRUN_ANSWERS" != 0 ] || [ -n "$NO_FINAL" ] || mkdir -p "$LAB/run/final"
[ -z "$STOP_FILE" ] || touch "$LAB/run/stop"
[ -z "$SIGNAL" ] || kill -s "$SIGNAL" "$PPID"
[ -z "$SIGNAL$AWAITS_STOP" ] || while [ ! -e "$LAB/run/stop" ]; do sleep 0.02; done
exit "$SRUN_ANSWERS"
""",
    "scontrol": """
case "$*" in
"show hostnames "*) printf 'n1\\nn2\\n' ;;
*"show job"*) echo "JobId=7 JobState=$JOB_STATE Reason=None" ;;
requeue*) echo "$*" >>"$LAB/requeued"; kill "$PPID" ;;
esac
""",
    "module": 'echo "module $*" >>"$LAB/modules"',
}


@dataclass
class Lab:
    """A folder with one submission; `life` runs its job once, from start or requeue to exit."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        self.submission.mkdir(parents=True)
        for name, body in COMMANDS.items():
            program = self.folder / "bin" / name
            program.write_text(f"#!/bin/bash\n{body}")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def submission(self) -> Path:
        return self.folder / "run" / "launch" / "one"

    def script(self, *overrides: str) -> str:
        """Return the text of the job script."""
        config = composed(*BASE, f"output_dir={self.folder / 'run'}", *overrides)
        return job_script.render(config, self.submission, self.folder)

    def life(self, script: str, **facts: str) -> subprocess.CompletedProcess[str]:
        """Run a script as slurmd would; `facts` set the answers of SLURM and the training."""
        known = {
            "SRUN_ANSWERS": "0",
            "RANK_ANSWERS": "",
            "CHECKPOINT": "",
            "SIGNAL": "",
            "STOP_FILE": "",
            "NO_FINAL": "",
            "AWAITS_STOP": "",
            "LINGERS": "",
            "FALLS": "",
            "JOB_STATE": "RUNNING",
        }
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "LAB": str(self.folder)}
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, **path, **job, **known, **facts},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    @property
    def was_requeued(self) -> bool:
        return (self.folder / "requeued").exists()
