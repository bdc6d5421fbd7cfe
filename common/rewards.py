"""Scalar models (reward, value, gold): one-label sequence classifiers of transformers, read at the positions of the masks.

Dims: B sequences, L prompt + response tokens, T response tokens, H hidden size.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import logprobs, models
from common.data import Batch
from common.engine import zero_of


class ScalarModel(torch.nn.Module):
    """A causal backbone with a scalar head: `AutoModelForSequenceClassification` with one label.

    transformers reads the head at the last token that is not PAD, which is the wrong token if PAD is EOS. Here the position
    comes from the response mask. `center` is subtracted from every output, and saved as config.reward_center.
    """

    center: Tensor

    def __init__(self, model):
        super().__init__()
        self.model = model
        if hasattr(model, "score"):  # an nn.Linear
            model.score.__class__ = ExactLinear
        self.register_buffer("center", torch.tensor(float(getattr(model.config, "reward_center", 0.0))))

    def forward(self, batch: Batch, every: bool = False) -> Tensor:
        """Return the scalar at the last response token -> (B,), or with `every` one for each response token -> (B, T).

        With `every`, `[:, t]` is read at the token before response token t: it sees the prompt and t response tokens, which is
        the state in which token t is chosen. It is 0 outside the response mask.
        """
        inner = self.inner
        if not hasattr(inner, "score"):  # an encoder: its own forward reads the right token
            logits = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return logits[:, 0].float() - self.center
        from extras.packing import model_inputs

        inputs, before, last = model_inputs(inner, batch)
        hidden = getattr(inner, inner.base_model_prefix)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        if not every:
            return self.head(inner, hidden[last])
        values = self.head(inner, hidden[before])  # (B, T)
        return torch.where(batch.response_mask, values, torch.zeros_like(values))

    @property
    def inner(self):
        """The model without LoRA's wrapper."""
        return logprobs.language_model(self.model)

    def normalise(self, mean: float, std: float = 1.0) -> None:
        """Shift and scale the outputs: scores with this mean and standard deviation get mean 0 and standard deviation 1."""
        with torch.no_grad():
            for parameter in self.inner.score.parameters():
                parameter /= std
            self.center.copy_((self.center + mean) / std)

    def head(self, inner, hidden: Tensor) -> Tensor:
        """(..., H) -> (...)"""
        return inner.score(hidden)[..., 0] - self.center


class ActorCritic(torch.nn.Module):
    """Policy and value model in one module, so that they share an optimizer and a backward pass."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(self, batch, temperature: float = 1.0, with_values: bool = True):
        """(ResponseScores of the policy, values (B, T)). Without values a 0 that touches the value's weights, for DDP."""
        scores = logprobs.response_logprobs(self.policy, batch, temperature)
        if with_values:
            return scores, self.value(batch, every=True)
        return scores, zero_of(self.value)


class ExactLinear(torch.nn.Linear):
    """A linear layer that computes in float32 or float64, under any mixed precision and with any type of weights.

    In bf16, rewards of 5.02 and 5.03 would be the same number.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def load_scalar_model(
    args, name: str, flag: str, head_seed: int | None = None, only_check: bool = False
) -> ScalarModel:
    """Return the model `name` with a scalar head, without dropout or other noise.

    head_seed: if the model has no head, make one N(0, 1/(H+1)) from this seed, as N+ and Stiennon et al. do. Without head_seed,
    a model without a head is a UserError. only_check: do all of this without reading the weights.
    """
    from transformers import AutoModelForSequenceClassification

    from extras import loading, noise, shared_prompts

    options: dict = {"device_map": "meta"} if only_check else {}
    if head_seed is not None:
        config = models.load_config(name, args.trust_remote_code, flag)
        options = {"attn_implementation": loading.attention(args, config)}
    options["key_mapping"] = {"^score_head": "score"}  # safe-rlhf's name of the head (beaver)
    model, info = loading.from_pretrained(AutoModelForSequenceClassification, args, name, flag, num_labels=1, **options)
    loading.refuse_unfit_scalar(info, f"{flag} {name}", head_seed is not None)
    if head_seed is not None and "score.weight" in info["missing_keys"]:
        stream, weight = torch.Generator().manual_seed(head_seed), model.score.weight  # (1, H)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=stream) / math.sqrt(weight.shape[1] + 1))
    loading.refuse_not_finite(model, name, flag)
    model = noise.without_noise(model)
    return ScalarModel(model if only_check else shared_prompts.settle(model, args, f"{flag} {name}"))


def prepare_scalar(args, name: str, flag: str) -> ScalarModel:
    """Load a scalar model to train. A missing head is made from --seed; --lora-r and --gradient-checkpointing are applied."""
    scalar = load_scalar_model(args, name, flag, head_seed=args.seed)
    scalar.model = models.make_trainable(scalar.model, args, "SEQ_CLS")
    return scalar


def save_reward(run, reward_model, method: str, paper: str, centred_on: str) -> Path:
    """Save a trained ScalarModel, as accelerate prepared it, under reward/ -> its path. Plain transformers can load and read it.

    centred_on: the responses whose mean score is 0, in words for the model card.
    """
    from extras.tokenizers import pad_for_readers

    args, scalar = run.args, run.unwrap(reward_model)
    tokenizer = models.load_tokenizer(args)
    scalar.model.config.reward_center = scalar.center.item()
    how = f"A score is the classifier's output minus `reward_center` of config.json: held-out {centred_on} average 0."
    note = f"{pad_for_readers(scalar.model.config, tokenizer)}{how}\n\n"
    source = getattr(args, "reward_model", "") or args.model
    card = run.model_card(f"{method}, reward model", paper, note, source, "eval/reward/accuracy")
    return run.save_final(reward_model, tokenizer, card, name="reward", part="model")
