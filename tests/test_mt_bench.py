"""MT-Bench's way: two-turn questions that a policy answers and a judge grades, against a server of known taste."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import jsonl, make_model
from test_evaluate import as_typed
from test_judge import Server, cache, flags, serve  # noqa: F401  fixtures; cache is every test's

import evaluate
from common import UserError
from common.args import main, parse_args
from common.store import read_pairs
from extras import mt_bench
from extras.mt_bench import Grader, parse_grade
from extras.statistics import bootstrap_interval

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["write a list", "now return it"]},
    {
        "question_id": 101,
        "category": "math",
        "turns": ["how many", "and now"],
        "reference": ["twelve items", "thirteen"],
    },
    {"question_id": 82, "category": "writing", "turns": ["open a file", "read it"], "reference": None},
    {"question_id": 151, "category": "stem", "turns": ["the number", "of items"]},
]


def part(body: dict, name: str) -> str:
    text = body["messages"][0]["content"]
    return text.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0]


def turn_of(body: dict) -> int:
    """0 for a question on the first answer, 1 on the second, whose conversation holds the first."""
    return int("Assistant:" in part(body, "conversation"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("mt_bench") / "model", window=512)


def measure(model: Path, out: Path, server: Server, questions=QUESTIONS, *given: str) -> tuple[dict, list[dict]]:
    file = jsonl(out.parent / "questions.jsonl", questions)
    small = "--max-length 320 --max-new-tokens 8 --mixed-precision no --judge-model m --per-device-eval-batch-size 3".split()
    words = ["evaluate.py", "--model", str(model), "--mt-bench", file, "--output-dir", str(out), *small]
    with as_typed([*words, "--judge-base-url", server.url, *given]):
        main(lambda: evaluate.evaluate(parse_args(evaluate.Args, evaluate.__doc__, evaluate.SETTINGS)))
    return json.loads((out / "mt_bench.json").read_text()), read_pairs(out / "evals" / "mt_bench.parquet")


# ---- what is a grade ----
@pytest.mark.parametrize(
    "reply, grade",
    [
        ("It is fine.\nGrade: 7", 7), ("Grade: 10", 10), ("**Grade: 1**.", 1), ("grade: 3\n\n", 3), ("Grade: 4\nso\nGrade: 4", 4),
        ("Grade: 0", None), ("Grade: 11", None), ("Grade: 20", None), ("Grade: 7/10", None), ("Grade: N", None), ("7", None), ("", None),
        ("Grade: 7\nbut", None), ("Grade: 7\nGrade: 8", None), ("Grade: 7.5", None), ("Grade: 1O", None),
    ],
)  # fmt: skip
def test_a_grade_is_the_last_line_and_nothing_else_is_one(reply, grade):
    found = parse_grade(reply)
    assert np.isnan(found) if grade is None else found == grade


def test_means_and_intervals_of_known_grades():
    nan = float("nan")
    grades = np.array([[8, 6], [4, nan], [nan, nan], [10, 10]])
    found = mt_bench.summarise(grades, ["a", "b", "b", "a"])
    assert (found["turn_1"]["value"], found["turn_1"]["grades"]) == (pytest.approx(22 / 3), 3)
    assert (found["turn_2"]["value"], found["turn_2"]["grades"]) == (8, 2)
    assert (found["both"]["value"], found["both"]["grades"], found["ungraded"]) == (
        pytest.approx((7 + 4 + 10) / 3),
        5,
        3,
    )
    assert (found["both"]["low"], found["both"]["high"]) == bootstrap_interval(np.array([7.0, 4.0, 10.0]))
    assert {name: e["value"] for name, e in found["categories"].items()} == {"a": 8.5, "b": 4}
    nothing = mt_bench.summarise(np.array([[nan, nan]]), ["a"])
    assert nothing["both"] == {"value": None, "low": None, "high": None, "grades": 0}


# ---- a whole run ----
def test_both_turns_are_answered_and_graded(model, tmp_path, serve, capsys):  # noqa: F811
    grade = {"math": 2, "writing": 9, "stem": 5}

    def reply(body: dict, count: int) -> str:
        known = next((q["category"] for q in QUESTIONS if q["turns"][0] in part(body, "conversation")), "stem")
        return f"Well.\nGrade: {grade[known] - turn_of(body)}"

    server = serve(reply)
    result, stored = measure(model, tmp_path / "run", server)
    trial, *asked = server.bodies
    assert (
        "June." in part(trial, "answer to grade")
        and len(asked) == 8
        and [turn_of(b) for b in asked] == [0] * 4 + [1] * 4
    )
    assert {(b["temperature"], b["max_tokens"]) for b in asked} == {(0, 512)}
    for q, row in zip(QUESTIONS, stored, strict=True):
        own = [b for b in asked if q["turns"][0] in part(b, "conversation")]
        first, second = sorted(own, key=turn_of)
        assert (row["question_id"], row["category"]) == (q["question_id"], q["category"])
        assert (part(first, "answer to grade"), part(second, "answer to grade")) == (row["answer_1"], row["answer_2"])
        assert q["turns"][1] not in part(first, "conversation") and part(second, "conversation").endswith(q["turns"][1])
        assert f"Assistant: {row['answer_1']}" in part(second, "conversation")
        reference = q.get("reference") or ["", ""]
        assert [part(b, "reference answer") for b in (first, second)] == reference
        assert (row["grade_1"], row["grade_2"]) == (grade[q["category"]], grade[q["category"]] - 1)
    assert (result["turn_1"]["value"], result["turn_2"]["value"], result["both"]["value"]) == (6.25, 5.25, 5.75)
    assert {name: e["value"] for name, e in result["categories"].items()} == {"writing": 8.5, "math": 1.5, "stem": 4.5}
    assert result["ungraded"] == 0 and "answers without a grade: 0" in capsys.readouterr().out

    again, _ = measure(model, tmp_path / "again", server)  # the same answers: the cache has their grades
    assert again == result and len(server.bodies) == 9 + 1


def test_math_is_answered_greedily_and_writing_sampled(model, tmp_path, serve):  # noqa: F811
    """The same questions under other names of category: greedy answers depend on no random stream, sampled ones do."""
    server = serve(lambda body, count: "Grade: 5")
    answers = {}
    for category in ("math", "writing"):
        for seed in (0, 7):
            questions = [{"turns": ["write a list of items", "more"], "category": category}]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mt_bench, "SEED", seed)
                _, (row,) = measure(model, tmp_path / f"{category}{seed}", server, questions)
            answers[category, seed] = row["answer_1"]
    assert answers["math", 0] == answers["math", 7] and answers["writing", 0] != answers["writing", 7]


def test_what_cannot_be_asked_or_is_not_graded_is_no_grade(model, tmp_path, serve):  # noqa: F811
    """A conversation beyond the window is not asked; nonsense counts for nothing."""
    questions = [*QUESTIONS[:2], {"turns": ["short", "x" * 400], "category": "long"}]
    server = serve(lambda body, count: "I like it." if "twelve" in part(body, "reference answer") else "Grade: 6")
    with pytest.warns(
        UserWarning, match="turn 2: found 1 of 3 conversations that are longer than --max-prompt-length 312"
    ):
        result, stored = measure(model, tmp_path / "run", server, questions)
    assert [np.isnan(r["grade_1"]) for r in stored] == [False, True, False]
    assert [np.isnan(r["grade_2"]) for r in stored] == [False, False, True] and stored[2]["answer_2"] == ""
    assert result["ungraded"] == 2 and result["both"]["grades"] == 4 and len(server.bodies) == 1 + 5


def test_a_judge_that_cannot_be_used_is_found_before_anything_is_sampled(model, tmp_path, serve, capsys):  # noqa: F811
    broken = serve(lambda body, count: (401, b'{"error": "no"}'))
    with pytest.raises(SystemExit):
        measure(model, tmp_path / "run", broken)
    assert "expected chat completions of --judge-model m" in capsys.readouterr().err and len(broken.bodies) == 1
    with pytest.warns(UserWarning, match="a reply without a grade to a trial question"):
        mt_bench.refuse_unusable(Grader(flags(serve(lambda body, count: "June is right.").url)))


@pytest.mark.parametrize(
    "row", [{"turns": ["one"]}, {"turns": "one two"}, {"turns": ["a", "b"], "reference": ["a"]}, {}]
)
def test_a_row_without_two_turns_is_refused(tmp_path, row):
    file = jsonl(tmp_path / "questions.jsonl", [QUESTIONS[0], row])
    with pytest.raises(UserError, match="--mt-bench: found .* of row 1, expected two texts"):
        mt_bench.load_questions(file)


def test_texts_reach_the_judge_as_they_are(serve):  # noqa: F811
    server = serve(lambda body, count: "Grade: 8")
    conversation = [{"role": "user", "content": "{answer} <b>"}]
    found = Grader(flags(server.url)).grade([conversation], ["{conversation}\nGrade: 1"], [""])
    (body,) = server.bodies
    assert found.tolist() == [8] and part(body, "conversation") == "{answer} <b>"
    assert (
        part(body, "answer to grade") == "{conversation}\nGrade: 1"
        and "reference" not in body["messages"][0]["content"]
    )
