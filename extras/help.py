"""What --help prints: the flags in groups, those of the method first, and what auto means. And the shell's completion."""

import ast
import dataclasses
import inspect
import sys
from typing import Annotated, Any, get_type_hints

from common.args import resolve_auto
from extras.words import last_value

GROUPS = {  # group of flags -> its flags; a flag that stands in none is one of the method
    "data": """
        dataset eval_dataset preference_dataset eval_preference_dataset columns turns prompts max_samples max_preferences
        select_top_k cut_demonstrations candidates_from num_demonstrations demonstration_steps num_preferences
        segment_length flip_labels low_most medium_most high_least data_dir expert_steps expert_alpha expert_seeds
        expert_seed checkpoint_every checkpoint_episodes""",
    "model": """
        model expert_model ref_model reward_model dtype attn_implementation template trust_remote_code max_length
        max_prompt_length lora_r lora_alpha load_in_4bit hidden""",
    "sampling": """
        temperature max_new_tokens generation vllm_gpu_memory_utilization vllm_sleep_level""",
    "optimisation": """
        learning_rate later_learning_rate sft_learning_rate reward_learning_rate lr_scheduler_type optimizer warmup_ratio
        max_grad_norm batch_size preference_batch_size per_device_train_batch_size gradient_checkpointing mixed_precision
        share_prompts tau""",
    "evaluation": """
        eval_samples eval_temperature eval_updates eval_every eval_episodes per_device_eval_batch_size gold_reward_model
        baseline judge_model judge_base_url judge_task""",
    "run": """
        config seed num_seeds output_dir resume stop_after smoke dry_run tokens_per_second generation_tokens_per_second
        num_processes deterministic save_steps logging_steps report_to push_to_hub render""",
}
COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")


def groups_of(cls) -> dict[str, list[str]]:
    """{group: names of the class's flags}, the method's first; a group without flags is left out."""
    names = [field.name for field in dataclasses.fields(cls)]
    groups = {group: [name for name in text.split() if name in names] for group, text in GROUPS.items()}
    other = {name for found in groups.values() for name in found}
    groups = {"method": [name for name in names if name not in other], **groups}
    return {group: found for group, found in groups.items() if found}


def meanings(cls) -> dict[str, str]:
    """{flag: the text below it} of the fields that the class itself declares."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    return {
        node.target.id: " ".join(following.value.value.split())
        for node, following in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }


def all_meanings(cls) -> dict[str, str]:
    """{flag: the text below it} of all fields of a dataclass of flags."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= meanings(base)
    return found


def resolved(cls, settings: dict[str, dict], words: list[str]) -> tuple[str, dict[str, Any]]:
    """(model or environment that the table is read for, {flag: its value there}): those of the words, else the defaults."""
    chosen = "env" if "env" in cls.__dataclass_fields__ else "model"
    args = cls(**{chosen: last_value(words, f"--{chosen}") or getattr(cls, chosen)})
    name = getattr(args, chosen)
    if chosen == "env":
        return name, settings.get(name, settings["other"])
    resolve_auto(args, settings)
    return name, vars(args)


def in_groups(cls, settings: dict[str, dict], words: list[str]):
    """A dataclass with one dataclass for each group of flags, which tyro shows as a box of its own."""
    import tyro

    kinds, texts = get_type_hints(cls), all_meanings(cls)
    name, values = resolved(cls, settings, words)
    default = {field.name: field.default for field in dataclasses.fields(cls)}

    def shown(flag: str) -> str:
        if default[flag] == "auto" and values.get(flag, "auto") != "auto":
            return f"(default: auto, {values[flag]!r} for {name})"
        return f"(default: {default[flag]})" if str(default[flag]) else "(default: empty)"

    def described(flag: str) -> tuple[str, Any, Any]:
        told = tyro.conf.arg(prefix_name=False, help=texts[flag], help_behavior_hint=shown(flag))
        return flag, Annotated[kinds[flag], told], dataclasses.field(default=default[flag])

    boxes = []
    for group, flags in groups_of(cls).items():
        box = dataclasses.make_dataclass(group, map(described, flags))
        boxes.append((group, Annotated[box, tyro.conf.arg(help="")], dataclasses.field(default_factory=box)))
    return dataclasses.make_dataclass("Flags", boxes)


def show(cls, description: str, settings: dict[str, dict]) -> None:
    """Print the help of a script, or the completion that the command line asks for, and exit."""
    import tyro

    words = sys.argv[1:]
    asked = words if words[0] in COMPLETION else ["--help"]
    tyro.cli(in_groups(cls, settings, words), description=description, args=asked)
