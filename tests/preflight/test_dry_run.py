"""The dry run: plans of every experiment, without weights, data or DeepSpeed."""

import json
import math
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from clex_train.preflight import dry_run
from clex_train.preflight.memory_plan import BESIDES, Part, Plan, make_plan
from clex_train.preflight.run_checks import Scope, run_checks
from clex_train.utils import distributed
from tests.helpers.composing import CONF, EXPERIMENTS, composed
from tests.helpers.tiny_causal_lm import save_tiny_llama

ROOT = CONF.parent
GIB = 2**30


def plan_of(*overrides: str) -> Plan:
    return make_plan(run_checks(composed(*overrides, "dry_run=true"), Scope.plan))


def part(plan: Plan, name: str) -> Part:
    return next(part for part in plan.parts if part.name == name)


TODAY = [
    "llama3_1_8b_clex",
    "qwen3_8b_clex",
    "qwen2_5_7b_clex",
    "olmo3_7b_clex",
    "smollm3_3b_clex",
    "smollm2_360m_clex",
    "mistral_7b_clex",
    "gemma3_4b_clex",
    "phi4_mini_clex",
]
"""Presets of models that are extended today."""
CAPACITY = 80e9
"""Bytes of a GPU of 80 GB."""


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {*TODAY}))
def test_every_experiment_has_a_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed(f"+experiment={name}")
    groups = math.gcd(4, config.optim.batch_rows)
    ranks = groups * config.engine.sequence_parallel
    plan = plan_of(f"+experiment={name}", f"engine.world_size={ranks}", "engine.micro_batch=1")
    assert plan.counts.total == sum(plan.counts.blocks)
    assert 0 < plan.peak == max(plan.totals())
    assert plan.batch.accumulation * groups == config.optim.batch_rows
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TODAY)
def test_presets_of_today_fit_eight_gpus_of_80_gb_and_one_with_the_state_in_host_memory(name):
    eight = plan_of(f"+experiment={name}", "engine.world_size=8")
    one = plan_of(f"+experiment={name}", "engine.world_size=1", "engine=zero3_offload")
    # Held in host memory by these runs, or beside the state on the GPU.
    cache = 0 if eight.config.evaluation.offload_cache else eight.evaluation_cache
    state = eight.totals()[1] - part(eight, "activations").device[1]
    for plan, num_ranks in ((eight, 8), (one, 1)):
        assert plan.counts.total == sum(plan.counts.blocks)
        assert plan.batch.accumulation * num_ranks == plan.config.optim.batch_rows
        assert plan.peak + BESIDES * GIB < CAPACITY
    assert state + cache + BESIDES * GIB < CAPACITY
    assert eight.host < GIB
    told = (CONF / f"experiment/{name}.yaml").read_text()
    assert f"`engine=zero3_offload` and {math.ceil(one.host / GIB):,} GiB of host memory" in told


def test_state_of_7b_on_64_gpus_is_exact():
    plan = plan_of("+experiment=llama2_7b_clex", "engine.world_size=64")
    count = 6_738_415_616
    assert plan.batch.accumulation == 8
    assert part(plan, "optimizer").device[0] == 12 * count / 64
    assert part(plan, "gradients").device[0] == 4 * count / 64 + 2 * 2 * 500_000_000
    assert part(plan, "parameters").device[0] == 2 * count / 64 + 2 * 1_000_000_000
    # 64 pairs and 128 hidden units: two matrices, a direction, the hidden units' bias and clock.
    assert plan.num_learned == 2 * 64 * 128 + 64 + 2 * 128
    assert part(plan, "logits").device[0] == pytest.approx(4096 * 32_000 * 12, rel=0.01)


def test_more_gpus_have_less_state_each_and_the_same_activations():
    few, many = (plan_of("+experiment=llama2_7b_clex", f"engine.world_size={n}") for n in (8, 64))
    for name in ("parameters", "gradients", "optimizer"):
        assert part(few, name).device[0] > part(many, name).device[0]
    assert part(few, "activations") == part(many, "activations")


