"""Read what a chat template writes around a prompt and a response, and remove it from texts that hold it already."""

import re
from collections.abc import Callable

from common import UserError
from common.data import NAMES, PLAIN_TEMPLATE, Frame, UnusableRow, render_prompt, tokenise, tokenise_prompts
from common.store import as_messages


# ---- the template ----
def read_frame(tokenizer) -> Frame:
    """The Frame of the tokenizer's template, from what it writes for an exchange of two known texts.

    The turn ends with the token that the template puts after the response. Where it puts none, or refuses such an
    exchange, the turn ends with the tokenizer's EOS.
    """
    eos = tokenizer.eos_token_id
    prompt, response = "PROMPT", "RESPONSE"
    if not getattr(tokenizer, "chat_template", None):  # stand-ins of tests and benchmarks know EOS alone
        before, _, after = PLAIN_TEMPLATE.partition("{prompt}")
        return Frame(before, after, after.lstrip(), end=eos)
    question, answer = as_messages(prompt), [{"role": "assistant", "content": response}]
    try:
        asked = render_prompt(tokenizer, prompt)
        bare = tokenizer.apply_chat_template(question, tokenize=False)
        whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    except Exception:  # the rows that the template refuses are named later
        return Frame(end=eos)
    before, _, after = asked.partition(prompt)
    bare = bare.partition(prompt)[2]
    head, _, tail = whole.rpartition(response)
    lead, trail = head.removeprefix(asked), tail[: len(tail) - len(tail.lstrip())]
    added = {str(t) for t in tokenizer.added_tokens_decoder.values()}
    ends = [t for t in added | {tokenizer.eos_token} if head and tail.lstrip().startswith(t)]
    return Frame(
        before,
        after,
        opening=after.removeprefix(bare) if after.startswith(bare) else "",
        lead=lead if head.startswith(asked) and not lead.strip() else "",
        trail=trail if ends else "",
        end=tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else eos,
    )


def check_template(tokenizer, where: str) -> None:
    """UserError for chat templates that cannot be used: several without a default one, or one that is no valid Jinja."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise UserError(
            f"{where}: found chat templates {names}, none of the name default; expected one: in Python,"
            f" tokenizer.chat_template = tokenizer.chat_template[{sorted(templates)[0]!r}], then save_pretrained"
        )
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
        try:
            _compile_jinja_template(template)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{where}: found a chat template with an error in line {error.lineno} ({error.message}), expected a valid"
                " Jinja template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            ) from error


# ---- the template of a saved tokenizer ----
BEFORE, AFTER = PLAIN_TEMPLATE.split("{prompt}")
GAP = AFTER[: len(AFTER) - len(AFTER.lstrip())]
PLAIN_CHAT = (  # PLAIN_TEMPLATE and data.plain_prompt, as a chat template; the answer of a finished exchange ends with EOS
    "{% set answer = messages[-1] if messages[-1]['role'] == 'assistant' and not add_generation_prompt else none %}"
    "{% set turns = messages[:-1] if answer else messages %}"
    f"{{% set names = {NAMES!r} %}}{{{{ {BEFORE!r} }}}}"
    "{% for turn in turns %}"
    "{% if turns|length > 1 %}{{ names.get(turn['role'], turn['role']) + ': ' }}{% endif %}{{ turn['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    f"{{% endfor %}}{{{{ {GAP!r} }}}}"
    f"{{% if answer %}}{{{{ {AFTER.lstrip()!r} + answer['content'] + eos_token }}}}"
    f"{{% elif add_generation_prompt %}}{{{{ {AFTER.lstrip()!r} }}}}{{% endif %}}"
)


def served_template(tokenizer) -> str | dict:
    """The chat template with which a chat server sends the tokens of the prompts in training.

    It is that of the tokenizer, or PLAIN_CHAT. A server adds no BOS of its own (add_special_tokens false), so the template
    begins with it where training puts it before the text.
    """
    templates = tokenizer.chat_template or PLAIN_CHAT
    try:
        text = render_prompt(tokenizer, "a")
    except UnusableRow:  # it wants another conversation: what it would write is not known
        return templates
    try:
        begins_with_bos = tokenise_prompts(tokenizer, [text]) != tokenise(tokenizer, [text])
    except (
        Exception
    ):  # a word-level tokenizer without an unknown token can read no text, and says so by this type alone
        begins_with_bos = False
    if not begins_with_bos:
        return templates
    bos = "{{ bos_token }}"
    return {**templates, "default": bos + templates["default"]} if isinstance(templates, dict) else bos + templates


def save_tokenizer(tokenizer, folder) -> None:
    """save_pretrained, with served_template. The tokenizer itself stays as it is."""
    own = tokenizer.chat_template
    tokenizer.chat_template = served_template(tokenizer)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


# ---- tokens written out as text ----
def control_texts(tokenizer) -> list[str]:
    """The tokens that stand for no text: what begins and ends turns, padding, and the like; the unknown token is none."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    special -= {tokenizer.unk_token}
    return sorted(special | set(end_texts(tokenizer)), key=lambda t: (-len(t), t))


