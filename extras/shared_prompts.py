"""Which models can score several answers to one prompt in one row, [prompt; answer 1; answer 2; ...] (extras/packing.py).

A model can if it tells tokens apart by nothing but the mask and the positions that it is given. Rules refuse some models by
their configuration. A forward pass over a few tokens refuses the others: it compares packed rows with separate ones, and with
packed rows in which an answer sees the answers before it too. This happens when a model is loaded, before an engine wraps
it or cuts it up. So no collective is needed, and all processes decide alike.
"""

import inspect
import os
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.data import collate
from common.models import text_config
from extras.packing import Limits, Rows, attention_mask, has_state_layers, padded_inputs, shared_inputs

WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")  # fields of configurations
MASKS = ("sdpa", "eager", "flex_attention")  # kinds of attention that take a mask for each pair of tokens
PROMPT, ANSWERS = [5, 6, 7], ([8, 9], [10, 11, 12])  # of the forward pass at load time
PROBED = Rows.of([[0, 1]], [len(PROMPT)] * 2, [len(y) for y in ANSWERS])

DECISIONS: dict[tuple[str, ...], str] = {}  # class, configuration, type of weights -> why the model is refused, or ""
SAID: set[str] = set()  # what this process has printed


def settle(model, args, owner: str):
    """Decide if a loaded model shares prompts, print it once, and return the model.

    owner: the flag and the name of the model. The decision is an attribute of the model, which copies of it have too.
    """
    limits = Limits(getattr(text_config(model.config), "hidden_size", 1024), token_limit(model))
    key = identity(model)
    if args.share_prompts and key not in DECISIONS:
        DECISIONS[key] = refusal(model, limits)
    reason = DECISIONS[key] if args.share_prompts else "--no-share-prompts"
    model.shared_prompts = None if reason else limits
    most = f", in rows of {limits.tokens} tokens at most" if limits.tokens < float("inf") else ""
    why = f"{owner}: {reason}" if args.share_prompts else reason
    line = f"shared prompts: off ({why})" if reason else f"shared prompts: on{most}"
    if line not in SAID and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
    SAID.add(line)
    return model


def identity(model) -> tuple[str, ...]:
    """Return the key of the model in DECISIONS."""
    return type(model).__name__, str(model.dtype), model.config._attn_implementation, model.config.to_json_string()


def refusal(model, limits: Limits) -> str:
    """Say in a few words why a loaded model cannot share prompts. Empty if it can."""
    name, attention = type(model).__name__, model.config._attn_implementation
    called = called_part(model)
    if attention not in MASKS:
        return f"{attention} takes no mask for each pair of tokens"
    if called is None:
        return f"{name} is an encoder"
    try:
        if has_state_layers(model.config):
            return f"{name} has convolutional or recurrent layers"
        if "position_ids" not in inspect.signature(called.forward).parameters:
            return f"{name} takes no positions"
        if limits.tokens < PROBED.tokens:
            return f"{name} sees {limits.tokens} tokens"
        shared, leaked = gaps(model, called)
    except Exception as error:  # code of a model, written for other masks, may raise anything
        return f"{name} cannot run such rows, {type(error).__name__}"
    rounding = 0.25 if model.dtype.itemsize < 4 else 0.01
    if not shared < rounding * leaked:
        return f"{name} scores such rows differently, by {shared:.1e} against {leaked:.1e} where answers see each other"
    return ""


def same_prompts(args, sequences: Sequence[tuple], order: Iterable[int] = ()) -> list[list[int]]:
    """Group the indices of [(prompt ids, response ids)] by prompt. Groups and their members stand as `order` has them.

    order: by default that of the sequences. Each index is alone with --no-share-prompts, or if no loaded model shares prompts.
    """
    order = order or range(len(sequences))
    if not (args.share_prompts and "" in DECISIONS.values()):
        return [[i] for i in order]
    groups: dict[
        int, list[int]
    ] = {}  # by a hash, which all processes find alike; `collate` compares the prompts themselves
    for i in order:
        groups.setdefault(hash(tuple(sequences[i][0])), []).append(i)
    return list(groups.values())


def scoring_order(args, sequences: Sequence[tuple]) -> list[int]:
    """Sort the indices of [(prompt ids, response ids)], the longest sequence first, and put those with one prompt together."""
    by_length = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))
    return [i for group in same_prompts(args, sequences, by_length) for i in group]


def called_part(model):
    """Return the module that scoring calls: a language model itself, the backbone of a classifier. None for an encoder."""
    if model.get_output_embeddings() is not None:
        return model
    return getattr(model, model.base_model_prefix) if hasattr(model, "score") else None


def token_limit(model) -> float:
    """Return the length up to which rows of the model are free of windows, chunks, and tables with an entry for each place.

    These count places in a row, which in packed rows are not the positions. So they must hold the whole row.
    """
    config = text_config(model.config)
    found = [getattr(config, name, None) for name in WINDOWS]
    tables = [
        b for b in model.get_decoder().buffers() if b.dim() > 1
    ]  # causal masks are square, ids of places are (1, n)
    found += [b.shape[-1] for b in tables if b.shape[-1] == b.shape[-2] or (len(b) == 1 and not b.is_floating_point())]
    return min((n for n in found if isinstance(n, int) and n > 1), default=float("inf"))


@torch.no_grad()
def gaps(model, called) -> tuple[float, float]:
    """Return how far packed rows are from separate ones, and how far those are in which the second answer sees the first.

    Both are the largest difference of an output at the positions that predict answer tokens, and at the last one.
    """
    words = text_config(model.config).vocab_size
    sequences = [([i % words for i in PROMPT], [i % words for i in answer]) for answer in ANSWERS]
    batch = collate(sequences, 0).to(model.device)
    packed = shared_inputs(model, batch, PROBED)
    leaking = {**packed.inputs, "attention_mask": attention_mask(model, torch.ones_like(packed.inputs["input_ids"]))}

    def read(inputs: dict, before: Tensor, last: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = called(**inputs, use_cache=False)
        out = out.logits if called is model else out.last_hidden_state
        return out.flatten(0, 1)[torch.cat([before[batch.response_mask], last])].double()

    separate = read(*padded_inputs(batch))
    shared, leaked = (read(inputs, packed.before, packed.last) for inputs in (packed.inputs, leaking))
    return (shared - separate).abs().max().item(), (leaked - separate).abs().max().item()
