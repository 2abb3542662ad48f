"""Adapters on two ranks of ZeRO-3 against one rank without ZeRO, over weights that are sharded while they are read."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

OPTIONS = (
    "adapter=longlora",
    "adapter.save=true",
    "model.config=null",
    "model.init=pretrained",
    "scaling=clex",
    "scaling.lr_scale=1.0",
    "scaling.t_max=4",
    "optim.steps=8",
    "optim.lr=5e-3",
    "engine.activation_checkpointing=true",
    "evaluation=never",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_store) -> str:
    """Save pretrained weights with the vocabulary of the store, L = 32; the embedding is tied."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_store.parent / "tokenizer")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, num_key_value_heads=1, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(600)
def test_two_ranks_of_zero3_equal_one_rank_without_zero(launcher, base):
    runs = {1: ("engine.zero_stage=0", "engine.micro_batch=8"), 2: ("engine.zero_stage=3", "engine.micro_batch=2")}
    for ranks, engine in runs.items():
        done = launcher.run(ranks, f"adapter_{ranks}", f"model.path={base}", *OPTIONS, *engine)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.tensor(launcher.figures(f"adapter_{ranks}", "loss")) for ranks in runs)
    assert len(one) == len(two) == 8
    assert one[-1] < one[0] - 0.1, "it learns"
    assert ((one - two).abs() / one).max() < 1e-5
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "clex.safetensors"):
        alone, sharded = (load_file(launcher.folder / f"adapter_{ranks}" / "final" / file) for ranks in runs)
        assert alone.keys() == sharded.keys()
        for name, tensor in alone.items():
            assert (tensor - sharded[name]).abs().max() <= 1e-3 * tensor.abs().max(), name
