"""Every causal architecture of transformers, tiny and random: does it run here, and does it run right?

python tests/architectures.py [name ...]: checks them and writes the table of docs/models.md (all of them unless named).
"""

import contextlib
import copy
import functools
import inspect
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import transformers
from helpers import make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import irft
from common import UserError, models
from common.data import collate
from common.generation import Generator, check_agreement
from common.logprobs import response_logprobs

VOCABULARY, WINDOW = 320, 64
SMALL = {  # field of a configuration -> its value where the architecture has the field
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "embedding_dim": 32, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "num_decoder_layers": 2, "num_encoder_layers": 1, "num_key_value_heads": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "head_dim": 8, "swa_head_dim": 8, "global_head_dim": 8,
    "v_head_dim": 8, "swa_v_head_dim": 8, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "dim_ff": 48, "d_ff": 48, "n_inner": 48, "dff": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "moe_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "num_experts_per_token": 2,
    "top_k_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": WINDOW, "n_positions": WINDOW, "max_seq_len": WINDOW, "max_target_positions": WINDOW,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "dim_head": 8,
    "sliding_window": 8, "attention_window_size": 8, "local_attention_window": 8, "attention_chunk_size": 16, "window_size": 8,
    "rotary_dim": 4, "lru_width": 32, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4, "mamba_d_state": 8,
    "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "n_mamba_heads": 2, "mamba_ngroups": 1, "mamba_headdim": 16, "mamba_dt_rank": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "attention_hidden_size": 32, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 64, "image_size": 28, "patch_size": 14,
    "num_mel_bins": 8, "axial_pos_embds": False, "num_buckets": 4, "is_decoder": True, "router_jitter_noise": 0.1,
    "input_jitter_noise": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1, "resid_pdrop": 0.1, "layerdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_mamba_kernels": False,
}  # fmt: skip
SPECIAL: dict[str, dict] = {}


def small_config(kind, **special):
    """A configuration of that class with small sizes, its parts too."""
    default = kind()
    given = {name: value for name, value in SMALL.items() if isinstance(getattr(default, name, None), (int, float))}
    given |= {n: v for n, v in SMALL.items() if n.endswith("_token_id") and n in inspect.signature(kind.__init__).parameters}
    for name, part in getattr(kind, "sub_configs", {}).items():
        own = getattr(default, name, None)
        if own is not None:
            given[name] = small_config(type(own)).to_dict()
    return kind(**given | special)


if __name__ == "__main__":
    ok = bad = 0
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            t = time.time()
            config = small_config(CONFIG_MAPPING[name], **SPECIAL.get(name, {}))
            with torch.device("meta"):
                m = AutoModelForCausalLM.from_config(config)
            n = sum(p.numel() for p in m.parameters())
            print(f"{name:28s} {n/1e6:.2f}M {time.time()-t:.2f}s", flush=True)
        except Exception as e:
            print(f"{name:28s} FAILED {type(e).__name__} {str(e)[:160]!r}", flush=True)
