"""Records of a run: metrics, run folder, wandb, and the block that opens a program."""