def control_tokens(tokenizer) -> re.Pattern:
    """Finds a control token that is written out in a text."""
    return re.compile("|".join(map(re.escape, control_texts(tokenizer))) or r"(?!)")


def end_texts(tokenizer) -> list[str]:
    """Texts that some data sets write at the end of a response: the template's token and the tokenizer's EOS."""
    return [tokenizer.convert_ids_to_tokens(read_frame(tokenizer).end), tokenizer.eos_token]


def without_end(text: str, ends: list[str]) -> str:
    """The text without an end written out after it: the end is added once, as a token. Within the text it is text."""
    bare = text.rstrip()
    while any(bare.endswith(end) for end in ends):
        text = bare = next(bare.removesuffix(end) for end in ends if bare.endswith(end)).rstrip()
    return text


# ---- the texts of a data set ----
class Wording:
    """Takes out of prompts and responses what the template writes itself. frame: by default that of the tokenizer."""

    def __init__(self, tokenizer, frame: Frame | None = None):
        self.tokenizer, self.frame = tokenizer, frame or read_frame(tokenizer)
        self.ends, self.controls = end_texts(tokenizer), control_tokens(tokenizer)

    def prompt(self, prompt, render: Callable) -> tuple:
        """(the prompt to render, its text if it is rendered already, else ""). UnusableRow for a control token in it."""
        if isinstance(prompt, str) and self.is_rendered(prompt):
            inner = prompt.removeprefix(self.frame.before).removesuffix(self.frame.after)
            known = not self.controls.search(inner) and render(self.tokenizer, inner) == prompt
            return (inner if known else prompt), prompt
        if isinstance(prompt, list):  # earlier answers may have their end written out too
            prompt = [
                {**m, "content": without_end(m["content"], self.ends)} if m["role"] == "assistant" else m
                for m in prompt
            ]
        written = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        if found := self.controls.search(written):
            raise UnusableRow(f"found the control token {found[0]} in the prompt's text, expected text alone")
        return prompt, ""

    def is_rendered(self, prompt: str) -> bool:
        """True where the template's own words end the prompt, and begin it too unless those at the end are its control tokens."""
        before, after = self.frame.before, self.frame.after
        if not after.strip() or not prompt.endswith(after):
            return False
        return bool(self.controls.search(after)) or prompt.startswith(before)

    def response(self, text: str, prompt: str) -> str:
        """A response without an end that is written out, and without the part of the template's opening that it repeats.

        DeepSeek-R1's prompt ends in "<think>\n", with which its published answers begin: it is there once.
        """
        text = without_end(text, self.ends)
        opening = self.frame.opening
        if not opening.strip() or not prompt.endswith(opening):
            return text
        starts = [i for i, c in enumerate(opening) if i == 0 or opening[i - 1] == "\n" or c in "<["]
        for i in starts:
            tag = opening[i:].strip()
            if tag and text.lstrip().startswith(tag):
                space = opening[len(opening.rstrip()) :]
                return text.lstrip().removeprefix(tag).removeprefix(space)
        return text
