"""Private names inside libraries that this project relies on without a contract.

`tests/utils/test_private_names.py` checks each `target` on the installed version and fails by name:

    package.module:Class.attribute     an attribute exists
    package.module:function(name)      a parameter of that name exists
    package.module:Class@attribute     an attribute of instances: the class or a parent assigns it
    package.module:function=>text      the source of a function mentions a name

The target is the check, so no entry goes unchecked. Prefer a type or a public function to a new entry.
"""

from typing import NamedTuple


class Reach(NamedTuple):
    """One name in a library, why it is needed, and what fails without it."""

    target: str
    why: str
    gone: str
    since: str | None = None
    """First version of the library that has it; earlier ones work without."""
    cuda: bool = False
    """True if it exists only in CUDA builds, and is checked only on a machine with a GPU."""


_MODELS = "transformers.models"
_CACHE = "transformers.cache_utils"
_LLAMA = f"{_MODELS}.llama.modeling_llama"
_GPTJ = f"{_MODELS}.gptj.modeling_gptj:GPTJAttention"
_FALCON = f"{_MODELS}.falcon.modeling_falcon"
_MPT = f"{_MODELS}.mpt.modeling_mpt"
_BLOOM = f"{_MODELS}.bloom.modeling_bloom"
_CALL_REFUSED = "calls fail with `LibraryChanged`, which names the versions"
_WITHOUT_LAMBDA = "apply_lm_infinite fails at once, or at the first call of the family"
_UNREAD = "weights that do not fit their config.json are not found before training"
_ZERO = "sharded parameters look empty: counts, decay groups and loading are wrong"

