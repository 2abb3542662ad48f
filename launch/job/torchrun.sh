# --- one task per node: torchrun starts its ranks -----------------------------------------------------------------
task() {
    exec "${prefix[@]}" "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$ranks_per_node" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        "$submission/code/train.py" "${arguments[@]}"
}
