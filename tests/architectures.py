"""Every causal architecture of transformers, tiny and random: does it run here, and does it run right?

python tests/architectures.py [name ...]: checks them and writes the table of docs/models.md (all of them unless named).
"""

import copy
import functools
import random
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from helpers import make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import irft  # noqa: E402
from common import UserError, models  # noqa: E402
from common.data import collate  # noqa: E402
from common.generation import Generator  # noqa: E402
from common.logprobs import plain_logprobs, response_logprobs  # noqa: E402
from extras import adapters, packing, shared_prompts  # noqa: E402
from extras.agreement import check_agreement  # noqa: E402

VOCABULARY, WINDOW = 320, 64
SMALL = {  # field of a configuration -> its value where the architecture has the field
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "embedding_size": 32,
    "output_embedding_size": 32, "input_embedding_size": 32,
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
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "attention_hidden_size": 32, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 64, "image_size": 28, "patch_size": 14,
    "num_mel_bins": 8, "axial_pos_embds": False, "num_buckets": 4, "is_decoder": True, "router_jitter_noise": 0.1,
    "input_jitter_noise": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1, "resid_pdrop": 0.1, "layerdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_mamba_kernels": False,
}  # fmt: skip
SPECIAL: dict[str, dict] = {  # what an architecture needs besides, so that every kind of its layers is there
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    "diffllama": {"attention_dropout": 0.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), {"logit_scale": 4.0}),
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
    "kimi_linear": {"head_dim": 4, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "ministral": {"head_dim": 8},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4, "dim_model_base": 32},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "n_mamba_heads": 4},
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "youtu",
        ),
        {"head_dim": 4, "num_key_value_heads": 4},
    ),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}
LARGEST = 20_000_000  # weights; what stays larger has parts that no field makes small
STEPS = 12
TOLERANCE = 1e-5  # nats per token, float32


class NotSmall(Exception):
    """The architecture cannot be built tiny from its configuration alone."""


def small_config(kind, **special):
    """A configuration of that class with small sizes, its parts too."""
    default = kind()
    own = {n for n in dir(kind) if isinstance(getattr(kind, n, None), property) and getattr(kind, n).fset is None}
    known = default.to_dict().keys() | default.attribute_map.keys()
    given = {}
    for name, value in SMALL.items():
        present = default.to_dict().get(default.attribute_map.get(name, name))
        tokens = name.endswith("_token_id") and name in known
        if name not in own and (isinstance(present, (int, float)) or tokens):
            given[name] = value
    for name in getattr(kind, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            part = type(getattr(default, name))
            given[name] = small_config(part, **SPECIAL.get(part.model_type, {})).to_dict()
    return kind(**given | special)


def build(name: str):
    """The architecture, tiny and random, its weights spread so that every part of it shows in its logits."""
    try:
        config = small_config(CONFIG_MAPPING[name], **SPECIAL.get(name, {}))
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise NotSmall(f"{size / 1e6:.0f} million weights at its smallest")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}") from error
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and p.requires_grad:
                p.add_(torch.randn(p.shape, generator=stream) * 0.05)
        if (head := model.get_output_embeddings()) is not None and not getattr(
            model.config, "tie_word_embeddings", False
        ):
            head.weight.add_(torch.randn(head.weight.shape, generator=stream) * 0.1)  # far from uniform
    return model


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, 290) for _ in range(n)] for n in (3, 30, 17, 9, 24)]


def scored(model, sequences) -> list[torch.Tensor]:
    """Log-probs of the tokens of each response, scored in one padded batch."""
    with torch.no_grad():
        rows = response_logprobs(model, collate(sequences, 0)).logprobs
    return [row[: len(y)] for row, (_, y) in zip(rows, sequences, strict=True)]


def furthest(a, b) -> float:
    return max((x - torch.as_tensor(y, dtype=x.dtype)).abs().max().item() for x, y in zip(a, b, strict=True))


def without_dtype(path: Path) -> list[str]:
    """Lines of a config.json but for the types of weights, which the parts of some models lack until they are loaded once."""
    return [line for line in path.read_text().splitlines() if '"dtype"' not in line]


@functools.cache
def tokenizer():
    return make_tokenizer()


def examine(name: str, folder: Path) -> dict[str, float]:
    """The largest differences, nats per token, of what must agree. UserError where the product refuses the architecture.

    NotSmall if it cannot be built. Everything goes through what the scripts use.
    """
    build(name).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    args = irft.Args(
        model=str(folder / "model"),
        max_length=48,
        max_prompt_length=32,
        max_new_tokens=STEPS,
        mixed_precision="no",
        lora_r=4,
    )
    own = models.load_tokenizer(args)
    model = models.load_model(args)
    own_config = without_dtype(folder / "model" / "config.json")

    asked = prompts()
    generator = Generator(model, own, 3, STEPS)
    generator.eos_ids = set(range(5, VOCABULARY, 6))  # rows end at different steps
    said = []
    run = type("Run", (), {"args": args, "print": staticmethod(said.append)})
    generator.check = functools.partial(check_agreement, run, model)
    rollout = generator.sample(asked, list(range(len(asked))), 7)
    alone = Generator(model, own, 1, STEPS)
    alone.eos_ids = generator.eos_ids
    single = alone.sample(asked, list(range(len(asked))), 7)
    assert len({len(y) for y in rollout.response_ids}) > 1, "no row ended before another"
    assert len(said) == 1 and max(map(max, rollout.logprobs)) > min(map(min, rollout.logprobs)) + 0.1, (
        "nothing to compare"
    )
    assert single.response_ids == rollout.response_ids, "another answer in another batch"
    sequences = list(zip(asked, rollout.response_ids, strict=True))
    batch = scored(model, sequences)
    found = {
        "sampler": furthest(batch, rollout.logprobs),
        "alone": max(furthest(batch, single.logprobs), furthest(batch, [scored(model, [s])[0] for s in sequences])),
        "training": furthest(batch, scored(model.train(), sequences)),
    }
    model.eval().save_pretrained(folder / "saved")
    own.save_pretrained(folder / "saved")
    again = models.load_model(irft.Args(model=str(folder / "saved"), mixed_precision="no"))
    found["saved"] = furthest(batch, scored(again, sequences))
    assert without_dtype(folder / "saved" / "config.json") == own_config, "another config.json"
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    found["resumed"] = furthest(batch, scored(again, sequences))

    lora = adapters.add_lora(model, args)
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lora.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=stream) * 0.05)
    adapted = scored(lora.eval(), sequences)
    assert furthest(adapted, batch) > 1e-3, "the adapter changes nothing"
    found["lora"] = furthest(adapted, scored(adapters.merged(args, lora).eval(), sequences))
    with lora.disable_adapter():
        found["reference"] = furthest(batch, scored(lora, sequences))
    return found