PRIVATE_NAMES = (
    # Calls of a model (rope.patch, rope.hooks).
    Reach(f"{_LLAMA}:LlamaModel.forward(input_ids)", "the number of new tokens of a call", _CALL_REFUSED),
    Reach(f"{_LLAMA}:LlamaModel.forward(inputs_embeds)", "the same, for calls with embeddings", _CALL_REFUSED),
    Reach(f"{_LLAMA}:LlamaModel.forward(position_ids)", "n and the positions of cached keys", "n counts padding too"),
    Reach(f"{_LLAMA}:LlamaModel@rotary_emb", "a module with inv_freq is a child of the decoder", "no RoPE is found"),
    Reach(f"{_LLAMA}:LlamaRotaryEmbedding.forward(position_ids)", "recognizes the rotary module", "no RoPE is found"),
    Reach(f"{_LLAMA}:LlamaRotaryEmbedding@attention_scaling", "the model's own factor on cos", "it counts as 1"),
    Reach(f"{_LLAMA}:LlamaRotaryEmbedding@rope_type", "whether it follows the sequence length", "it is scaled twice"),
    Reach(f"{_LLAMA}:apply_rotary_pos_emb(cos)", "the layout of pairs, LM-Infinite's rotation", "rerotation fails"),
    Reach(f"{_LLAMA}:LlamaDecoderLayer.forward(position_embeddings)", "one cast a layer", "gradients are rounded"),
    Reach(f"{_LLAMA}:LlamaAttention.forward(position_embeddings)", "a layer's attention", "keys cannot be rerotated"),
    Reach(f"{_LLAMA}:LlamaAttention.forward(hidden_states)", "layers are probed", "keys cannot be rerotated"),
    Reach(f"{_LLAMA}:LlamaAttention@layer_idx", "the layer of an attention module", "keys cannot be rerotated"),
    Reach(f"{_LLAMA}:LlamaAttention@scaling", "log-scaling changes the softmax scale", "log-scaling is refused"),
    *(
        Reach(f"{_LLAMA}:LlamaAttention.forward=>{name}", "log-scaling by token finds the function", "it is refused")
        for name in ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")
    ),
    Reach(f"{_LLAMA}:LlamaModel.forward(attention_mask)", "log-scaling by token counts padding", "padding counts too"),
    Reach(f"{_MODELS}.hunyuan_v1_dense.modeling_hunyuan_v1_dense:HunYuanDenseV1Attention@key_layernorm",
          "keys of this family are normalized after their rotation", "its cached keys are refused needlessly"),
    Reach(f"{_MODELS}.mistral.configuration_mistral:MistralConfig.sliding_window", "the window", "windows are missed"),
    Reach(f"{_MODELS}.gemma3.configuration_gemma3:Gemma3TextConfig.layer_types", "local layers", "windows are missed"),
    # Caches (rope.key_cache, rope.key_record, rope.preallocated_cache, lm_infinite.cache).
    Reach(f"{_CACHE}:Cache.get_seq_length", "the number of cached keys", "n of a call is unknown"),
    Reach(f"{_CACHE}:Cache.reorder_cache(beam_idx)", "positions travel with rows", "rows mix up positions"),
    Reach(f"{_CACHE}:Cache.batch_select_indices(indices)", "positions travel with rows", "rows mix up positions"),
    Reach(f"{_CACHE}:Cache.batch_repeat_interleave(repeats)", "positions travel with rows", "rows mix up positions"),
    Reach(f"{_CACHE}:Cache@layers", "the keys of each layer", "moving t with cached keys fails"),
    Reach(f"{_CACHE}:Cache@offloading", "offloaded keys are refused", "keys on the host are missed"),
    Reach(f"{_CACHE}:CacheLayerMixin@keys", "cached keys are rerotated", "moving t with cached keys fails"),
    Reach(f"{_CACHE}:CacheLayerMixin@is_initialized", "empty layers are left alone", "moving t fails"),
    Reach(f"{_CACHE}:QuantizedLayer@_quantized_keys", "quantized keys are rerotated", "moving t fails"),
    Reach(f"{_CACHE}:QuantizedLayer@axis_key", "quantized keys are rerotated", "moving t fails"),
    Reach(f"{_CACHE}:QuantizedLayer._dequantize", "quantized keys are rerotated", "moving t fails"),
    Reach(f"{_CACHE}:QuantizedLayer._quantize(axis)", "quantized keys are rerotated", "moving t fails"),
    Reach(f"{_CACHE}:QuantizedLayer@_pending_beam_idx", "rows of a beam search", "rows mix up positions", "5.20"),
    Reach(f"{_CACHE}:BaseQuantizedLayer", "other quantized layers are refused", "their keys are missed", "5.21"),
    Reach(f"{_CACHE}:LinearAttentionCacheLayerMixin", "models with a recurrent state", "the import fails"),
    # Attention (attention.*, lm_infinite.*).
    Reach("transformers.configuration_utils:PretrainedConfig@_attn_implementation_internal",
          "config._attn_implementation names the attention function that is called", "our functions are never called"),
    Reach("transformers:AttentionInterface.register", "our attention functions", "the import fails"),
    Reach("transformers.masking_utils:AttentionMaskInterface.register", "no n x n mask is built", "the import fails"),
    Reach("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS", "masks in bounded memory", "the import fails"),
    Reach("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", "the model's own function", "the import fails"),
    Reach("transformers.modeling_utils:PreTrainedModel._supports_sdpa", "supported implementations", "all are assumed"),
    Reach("transformers.modeling_utils:PreTrainedModel._supports_flash_attn", "the same", "flash is never chosen"),
    *(
        Reach(f"transformers.modeling_utils:PreTrainedModel.from_pretrained=>{name}", why, _UNREAD)
        for name, why in (
            ("state_dict", "tensors without data are matched with an architecture"),
            ("device_map", "the same, on the meta device"),
            ("output_loading_info", "the tensors that did not match"),
            ("ignore_mismatched_sizes", "shapes are reported, not raised"),
        )
    ),
    *(
        Reach(f"transformers.modeling_utils:LoadStateDictInfo@{name}", "a key of the loading report", _UNREAD)
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ),
    Reach("transformers.modeling_utils:PreTrainedModel.get_expanded_tied_weights_keys(all_submodels)",
          "tied tensors stored twice are compared", "no weights can be checked"),
    Reach("transformers.utils.loading_report:log_state_dict_report=>LOAD REPORT", "its table is dropped where "
          "our own line names the tensors", "the table appears in addition to that line"),
    Reach("transformers.modeling_utils:PreTrainedModel.gradient_checkpointing_enable", "activation checkpointing",
          "recomputation fails at the start"),
    Reach("transformers.modeling_utils:PreTrainedModel.activation_checkpointing_enable", "the same, by its new name",
          "recomputation fails at the start", "5.23"),
    Reach("transformers:AutoModelForCausalLM._model_mapping", "the class of an architecture", "selection fails"),
    Reach("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS", "formulas of transformers", "the import fails"),
    Reach("transformers.integrations:HfDeepSpeedConfig", "weights are sharded while read", "loading fails"),
    Reach(f"{_GPTJ}@q_proj", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_GPTJ}@out_proj", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_GPTJ}@resid_dropout", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_GPTJ}@rotary_dim", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_GPTJ}@embed_dim", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_MODELS}.gptj.modeling_gptj:create_sinusoidal_positions(dim)", "longer tables", _WITHOUT_LAMBDA),
    Reach(f"{_MODELS}.gptj.modeling_gptj:GPTJRotaryEmbedding@embed_positions", "a table's end",
          "LM-Infinite on GPT-J ends with the trained context", "5.24"),
    Reach(f"{_FALCON}:FalconAttention._split_heads", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_FALCON}:FalconAttention@query_key_value", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_FALCON}:build_alibi_tensor", "slopes of ALiBi", _WITHOUT_LAMBDA),
    Reach(f"{_MPT}:MptAttention@Wqkv", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_MPT}:MptAttention@softmax_scale", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_MPT}:build_mpt_alibi_tensor", "slopes of ALiBi", _WITHOUT_LAMBDA),
    Reach(f"{_BLOOM}:BloomAttention._reshape", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_BLOOM}:BloomAttention@inv_norm_factor", "LM-Infinite's adapter", _WITHOUT_LAMBDA),
    Reach(f"{_BLOOM}:build_alibi_tensor", "slopes of ALiBi", _WITHOUT_LAMBDA),
    # DeepSpeed (engine.*, checkpoint.*).
    Reach("deepspeed.ops:__compatible_ops__", "no shared-memory op is compiled on a CPU", "the start fails"),
    Reach("deepspeed.runtime.zero.partition_parameters:Init(config_dict_or_path)", "parameters carry ds_id", _ZERO),
    *(
        Reach(f"deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param=>param.{name}", why, _ZERO)
        for name, why in (
            ("ds_id", "whether a parameter is sharded"),
            ("ds_numel", "the number of weights of a sharded parameter"),
            ("ds_shape", "the decay group of a sharded parameter"),
            ("ds_tensor", "this rank's share, for numbers that are not finite"),
        )
    ),
    Reach("deepspeed:zero.register_external_parameter", "weights used outside their module", "ZeRO-3 forward fails"),
    Reach("deepspeed.runtime.engine:DeepSpeedEngine._copy_recovery_script", "no script a checkpoint", "saving fails"),
    Reach("deepspeed.runtime.engine:DeepSpeedEngine@_config", "universal checkpoints", "they are not loaded"),
    Reach("deepspeed.runtime.config:DeepSpeedConfig@load_universal_checkpoint", "the same", "they are not loaded"),
    Reach("deepspeed.runtime.engine:DeepSpeedEngine@checkpoint_engine", "our writer saves", "saving fails"),
    Reach("deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied", "skipped steps", "the first step fails"),
    Reach("deepspeed.checkpoint.ds_to_universal:main", "conversion of checkpoints", "another ZeRO stage is refused"),
    Reach("deepspeed.runtime.sequence_parallel.ulysses_sp:UlyssesSPAttentionHF", "sequence parallelism", "it fails"),
    Reach("deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler", "classes in a checkpoint", "resuming fails"),
    Reach("deepspeed.utils.tensor_fragment:fragment_address", "classes in a checkpoint", "resuming fails"),
    Reach("deepspeed.launcher.launch:main", "recognizes the launcher above a rank", "stops reach it late"),
    # torch.
    Reach("torch:_fused_sdp_choice", "the kernel that SDPA takes, for the log", "the line fails"),
    Reach("torch._dynamo.config:recompile_limit", "one graph a shape for flex_attention", "it computes uncompiled"),
    Reach("torch:_C._host_emptyCache", "pinned memory is released", "evaluation with offload_cache fails", cuda=True),
    Reach("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", "log-sum-exp on a CPU", "LM-Infinite fails"),
    Reach("torch:ops.aten._local_scalar_dense", "memory plan of a model", "the dry run fails"),
    Reach("torch:ops.aten._grouped_mm", "memory plan of experts", "the dry run fails"),
    Reach("torch.utils._python_dispatch:TorchDispatchMode", "memory plan of a model", "the dry run fails"),
    Reach("torch.utils._pytree:tree_leaves", "memory plan of a model", "the dry run fails"),
    Reach("torch:UntypedStorage._cdata", "storages written once", "saving a checkpoint fails"),
    # omegaconf.
    Reach("omegaconf:DictConfig._get_root", "the key in a message", "a wrong value ends in a traceback"),
    Reach("omegaconf:DictConfig._get_node", "the key in a message", "a wrong value ends in a traceback"),
    Reach("omegaconf:DictConfig._is_none", "the key in a message", "a wrong value ends in a traceback"),
    Reach("torch.utils.cpp_extension:_get_build_directory", "where extensions are compiled", "the first build fails"),
)  # fmt: skip
"""All private names, grouped by the code that relies on them."""
