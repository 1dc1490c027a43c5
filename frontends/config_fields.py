"""Lists of config.json fields: those that change nothing here, and those that change the model unless neutral.

A field that is on neither list and that no recipe asks for is reported as unknown (see `frontends.config_reader`).
"""

from __future__ import annotations

from typing import Any

# Fields that change nothing in the forward pass: training, bookkeeping, and defaults of generation.
HARMLESS = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
        "_name_or_path", "add_cross_attention", "architectures", "attention_dropout", "attn_dropout",
        "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
        "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
        "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range",
        "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length",
        "min_length", "model_name", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
        "pad_token_id", "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values",
        "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
        "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
        "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
        "use_flash_attn", "use_return_dict",
    )
)  # fmt: skip

# Fields of other families that change the forward pass, with the values at which they change nothing (of a list: the
# values each element may have).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "no_rope_layers": (),
    "attn_logit_softcapping": (0, 0.0),
    "final_logit_softcapping": (0, 0.0),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_emb": (1, 1.0),
    "scale_depth": (1, 1.0),
    "mup_denominator": (),
    "attention_chunk_size": (0,),
    "attn_temperature_tuning": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "parallel_attention": (False,),
    "use_parallel_residual": (False,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "routed_scaling_factor": (1, 1.0),
    "scoring_func": ("softmax",),
    "num_nextn_predict_layers": (0,),
    "kv_lora_rank": (0,),
    "q_lora_rank": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": ("full_attention",),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "mlp_only_layers": (),
    "decoder_sparse_step": (1,),
    "rope_local_base_freq": (),
}
