"""The LLM judge against servers that answer, fail, stall and talk nonsense, and against `transformers serve`."""

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    ZEPHYR_TEMPLATE,
    command,
    make_data,
    make_model,
    make_tokenizer,
    metrics,
    run,
    start,
    transformers_server,
)
from test_evaluate import as_typed

import evaluate
import sft
from common import UserError
from common.args import main, parse_args
from common.store import read_pairs
from extras import judge
from extras.judge import Judge, parse_reply
from extras.metrics import JUDGE_METRICS
from extras.statistics import bootstrap_interval

SECRET = "sk-not-to-be-written-4711"


# ---- servers ----
class Server:
    """An OpenAI-compatible endpoint: answer(request body, requests so far) gives the reply's text, or (status, raw body)."""

    def __init__(self, answer):
        self.bodies, self.keys, self.lock = [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.keys.append(self.headers["Authorization"])
                    count = len(server.bodies)
                made = answer(body, count) if self.path == "/v1/chat/completions" else (404, b"{}")
                status, raw = (200, completion(made)) if isinstance(made, str) else made
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that hung up
                    self.send_response(status)
                    self.send_header("Content-Type", "text/html" if raw.startswith(b"<") else "application/json")
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


def completion(content) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


@pytest.fixture
def serve():
    started = []

    def start(answer) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path / "cache"


def shown(body: dict) -> tuple[str, str]:
    """The responses A and B of a request, from the text of the question."""
    (message,) = body["messages"]
    text, kind = message["content"], "answer" if "<answer A>" in message["content"] else "summary"
    return tuple(text.split(f"<{kind} {x}>\n")[1].split(f"\n</{kind} {x}>")[0] for x in "AB")


def longer(body: dict, count: int = 0) -> str:
    """A judge without position bias."""
    a, b = (len(text) for text in shown(body))
    return f"One has {a} letters, the other {b}.\nPreferred: " + ("A" if a > b else "B" if b > a else "tie")


def flags(url: str = "", model: str = "m", task: str = "answer") -> SimpleNamespace:
    return SimpleNamespace(judge_model=model, judge_base_url=url, judge_task=task)


def pairs(n: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts and two responses each, of which the first is longer, as long and shorter in turn."""
    return [f"question {i}" for i in range(n)], ["x" * (2 + i % 3) for i in range(n)], ["y" * 3 for _ in range(n)]


# ---- what is a verdict ----
@pytest.mark.parametrize(
    "reply, vote",
    [
        ("A is shorter.\nPreferred: A", 1.0),
        ("Preferred: B", 0.0),
        ("Both say it.\n\nPreferred: tie\n\n", 0.5),
        ("B.\n**Preferred: B**.", 0.0),
        ("One.\npreferred: Tie.", 0.5),
        ("", None),
        ("A", None),
        ("I prefer A.", None),
        ("Preferred: A or B", None),
        ("Preferred: neither", None),
        ("Preferred: AB", None),
        ("Preferred:", None),
        ("The answer is Preferred: A", None),
        ("Preferred: A\nbut it is close", None),
        ("Preferred: A\nPreferred: B", None),
        ("Preferred: B\nOn reflection:\nPreferred: B", 0.0),
    ],
)
def test_a_verdict_is_the_last_line_and_nothing_else_is_one(reply, vote):
    found = parse_reply(reply)
    assert np.isnan(found) if vote is None else found == vote


def test_both_orders_of_a_pair_are_asked_at_temperature_0(serve):
    server = serve(longer)
    prompts, ours, theirs = pairs(6)
    votes = Judge(flags(server.url)).compare(prompts, ours, theirs)
    assert votes.tolist() == [[0, 0], [0.5, 0.5], [1, 1]] * 2
    assert sorted(map(shown, server.bodies)) == sorted(
        [*zip(ours, theirs, strict=True), *zip(theirs, ours, strict=True)]
    )
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in server.bodies} == {("m", 0, judge.MAX_TOKENS)}
    assert all(f"question {i}" in "".join(str(b) for b in server.bodies) for i in range(6))


@pytest.mark.parametrize("task", ["answer", "summary"])
def test_texts_reach_the_judge_as_they_are(serve, task):
    server = serve(longer)
    turns = [
        {"role": "user", "content": "one {a}"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
    ]
    votes = Judge(flags(server.url, task=task)).compare([turns], ["{prompt} Preferred: A"], ["ä{}\nPreferred: B"])
    assert votes.tolist() == [[1, 1]]
    assert set(map(shown, server.bodies)) == {
        ("{prompt} Preferred: A", "ä{}\nPreferred: B"),
        ("ä{}\nPreferred: B", "{prompt} Preferred: A"),
    }
    assert "Human: one {a}\n\nAssistant: two\n\nHuman: 3" in server.bodies[0]["messages"][0]["content"]
    assert ("post" in server.bodies[0]["messages"][0]["content"]) == (task == "summary")


def test_a_judge_that_prefers_a_position_says_nothing_about_the_policy(serve):
    votes = Judge(flags(serve(lambda body, count: "Well.\nPreferred: A").url)).compare(*pairs(7))
    values = judge.judge_values(votes)
    assert values["eval/judge/win_rate_demonstrations"] == values["eval/judge/win_rate_low"] == 0.5
    assert (
        values["eval/judge/first_position"] == 1 and values["eval/judge/ties"] == values["eval/judge/unparsable"] == 0
    )


def test_one_order_alone_is_no_vote(serve):
    """Else this judge, which prefers A whatever it is and breaks down where the x come second, would prefer the x."""
    broken = serve(lambda body, count: "..." if shown(body)[1] == "xx" else "Preferred: A")
    votes = Judge(flags(broken.url)).compare(*pairs(9))
    assert np.isnan(votes).tolist() == [[False, True], [False, False], [False, False]] * 3
    values = judge.judge_values(votes)
    assert values["eval/judge/win_rate_demonstrations"] == 0.5 and values["eval/judge/unparsable"] == 3
    assert values["eval/judge/first_position"] == 1
    assert values["eval/judge/win_rate_low"] <= 0.5 <= values["eval/judge/win_rate_high"]


def test_nonsense_is_counted_and_never_a_vote(serve):
    odd = ["I am a teapot.", "Preferred: C", "", completion(None), completion(["Preferred: A"]), completion(7)]
    server = serve(lambda body, count: (200, r) if isinstance(r := odd[count % 6], bytes) else r)
    values = judge.judge_values(Judge(flags(server.url)).compare(*pairs(6)))
    assert values == {"eval/judge/ties": 0, "eval/judge/unparsable": 12}


def test_values_of_known_votes():
    nan = float("nan")
    votes = np.array([[1, 1], [1, 0.5], [0, 0.5], [1, 0], [nan, 1], [0.5, 0.5], [nan, nan]])
    values = judge.judge_values(votes)
    means = [1, 0.75, 0.25, 0.5, 0.5]
    assert values["eval/judge/win_rate_demonstrations"] == np.mean(means)
    assert (values["eval/judge/win_rate_low"], values["eval/judge/win_rate_high"]) == bootstrap_interval(
        np.array(means)
    )
    first = [1, 0, 1, 0.5, 0, 0.5, 1, 1, 0.5, 0.5]  # of each reply of the five rows, whether what is shown first won
    assert values["eval/judge/first_position"] == np.mean(first)
    assert (values["eval/judge/ties"], values["eval/judge/unparsable"]) == (4, 3)


# ---- servers that fail ----
def test_a_request_that_fails_is_asked_again(serve):
    statuses = {1: 500, 2: 503, 3: 429}
    server = serve(lambda body, count: (statuses[count], b'{"error": "busy"}') if count in statuses else longer(body))
    assert Judge(flags(server.url)).compare(*pairs(1)).tolist() == [[0, 0]]
    assert len(server.bodies) == 5


@pytest.mark.parametrize("status, attempts", [(500, 3), (401, 1), (404, 1)])
def test_what_cannot_be_had_is_one_line(serve, status, attempts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve(lambda body, count: (status, json.dumps({"error": f"no\n{SECRET}\n" + "long " * 500}).encode()))
    asked = Judge(flags(server.url), retries=2)
    with pytest.raises(UserError) as error:
        asked.ask(asked.request("p", "a", "b"))
    line = str(error.value)
    assert line.startswith(f"--judge-base-url {server.url}: found Error code: {status}") and "--judge-model m" in line
    assert "\n" not in line and SECRET not in line and "***" in line and len(line) < 500
    assert len(server.bodies) == attempts and server.keys[0] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "raw", [b"<html>welcome</html>", b"{not json", b"[]", b"{}", b"7", b'{"choices": []}', b'{"choices": [7]}']
)
def test_an_answer_that_is_no_chat_completion_is_refused(serve, raw):
    server = serve(lambda body, count: (200, raw))
    with pytest.raises(UserError, match="--judge-base-url .* found .* expected chat completions"):
        Judge(flags(server.url), retries=0).compare(*pairs(1))
    assert not list(Judge(flags(server.url)).replies)


def test_a_server_that_stalls_runs_into_the_timeout(serve):
    hold = threading.Event()
    server = serve(lambda body, count: hold.wait(60) and "" or "")
    judge, started = Judge(flags(server.url), timeout=1.5, retries=1), time.time()
    with pytest.raises(UserError, match="found Request timed out"):
        judge.compare(*pairs(1))
    assert 3 < time.time() - started < 50 and len(server.bodies) in (3, 4)  # two requests, each again
    hold.set()


def test_an_error_does_not_wait_for_a_request_that_stalls(serve):
    hold = threading.Event()
    server = serve(lambda body, count: (400, b"{}") if "question 1" in str(body) else hold.wait(30) and "" or "")
    started = time.time()
    with pytest.raises(UserError, match="Error code: 400"):
        Judge(flags(server.url)).compare(*pairs(2))
    assert time.time() - started < 25
    hold.set()


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=f"--judge-base-url {url}: found Connection error. .*refused"):
        Judge(flags(url), retries=1).compare(*pairs(1))
    with pytest.raises(UserError, match="--judge-base-url http://here:port: found Invalid port"):
        Judge(flags("http://here:port"))
    with pytest.raises(UserError, match="--judge-model: found m and no OPENAI_API_KEY in the environment"):
        Judge(flags())


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(judge_base_url="http://localhost:8000/v1"),
            "--judge-base-url: found .*, expected --judge-model beside it",
        ),
        (
            dict(judge_base_url="localhost:8000", judge_model="m"),
            "--judge-base-url: found localhost:8000, expected http://",
        ),
    ],
)
def test_flags_that_make_no_sense(given, message):
    args = evaluate.Args(
        eval_samples=1, max_length=9, max_prompt_length=8, max_new_tokens=1, per_device_eval_batch_size=1
    )
    args.check()
    vars(args).update(given)
    with pytest.raises(UserError, match=message):
        args.check()


# ---- the cache ----
def test_replies_are_asked_for_once(serve, cache):
    server = serve(longer)
    prompts, ours, theirs = pairs(4)
    votes = Judge(flags(server.url)).compare(prompts, ours, theirs)
    again = Judge(flags(server.url + "/")).compare(prompts, ours, theirs)
    assert again.tolist() == votes.tolist() and len(server.bodies) == 8
    Judge(flags(server.url)).compare(prompts * 2, ours * 2, [*theirs, "new", *theirs[1:]])
    assert len(server.bodies) == 10  # one new pair, beside seven known ones
    Judge(flags(server.url)).compare(["same", "same"], ["x", "x"], ["x", "x"])
    assert len(server.bodies) == 11
    for other in (flags(server.url, model="n"), flags(server.url, task="summary")):
        Judge(other).compare(prompts, ours, theirs)
    assert len(server.bodies) == 27
    assert [r["reply"] for p in cache.glob("judge-*.jsonl") for r in map(json.loads, open(p))].count("") == 0


def test_another_endpoint_is_another_judge(serve):
    first, second = serve(longer), serve(lambda body, count: "Preferred: tie")
    assert Judge(flags(first.url)).compare(*pairs(3)).tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    assert Judge(flags(second.url)).compare(*pairs(3)).tolist() == [[0.5, 0.5]] * 3


def test_a_line_that_was_cut_off_costs_one_reply(serve, cache):
    server = serve(longer)
    Judge(flags(server.url)).compare(*pairs(3))
    (path,) = cache.glob("judge-*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    for asked in (7, 7):
        assert Judge(flags(server.url)).compare(*pairs(3)).tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
        assert len(server.bodies) == asked


KILLED = """
import sys; from types import SimpleNamespace
sys.path[:0] = {paths}
from extras.judge import Judge
from test_judge import pairs
Judge(SimpleNamespace(judge_model="m", judge_base_url={url!r}, judge_task="answer")).compare(*pairs(20))
"""


def test_a_run_that_is_killed_asks_only_for_the_rest(serve, cache, tmp_path):
    hold = threading.Event()
    server = serve(lambda body, count: longer(body) if count <= 13 or hold.is_set() else hold.wait(60) and (400, b"{}"))
    (tmp_path / "killed.py").write_text(KILLED.format(paths=[str(ROOT), str(ROOT / "tests")], url=server.url))
    with start([sys.executable, str(tmp_path / "killed.py")]) as process:
        deadline = time.time() + 240
        while not (files := list(cache.glob("judge-*.jsonl"))) or files[0].read_bytes().count(b"\n") < 13:
            assert time.time() < deadline and process.alive()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60).returncode == -signal.SIGKILL
    hold.set()
    before = len(server.bodies)
    votes = Judge(flags(server.url)).compare(*pairs(20))
    assert len(server.bodies) - before == 40 - 13 and votes.tolist() == ([[0, 0], [0.5, 0.5], [1, 1]] * 7)[:20]


def test_what_came_before_an_error_is_kept(serve, cache):
    ok = threading.Event()
    server = serve(lambda body, count: longer(body) if count <= 5 or ok.is_set() else (400, b"{}"))
    with pytest.raises(UserError):
        Judge(flags(server.url)).compare(*pairs(10))
    (path,) = cache.glob("judge-*.jsonl")
    deadline, asked = time.time() + 30, -1  # requests are still under way
    while time.time() < deadline and (asked != len(server.bodies) or path.read_bytes().count(b"\n") < 5):
        asked = len(server.bodies)
        time.sleep(1)
    ok.set()
    before = len(server.bodies)
    assert not np.isnan(Judge(flags(server.url)).compare(*pairs(10))).any()
    assert len(server.bodies) - before == 15


# ---- runs ----
N = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", N)
    return folder


def in_process(module, begin, argv: list) -> None:
    """A script as it would run from the command line."""
    with as_typed([str(a) for a in argv]):
        main(lambda: begin(parse_args(module.Args, module.__doc__, module.SETTINGS)))


def measure(place: Path, out: Path, url: str) -> None:
    small = "--max-length 96 --max-new-tokens 8 --max-prompt-length 64 --eval-samples 99 --per-device-eval-batch-size 5"
    data = place / "data.jsonl"
    small += " --mixed-precision no"
    given = ["--model", place / "model", "--dataset", data, "--eval-dataset", data, "--output-dir", out, *small.split()]
    in_process(evaluate, evaluate.evaluate, ["evaluate.py", *given, "--judge-model", "m", "--judge-base-url", url])


def train(place: Path, out: Path, url: str) -> None:
    judged = ("--judge-model", "m", "--judge-base-url", url, "--judge-task", "summary")
    in_process(sft, sft.train, command("sft.py", place / "model", place / "data.jsonl", out, *judged)[1:])


def by_hand(out: Path, place: Path) -> list[float]:
    """Votes of the length judge on the samples of a run."""
    demonstrations = [json.loads(line)["completion"] for line in open(place / "data.jsonl")]
    pairs = [(len(r["sample"]), len(demonstrations[r["row"]])) for r in read_pairs(out / "evals" / "0000.parquet")]
    return [1.0 if ours > theirs else 0.5 if ours == theirs else 0.0 for ours, theirs in pairs]


def test_evaluate_with_a_judge(serve, place, tmp_path, cache, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server, out = serve(longer), tmp_path / "one"
    measure(place, out, server.url)
    assert len(server.bodies) == 2 * N + 1 and set(server.keys) == {f"Bearer {SECRET}"}  # one is the trial question
    result = json.loads((out / "evaluation.json").read_text())
    expected, rows = by_hand(out, place), read_pairs(out / "evals" / "0000.parquet")
    assert [r["judge/win_rate_demonstrations"] for r in rows] == expected and 0 < np.mean(expected) < 1
    assert [r["judge/shown_first"] for r in rows] == [r["judge/shown_second"] for r in rows] == expected
    low, high = bootstrap_interval(np.array(expected))
    win = result["measures"]["eval/judge/win_rate_demonstrations"]
    assert win == {"value": np.mean(expected), "low": low, "high": high} and result["judge_model"] == "m"
    assert result["measures"]["eval/judge/first_position"]["value"] == 0.5
    assert "eval/judge/win_rate_low" not in result["measures"]  # it is the interval
    (logged,) = metrics(out)
    assert {k for k in logged if "/judge/" in k} == set(JUDGE_METRICS) and logged["eval/judge/win_rate_low"] == low
    printed = "".join(capfd.readouterr())
    assert "eval/judge/win_rate_demonstrations" in printed and SECRET not in printed
    files = [p for folder in (out, cache) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 6 and not any(SECRET.encode() in p.read_bytes() for p in files)
    measure(place, tmp_path / "two", server.url)
    assert len(server.bodies) == 2 * N + 2  # only the trial question is asked again
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_an_evaluation_without_a_single_vote_says_so(serve, place, tmp_path, capfd):
    with pytest.warns(UserWarning, match="reply without verdict"):
        measure(place, tmp_path / "out", serve(lambda body, count: "I am a teapot.").url)
    assert "eval/judge/unparsable" in capfd.readouterr().out
    (logged,) = metrics(tmp_path / "out")
    assert {k: v for k, v in logged.items() if "/judge/" in k} == {"eval/judge/ties": 0, "eval/judge/unparsable": 2 * N}
    rows = read_pairs(tmp_path / "out" / "evals" / "0000.parquet")
    assert all(np.isnan(r["judge/win_rate_demonstrations"]) for r in rows)


def test_training_is_judged_at_every_evaluation_and_shown(serve, place, tmp_path, capfd):
    server = serve(longer)
    train(place, tmp_path / "sft", server.url)
    measured = [r for r in metrics(tmp_path / "sft") if "eval/nll" in r]
    assert len(measured) > 1 and all(set(JUDGE_METRICS) <= set(r) for r in measured)
    expected = by_hand(tmp_path / "sft", place)
    assert measured[0]["eval/judge/win_rate_demonstrations"] == np.mean(expected)
    assert "win judge" in capfd.readouterr().out and "post" in server.bodies[-1]["messages"][0]["content"]


def test_a_judge_that_cannot_be_used_is_refused_before_anything_is_trained(serve, place, tmp_path, capfd):
    server = serve(lambda body, count: (401, b'{"error": "no such key"}'))
    with pytest.raises(SystemExit) as status:
        train(place, tmp_path / "sft", server.url)
    expected = (
        f"error: --judge-base-url {server.url}: found Error code: 401 - {{'error': 'no such key'}}, expected chat"
    )
    assert status.value.code == 2 and capfd.readouterr().err.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "sft").exists() and len(server.bodies) == 1


RANKS = """
import sys
sys.path[:0] = {paths}
import evaluate
from common import UserError
from common.run import Run
from extras import judge
from test_judge import pairs
rows = [dict(prompt=p, response_text=y, x=x) for p, x, y in zip(*pairs({n}))]
for i, url in enumerate({urls}):
    args = evaluate.Args(judge_model="m", judge_base_url=url, output_dir={out!r} + str(i), mixed_precision="no")
    judge.refuse_unusable(args)
    run = Run(args, "evaluate", {{}})
    try:
        heard = judge.judge_samples(run, rows, [r["x"] for r in rows], 0).tolist()
    except UserError as error:
        heard = error
    sys.stdout.write("RANK " + str(run.rank) + " " + str(heard) + chr(10))  # in one piece: ranks share the pipe
"""


def test_rank_0_asks_and_all_ranks_hear_the_votes_or_the_error(serve, tmp_path):
    n = 20  # more than a block
    good, bad = serve(longer), serve(lambda body, count: longer(body) if count <= 35 else (403, b"{}"))
    here, urls = [str(ROOT), str(ROOT / "tests")], [good.url, bad.url]
    (tmp_path / "ranks.py").write_text(RANKS.format(paths=here, n=n, urls=urls, out=str(tmp_path / "out")))
    done = run([sys.executable, str(tmp_path / "ranks.py")], ranks=2)
    assert n > judge.BLOCK and len(good.bodies) == 2 * n + 1
    votes = ([[0, 0], [0.5, 0.5], [1, 1]] * n)[:n]
    for rank in (0, 1):
        first, second = (line for line in done.stdout.splitlines() if line.startswith(f"RANK {rank} "))
        assert json.loads(first.split(maxsplit=2)[2]) == votes
        assert (
            f"--judge-base-url {bad.url}: found Error code: 403" in second and "a rerun asks for the others" in second
        )


def test_a_judge_without_a_verdict_for_the_trial_question_is_warned_of(serve):
    with pytest.warns(UserWarning, match="--judge-model m: found a reply without verdict to a trial question: 'I am"):
        judge.refuse_unusable(flags(serve(lambda body, count: "I am a teapot.").url))


# ---- a real server ----
def constant_judge(folder: Path) -> Path:
    """A chat model that has learned to say A, whatever it is asked."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    tokenizer.add_tokens(["Preferred: A"])
    make_model(folder, "mistral", tokenizer, window=2048)
    model = AutoModelForCausalLM.from_pretrained(folder)
    reply = [len(tokenizer) - 1, tokenizer.eos_token_id]
    rows = [tokenizer(f"read {i} <|assistant|>\n", add_special_tokens=False)["input_ids"] + reply for i in range(8)]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, : -len(reply)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    model = constant_judge(tmp_path / "judge")
    with transformers_server(model, tmp_path / "log") as url:
        args = flags(f"{url}/v1", model=str(model))
        judge.refuse_unusable(args)
        votes = Judge(args).compare(*pairs(5))
        assert votes.tolist() == [[1, 0]] * 5
        assert set(Judge(args).replies.values()) == {"Preferred: A"}
        with pytest.raises(UserError, match="--judge-base-url .* expected chat completions of --judge-model"):
            Judge(flags(args.judge_base_url, model=str(tmp_path / "missing")), retries=0).compare(*pairs(1))
