"""Stop requests by signals, stop files, the end of the launcher and deadlines, in one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from clex_train.config import duration
from clex_train.resilience import launchers, stop_requests
from clex_train.resilience.deadline import Deadline
from clex_train.resilience.stop_requests import StopRequests
from clex_train.tracking import run_folder

ROOT = Path(__file__).resolve().parents[2]
LISTENER = """
import sys, time
from clex_train.resilience import stop_requests
stop_requests.REPEAT_AFTER, heard, mark = {repeat_after}, [], stop_requests.SignalWatch._mark
stop_requests.SignalWatch._mark = lambda watch, number: (mark(watch, number), heard.append(number))
stop_requests.listen()
stop_requests.signals().leave_marks()
print("ready", flush=True)
while stop_requests.signals().reason is None:
    time.sleep(0.01)
print(stop_requests.signals().reason, flush=True)
{rest}
"""


def listener(rest: str, repeat_after: float = 0.5) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER.format(rest=rest, repeat_after=repeat_after)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_recorded_and_the_process_continues(number):
    process = listener("time.sleep(0.2)")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output == f"{number.name} arrived\n"


def test_an_immediately_repeated_signal_is_the_same_request():
    process = listener("while len(heard) < 2:\n    time.sleep(0.01)", repeat_after=600)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck_in_a_library():
    # A mutex locked twice never returns for a signal, like a collective without its peers.
    process = listener(
        "import ctypes; lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\n"
        "lock(mutex); lock(mutex)"
    )
    process.send_signal(signal.SIGUSR1)
    assert "SIGUSR1" in process.stdout.readline()
    time.sleep(stop_requests.MOMENT + 0.7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert "second signal (SIGTERM)" in process.stderr.read()


def test_the_end_of_the_launcher_is_a_stop_request(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n")
    script = LISTENER.format(rest="", repeat_after=0.5)
    process = subprocess.Popen(
        [sys.executable, str(launcher), script], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline() == f"its launcher (process {process.pid}) has exited\n"
    process.wait(120)


@pytest.mark.parametrize("listen", ["listen", "end_on_signals"])
def test_a_program_with_nothing_to_save_ends_with_its_launcher(tmp_path, listen):
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n")
    script = (
        "import os, time\nfrom clex_train.resilience import stop_requests\n"
        f"stop_requests.{listen}()\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, str(launcher), script], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    rank = psutil.Process(int(process.stdout.readline()))
    process.kill()
    _, alive = psutil.wait_procs([rank], timeout=60)
    assert not alive
    assert f"its launcher (process {process.pid}) has exited: ended" in process.stderr.read()
    process.wait(120)


def test_a_program_without_a_launcher_watches_none():
    assert launchers.launchers() == []


def test_a_stop_file_is_a_lasting_stop_request(tmp_path):
    stop = StopRequests(stop_file=tmp_path / "stop")
    assert stop.reason() is None
    (tmp_path / "stop").touch()
    stop._looked = 0.0
    assert stop.reason() == f"{tmp_path / 'stop'} exists"
    (tmp_path / "stop").unlink()
    assert stop.reason()


def test_the_deadline_leaves_time_for_the_longest_recent_step_and_save():
    deadline = Deadline(limit=1000.0, started=time.time() - 900.0)
    deadline.assume("save", 40.0)
    assert deadline.exceeded_by("step") is None
    deadline.took("step", 20.0)
    assert deadline.exceeded_by() is None, "a save alone: 1.5 * 40 + 20 < 100"
    assert "max_runtime ends in" in deadline.exceeded_by("step")
    for _ in range(Deadline.MEMORY):
        deadline.took("step", 1.0)
    assert deadline.exceeded_by("step") is None, "one slow step is forgotten"


def test_a_limit_too_short_for_any_step_allows_no_progress():
    stop = StopRequests(deadline=Deadline(limit=10.0, started=time.time() - 11.0))
    assert stop.is_too_short
    with stop.timed("step"):
        pass
    assert not stop.is_too_short
    assert stop.reason("step")


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 7200), ("0.5", 1800), ("23:30:00", 84600), ("1-02:00:30", 93630), ("0:00:10", 10)]
)
def test_durations_are_hours_or_clock_time(text, seconds):
    assert duration.seconds("max_runtime", text) == seconds


@pytest.mark.parametrize("text", ["0", "-1", "84600", "12:00", "1:60:00", "soon", ""])
def test_an_invalid_duration_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^max_runtime=.*hours:minutes:seconds"):
        duration.seconds("max_runtime", text)


def test_a_second_launch_waits_and_is_refused_if_the_first_remains(tmp_path):
    with (
        run_folder.run_lock(tmp_path, 0, patience=0),
        pytest.raises(ValueError, match=rf"output_dir=.*in use by process {os.getpid()} on"),
        run_folder.run_lock(tmp_path, 0, patience=0.3),
    ):
        raise AssertionError("two launches in one folder")
    with run_folder.run_lock(tmp_path, 0, patience=0):
        pass


def test_a_second_launch_starts_when_the_first_has_ended(tmp_path):
    held, begun = threading.Event(), []

    def first() -> None:
        with run_folder.run_lock(tmp_path, 0, patience=0):
            held.set()
            time.sleep(0.5)
            begun.append("first ends")

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(120)
    with run_folder.run_lock(tmp_path, 0, patience=120):
        begun.append("second begins")
    thread.join()
    assert begun == ["first ends", "second begins"]


def test_a_zombie_launcher_counts_as_ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    watched = psutil.Process(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not launchers.is_alive(watched)
    process.wait()


PROGRAM = """
import signal, sys, time
from clex_train.resilience import stop_requests
stop_requests.end_on_signals()
from clex_train.console import program as console
def work():
    print("ready", flush=True)
    {work}
