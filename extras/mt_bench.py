"""MT-Bench's way (arXiv:2306.05685): a policy answers 80 two-turn questions, and an LLM judge grades each answer from 1 to 10.

The questions are those of FastChat's question.jsonl: question_id, category, turns (two), and for some a reference (two). The
wording of the judge's question is ours, so grades compare policies that one judge has graded, not with published tables.

Dims: n questions.
"""

import re
import warnings
from pathlib import Path

import numpy as np

from common import UserError, models
from common.args import require
from common.data import encode_prompts, plain_prompt, render_prompt
from common.evals import sample_rows, sampled_texts
from common.generation import make_generator
from common.run import Run
from common.store import without_nan, write_json, write_pairs
from extras.judge import BLOCK, Judge
from extras.left_out import LeftOut
from extras.sources import read_file
from extras.statistics import bootstrap_interval
from extras.table import print_table
from extras.templates import Wording

TEMPERATURES = {  # FastChat's, by category; 0.7 for any other
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
SEED = 20_240_528  # of the samples: policies that are compared share their random streams
TEMPLATE = """\
Below is a conversation between a user and an assistant. Grade the assistant's last answer: whether it is helpful, relevant,
correct, deep enough, and does what the user asks. Its length alone is no merit.

<conversation>
{conversation}
</conversation>
{reference}
<answer to grade>
{answer}
</answer to grade>

First write one sentence on the answer. Then write a last line, with nothing after it, in exactly this form, where N is a whole
number from 1 (worst) to 10 (best):
Grade: N
"""
REFERENCE = """
<reference answer>
{reference}
</reference answer>
"""


def parse_grade(reply: str) -> float:
    """The grade, 1 to 10, of a last line `Grade: N`; NaN for any other reply, and where another line has another grade."""
    lines = [line.strip() for line in reply.replace("*", "").splitlines() if line.strip()]
    found = [re.fullmatch(r"Grade: (10|[1-9])\.?", line, re.IGNORECASE) for line in lines]
    grades = {match[1] for match in found if match}
    return float(grades.pop()) if found and found[-1] and len(grades) == 1 else float("nan")


class Grader(Judge):
    """A judge that grades single answers. Replies are cached as those of Judge."""

    def grade(
        self, conversations: list[list[dict]], answers: list[str], references: list[str], advance=lambda n: None
    ) -> np.ndarray:
        """Grades (n,) of answers to conversations, lists of messages; a reference is empty where there is none."""
        requests = [self.question(*row) for row in zip(conversations, answers, references, strict=True)]
        return np.array([parse_grade(reply) for reply in self.answers(requests, advance)])

    def question(self, conversation: list[dict], answer: str, reference: str) -> dict:
        known = REFERENCE.format(reference=reference) if reference else ""
        return self.body(TEMPLATE.format(conversation=plain_prompt(conversation), reference=known, answer=answer))


def measure(args) -> dict:
    """Answer the questions of --mt-bench, have them graded; table, JSON, and answers with grades -> what the JSON holds."""
    require(bool(args.judge_model), "mt_bench", args.mt_bench, "--judge-model beside it, which grades the answers")
    questions = load_questions(args.mt_bench)
    tokenizer = models.load_tokenizer(args)
    run = Run(args, "evaluate", {})
    grader = Grader(args) if run.is_main else None
    if grader:
        refuse_unusable(grader)
    policy = models.for_inference(run, models.load_model(args))
    generator = make_generator(run, policy, tokenizer)
    run.print(f"MT-Bench: {args.model} on {len(questions)} questions, {run.world} process(es), {run.dir}")
    conversations: list[list[dict]] = [[] for _ in questions]
    texts: list[list[str | None]] = []
    grades: list[np.ndarray] = []
    for turn in range(2):
        conversations = [
            [*c, {"role": "user", "content": q["turns"][turn]}] for c, q in zip(conversations, questions, strict=True)
        ]
        texts.append(answer(run, generator, tokenizer, questions, conversations, turn))
        grades.append(grade(run, grader, questions, conversations, texts[turn], turn))
        conversations = [
            [*c, {"role": "assistant", "content": t or ""}] for c, t in zip(conversations, texts[turn], strict=True)
        ]
    result = {"model": args.model, "judge_model": args.judge_model, "questions": len(questions)}
    result |= summarise(np.stack(grades, 1), [q["category"] for q in questions])
    if run.is_main:
        stored = [
            {"question_id": q["question_id"], "category": q["category"], "grade_1": float(grades[0][i]),
             "grade_2": float(grades[1][i]), "answer_1": texts[0][i] or "", "answer_2": texts[1][i] or ""}
            for i, q in enumerate(questions)
        ]  # fmt: skip
        write_pairs(run.dir / "evals" / "mt_bench.parquet", stored)
        write_json(run.dir / "mt_bench.json", result)
        show(f"{args.model}, {len(questions)} questions, graded by {args.judge_model}", result)
        print(f"values: {run.dir / 'mt_bench.json'}   answers: {run.dir / 'evals'}")
    run.end()
    return result


def load_questions(name: str) -> list[dict]:
    """Rows of --mt-bench with question_id, category, turns and reference. UserError for a row without two turns."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--mt-bench: found no file {path}, expected FastChat's question.jsonl")
    questions = []
    for i, row in enumerate(read_file(path, "--mt-bench")):
        turns, reference = row.get("turns"), row.get("reference") or ["", ""]
        for name, texts in (("turns", turns), ("reference", reference)):
            if not (isinstance(texts, list) and len(texts) == 2 and all(isinstance(t, str) for t in texts)):
                raise UserError(f"--mt-bench: found {texts!r:.80} as {name} of row {i}, expected two texts")
        own = {"row": i, "question_id": row.get("question_id", i), "category": str(row.get("category", "all"))}
        questions.append({**own, "turns": turns, "reference": reference})
    return questions


def answer(
    run, generator, tokenizer, questions: list[dict], conversations: list[list[dict]], turn: int
) -> list[str | None]:
    """The policy's answers to conversations; None, with one warning, for one that cannot be asked."""
    left_out = LeftOut("--mt-bench")
    texts: list[str | None] = [None] * len(questions)
    rows = [{"row": q["row"], "prompt": c} for q, c in zip(questions, conversations, strict=True)]
    items = encode_prompts(rows, tokenizer, render_prompt, Wording(tokenizer), left_out)
    fitting = [item for item in items if len(item["prompt_ids"]) <= run.args.max_prompt_length]
    if len(fitting) < len(questions):
        found = f"found {len(questions) - len(fitting)} of {len(questions)} conversations that are longer than"
        found += f" --max-prompt-length {run.args.max_prompt_length}, or that the template refuses"
        warnings.warn(f"--mt-bench: turn {turn + 1}: {found}: they have no answer and no grade", stacklevel=2)
    with run.phase(f"turn {turn + 1}: answers", len(fitting), step=turn) as advance:
        for temperature in sorted(set(TEMPERATURES.values())):
            own = [i for i in fitting if TEMPERATURES.get(questions[i["row"]]["category"], 0.7) == temperature]
            if own:
                rollout = sample_rows(run, generator, own, SEED + turn, temperature, advance)
                for item, text in zip(own, sampled_texts(tokenizer, rollout), strict=True):
                    texts[item["row"]] = text
    return texts


def grade(run, grader: Grader | None, questions, conversations, texts: list[str | None], turn: int) -> np.ndarray:
    """Grades (n,) on all ranks, NaN without an answer. Rank 0 asks, block by block."""
    from accelerate.utils import broadcast_object_list

    grades, answered = np.full(len(questions), np.nan), [i for i, text in enumerate(texts) if text is not None]
    with run.phase(f"turn {turn + 1}: grades", len(answered), step=turn) as advance:
        for start in range(0, len(answered), BLOCK):
            part, problem = answered[start : start + BLOCK], None
            if grader:
                asked, references = [conversations[i] for i in part], [questions[i]["reference"][turn] for i in part]
                try:
                    grades[part] = grader.grade(asked, [texts[i] or "" for i in part], references, advance)
                except UserError as error:
                    problem = f"{error}; replies that came are kept: a rerun asks for the others"
            (problem,) = broadcast_object_list([problem])
            if problem:
                raise UserError(problem)
    return broadcast_object_list([grades])[0]


def refuse_unusable(grader: Grader) -> None:
    """One question, never from the cache, before anything is sampled: UserError unless the endpoint answers."""
    reply = grader.ask(grader.question([{"role": "user", "content": "Say which month comes after May."}], "June.", ""))
    if np.isnan(parse_grade(reply)):
        found = f"a reply without a grade to a trial question: {reply[-100:]!r}"
        warnings.warn(f"--judge-model {grader.model}: found {found}; such replies count for nothing", stacklevel=2)


def summarise(grades: np.ndarray, categories: list[str]) -> dict:
    """Means of grades (n, 2), NaN for none, by turn and category, each as {value, low, high, grades}, and how many are none.

    A question's answers to both turns are drawn together in the bootstrap of `both`. A mean of no grades has no value.
    """

    def entry(own: np.ndarray) -> dict:
        known = own[~np.isnan(own).all(1)]
        means = np.nanmean(known, 1)
        low, high = bootstrap_interval(means) if len(means) else (float("nan"),) * 2
        value = float(means.mean()) if len(means) else float("nan")
        return {**without_nan({"value": value, "low": low, "high": high}), "grades": int((~np.isnan(own)).sum())}

    names = np.array(categories)
    return {
        "turn_1": entry(grades[:, :1]),
        "turn_2": entry(grades[:, 1:]),
        "both": entry(grades),
        "categories": {name: entry(grades[names == name]) for name in dict.fromkeys(categories)},
        "ungraded": int(np.isnan(grades).sum()),
    }


def show(title: str, result: dict) -> None:
    lines = {
        "first turn": result["turn_1"],
        "second turn": result["turn_2"],
        **result["categories"],
        "both turns": result["both"],
    }
    rows = []
    for name, e in lines.items():
        known = e["value"] is not None
        mean, interval = (f"{e['value']:.2f}", f"{e['low']:.2f}..{e['high']:.2f}") if known else ("", "")
        rows.append([name, str(e["grades"]), mean, interval])
    print_table(f"{title}: mean grade, 1 to 10", ["answers", "grades", "mean", "95% interval"], rows)
    print(f"answers without a grade: {result['ungraded']}")
