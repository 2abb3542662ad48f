"""Suggest existing names that are similar to a misspelt one."""

import difflib
from collections.abc import Sequence

ELSEWHERE = {
    "accumulation_steps": "engine.accumulation",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "attn_implementation": "attention.implementation",
    "base_model": "model.path",
    "batch_size": "optim.batch_rows",
    "bf16": "engine.precision",
    "block_size": "data.seq_len",
    "checkpoint_every": "checkpoint.every",
    "context_length": "model.context_len",
    "data_path": "data.path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "deepspeed_stage": "engine.zero_stage",
    "dtype": "engine.precision",
    "eval_every": "evaluation.every",
    "eval_steps": "evaluation.every",
    "fp16": "engine.precision",
    "global_batch_size": "optim.batch_rows",
    "grad_clip": "optim.clip",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "gradient_clipping": "optim.clip",
    "learning_rate": "optim.lr",
    "logging_steps": "tracking.log_every",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "max_length": "data.seq_len",
    "max_position_embeddings": "model.context_len",
    "max_seq_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_steps": "optim.steps",
    "micro_batch_size": "engine.micro_batch",
    "min_lr": "optim.min_lr_ratio",
    "model_max_length": "model.context_len",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_epochs": "optim.steps",
    "num_steps": "optim.steps",
    "num_train_epochs": "optim.steps",
    "output": "output_dir",
    "per_device_batch_size": "engine.micro_batch",
    "per_device_train_batch_size": "engine.micro_batch",
    "precision": "engine.precision",
    "pretrained_model_name_or_path": "model.path",
    "report_to": "tracking.name",
    "resume_from_checkpoint": "resume",
    "rope_scaling": "scaling.name",
    "run_name": "name",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "scheduler": "optim.schedule",
    "seq_length": "data.seq_len",
    "sequence_length": "data.seq_len",
    "tokenizer_name": "model.tokenizer",
    "torch_dtype": "engine.precision",
    "train_batch_size": "optim.batch_rows",
    "wandb_mode": "tracking.wandb",
    "wandb_project": "tracking.project",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "weight_init": "model.init",
    "zero": "engine.zero_stage",
    "zero_optimization": "engine.zero_stage",
}
"""Names in other trainers (Hugging Face Trainer, Axolotl, DeepSpeed) for keys of this one."""


def did_you_mean(key: str, keys: Sequence[str]) -> str:
    """Return `did you mean a, b or c?` for a dotted key among all keys; an empty string if none is similar."""
    group, _, field = key.rpartition(".")
    # Case is ignored: people type FP16 and ZeRO.
    same = [name for name in keys if name == ELSEWHERE.get(field.lower())]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == field]
    siblings = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == group}
    # 0.6 is difflib's default; lower values suggest unrelated keys.
    nearby = [siblings[name] for name in difflib.get_close_matches(field, siblings, n=2, cutoff=0.6)]
    # A field of the same name in another group is the surest guess, then names of other trainers, then typos.
    found = elsewhere or same or nearby or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f"did you mean {in_words(found)}?" if found else ""


def in_words(names: Sequence[str]) -> str:
    """Join names as `a, b or c`."""
    # rsplit at the last comma only.
    return " or ".join(", ".join(names).rsplit(", ", 1))
