"""An LLM judge: which of two responses to a prompt is better, asked of any OpenAI-compatible endpoint.

Every pair is asked in both orders, at temperature 0, and what is not a clear verdict is no vote.

Dims: n pairs.
"""

import hashlib
import json
import os
import re
import threading
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from common import UserError
from common.args import require
from common.data import plain_prompt
from extras.cache import cache_folder
from extras.statistics import bootstrap_interval


def judge_values(votes: np.ndarray) -> dict[str, float]:
    """JUDGE_METRICS of the votes of Judge.compare (n, 2); without a row that has both votes only the counts."""
    both = votes[~np.isnan(votes).any(1)]
    counts = {"eval/judge/ties": float((votes == 0.5).sum()), "eval/judge/unparsable": float(np.isnan(votes).sum())}
    if not len(both):
        return counts
    low, high = bootstrap_interval(both.mean(1))
    return {
        "eval/judge/win_rate_demonstrations": float(both.mean()),
        "eval/judge/win_rate_low": low,
        "eval/judge/win_rate_high": high,
        "eval/judge/first_position": float((both[:, 0] + 1 - both[:, 1]).mean() / 2),
        **counts,
    }


OPENAI = "https://api.openai.com/v1"
TIMEOUT = 60.0  # seconds without a byte from the server
RETRIES = 6  # of a failed request (no connection, time-out, 408, 409, 429, 5xx), after 0.5, 1, 2, ... 8 s
WORKERS = 8  # requests at a time
BLOCK = 16  # pairs between two signs of life to the other processes: NCCL's patience is ten minutes
MAX_TOKENS = 512  # in a reply
VERDICT = """
First write one sentence that compares the two. Then write a last line, with nothing after it, that is exactly one of these:
Preferred: A
Preferred: B
Preferred: tie
"""
TEMPLATES = {  # --judge-task -> question; the text of the question is part of the cache key
    "answer": """\
Below are a request and two answers to it, A and B. Judge which answer is better: it does what the request asks, is correct
and to the point, and reads well. Neither the order nor the length of the answers is a reason to prefer one.

<request>
{prompt}
</request>

<answer A>
{a}
</answer A>

<answer B>
{b}
</answer B>
"""
    + VERDICT,
    "summary": """\
Below are a post and two summaries of it, A and B. Judge which summary is better: it gives the points that matter most in the
post, claims nothing that the post does not say, and can be read quickly by somebody who has not seen the post. The order of
the summaries is no reason to prefer one.

<post>
{prompt}
</post>

<summary A>
{a}
</summary A>

<summary B>
{b}
</summary B>
"""
    + VERDICT,
}
SHARE = {"a": 1.0, "b": 0.0, "tie": 0.5}  # verdict -> vote for the response shown first


def parse_reply(reply: str) -> float:
    """1, 0 or 1/2 if the last line prefers A, B or neither; NaN if it is no verdict or another line says otherwise."""
    lines = [line.strip() for line in reply.replace("*", "").splitlines() if line.strip()]
    found = [re.fullmatch(r"Preferred: (A|B|tie)\.?", line, re.IGNORECASE) for line in lines]
    verdicts = {match[1].lower() for match in found if match}
    return SHARE[verdicts.pop()] if found and found[-1] and len(verdicts) == 1 else float("nan")


