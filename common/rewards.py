"""Scalar models (reward, value, gold): one-label sequence classifiers of transformers, read where the masks say.

Dims: B sequences, L prompt + response tokens, T response tokens, H hidden size.
"""

import functools
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, logprobs, models
from common.data import (
    Batch,
    Frame,
    cache_folder,
    end_of_turn,
    end_texts,
    read_frame,
    render_prompt,
    respond,
    tokenise,
    tokenise_prompts,
    without_end,
)


class ScalarModel(torch.nn.Module):
    """A causal backbone with a scalar head, `AutoModelForSequenceClassification` with one label.

    transformers reads its head at the last token that is not PAD, which is the wrong one where PAD is EOS. Here the
    position comes from the response mask. `center` is subtracted from every output; saved as config.reward_center.
    """

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

    kind = {"device_map": "meta"} if only_check else {}
    if head_seed is not None:
        config = models.load_config(name, args.trust_remote_code, flag)
        kind = {"attn_implementation": models.attention(args, config)}
    with models.one_line_error(name, flag), models.quiet_load():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            models.resolve_model(name),
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
    models.refuse_mismatched(info, f"{flag} {name}")
    expected = "a model with a scalar head" if head_seed is None else "a causal model, or a classifier on one"
    missing = info["missing_keys"]
    models.refuse_missing(
        info, f"{flag} {name}", expected, frozenset() if head_seed is None else frozenset({"score.weight"})
    )
    if "score.weight" in missing:
        stream = torch.Generator().manual_seed(head_seed)
        hidden = model.score.weight.shape[1]
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, hidden, generator=stream) / math.sqrt(hidden + 1))
    models.refuse_not_finite(model, name, flag)
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


# ---- a gold reward model: text in, since its tokenizer is its own ----
FLAG = "--gold-reward-model"
BEAVER = ("BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:")  # the prompt format of safe-rlhf


def refuse_unusable(args) -> None:
    """UserError for a --gold-reward-model that could not score: no scalar head, weights missing or cut short, no tokenizer."""
    models.read_tokenizer(args.gold_reward_model, args.trust_remote_code, FLAG)
    load_scalar_model(args, args.gold_reward_model, FLAG, only_check=True)


def is_beaver(name: str) -> bool:
    return Path(name).name.startswith("beaver")


def render_gold(name: str, tokenizer, prompt) -> str:
    """The prompt as the gold model expects it: safe-rlhf's format for beaver, else chat template or plain template."""
    if not is_beaver(name):
        return render_prompt(tokenizer, prompt)
    begin, user, assistant = BEAVER
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    text = begin
    for turn in turns:
        text += (
            user.format(turn["content"]) + assistant
            if turn["role"] == "user"
            else turn["content"] + tokenizer.eos_token
        )
    return text


class GoldReward:
    """--gold-reward-model, loaded for as long as this object lives. A prompt too long for its window loses its beginning."""

    def __init__(self, run):
        self.run, self.name = run, run.args.gold_reward_model
        self.scalar = models.for_inference(run, load_scalar_model(run.args, self.name, FLAG))

    def score(
        self, rows: list[dict], responses: list[str], finished: list[bool], advance=lambda n: None
    ) -> list[float]:
        """Score of each response to its row's prompt, shared over ranks; EOS ends those that are finished."""
        sequences = gold_sequences(self.run.args, rows, responses, finished, self.scalar.model.config)
        return self.run.map_sequences(sequences, lambda batch: self.scalar(batch).tolist(), advance)


def gold_sequences(
    args, rows: list[dict], responses: list[str], finished: list[bool], config
) -> list[tuple[list[int], list[int]]]:
    """[(prompt ids, response ids)] in the gold model's tokens, cut to its window; the end of a turn after finished responses.

    A response that its sampler was cut in has no end, as in the policy's own tokens; one without any text has the end alone.
    """
    name = args.gold_reward_model
    tokenizer = models.read_tokenizer(name, args.trust_remote_code, FLAG)
    texts = []
    for row in rows:
        try:
            texts.append(render_gold(name, tokenizer, row["prompt"]))
        except UserError as error:
            raise UserError(f"{FLAG} {name}: row {row['row']}: {error}") from None
    prompts, ends = tokenise_prompts(tokenizer, texts), end_texts(tokenizer)
    bare = [without_end(t, ends) for t in responses]
    frame = Frame(end=tokenizer.eos_token_id) if is_beaver(name) else read_frame(tokenizer)
    alone = tokenise(tokenizer, bare, split_special=True)  # for an answer, such as an empty one, that none follow
    window = getattr(models.text_config(config), "max_position_embeddings", None) or 4096
    out, answers = [], respond(tokenizer, texts, bare, finished, frame)
    for prompt, answer, own, done in zip(prompts, answers, alone, finished, strict=True):
        answer = (own + [frame.end] * (done or not own) if answer is None else answer)[: window - 1]
        out.append((prompt[-(window - len(answer)) :], answer))
    return out


def cached_gold_scores(run, rows: list[dict], responses: list[str], block: int = 4096) -> list[float]:
    """Gold scores of responses to rows through the user's cache folder; a row's response_finished says if it is False."""
    config = models.load_config(run.args.gold_reward_model, run.args.trust_remote_code, FLAG)
    precision = [run.args.dtype, run.accelerator.mixed_precision]
    path = cache_file("gold", run.args.gold_reward_model, config.to_json_string(use_diff=False), precision)
    finished = [r.get("response_finished", True) for r in rows]
    asked = zip(rows, responses, finished, strict=True)
    pairs = [json.dumps([r["prompt"], t] + ([] if done else ["unfinished"])) for r, t, done in asked]
    keys = [hashlib.sha256(p.encode()).hexdigest() for p in pairs]
    gold = functools.cache(lambda: GoldReward(run))  # loaded if a score is missing

    def work(part: list[int], advance) -> list[float]:
        return gold().score(*([column[i] for i in part] for column in (rows, responses, finished)), advance)

    return run.cached(path, keys, work, "gold scores of demonstrations", block)


def cache_file(kind: str, model: str, *settings) -> Path:
    """Where results of a model under these settings are kept; other weights have another file."""
    name = models.resolve_model(model)
    identity = json.dumps([kind, name, weights_identity(Path(name)), *settings])
    return cache_folder() / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.parquet"


def weights_identity(folder: Path) -> list:
    """Name, size and time of a local model's weight files; a hub model is known by its name."""
    return sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.glob("*")
        if p.suffix in (".safetensors", ".bin")
    )
