"""Token ids of a response where they are not simply those after the prompt's.

A token may cross the border between prompt and response, and a control token may be written out in a response as text.
"""

import unicodedata

from common.data import tokenise
from extras.templates import control_texts, control_tokens


def mend_borders(
    tokenizer, before: list[list[int]], whole: list[list[int]], texts: list[str]
) -> list[list[int] | None]:
    """Token ids of each text after its prompt. before: ids of the prompts; whole: ids of the prompts with their texts.

    They are those in `whole` after the prompt's, if `whole` begins with these. It does not where a token crosses the border;
    the sampler still sees the prompt's own. The ids then are the text's own, or those it has after a short other text: the first
    that read the same as the whole. Control tokens written in a text are text. None where no ids read so.
    """
    controls = control_tokens(tokenizer)
    out: list[list[int] | None] = [None] * len(texts)
    left, written = [], []
    for i, (mine, both) in enumerate(zip(before, whole, strict=True)):
        if controls.search(texts[i]) or (tokenizer.unk_token and tokenizer.unk_token in texts[i]):
            written.append(i)
        elif both[: len(mine)] == mine and len(both) > len(mine):
            out[i] = both[len(mine) :]
        else:
            left.append(i)

    def common(i: int) -> int:
        """Return the position from which to read: one token before the first that differs."""
        same = next((k for k, (a, b) in enumerate(zip(before[i], whole[i], strict=False)) if a != b), len(before[i]))
        return max(same - 1, 0)

    def reads_as_whole(parts: dict[int, list[int]]) -> list[bool]:
        start = {i: common(i) for i in parts}
        mine = read(tokenizer, [(before[i] + own)[start[i] :] for i, own in parts.items()])
        return [a == b for a, b in zip(mine, read(tokenizer, [whole[i][start[i] :] for i in parts]), strict=True)]

    def reads_as_text(parts: dict[int, list[int]]) -> list[bool]:
        heads = read(tokenizer, [before[i] for i in parts])
        mine = read(tokenizer, [before[i] + own for i, own in parts.items()])
        special = {tokenizer.convert_tokens_to_ids(t) for t in control_texts(tokenizer)}
        forms = [{texts[i], *(unicodedata.normalize(form, texts[i]) for form in ("NFC", "NFKC"))} for i in parts]
        return [
            special.isdisjoint(own) and m.removeprefix(h) in allowed
            for h, m, own, allowed in zip(heads, mine, parts.values(), forms, strict=True)
        ]

    for waiting, reads, split in ((left, reads_as_whole, False), (written, reads_as_text, True)):
        for context in ("", "\n", ".", "a", "("):
            if not waiting:
                break
            head = tokenise(tokenizer, [context], split)[0]
            found = zip(waiting, tokenise(tokenizer, [context + texts[i] for i in waiting], split), strict=True)
            parts = {i: ids[len(head) :] for i, ids in found if ids[: len(head)] == head and len(ids) > len(head)}
            for (i, own), right in zip(parts.items(), reads(parts), strict=True):
                if right:
                    out[i] = own
            waiting = [i for i in waiting if out[i] is None]
    return out


def read(tokenizer, ids: list[list[int]]) -> list[str]:
    """Texts of token ids, to the letter."""
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else []
