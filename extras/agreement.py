"""The check of the first answers: the scorer must see in them the log-probs that the sampler saw."""

import contextlib
from collections.abc import Iterator

import torch

from common import UserError
from common.data import collate
from common.generation import Rollout
from common.logprobs import language_model, response_logprobs
from extras.loading import uses_bf16
from extras.memory import ran_out_of_memory

LIMITS = {  # sampler -> mean |log pi (scorer) - log pi (sampler)| per token, nats at temperature 1, that rounding can explain
    "hf": {"float32": 1e-4, "bfloat16": 0.05},  # the same kernels: 1e-6 was seen; bf16 numbers near 32 are 0.125 apart
    "vllm": {"float32": 1e-3, "bfloat16": 0.05},  # kernels of its own, which may multiply in TF32
}
CHECKED = (8, 64)  # how many answers are compared, and how many tokens of each


def check_agreement(run, model, rollout: Rollout, temperature: float) -> None:
    """Raise UserError unless the scorer and the sampler agree, up to rounding, on the log-probs of answers just sampled.

    The caller has gathered all weights of `model`. The scorer reads the answers in training mode, as a loss does. A difference
    means that one of the two is wrong for this architecture: it sees later tokens or padding, counts positions in another way,
    loses its cache, or has noise in training mode. The answers to the longest and to the shortest prompts are compared, since
    padding differs most there.
    """
    order = sorted(range(len(rollout.prompt_ids)), key=lambda i: len(rollout.prompt_ids[i]))
    half = CHECKED[0] // 2
    picked = sorted({*order[:half], *order[-half:]})
    sequences = [(rollout.prompt_ids[i], rollout.response_ids[i][: CHECKED[1]]) for i in picked]
    if not sequences:
        return
    batch = collate(sequences, pad_token_id=0).to(model.device)
    with torch.no_grad():
        scored = response_logprobs(model.train(), batch, temperature or 1.0).logprobs
        again = response_logprobs(model.eval(), batch, temperature or 1.0).logprobs
    sampled = torch.zeros_like(scored)
    for row, i in zip(sampled, picked, strict=True):
        row[: len(rollout.logprobs[i][: CHECKED[1]])] = row.new_tensor(rollout.logprobs[i][: CHECKED[1]])
    gaps = (scored - sampled).abs()[batch.response_mask]
    found, noise = gaps.mean().item(), (scored - again).abs()[batch.response_mask].mean().item()
    kind = "bfloat16" if uses_bf16(run.args) else "float32"
    limit = LIMITS["hf"][kind] / (temperature or 1.0)  # by which the rounding of the logits is divided too
    if not (found <= limit and noise <= limit):
        name, architecture = language_model(model).name_or_path, type(language_model(model)).__name__
        cause = f"its log-probs in training mode differ from those in evaluation mode by {noise:.2g}"
        raise UserError(
            f"--model: found sampled and scored log-probs of {architecture} ({name}) {found:.2g} nats per token apart on the"
            f" first answers (largest difference {gaps.max().item():.2g}), expected at most {limit:g} ({kind}):"
            f" {cause if not noise <= limit else 'what would be trained is not the policy that answers'}; see docs/models.md"
        )
    run.print(
        f"sampled and scored log-probs agree on the first answers: largest difference {gaps.max().item():.1e} nats per token,"
        f" mean {found:.1e}"
    )


@contextlib.contextmanager
def one_line_error(model, first: bool) -> Iterator[None]:
    """Turn an error of the model's own code into one line while the first answers are sampled. Leave later errors as they are."""
    try:
        yield
    except Exception as error:
        if not first or isinstance(error, UserError) or ran_out_of_memory(error):
            raise
        inner = language_model(model)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"--model: found {type(inner).__name__} ({inner.name_or_path}), which the sampler cannot run"
            f" ({type(error).__name__}: {reason}), expected an architecture that passes in docs/models.md"
        ) from error


def check_first_step(kind: str, row: dict[str, float], temperature: float) -> None:
    """UserError if the log-probs in the policy's first step on its answers are not those at sampling.

    row: metrics of the step, of a kind such as PPO, with sampling/logp_difference in nats per token.
    """
    difference = row["sampling/logp_difference"]
    if not difference * temperature < 0.05:  # rounding of the logits is divided by the temperature
        raise UserError(
            f"first {kind} step: found log-probs that differ by {difference:.4f} nats per token from those at sampling,"
            " expected rounding: the policy that is trained is not the one that answered"
        )
