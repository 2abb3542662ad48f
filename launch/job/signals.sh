# --- one life of the job, from the start to the end or the next requeue, for all launchers ------------------------------------------
set -u -o pipefail
START_SECONDS=600

main() {
    life=${SLURM_RESTART_COUNT:-0}
    say "life $((life + 1)) on $SLURM_JOB_NODELIST"
    if ((life > max_restarts)); then
        say "giving up: launch.max_restarts=$max_restarts"
        exit 1
    fi
    asked= step=
    trap 'say "time limit is near: asking the run to save and stop"; ask_to_stop' USR1
    trap 'say "SIGTERM: asking the run to save and stop"; ask_to_stop' TERM
    launch
    if failed_at_start; then
        say "failed before any progress: launching once more"
        launch
    fi
    if worth_another_life; then
        requeue
    fi
    exit "$code"
}

launch() {
    launches=$((${launches:-0} + 1))
    meet
    train
    say "training ended with exit code $code"
}

meet() { # Choose address and port of the rendezvous; the nodes may differ from those of the last life.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + 2 * life + launches) % 10000))
    while is_taken "$MASTER_PORT"; do # another job may run on this first node
        MASTER_PORT=$((MASTER_PORT + 1))
    done
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks_per_node/" >"$submission/hostfile"
    export MASTER_ADDR MASTER_PORT
    export PYTHONPATH=$submission/code${PYTHONPATH:+:$PYTHONPATH}
    # The first rank to end writes its exit code here.
    export CLEX_TRAIN_EXIT_CODE=$submission/exit_code
    rm -f "$CLEX_TRAIN_EXIT_CODE" "$run_dir/stop"
}

is_taken() { # Succeed if something on this node listens at a port.
    (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

train() { # Run the training and set `code` to its exit code.
    checkpoint_before=$(newest_checkpoint) started=$SECONDS
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_options[@]}" \
        bash -c "$(declare -p prefix python submission ranks_per_node arguments); $(declare -f on_node task); on_node" &
    step=$!
    end_lingering_step &
    [[ ! $asked ]] || ask_to_stop # repeat a request that came before the step existed
    await_step
    # Launchers return 1 for any failure of their ranks, and a killed one may even return 0.
    if [[ -s $CLEX_TRAIN_EXIT_CODE && $(<"$CLEX_TRAIN_EXIT_CODE") != 0 ]]; then
        code=$(<"$CLEX_TRAIN_EXIT_CODE")
    elif ((code == 0)) && [[ ! -d $run_dir/final ]]; then
        code=1
    fi
}

on_node() { # Prepare a task. Extensions are built per job and node, because a killed compilation leaves a lock behind.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$submission/extensions/$SLURMD_NODENAME}
    task
}

await_step() { # Wait for the step; a trapped signal ends `wait` early, but not the step.
    while :; do
        interrupted=
        wait "$step"
        code=$?
        [[ $interrupted ]] || break
    done
}

end_lingering_step() { # srun waits forever for tasks of a node that died and came back before SLURM noticed.
    while kill -0 "$step" 2>/dev/null; do
        if [[ -s $CLEX_TRAIN_EXIT_CODE ]] && (($(date +%s) - $(stat -c %Y "$CLEX_TRAIN_EXIT_CODE") >= linger)); then
            say "a rank ended $linger s ago and srun still waits for others: killing the step"
            kill -KILL "$step"
        fi
        sleep 1
    done
}

ask_to_stop() { # Use a file: it reaches the ranks through any launcher and container, which a signal may not.
    asked=yes interrupted=yes
    # Repeatedly, because a launch that is just starting removes the stop file of an earlier one.
    while kill -0 "$step" 2>/dev/null; do
        touch "$run_dir/stop"
        sleep 5
    done &
}

newest_checkpoint() {
    cat "$run_dir/checkpoints/latest" 2>/dev/null
}

failed_at_start() { # SLURM repeats a signal that a node was slow to handle, and may hit the next life with it.
    case $code in 0 | 2 | 3 | 75) return 1 ;; esac
    [[ ! $asked ]] && ! got_further && ((SECONDS - started < START_SECONDS)) && [[ $(state) = RUNNING ]]
}

worth_another_life() {
    [[ $(state) = RUNNING ]] || return 1
    case $code in
    0 | 2 | 3) return 1 ;;                    # done; bad input; stopped by a guard
    75) [[ $asked || ! -e $run_dir/stop ]] ;; # stopped with a checkpoint, but not by the user's stop file
    *) got_further ;;                         # a crash: repeat if this life wrote a checkpoint
    esac
}

got_further() {
    [[ $(newest_checkpoint) != "$checkpoint_before" ]]
}

state() { # A cancelled job is COMPLETING by now, and must not be requeued.
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d = -f 2
}

requeue() {
    if ((life >= max_restarts)); then
        say "not requeued: launch.max_restarts=$max_restarts"
        return
    fi
    say "requeueing"
    trap - USR1 USR2 TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this life
}

say() {
    echo "$(date '+%F %T') slurm job $SLURM_JOB_ID: $*"
}

main