class Judge:
    """--judge-model at --judge-base-url, with every reply it has ever given in the user's cache folder."""

    def __init__(self, args, timeout: float = TIMEOUT, retries: int = RETRIES):
        import httpx
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY", "")
        self.secret, self.model, self.url = key, args.judge_model, (args.judge_base_url or OPENAI).rstrip("/")
        require(
            bool(key or args.judge_base_url), "judge_model", f"{self.model} and no OPENAI_API_KEY in the environment",
            "a key for OpenAI, or another endpoint as --judge-base-url",
        )  # fmt: skip
        try:  # a local server asks for no key, the client does
            self.client = OpenAI(base_url=self.url, api_key=key or "none", timeout=timeout, max_retries=retries)
        except httpx.InvalidURL as error:
            raise self.failure(str(error)) from error
        self.template = TEMPLATES[args.judge_task]
        name = hashlib.sha256(json.dumps([self.url, self.model]).encode()).hexdigest()[:16]
        self.cache, self.lock = cache_folder() / f"judge-{name}.jsonl", threading.Lock()
        self.replies = read_replies(self.cache)

    def compare(self, prompts: list, ours: list[str], theirs: list[str], advance=lambda n: None) -> np.ndarray:
        """Votes for `ours` against `theirs` -> (n, 2): 1, 0, 1/2 for a tie, NaN for a reply without verdict.

        Column 0 comes from the order in which ours is shown first, column 1 from the other. A row's vote is their mean,
        and NaN with either: one order alone carries the judge's preference for a position, which nothing cancels.
        prompts: texts or lists of messages. UserError if an answer could not be had; those that came are kept.
        """
        requests = [
            self.request(plain_prompt(prompt), *pair)
            for prompt, a, b in zip(prompts, ours, theirs, strict=True)
            for pair in ((a, b), (b, a))
        ]
        first = np.array([parse_reply(reply) for reply in self.answers(requests, advance)]).reshape(-1, 2)
        return np.stack([first[:, 0], 1 - first[:, 1]], axis=1)

    def answers(self, requests: list[dict], advance=lambda n: None) -> list[str]:
        """The reply to each request: from the cache, or asked for now. UserError as in compare."""
        keys = [hashlib.sha256(json.dumps(r).encode()).hexdigest() for r in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in self.replies}
        with ThreadPool(
            WORKERS
        ) as pool:  # its threads are daemons: neither an error nor SIGTERM waits for a stalled one
            for _ in pool.imap_unordered(lambda item: self.store(*item), missing.items()):
                advance(1)
        advance(len(requests) - len(missing))
        return [self.replies[k] for k in keys]

    def request(self, prompt: str, a: str, b: str) -> dict:
        """The body of the request that shows a first."""
        return self.body(self.template.format(prompt=prompt, a=a, b=b))

    def body(self, question: str) -> dict:
        """The body of a request; max_tokens is the name that local servers know too."""
        message = {"role": "user", "content": question}
        return {"model": self.model, "messages": [message], "temperature": 0.0, "max_tokens": MAX_TOKENS}

    def store(self, key: str, request: dict) -> None:
        """Ask, and append the reply to the cache, one line in one write.

        The file is not that of Run.cached, which writes whole blocks: each reply costs money, so a crash must lose none, and
        several runs may append to it at a time.
        """
        line = json.dumps({"key": key, "request": request, "reply": (reply := self.ask(request))}) + "\n"
        with self.lock, open(self.cache, "ab", buffering=0) as f:
            f.write(line.encode())
            self.replies[key] = reply

    def ask(self, request: dict) -> str:
        """The reply's text, empty if it has none. UserError when the client has given up, or at what is no chat completion."""
        import openai

        try:
            completion = self.client.chat.completions.create(**request)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise self.failure(f"{error} {error.__cause__ or ''}") from error
        try:
            content = completion.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise self.failure(f"no chat completion but {completion!r}") from error
        return content if isinstance(content, str) else ""

    def failure(self, found: str) -> UserError:
        """One line, without the key, which a server may repeat."""
        found = " ".join((found.replace(self.secret, "***") if self.secret else found).split())[:300]
        return UserError(
            f"--judge-base-url {self.url}: found {found}, expected chat completions of --judge-model {self.model}"
        )


def read_replies(path: Path) -> dict[str, str]:
    """{key: reply} of a cache file. A line that was cut off is passed over, and closed so that the next one stands alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        with open(path, "ab", buffering=0) as f:
            f.write(b"\n")
    replies = {}
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        replies[entry["key"]] = entry["reply"]
    return replies


def refuse_unusable(args) -> None:
    """One question, never from the cache, before anything is trained: UserError unless the endpoint answers, or a warning
    if it does so without a verdict. Only rank 0 asks."""
    if not args.judge_model or os.environ.get("RANK", "0") != "0":
        return
    judge = Judge(args, retries=1)
    reply = judge.ask(judge.request("Say which month comes after May.", "June.", "It is Monday."))
    if np.isnan(parse_reply(reply)):
        found = f"a reply without verdict to a trial question: {reply[-100:]!r}"
        warnings.warn(f"--judge-model {args.judge_model}: found {found}; such replies are no votes", stacklevel=2)


def judge_samples(run, rows: list[dict], samples: list[str], iteration: int) -> np.ndarray:
    """Judge.compare of samples with the rows' demonstrations -> (n, 2) on all ranks. Rank 0 asks, block by block."""
    from accelerate.utils import broadcast_object_list

    judge, votes = Judge(run.args) if run.is_main else None, []
    with run.phase(f"judge {iteration}", 2 * len(rows), evaluation=iteration) as advance:
        for start in range(0, len(rows), BLOCK):
            part, problem = rows[start : start + BLOCK], None
            if judge:
                prompts, theirs = [r["prompt"] for r in part], [r["response_text"] for r in part]
                try:
                    votes.append(judge.compare(prompts, samples[start : start + BLOCK], theirs, advance))
                except UserError as error:
                    problem = f"{error}; replies that came are kept: a rerun asks for the others"
            (problem,) = broadcast_object_list([problem])
            if problem:
                raise UserError(problem)
    return broadcast_object_list([np.concatenate(votes) if judge else None])[0]


def judge_measures(run, rows: list[dict], samples: list[str], iteration: int) -> tuple[dict, dict[str, np.ndarray]]:
    """(JUDGE_METRICS of samples against demonstrations, {column of the evaluation's file: (n,)}); both empty without a judge."""
    if not run.args.judge_model:
        return {}, {}
    votes = judge_samples(run, rows, samples, iteration)
    columns = {"win_rate_demonstrations": votes.mean(1), "shown_first": votes[:, 0], "shown_second": votes[:, 1]}
    return judge_values(votes), {f"judge/{name}": values for name, values in columns.items()}