def test_sequence_parallel_ranks_have_the_activations_of_their_shard(capsys):
    """Shard the state over all ranks as usual; both experiments default to eight sequence-parallel ranks."""
    experiment = "+experiment=llama2_7b_clex_64k"
    shared = plan_of(experiment)
    alone = plan_of(experiment, "engine.sequence_parallel=1")
    eighth = plan_of(experiment, "engine.sequence_parallel=1", "data.seq_len=8192", "optim.batch_rows=256")
    assert (shared.batch.world_size, shared.batch.accumulation, alone.batch.accumulation) == (8, 32, 4)
    for name in ("activations", "logits"):
        assert part(shared, name).device[0] == part(eighth, name).device[0]
        assert part(alone, name).device[0] > 7.9 * part(shared, name).device[0]
    # The all-to-all makes temporary copies in each layer.
    assert 1 < part(shared, "activations").device[1] / part(eighth, "activations").device[1] < 1.2
    assert part(shared, "optimizer") == part(alone, "optimizer")
    dry_run.print_plan(composed(experiment, "dry_run=true"))
    printed = capsys.readouterr().out
    assert "a step: 1 group of 8 ranks * 1 sequence * 32 micro-batches\n" in printed
    assert "1 * 8,192 tokens of 65,536, " in printed


def test_indivisible_heads_are_refused_in_the_plan():
    with pytest.raises(ValueError, match=r"engine\.sequence_parallel=3: .* 32 attention heads.* take 1 or 2 or 4 or 8"):
        plan_of("+experiment=llama2_7b_clex", "engine.sequence_parallel=3", "engine.world_size=3", "optim.batch_rows=9")


def test_recomputation_and_offload_each_reduce_their_part():
    plain = plan_of("+experiment=llama2_7b_clex", "engine.activation_checkpointing=false")
    recomputed = plan_of("+experiment=llama2_7b_clex")
    offloaded = plan_of("+experiment=llama2_7b_clex", "engine=zero3_offload")
    assert part(plain, "activations").device[0] > 10 * part(recomputed, "activations").device[0]
    assert offloaded.host > 16 * 6_738_415_616
    assert part(offloaded, "optimizer").device == (0, 0, 0)
    assert offloaded.peak < recomputed.peak


def test_tiling_and_activation_offload_are_in_the_plan(capsys):
    overrides = ("+experiment=llama2_7b_clex_64k", "engine.sequence_parallel=1", "dry_run=true")
    plain, long_rows = plan_of(*overrides, "engine=zero3"), plan_of(*overrides, "engine=long_rows")
    inputs = 32 * 65536 * 4096 * 2
    assert part(plain, "activations").host == 0
    assert part(long_rows, "activations").host == inputs
    assert part(plain, "activations").device[0] - part(long_rows, "activations").device[0] == inputs
    assert part(plain, "logits").device[0] == pytest.approx(65536 * 32000 * 12, rel=0.1)
    # The gradient of the output layer is accumulated in float32, next to that of a tile.
    weight, tile, hidden = 32000 * 4096, 1024 * 32000, 65536 * 4096
    assert part(long_rows, "logits").device[0] < 6 * weight + 12 * tile + 4 * hidden
    gained = [part(plan, "activations").device[1] - part(plan, "activations").device[0] for plan in (plain, long_rows)]
    assert gained[0] - gained[1] > 2 * (65536 * 11008 * 2)
    dry_run.print_plan(composed(*overrides, "engine=long_rows"))
    assert "layers recomputed from the host, loss in tiles of 1,024, MLP in tiles of 4,096" in capsys.readouterr().out