sys.exit(console.run(work, str, kept="its cells are kept"))
"""


def program(work: str, **options) -> subprocess.Popen:
    """Start a program that does `work` under `console.run`, by default as in an interactive shell."""
    options = {"preexec_fn": restore_signals, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=work)], cwd=ROOT, text=True, **options)
    if process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process


def restore_signals() -> None:
    """Restore the default signal handling that a background test run disables."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", stop_requests.ENDING)
def test_a_program_with_nothing_to_save_ends_with_one_line_and_the_exit_code_of_shells(number):
    process = program("time.sleep(600)")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert errors == f"interrupted by {number.name}; its cells are kept\n"


@pytest.mark.parametrize(
    "work",
    [
        "\n    try: time.sleep(600)\n    except BaseException as error: raise ImportError('numpy failed') from error",
        "\n    class Late:\n        def __del__(self): time.sleep(600)\n    late = Late(); del late",
    ],
    ids=["made into another error by a library", "raised in a finalizer"],
)
def test_an_interrupt_swallowed_by_python_or_a_library_still_gives_one_line(work):
    process = program(work)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.startswith("interrupted by SIGINT")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("number", stop_requests.ENDING)
def test_a_signal_during_the_exit_of_a_finished_program_does_not_change_its_code(number):
    work = (
        "import builtins, os\n"
        "    kill = lambda self, kill=os.kill, pid=os.getpid(): kill(pid, {number})\n"
        "    builtins.torn_down_with_the_interpreter = type('Late', (), dict(__del__=kill))()"
    )
    process = program(work.format(number=int(number)))
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


def test_a_program_stuck_in_a_library_ends_after_its_grace():
    process = program(
        "import ctypes; lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\n"
        "    lock(mutex); lock(mutex)"
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "interrupted by SIGTERM\n"


def test_a_program_under_nohup_ignores_a_closed_terminal():
    def nohup() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = program("time.sleep(1.5); print('done')", preexec_fn=nohup)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (0, "done\n", "")


def test_an_interrupt_is_deferred_to_the_end_of_a_block():
    process = program(
        "\n    with stop_requests.shielding_children():\n        time.sleep(1.5); print('whole', flush=True)"
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output) == (130, "whole\n")


def test_only_a_real_second_ctrl_c_ends_a_saving_run_at_once():
    process = listener("time.sleep(600)", repeat_after=600)
    process.send_signal(signal.SIGINT)
    assert "SIGINT" in process.stdout.readline()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    time.sleep(2 * stop_requests.MOMENT + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    first, second = errors.splitlines()
    assert first.startswith("SIGINT: finishing the current work and saving")
    assert second == "second signal (SIGINT): ended at once"


def test_output_to_a_closed_terminal_does_not_fail_or_change_the_exit_code():
    program = (
        "import sys, time; from clex_train.utils import log, terminal\n"
        "terminal.survive_hangup('stdout', 'stderr'); log.setup()\n"
        "print('ready', flush=True); time.sleep(1)\n"
        "print('lost'); print('lost', file=sys.stderr); log.get('clex_train').info('lost'); sys.exit(75)"
    )
    master, slave = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=slave, stderr=slave)
    os.close(slave)
    assert os.read(master, 64).startswith(b"ready")
    os.close(master)
    assert process.wait(120) == 75
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)
    assert process.wait(120) == 75
