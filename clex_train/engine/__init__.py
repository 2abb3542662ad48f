"""DeepSpeed and the memory of a step: ZeRO, sequence parallelism, tiled loss and MLP, activation offload, Liger."""
