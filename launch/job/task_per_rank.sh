# --- one task per rank: srun starts it, and its task number is its rank ----------------------------------------------------
task() {
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "${prefix[@]}" "$python" "$submission/code/train.py" "${arguments[@]}"
}
