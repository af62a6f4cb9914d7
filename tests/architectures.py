"""Tiny random models of today's architectures, each with the tokenizer of `tiny`."""

import torch
from tiny import tiny_tokenizer

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}

# name for people: (configuration in transformers, what it differs in)
ARCHITECTURES = {
    "Llama": ("LlamaConfig", {}),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": 12}),
    "Qwen 2.5": ("Qwen2Config", {}),
    "Qwen 3": ("Qwen3Config", {"head_dim": 8}),
    "Gemma 2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 12}),
    "Gemma 3, text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 12}),
    "Gemma 3, with an eye": ("Gemma3Config", {"head_dim": 8, "sliding_window": 12}),
    "Phi-3, longrope": ("Phi3Config", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}),
    "Llama, dynamic rope": ("LlamaConfig", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
                                            "max_position_embeddings": 64}),
    "OLMo 2": ("Olmo2Config", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "Granite 3": ("GraniteConfig", {}),
    "Cohere": ("CohereConfig", {}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "GPT-2": ("GPT2Config", {}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomConfig", {}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "Qwen 3 MoE": ("Qwen3MoeConfig", {"head_dim": 8, **EXPERTS}),
    "OLMoE": ("OlmoeConfig", {"num_experts": 2, "num_experts_per_tok": 1}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                                  "sliding_window": 12}),
    "Qwen 3.5": ("Qwen3_5TextConfig", {"head_dim": 8, **HYBRID}),
    "Qwen3-Next": ("Qwen3NextConfig", {"head_dim": 8, **HYBRID, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Granite 4 H": ("GraniteMoeHybridConfig", {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                                               "shared_intermediate_size": 32}),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8}),
    "Falcon H1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    "Mamba": ("MambaConfig", {"state_size": 8}),
    "Mamba 2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "RWKV": ("RwkvConfig", {"attention_hidden_size": 32}),
}


def random_model(name: str, seed: int = 1):
    """A tiny model of one of `ARCHITECTURES`, and its tokenizer."""
    import transformers

    tokenizer = tiny_tokenizer()
    kind, more = ARCHITECTURES[name]
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512,
             "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None} | more
    if kind in ("GPTNeoXConfig", "GPT2Config", "OPTConfig", "BloomConfig"):
        shape.pop("num_key_value_heads")
    if kind == "Gemma3Config":
        eye = transformers.SiglipVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                              intermediate_size=16, patch_size=14)
        shape = {"text_config": transformers.Gemma3TextConfig(**shape), "vision_config": eye, "mm_tokens_per_image": 4,
                 "image_token_index": len(tokenizer) - 3, "boi_token_index": len(tokenizer) - 2,
                 "eoi_token_index": len(tokenizer) - 1}
    config = getattr(transformers, kind)(**shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.name_or_path = f"tiny/{name.lower().replace(' ', '-').replace(',', '')}"
    return model.eval(), tokenizer
