# --- one task per node: DeepSpeed's launcher starts its ranks ------------------------------------------------------
task() {
    exec "${prefix[@]}" "$python" -m deepspeed.launcher.runner --log_level=warning --hostfile="$submission/hostfile" --no_ssh \
        --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
        "$submission/code/train.py" "${arguments[@]}"
}