@pytest.mark.parametrize("recomputed", [False, True])
def test_document_masks_are_counted_as_layers_save_them(recomputed):
    """Count the float mask that SDPA makes from the bool mask: saved in each layer, or only in the recomputed one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings, num_hidden_layers=3)).train()
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) == (1, 1, 256, 256):
            kept[x.data_ptr()] = x.nbytes
        return x

    positions = torch.cat((torch.arange(100), torch.arange(156)))[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    overrides = ("+experiment=tiny_clex", "data.document_mask=true", "data.seq_len=256", "engine.micro_batch=1")
    recompute = f"engine.activation_checkpointing={str(recomputed).lower()}"
    plan = plan_of(*overrides, recompute, "engine.precision=fp32", "model=tiny")
    layers = 1 if recomputed else 4
    assert len(kept) == 3
    assert sum(kept.values()) == 3 * 256**2 * 4
    assert part(plan, "document mask").device[1] == 256**2 * (1 + layers * 4)
    assert "document mask" not in {p.name for p in plan_of(*overrides, "data.document_mask=false").parts}


def test_keys_and_values_of_an_evaluation_match_a_cache(capsys):
    """Expect half a MiB a token: 32 layers, 32 key heads of 128, keys and values in bfloat16."""
    plan = plan_of("+experiment=llama2_7b_clex")
    assert plan.evaluation_cache == 65536 * 2**19
    assert plan_of("+experiment=llama2_7b_clex_64k").evaluation_cache == 0
    dry_run.print_plan(composed("+experiment=llama2_13b_clex", "dry_run=true"))
    assert "evaluating 65,536 tokens: keys and values take 50.00 GiB a rank, in host memory" in capsys.readouterr().out


def test_host_memory_is_given_for_every_rank(capsys):
    dry_run.print_plan(composed("+experiment=llama3_8b_clex_1m", "dry_run=true"))
    assert "host 32.00 GiB a rank: a node needs that for each of its ranks" in capsys.readouterr().out


def test_a_cpu_run_has_a_single_memory():
    plan = plan_of("+experiment=tiny_clex", "engine.precision=fp32")
    assert not plan.on_gpu
    assert plan.host == 0
    assert part(plan, "ODE").device[0] > 0


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"optim\.batch_rows=512: must be a multiple"):
        plan_of("+experiment=llama2_7b_clex", "engine.world_size=7")


def test_a_length_beyond_the_scaling_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.lengths=.*scaling\.t_max \* L = 8 \* 4096 = 32768"):
        plan_of("+experiment=llama2_7b_clex", "scaling.t_max=8")


def test_a_local_directory_takes_precedence_over_the_shipped_architecture(tmp_path):
    from transformers import LlamaConfig

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=8192).save_pretrained(tmp_path)
    plan = plan_of("+experiment=llama2_7b_clex", f"model.path={tmp_path}")
    assert plan.counts.blocks[0] == 3200
    assert plan.subject.context_len == 8192, "nothing of the preset outlives another path"


def test_weights_of_another_shape_are_refused_in_the_plan(tmp_path):
    save_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(
        ValueError, match=r"model\.path=.*down_proj\.weight is \[48, 64\] in its weights and \[48, 96\]"
    ):
        # A store left by the quick start in this checkout would be refused before the weights.
        plan_of(f"model.path={tmp_path}", "evaluation=never", f"data.path={tmp_path / 'no_store'}")


def test_the_shipped_architecture_only_stands_in_for_its_model(tmp_path):
    elsewhere = plan_of("+experiment=llama2_7b_clex", "model.path=/models/Llama-2-7b-hf")
    assert elsewhere.counts.total == 6_738_415_616
    with pytest.raises(
        ValueError, match=r"model\.path=/models/mine: no such directory; .* of meta-llama/Llama-2-7b-hf"
    ):
        plan_of("+experiment=llama2_7b_clex", "model.path=/models/mine")
    with pytest.raises(ValueError, match=r"model\.path=/models/mine: no such directory; .* of runs/tiny_base/final"):
        plan_of("model.path=/models/mine")
    # A user's config.json without the name of a model is used.
    shutil.copytree(CONF / "model/architectures/tiny", tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    del config["_name_or_path"]
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    keys = ("model.path=/models/mine", f"model.config={tmp_path / 'mine'}", "evaluation=never")
    assert plan_of(*keys).subject.context_len == 128


def test_an_unreachable_hub_name_is_not_planned_as_another_model():
    with pytest.raises(
        ValueError, match=r"model\.path=owner/other: no readable config\.json \(the hub cannot be reached"
    ):
        plan_of("+experiment=llama2_7b_clex", "model.path=owner/other")


def test_a_local_store_is_described_and_refused_as_by_a_run(capsys, tmp_path, tiny_store):
    keys = ("+experiment=tiny_clex", "model=tiny", "data.seq_len=64", "evaluation.lengths=[64]", "dry_run=true")
    dry_run.print_plan(composed(*keys, f"data.path={tiny_store}"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"  data        {tiny_store}: ") and line.endswith(" epochs") for line in lines)
    assert any(line.startswith(f"  held out    {tiny_store}") for line in lines)
    with pytest.raises(ValueError, match=rf"^data\.path={tmp_path}: not a token store"):
        plan_of(*keys, f"data.path={tmp_path}")
    dry_run.print_plan(composed(*keys, "data.path=/not/here"))
    assert "  data        /not/here (not on this machine: not checked)" in capsys.readouterr().out.splitlines()


def test_sequences_of_a_preset_beyond_the_length_of_another_model_are_refused():
    keys = ("+experiment=llama3_8b_clex", "model=tiny", "evaluation=never", "engine.precision=fp32")
    with pytest.raises(ValueError, match=r"^data\.seq_len=8192: longer than .* = 32 \* 128 = 4096 tokens that CLEX"):
        plan_of(*keys)


def test_sequences_longer_than_l_are_noted_in_the_plan(capsys):
    keys = ("+experiment=tiny_clex", "data.seq_len=512", "evaluation=never", "dry_run=true")
    dry_run.print_plan(composed(*keys))
    assert " sequences * 512 tokens (4 L) = " in capsys.readouterr().out


def test_ids_outside_the_embedding_are_refused_if_the_store_exists(tmp_path, tiny_store):
    save_tiny_llama(tmp_path)
    with pytest.raises(ValueError, match=r"data\.path=.*the embedding of .* has 61 rows"):
        plan_of(f"model.path={tmp_path}", f"data.path={tiny_store}", "evaluation=never")
    with pytest.raises(ValueError, match=r"evaluation\.path=.*the embedding of .* has 61 rows"):
        plan_of(f"model.path={tmp_path}", "data.path=/not/here", f"evaluation.path={tiny_store}")


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    dry_run.print_plan(composed("+experiment=tiny_clex", "dry_run=true"))
    assert capsys.readouterr().out == ""


def test_the_command_prints_the_plan_in_seconds_without_deepspeed(tmp_path):
    """Run it from another folder and measure processor time, since other work may share the machine."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('deepspeed imported:', 'deepspeed' in sys.modules))\n"
        f"sys.argv = ['train.py', *{['+experiment=llama2_7b_clex', 'dry_run=true', 'engine.world_size=64']!r}]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # About eight on an idle machine; the weights of 7B alone would take minutes.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    for line in (
        "  model       pretrained weights of meta-llama/Llama-2-7b-hf (not on this machine; planned by the "
        "architecture of conf/model/architectures/llama2_7b): llama, 6,738,415,616 parameters, bfloat16",
        "  trained     all parameters, and 16,704 of the frequencies in float32",
        "  batch       512 sequences * 4,096 tokens = 2,097,152 tokens a step: 64 ranks * 1 sequence * 8 micro-batches",
        "  steps       954, in all 2,000,683,008 tokens",
        "  optimizer   AdamW, lr 2e-05, cosine after 29 warm-up steps",
        "  scaling     clex: t from 1 to 32, field log_time, drift yarn, L = 4,096: contexts up to 131,072 tokens; "
        "positions skip, 20 % of the steps as used",
        "deepspeed imported: False",
    ):
        assert line in done.stdout.splitlines()
    for name in ("parameters", "gradients", "optimizer", "activations", "logits", "ODE", "total"):
        assert f"\n  {name} " in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_plan_names_packing_and_mixture_in_a_line_each(capsys):
    curriculum = "+data.weights_at={10: {book: 0, code: 30}}"
    overrides = (
        "data=longcorpus",
        "data.seq_len=2048",
        "data.packing=best_fit",
        "data.skip_rows=[3,10-19]",
        curriculum,
        "dry_run=true",
    )
    dry_run.print_plan(composed("+experiment=tiny_clex", *overrides))
    lines = capsys.readouterr().out.splitlines()
    (packing,) = (line for line in lines if line.startswith("  packing     "))
    assert packing.startswith("  packing     best_fit: whole documents packed into rows of 2,048 tokens")
    assert packing.endswith("; 11 rows skipped")
    (mixture,) = (line for line in lines if line.startswith("  mixture     "))
    assert "book 40 %, arxiv 20 %, general 20 %, code 10 %, qa 5 %, paper 5 %; from step 10: book 0 %" in mixture
    assert any(line.startswith("  repeated    book unknown (") for line in lines)
