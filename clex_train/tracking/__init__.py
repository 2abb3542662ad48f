"""Records of a run: metrics, run folder, back ends that show them, and the block that opens a program."""
