# --- one life of the job: the same in every life, from the queue to the queue ------------------------------------------
set -u -o pipefail
START_SECONDS=600

main() {
    life=${SLURM_RESTART_COUNT:-0}
    say "life $((life + 1)) on $SLURM_JOB_NODELIST"
    if ((life > max_restarts)); then
        say "given up: launch.max_restarts=$max_restarts"
        exit 1
    fi
    asked= step=
    trap 'say "the limit is near: asks the run to save and stop"; ask_to_stop' USR1
    trap 'say "SIGTERM: asks the run to save and stop"; ask_to_stop' TERM
    launch
    if fell_at_the_start; then
        say "that was before it got anywhere: launches it once more"
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

meet() { # The nodes may be others than in the last life: where the ranks meet is found anew.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + 2 * life + launches) % 10000))
    while is_taken "$MASTER_PORT"; do # by another job on this node, which is the first
        MASTER_PORT=$((MASTER_PORT + 1))
    done
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks_per_node/" >"$submission/hostfile"
    export MASTER_ADDR MASTER_PORT
    export PYTHONPATH=$submission/code${PYTHONPATH:+:$PYTHONPATH}
    # The first rank to end writes its exit code here.
    export CLEX_TRAIN_EXIT_CODE=$submission/exit_code
    rm -f "$CLEX_TRAIN_EXIT_CODE" "$run_dir/stop"
}

is_taken() { # Whether somebody on this node listens at a port.
    (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

train() { # Sets `code` to what the training answered.
    checkpoint_before=$(newest_checkpoint) started=$SECONDS
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_options[@]}" \
        bash -c "$(declare -p prefix python submission ranks_per_node arguments); $(declare -f on_node task); on_node" &
    step=$!
    end_lingering_step &
    [[ ! $asked ]] || ask_to_stop # again, for then there was no step to ask
    await_step
    # Launchers answer 1 for whatever their ranks answered, and one that is killed may even answer 0.
    if [[ -s $CLEX_TRAIN_EXIT_CODE && $(<"$CLEX_TRAIN_EXIT_CODE") != 0 ]]; then
        code=$(<"$CLEX_TRAIN_EXIT_CODE")
    elif ((code == 0)) && [[ ! -d $run_dir/final ]]; then
        code=1
    fi
}

on_node() { # What every task does first. A killed compilation leaves a lock: extensions are this job's and this node's.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$submission/extensions/$SLURMD_NODENAME}
    task
}

await_step() { # A trapped signal ends `wait`, not the step.
    while :; do
        interrupted=
        wait "$step"
        code=$?
        [[ $interrupted ]] || break
    done
}

end_lingering_step() { # srun waits for ever for tasks of a node that died and came back before SLURM noticed.
    while kill -0 "$step" 2>/dev/null; do
        if [[ -s $CLEX_TRAIN_EXIT_CODE ]] && (($(date +%s) - $(stat -c %Y "$CLEX_TRAIN_EXIT_CODE") >= linger)); then
            say "a rank ended $linger s ago and srun still waits for others: ends it"
            kill -KILL "$step"
        fi
        sleep 1
    done
}

ask_to_stop() { # A file reaches the ranks through every launcher and container, where a signal may end half-way.
    asked=yes interrupted=yes
    # Again and again, for a launch that is only starting removes the request to stop of the one before it.
    while kill -0 "$step" 2>/dev/null; do
        touch "$run_dir/stop"
        sleep 5
    done &
}

newest_checkpoint() {
    cat "$run_dir/checkpoints/latest" 2>/dev/null
}

fell_at_the_start() { # SLURM repeats a signal that a node was slow to take, and by then may hit the next life.
    case $code in 0 | 2 | 3 | 75) return 1 ;; esac
    [[ ! $asked ]] && ! got_further && ((SECONDS - started < START_SECONDS)) && [[ $(state) = RUNNING ]]
}

worth_another_life() {
    [[ $(state) = RUNNING ]] || return 1
    case $code in
    0 | 2 | 3) return 1 ;;                    # done; bad input; stopped to protect what it has
    75) [[ $asked || ! -e $run_dir/stop ]] ;; # stopped with a checkpoint, and not by a stop file of the user's
    *) got_further ;;                         # a crash: again if this life wrote a checkpoint
    esac
}

got_further() {
    [[ $(newest_checkpoint) != "$checkpoint_before" ]]
}

state() { # A job that was cancelled is COMPLETING by now, and stays cancelled.
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d = -f 2
}

requeue() {
    if ((life >= max_restarts)); then
        say "not requeued: launch.max_restarts=$max_restarts"
        return
    fi
    say "goes back into the queue"
    trap - USR1 USR2 TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this life
}

say() {
    echo "$(date '+%F %T') slurm job $SLURM_JOB_ID: $*"
}

main
