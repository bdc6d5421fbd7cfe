"""Values that a command line starts from: those of --config, and the smallest sizes of --smoke."""

import dataclasses
import difflib
import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common import UserError
from common.args import flag
from extras.value_lists import LISTS
from extras.words import CHOSEN_ANEW, in_words, kinds_of, last_value

SMOKE = {  # flag -> its value under --smoke, where a script has the flag
    # every script for language models
    "eval_samples": 4, "max_samples": 16, "max_new_tokens": 8, "per_device_eval_batch_size": 16,
    "per_device_train_batch_size": 8, "batch_size": 8, "T": 1, "num_train_epochs": 1,
    # a reward, a policy that learns from it, and preferences
    "sft_epochs": 1, "total_episodes": 16, "rollout_batch_size": 8, "num_ppo_epochs": 1, "eval_updates": 2,
    "total_prompts": 8, "num_generations": 2, "max_preferences": 16,
    # continuous control
    "env": "Pendulum-v1", "total_steps": 800, "random_steps": 200, "eval_every": 400, "eval_episodes": 1,
    "critic_warmup": 200, "reward_every": 200, "reward_steps": 2, "bc_steps": 20, "ipl_steps": 20, "preference_steps": 20,
    "num_preferences": 20, "num_demonstrations": 1, "expert_steps": 4000, "expert_seeds": 1, "checkpoint_every": 400,
    "checkpoint_episodes": 1, "low_most": 0.2, "medium_most": 0.95, "high_least": 0.96,  # few checkpoints stand between
}  # fmt: skip


def starting_values(cls, words: list[str]):
    """A `cls` with the values that a command line starts from; the words of the line itself win over them.

    They are the defaults, then --smoke of the file, then the file of --config, then --smoke among the words. So a run's own
    args.json gives the same run again, and --smoke beside it makes that run small. Raises UserError, in one line, for a file
    that cannot be read or holds a wrong name or value.
    """
    path = last_value(words, "--config")
    found = {} if path is None else read_config(cls, path)
    small = {name: value for name, value in SMOKE.items() if name in cls.__dataclass_fields__}
    first = small if found.get("smoke") else {}
    last = small if "--smoke" in words and "--no-smoke" not in words else {}
    return cls(**{**first, **found, **last})


def read_config(cls, path: str) -> dict[str, Any]:
    """{flag: value} of a YAML file, or of the args.json of a run, without what a run chooses anew, such as its folder.

    A value is read as on the command line: 5e-7 is a number, and no is a word where the flag takes words. Raises UserError.
    """

    def require(ok: bool, found, expected: str) -> None:
        if not ok:
            raise UserError(f"--config: {path}: found {found}, expected {expected}")

    script, expected = Path(inspect.getfile(cls)).stem, "YAML with a flag: value per line, or the args.json of a run"
    try:
        stored = parse(Path(path).read_text(encoding="utf-8"), path.endswith(".json"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config: found {path} ({' '.join(str(error).split())}), expected {expected}") from None
    require(isinstance(stored, dict), f"{stored!r:.60}" if stored else "nothing in it", expected)
    if isinstance(stored.get("args"), dict):
        require(stored.get("script") == script, f"a run of {stored.get('script')}.py", f"one of {script}.py")
        stored = {name: value for name, value in stored["args"].items() if name not in CHOSEN_ANEW}
    kinds, values = get_type_hints(cls), {}
    known = {field.name for field in dataclasses.fields(cls)} - {"config", "resume"}
    for key, given in stored.items():
        name = str(key).removeprefix("--").replace("-", "_")
        near = "".join(f"{flag(n)}, or " for n in difflib.get_close_matches(name, known, 1))
        require(name in known, f"{key}, which is no flag for a file", f"{near}a flag that --help shows")
        if isinstance(given, list) and flag(name) in LISTS:
            given = shlex.join(map(str, given))
        values[name] = as_flag(given, kinds[name])
        require(values[name] is not None, f"{key} {given!r:.60}", in_words(kinds[name]))
    return values


def parse(text: str, is_json: bool) -> Any:
    """A file's mapping, with every number as the text that stands there. Raises ValueError."""
    if is_json:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # which knows nothing but texts, lists and mappings
    except yaml.YAMLError as error:
        raise ValueError(error) from None


SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def as_flag(given, kind):
    """The value of a flag of that type from what a file holds; None if it is none."""

    def one(kind) -> Any:
        if get_origin(kind) is Literal:
            return next((choice for choice in get_args(kind) if str(choice) == given), None)
        read: Callable = {bool: lambda text: SWITCH.get(text.lower())}.get(kind, kind)
        try:
            return read(given)
        except ValueError:
            return None

    if isinstance(given, bool):
        return given if bool in kinds_of(kind) else None
    if not isinstance(given, str):
        return None
    return next((value for value in map(one, kinds_of(kind)) if value is not None), None)
