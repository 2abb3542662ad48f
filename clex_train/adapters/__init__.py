"""Low-rank adapters on frozen weights (LoRA, LongLoRA): where they go, their layers, their merge, their files."""
