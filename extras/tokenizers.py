"""Tokenizers: one line for each that does not fit its model, and a PAD token for readers of a saved reward model."""

from common import UserError, models
from common.data import end_of_turn
from common.models import text_config
from extras.templates import check_template


def refuse_unreadable(tokenizer, ids: list[int], owner: str) -> None:
    """UserError if a tokenizer gave only unknown tokens, `ids`, for common words, or if its chat template fails."""
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(
            f"{owner}: found a tokenizer that knows no word, expected its vocabulary beside the model (tokenizer.json, or"
            " tokenizer.model): save_pretrained of the tokenizer writes it"
        )
    check_template(tokenizer, owner)


def refuse_unfit(tokenizer, config, max_length: int, owner: str) -> None:
    """UserError if a tokenizer has no EOS token or more tokens than its model, or if the model's window is too short.

    config: of the language model. max_length: tokens of a sequence in training.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{owner}: found a tokenizer without an EOS token, expected one: responses could not end")
    vocabulary = getattr(config, "vocab_size", None) or len(tokenizer)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{owner}: found a tokenizer of {len(tokenizer)} tokens but {vocabulary} embeddings in the model;"
            " expected a tokenizer made for this model"
        )
    window = getattr(config, "max_position_embeddings", None)
    if isinstance(window, int) and 0 < window < max_length:
        raise UserError(f"--max-length: found {max_length}, expected at most {window}, the window of {owner}")


def refuse_window(args, config, owner: str) -> None:
    """UserError if a prompt with its answer can be longer than the window in `config`.

    Absolute positions do not exist beyond the window. Rotary positions do, but the model was never trained on them.
    """
    window = getattr(config, "max_position_embeddings", None)
    length = args.max_prompt_length + args.max_new_tokens
    if isinstance(window, int) and 0 < window < length:
        raise UserError(
            f"--max-new-tokens: found {args.max_new_tokens}, {length} tokens with --max-prompt-length {args.max_prompt_length};"
            f" expected at most {window} in all, the window of {owner}"
        )


def pad_for_readers(config, tokenizer) -> str:
    """Give a reward model's config and tokenizer a PAD token that is not EOS. Return a sentence for the model card, or "".

    transformers' classifiers read their head at the last token that is not PAD. With PAD = EOS that is one token too early.
    The sentence is for a model that has no free token.
    """
    config, vocabulary = text_config(config), tokenizer.get_vocab()
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


def check_same_tokenizer(args, tokenizer, name: str, flag: str) -> None:
    """UserError unless the model `name` has the policy's tokenizer, since both read the same token ids.

    It may have one token more, a PAD token, which no text contains. `save_reward` adds such a token.
    """
    other, mine = models.load_tokenizer(args, name, flag), tokenizer.get_vocab()
    if {k: v for k, v in other.get_vocab().items() if k in mine or k != other.pad_token} != mine:
        raise UserError(
            f"{flag} {name}: found a tokenizer of {len(other)} tokens that differs from that of --model {args.model}"
            f" ({len(tokenizer)}); expected the same one, since both read the same token ids"
        )
