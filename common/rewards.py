"""Scalar models (reward, value, gold): one-label sequence classifiers of transformers, read where the masks say.

Dims: B sequences, L prompt + response tokens, T response tokens, H hidden size.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, logprobs, models
from common.data import Batch, end_of_turn
from extras import sharding


class ScalarModel(torch.nn.Module):
    """A causal backbone with a scalar head, `AutoModelForSequenceClassification` with one label.

    transformers reads its head at the last token that is not PAD, which is the wrong one where PAD is EOS. Here the
    position comes from the response mask. `center` is subtracted from every output; saved as config.reward_center.
    """

    center: Tensor

    def __init__(self, model):
        super().__init__()
        self.model = model
        if hasattr(model, "score"):  # an nn.Linear
            model.score.__class__ = ExactLinear
        self.register_buffer("center", torch.tensor(float(getattr(model.config, "reward_center", 0.0))))

    def forward(self, batch: Batch, every: bool = False) -> Tensor:
        """(B,) scalar at the last response token; with `every` (B, T): at the token before each response token, 0 beyond.

        `[:, t]` of the latter sees the prompt and t response tokens: the state in which token t is chosen.
        """
        inner = self.inner
        if not hasattr(inner, "score"):  # an encoder, whose own forward knows where to read
            logits = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return logits[:, 0].float() - self.center
        inputs, begin = logprobs.model_inputs(inner.config, batch)
        hidden = getattr(inner, inner.base_model_prefix)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        first = begin + batch.response_start  # (B,) of the first response tokens
        if not every:
            return self.head(inner, hidden[first + batch.response_mask.sum(-1) - 1])
        offsets = torch.arange(batch.response_mask.shape[1], device=hidden.device)
        index = (first[:, None] - 1 + offsets).clamp(max=len(hidden) - 1)  # (B, T)
        values = self.head(inner, hidden[index])
        return torch.where(batch.response_mask, values, torch.zeros_like(values))

    @property
    def inner(self):
        """The model without LoRA's wrapper."""
        return logprobs.language_model(self.model)

    def normalise(self, mean: float, std: float = 1.0) -> None:
        """Shift and scale so that scores of this mean and standard deviation become of mean 0 and deviation 1."""
        with torch.no_grad():
            for parameter in self.inner.score.parameters():
                parameter /= std
            self.center.copy_((self.center + mean) / std)

    def head(self, inner, hidden: Tensor) -> Tensor:
        """(..., H) -> (...)"""
        return inner.score(hidden)[..., 0] - self.center


class ActorCritic(torch.nn.Module):
    """Policy and value model in one module: one optimizer, one backward pass."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(self, batch, temperature: float = 1.0, with_values: bool = True):
        """(ResponseScores of the policy, values (B, T)). Without values a 0 that touches the value's weights, for DDP."""
        scores = logprobs.response_logprobs(self.policy, batch, temperature)
        if with_values:
            return scores, self.value(batch, every=True)
        return scores, sharding.zero_of(self.value)


class ExactLinear(torch.nn.Linear):
    """Computed in float32 (float64 stays) whatever the mixed precision, and whatever type an engine gave the weights.

    In bf16 rewards of 5.02 and 5.03 are the same.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def load_scalar_model(
    args, name: str, flag: str, head_seed: int | None = None, only_check: bool = False
) -> ScalarModel:
    """The model of that name with a scalar head, without noise.

    head_seed: make a head N(0, 1/(H+1)) from this seed where the model has none, as N+ and Stiennon et al. do; without
    it a model without a head is a UserError. only_check: read what its files hold, but not the weights.
    """
    from transformers import AutoModelForSequenceClassification

    from extras import loading

    kind = {"device_map": "meta"} if only_check else {}
    if head_seed is not None:
        config = models.load_config(name, args.trust_remote_code, flag)
        kind = {"attn_implementation": models.attention(args, config)}
    with loading.one_line_error(name, flag), loading.quiet_load():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            loading.resolve_model(name),
            num_labels=1,
            dtype=getattr(torch, args.dtype),
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            key_mapping={"^score_head": "score"},  # safe-rlhf's name of the head (beaver)
            **kind,
        )
    if any(name.startswith(("score.", "classifier.")) for name, *_ in info["mismatched_keys"]):
        raise UserError(f"{flag} {name}: found a classifier of several labels, expected one label")
    loading.refuse_mismatched(info, f"{flag} {name}")
    expected = "a model with a scalar head" if head_seed is None else "a causal model, or a classifier on one"
    missing = info["missing_keys"]
    loading.refuse_missing(
        info, f"{flag} {name}", expected, frozenset() if head_seed is None else frozenset({"score.weight"})
    )
    if head_seed is not None and "score.weight" in missing:
        stream = torch.Generator().manual_seed(head_seed)
        hidden = model.score.weight.shape[1]
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, hidden, generator=stream) / math.sqrt(hidden + 1))
    loading.refuse_not_finite(model, name, flag)
    return ScalarModel(models.without_noise(model))


def prepare_scalar(args, name: str, flag: str) -> ScalarModel:
    """A scalar model to train: its head made from --seed where it has none, LoRA and checkpointing where asked."""
    scalar = load_scalar_model(args, name, flag, head_seed=args.seed)
    scalar.model = models.make_trainable(scalar.model, args, "SEQ_CLS")
    return scalar


def check_same_tokenizer(args, tokenizer, name: str, flag: str) -> None:
    """UserError unless the model of that name has the policy's tokenizer: both read the same token ids.

    It may have a PAD token more, as pad_for_readers gives it: no text holds one.
    """
    other, mine = models.load_tokenizer(args, name, flag), tokenizer.get_vocab()
    if {k: v for k, v in other.get_vocab().items() if k in mine or k != other.pad_token} != mine:
        raise UserError(
            f"{flag} {name}: found a tokenizer of {len(other)} tokens that differs from that of --model {args.model}"
            f" ({len(tokenizer)}); expected the same one, since both read the same token ids"
        )


def pad_for_readers(config, tokenizer) -> str:
    """Give config and tokenizer a PAD that is not EOS, so that transformers' own classifier reads our last token.

    Returns a sentence for the model card, empty if all is well.
    """
    config, vocabulary = models.text_config(config), tokenizer.get_vocab()
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, end_of_turn(tokenizer)):
        free = next((t for t in ("<|padding|>", "<pad>", "[PAD]", "<unk>") if t in vocabulary), None)
        if free is None and len(tokenizer) < config.vocab_size:
            free = "<|padding|>"
        if free is None:
            config.pad_token_id = None
            return "No token was free for padding: score one sequence at a time, or mask by length.\n\n"
        tokenizer.add_special_tokens({"pad_token": free})
    config.pad_token_id = tokenizer.pad_token_id
    return ""


def save_reward(run, reward_model, method: str, paper: str, centred_on: str) -> Path:
    """reward/: a trained ScalarModel, prepared by accelerate, as a classifier that plain transformers loads and reads.

    centred_on: the responses whose mean score is 0.
    """
    args, scalar = run.args, run.unwrap(reward_model)
    tokenizer = models.read_tokenizer(args.model, args.trust_remote_code, "--model")
    note = pad_for_readers(scalar.model.config, tokenizer)
    scalar.model.config.reward_center = scalar.center.item()
    note += (
        f"A score is the classifier's output minus `reward_center` of config.json: held-out {centred_on} average 0.\n\n"
    )
    source = getattr(args, "reward_model", "") or args.model
    card = run.model_card(f"{method}, reward model", paper, note, source, "eval/reward/accuracy")
    return run.save_final(reward_model, tokenizer, card, name="reward", part="model")