def outcome(name: str) -> tuple[str, str]:
    """(passes | refused | not built | wrong, largest difference or reason) of an architecture."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = examine(name, Path(folder))
        except NotSmall as error:
            return "not built", str(error)
        except UserError as error:
            return "refused", str(error).replace(f"{folder}/", "")
    far = {k: v for k, v in found.items() if not v < TOLERANCE}
    return ("wrong", str(far)) if far else ("passes", f"{max(found.values()):.0e}")


def gradients(model, logprobs: torch.Tensor) -> torch.Tensor:
    """Gradients of all weights, one after the other, of the log-probs (B, T) with another weight for each."""
    model.zero_grad()
    (logprobs * torch.linspace(1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sharing(name: str) -> str:
    """Say whether answers to one prompt are scored in one row: yes, `in its window`, or `no: reason`. AssertionError if wrongly.

    Values and gradients of packed rows must be those of the plain version, which scores separate rows.
    """
    model = build(name).eval()
    limits = shared_prompts.settle(model, irft.Args(), name).shared_prompts
    if limits is None:
        reason = shared_prompts.DECISIONS[shared_prompts.identity(model)]
        return f"no: {reason.split(', by')[0].removeprefix(type(model).__name__).strip()}"
    sizes = (
        {3: (12, 1, 20, 12), 30: (1, 20, 8, 30), 17: (2, 2)}
        if limits.tokens > WINDOW
        else {2: (2, 1, 3), 4: (3,), 3: (1, 3)}
    )
    draw = random.Random(1)
    sequences = [
        (prompt, [draw.randrange(5, 290) for _ in range(n)])
        for prompt, answers in (([draw.randrange(5, 290) for _ in range(p)], own) for p, own in sizes.items())
        for n in answers
    ]
    batch = collate(sequences, 0)
    model.shared_prompts = limits._replace(width=10**6)  # tokens alone decide
    rows = packing.cheapest_rows(batch, model.shared_prompts)
    assert rows and len(rows.leaders) == 3 and limits.tokens >= rows.tokens and rows.tokens in (8, 89), rows
    plain, found = plain_logprobs(model, batch), response_logprobs(model, batch).logprobs
    expected = gradients(model, plain)
    assert (far := (found - plain).abs().max()) < TOLERANCE, far
    assert (far := (gradients(model, found) - expected).norm() / expected.norm()) < TOLERANCE, far
    return "yes" if limits.tokens == float("inf") else "in its window"


BEGIN, END = "<!-- architectures -->\n", "<!-- end -->\n"
PAGE = ROOT / "docs" / "models.md"
TABLE_ROW = re.compile(r"^\| `([\w-]+)` \| `\w+` \| (passes|refused|not built) \|", re.M)


def documented() -> dict[str, str]:
    """{model_type: outcome} of the table in docs/models.md."""
    return dict(TABLE_ROW.findall(PAGE.read_text()))


def documented_sharing() -> dict[str, str]:
    """{model_type: what `sharing` says} of the architectures that pass, from the last column of the table."""
    return dict(re.findall(r"^\| `([\w-]+)` \| `\w+` \| passes \|.*\| (.+) \|$", PAGE.read_text(), re.M))


def reason(detail: str) -> str:
    """The part of a refusal that differs from architecture to architecture."""
    if match := re.search(r"log-probs of .*? ([\d.e-]+) nats per token apart", detail):
        return f"sampler and scorer {match[1]} nats per token apart"
    if match := re.search(r"the sampler cannot run \((.*)\), expected", detail):
        return f"the sampler cannot run it: {match[1][:90]}"
    return detail.split(": ", 1)[-1][:110].replace("|", "/")


def table() -> str:
    """The table of all architectures, made by running them."""
    rows, counts = [], {}
    for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        status, detail = outcome(name)
        counts[status] = counts.get(status, 0) + 1
        shares = sharing(name) if status == "passes" else "-"
        rows.append(
            f"| `{name}` | `{kind}` | {status} | {detail if status == 'passes' else reason(detail)} | {shares} |\n"
        )
        print(rows[-1], end="", flush=True)
    versions = (
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, peft {version('peft')}"
    )
    counted = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    head = "| `model_type` | class | result | largest difference, nats per token; or why not | shared prompts |\n"
    head += "|---|---|---|---|---|\n"
    return f"{versions}; of {len(rows)} architectures: {counted}.\n\n{head}{''.join(rows)}"


if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(name, *outcome(name), flush=True)
    else:
        page = PAGE.read_text()
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:start] + "\n" + table() + "\n" + page[end:])
