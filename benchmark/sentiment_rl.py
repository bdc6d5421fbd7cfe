"""aihf.py or aihf_ppo.py, with prompts of the policy step and a base model of their own.

AIHF paper, arXiv:2406.06874, App. A.1.2: the methods answer prompts that have neither demonstrations nor preferences. And a run
that starts from an SFT policy is measured by its distance from the base model, as all others are.

    python benchmark/sentiment_rl.py aihf --policy-prompts runs/sentiment/split/methods.jsonl --base runs/film/base/final ...
    python benchmark/sentiment_rl.py aihf_ppo --policy-prompts ... the flags of aihf_ppo.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import aihf  # noqa: E402
import aihf_ppo  # noqa: E402
from common import UserError, models
from common.args import main, parse_args
from common.data import encode
from extras.sources import load_rows

SCRIPTS = {"aihf": aihf, "aihf_ppo": aihf_ppo}


def with_own_prompts(script) -> type:
    """Return the flags of the script with two more, after giving it a learner that heeds them."""

    @dataclass
    class Args(script.Args):
        policy_prompts: str = ""
        """rows whose prompts the policy step answers; empty: as --prompts says."""
        base: str = ""
        """model to which the KL is measured; empty: the one that the policy starts from."""

    class Learner(script.AIHF):
        def __init__(self, run, tokenizer, *data):
            super().__init__(run, tokenizer, *data)
            args = run.args
            if args.policy_prompts:
                rows = load_rows(args.policy_prompts, "all", flag="--policy-prompts")
                self.prompts = encode(rows, tokenizer, args.max_length, args.max_prompt_length, "--policy-prompts")

        def measure(self, t: int, updates: int, reference=None) -> None:
            if self.run.args.base:
                policy = getattr(self.raw, "policy", self.raw)
                reference = models.open_reference(self.run, policy, self.run.args.base)
            super().measure(t, updates, reference)

    script.AIHF = Learner  # by this name script.train makes it
    return Args


def start(words: list[str]) -> None:
    """UserError unless the first word of the command line is the name of a script."""
    if not words or words[0] not in SCRIPTS:
        raise UserError(f"found {' '.join(words[:1]) or 'no word'}, expected {' or '.join(SCRIPTS)} and its flags")
    script = SCRIPTS[words[0]]
    sys.argv[1:] = words[1:]
    script.train(parse_args(with_own_prompts(script), __doc__, script.SETTINGS))


if __name__ == "__main__":
    main(lambda: start(sys.argv[1:]))
