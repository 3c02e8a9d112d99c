"""Fields of configs that the rules of `tiny.py` do not get right, by class or by model type.

What stands under `first` is given to the class when its default config is made.
"""

from typing import Any

Values = dict[str, Any]

SECTIONS: Values = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Rotary positions of three axes for heads of 8 dimensions."""
PARTIAL_SECTIONS = SECTIONS | {"mrope_section": [2, 2, 2], "partial_rotary_factor": 1.0}
ROPE: Values = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_BY_TYPE = {"full_attention": ROPE, "sliding_attention": ROPE}

QWEN_VL: Values = {"text_config": {"rope_parameters": SECTIONS}}
GLM_VL: Values = {"text_config": {"rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0}}}
JAMBA: Values = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_dt_rank": 4,
}
BAMBA: Values = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
HYBRID_OF_FOUR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

OVERRIDES: dict[str, Values] = {
    "bamba": BAMBA,
    "granitemoehybrid": BAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": JAMBA,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba": {
        "num_hidden_layers": 5,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "chunk_size": 8,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [2, 4],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "num_hidden_layers": 4,
        "moe_latent_size": None,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": HYBRID_OF_FOUR,
        "num_expert_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "topk_group": 1,
        "num_experts": 4,
    },
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "layer_types": HYBRID_OF_FOUR,
        "n_group": 1,
        "num_expert_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "topk_group": 1,
    },
    "qwen4_exp": {"text_config": {"num_hidden_layers": 4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64, "hidden_size": 32},
        "rope_theta": 10000.0,
    },
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_TYPE},
    "cohere_compass": {"text_config": {"rope_parameters": ROPE_BY_TYPE}},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGAZ": 5}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 6],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "hidden_size": 32,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "rwkv": {"attention_hidden_size": 32},
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "paddleocr_vl": QWEN_VL,
    "qwen2_5_omni_thinker": QWEN_VL,
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "glm4v": GLM_VL,
    "glm46v": GLM_VL,
    "glm4v_moe": GLM_VL,
    "glm_ocr": GLM_VL,
    "glm_image": GLM_VL,
    "glm4v_text": GLM_VL["text_config"],
    "glm4v_moe_text": GLM_VL["text_config"],
    "glm_ocr_text": GLM_VL["text_config"],
    "glm_image_text": GLM_VL["text_config"],
    "hrm_text": {},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "autoformer": {"first": {"prediction_length": 8}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "sew": {"classifier_proj_size": 256},
    "sew-d": {"classifier_proj_size": 256},
}
