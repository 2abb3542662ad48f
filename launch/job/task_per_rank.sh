# --- one task for each rank: srun starts it, its number is its rank ----------------------------------------------------
task() {
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "${prefix[@]}" "$python" "$submission/code/train.py" "${arguments[@]}"
}
