"""What a run shows: the live line and its estimates, tables that fit, decoded rows, and what is said at the end."""

import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace

import pytest

from extras import curves, ending, samples, schedule, screen, table
from extras.schedule import Planned, Schedule
from extras.screen import Phase, line

ROOT = Path(__file__).parent.parent


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A screen without phases whose time stands still."""
    clock = Clock()
    monkeypatch.setattr(screen.time, "monotonic", clock)
    monkeypatch.setattr(screen, "screen", screen.Screen())
    return clock


# ---- the line ----
PHASE = dict(name="iteration 0: training", total=256, place="3/11", done=12, tokens=51_200)
VALUES = {"loss": 0.6931, "margin": 0.0213}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_a_line_fits_and_keeps_what_matters_most(clock, width):
    phase = Phase(**PHASE, values=VALUES, started=90.0)
    text = line(phase, (203.4, 3605.0), width, "GPU 12.3/80 GB")
    assert len(text) <= width
    assert text.startswith("3/11 iteration 0: training 12/256")
    if width >= 80:
        assert "loss 0.693" in text and "5.12k tok/s" in text and "ETA 3:23, run 1:00:05" in text
    if width >= 100:
        assert "margin 0.0213" in text
    assert ("GPU 12.3/80 GB" in text) == (width >= 120)
    assert ("━" in text and "─" in text) == (width == 160)


def test_a_line_begins_before_anything_is_done_and_ends_with_what_it_took(clock):
    phase = Phase("answers", 64, started=88.0)
    assert line(phase, (None, None), 60).startswith("answers 0/64  ──") and "0:12 so far" in line(
        phase, (None, None), 60
    )
    phase.tokens = 1_000
    assert "83 tok/s  0:12 so far" in line(phase, (None, None), 80)
    phase.done, phase.ended = 64, 151.0
    assert line(phase, (None, None), 60).endswith("16 tok/s  took 1:03")


def test_an_update_shows_its_loss_score_kl_and_margin(clock):
    with screen.progress("p", 3, visible=False):
        shown = screen.screen.phases[0]
        screen.show({"grad_norm": 1.0, "reward/loss": 0.5, "reward/margin": 2.0})
        assert shown.values == {"loss": 0.5, "margin": 2.0}
        screen.show({"objective/kl": 3.0, "objective/scores": 1.5, "loss/policy_avg": 9.0})
        assert shown.values == {"score": 1.5, "KL": 3.0}
        screen.show({"loss": 1.0, "policy/loss": 2.0, "rewards/margins": 0.1, "demonstrations/margin": 7.0})
        assert shown.values == {"loss": 1.0, "margin": 0.1}


def test_tokens_of_rows_sequences_and_ranks_are_counted_in_every_open_phase(clock, monkeypatch):
    rows = [
        {"prompt_ids": [1, 2], "response_ids": [3]},
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]},
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": None},
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    with screen.progress("outer", 1, visible=False):
        screen.saw_rows(rows)
        assert screen.screen.phases[0].tokens == 3 + (4 + 5) + 2 and screen.screen.trained is rows[0]
        with screen.progress("inner", 1, visible=False):
            screen.saw_sequences([([1, 2], [3]), ([1], [2])])
            assert [p.tokens for p in screen.screen.phases] == [14 + 20, 20]
    screen.saw(5)  # of no phase
    screen.saw_rows([[1.0], [2.0]])
    assert not screen.screen.phases


@pytest.mark.parametrize(
    "value, text", [(7, "0:07"), (59.6, "1:00"), (754, "12:34"), (11_100, "3:05:00"), (187_200, "2d 4h")]
)
def test_a_clock(value, text):
    assert screen.clock(value) == text


# ---- time left ----
def planned() -> Schedule:
    return Schedule([
        Planned("evaluation 0", 10, 100.0), Planned("iteration 0: training", 4, 400.0),
        Planned("evaluation 1", 20, 200.0), Planned("iteration 1: training", 8, 800.0),
    ])  # fmt: skip


def test_time_left_is_that_of_phases_of_its_kind_else_of_all_work_so_far():
    times = planned()
    assert times.place("evaluation 0") == "1/4"
    assert times.left("evaluation 0", 0, 10, 2.0) == (None, None)  # nothing is known
    own, run = times.left("evaluation 0", 5, 10, 5.0)  # 0.1 s a token; 1 s an item
    assert own == pytest.approx(5.0) and run == pytest.approx(5 + 0.1 * (400 + 200 + 800))
    times.finished("evaluation 0", 10, 10.0)
    assert times.place("iteration 0: training") == "2/4"
    own, run = times.left("iteration 0: training", 0, 4, 3.0)  # (10 + 3) s for 100 tokens; evaluations take 1 s an item
    assert own == pytest.approx(0.13 * 400 - 3) and run == pytest.approx(own + 20 * 1.0 + 0.13 * 800)
    own, run = times.left("iteration 0: training", 1, 4, 30.0)
    assert own == pytest.approx(90.0) and run == pytest.approx(90 + 20 * 1.0 + 40.0 / 200 * 800)
    times.finished("iteration 0: training", 4, 120.0)
    assert times.place("evaluation 1") == "3/4"
    own, run = times.left("evaluation 1", 10, 20, 5.0)  # of the last training: 30 s an item
    assert own == pytest.approx(5.0) and run == pytest.approx(5 + 8 * 30.0)


def test_phases_that_are_not_planned_have_no_place_and_a_resumed_run_goes_to_its_own():
    times = planned()
    assert times.place("baseline on held-out rows") == "" and times.left("baseline on held-out rows", 1, 4, 2.0) == (
        6.0,
        None,
    )
    assert times.place("iteration 1: training") == "4/4" and times.place("evaluation 1") == ""
    assert times.left("iteration 1: training", 2, 8, 4.0) == (12.0, 12.0)


def test_updates_that_an_earlier_process_did_take_no_time_in_the_estimate(clock):
    screen.screen.schedule = planned()
    with screen.progress("iteration 1: training", 8, visible=False) as advance:
        phase = screen.screen.phases[0]
        for _ in range(5):
            screen.skip()
        clock.now += 10
        advance(1)
        assert phase.done == 6 and screen.screen.left(phase) == (20.0, 20.0)
    assert screen.screen.schedule.per_item["iteration #: training"] == pytest.approx(10 / 3)


# ---- without a terminal ----
def test_without_a_terminal_a_line_comes_every_15_seconds_and_counts_tokens_too(clock, capsys):
    screen.screen.schedule = Schedule([Planned("answers", 100, 100.0), Planned("rest", 1, 50.0)])
    with screen.progress("answers", 100) as advance:
        advance(1)
        clock.now += 15
        advance(9)
        assert capsys.readouterr().err == ""
        clock.now += 1
        screen.saw(320)  # a batch that has no end yet
        assert capsys.readouterr().err == "  1/2 answers: 10/100, 20 tok/s, ETA 2:24, run 3:44\n"
        clock.now += 15
        advance(20)
        assert capsys.readouterr().err == ""
        clock.now += 0.5
        with screen.progress("judge", 4) as judged:
            judged(1)
            said = capsys.readouterr().err
    assert said == "  judge: 1/4, 0:00 so far\n" or said.startswith("  judge: 1/4, ETA 0:00"), said
    with screen.progress("answers", 100, visible=False) as advance:  # another rank
        clock.now += 99
        advance(50)
    assert capsys.readouterr().err == ""


# ---- on a terminal ----
DRIVE = """
import sys, time
from extras import screen, table
from extras.schedule import Planned, Schedule
screen.screen.schedule = Schedule([Planned("iteration 0: answers", 4, 40.0), Planned("iteration 0: training", 3, 90.0)])
with screen.progress("iteration 0: answers", 4) as advance:
    for _ in range(4):
        screen.saw(1000)
        time.sleep(0.3)
        advance(1)
with screen.progress("iteration 0: training", 3) as advance:
    for k in range(3):
        screen.show({"loss": 0.5 + k, "rewards/margins": 0.25})
        advance(1)
        if k == 1:
            with screen.progress("evaluation 10", 2) as inner:
                time.sleep(0.3)
                inner(2)
            print("said in the middle")
columns = "NLL, logp gap, accuracy, acc. shuffled, ROUGE-L, length, KL k1, KL k3, reward, gold, win base".split(", ")
rows = [["IRFT", str(i), str(100 * i), *(f"{i + k / 7:.3f}" for k in range(len(columns)))] for i in range(6)]
table.print_table("held-out measures", ["policy", "iteration", "step", *columns], rows, "metrics.jsonl")
"""


def on_a_terminal(words: list[str], columns: int, **variables: str) -> str:
    """All that Python writes with these words to a terminal that is so many columns wide, and in which nothing else runs."""
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", **variables}
    child = subprocess.Popen([sys.executable, *words], stdin=side, stdout=side, stderr=side, env=env, cwd=ROOT)
    os.close(side)
    parts = []
    while True:
        try:
            parts.append(os.read(main, 1 << 16))
        except OSError:  # the child has closed its end
            break
        if not parts[-1]:
            break
    os.close(main)
    assert child.wait() == 0, b"".join(parts).decode()
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [80, 100, 120, 140])
def test_on_a_terminal_no_line_and_no_table_row_wraps(columns):
    raw = on_a_terminal(["-c", DRIVE], columns)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", raw)
    drawn = [part for part in re.split(r"[\r\n]+", text) if part.strip()]
    assert max(map(len, drawn)) <= columns
    answers = [part for part in drawn if "answers" in part]
    assert answers[0].startswith("1/2 iteration 0: answers 0/4") and "ETA" not in answers[0]
    assert any(
        re.search(r"tok/s  ETA \d:\d\d, run \d:\d\d", part) for part in answers[1:]
    )  # it lives, and knows the rest of the run
    assert re.search(r"1/2 iteration 0: answers 4/4 .*k tok/s  took \d:\d\d", answers[-1])
    assert any(re.match(r"2/2 iteration 0: training 3/3 .*loss 2.5  margin 0.25  took ", part) for part in drawn)
    assert any(part.startswith("evaluation 10 2/2") and "took" in part for part in drawn)
    assert "said in the middle" in drawn
    body = text[text.index("held-out measures") :]
    for i in range(6):  # a column each where the table does not fit
        assert f"{i + 10 / 7:.3f}" in body
    assert bool(re.search("│ logp gap +│", body)) == (columns < 140), body


def test_a_dumb_terminal_is_treated_as_none():
    code = "from extras import screen\nwith screen.progress('answers', 2) as advance: advance(2)\nprint('end')"
    assert on_a_terminal(["-c", code], 80, TERM="dumb").strip() == "end"


def test_a_script_on_a_terminal_speaks_before_it_imports_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit")  # a stand-in
    said = on_a_terminal(["irft.py", "--T", "2"], 80, PYTHONPATH=str(tmp_path))
    assert said.strip() == "irft: loading libraries, data and models"
    assert on_a_terminal(["irft.py", "--T", "2"], 80, PYTHONPATH=str(tmp_path), RANK="1") == ""
    piped = subprocess.run(
        [sys.executable, "irft.py"], capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert not piped.stdout + piped.stderr and piped.returncode == 0


# ---- tables ----
def printed(capsys, monkeypatch, room: int, rows: list[list[str]], header=("policy", "step", "NLL")) -> list[str]:
    monkeypatch.setattr(table, "width", lambda: room)
    table.print_table("title", list(header), rows, "metrics.jsonl")
    return capsys.readouterr().out.splitlines()


def test_a_table_that_does_not_fit_is_turned_and_one_that_still_does_not_says_what_is_left_out(capsys, monkeypatch):
    rows = [[f"IRFT {i}", str(10 * i), f"{60 - i}.25", "0.500", "20.0"] for i in range(12)]
    header = ("policy", "step", "NLL", "accuracy", "length")
    wide = printed(capsys, monkeypatch, 46, rows, header)
    assert len([text for text in wide if "IRFT" in text]) == 12 and max(map(len, wide)) == 46
    narrow = printed(capsys, monkeypatch, 45, rows, header)
    assert max(map(len, narrow)) <= 45 and narrow[-1].endswith(" more in metrics.jsonl")
    cells = [re.findall(r"[^│┃ ][^│┃]*[^│┃ ]|[^│┃ ]", text) for text in narrow if text[0] in "│┃"]
    assert [row[0] for row in cells] == list(header)
    assert cells[0][1] == "IRFT 0" and cells[2][-1] == "49.25" and len({len(row) for row in cells}) == 1
    left_out = int(narrow[-1].split()[0])
    assert left_out == 12 - (len(cells[0]) - 1) > 0
    assert cells[2][1:] == ["60.25", *(f"{60 - i}.25" for i in range(1 + left_out, 12))]


def test_needed_columns_are_those_that_rich_draws(capsys, monkeypatch):
    rows = [["a", "1.5\n0.5..2.5", "word"]]
    drawn = printed(capsys, monkeypatch, table.WIDE, rows)
    assert max(map(len, drawn)) == table.needed(("policy", "step", "NLL"), rows)


# ---- decoded rows ----
class Words:
    """A tokenizer whose token i is w<i>, and 0 its end."""

    def decode(self, ids):
        return "".join("</s>" if i == 0 else f"w{i}\n" for i in ids)


def test_rows_are_shown_as_the_model_sees_them(capsys, monkeypatch, clock):
    said = []
    monkeypatch.setenv("COLUMNS", "60")
    run = SimpleNamespace(print=said.append, args=SimpleNamespace(report_to="none"))
    screen.screen.trained = {"row": 8, "prompt_ids": [5], "chosen_ids": [6, 0], "rejected_ids": [7]}
    rows = [{"row": 4, "prompt_ids": [1, 2]}, {"row": 9, "prompt_ids": [3]}]
    rollout = SimpleNamespace(response_ids=[[3, 0], [4]])
    assert samples.fold("answer", "a\x1b[2J\tb", 60) == "  answer    a\\x1b[2J\\tb"
    samples.show_samples(run, Words(), rows, rollout, ["w3", "w4"], 2)
    assert said == [
        "evaluation 2, held-out row 4:\n  prompt    w1\\nw2\\n\n  answer    w3\\n</s>",
        "last row trained on:\n  prompt    w5\\n\n  chosen    w6\\n</s>\n  rejected  w7\\n",
    ]
    folded = samples.fold("prompt", "word " * 500, 60).splitlines()
    assert max(map(len, folded)) <= 60 and " [...] " in " ".join(folded) and len(folded) < 20


# ---- the end ----
def test_the_end_says_what_was_saved_and_what_to_type_next(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(curves, "draw_run", lambda run: str(run.dir / "curves.png"))
    out = tmp_path / "a run"
    args = SimpleNamespace(model="tiny", dataset="pydoc", report_to="tensorboard")
    run = SimpleNamespace(is_main=True, dir=out, args=args, print=said.append)
    (out / "samples").mkdir(parents=True)
    ending.finish(run)
    assert not said  # evaluate.py, which has no final model
    for name in ("final", "sft", "reward"):
        (out / name).mkdir()
    for i in (0, 12):
        (out / "samples" / f"{i:04}.md").write_text("")
    ending.finish(SimpleNamespace(**{**vars(run), "is_main": False}))
    assert not said
    ending.finish(run)
    assert said[0].splitlines() == [
        "saved:", f"  curves   {out}/curves.png", f"  metrics  {out}/metrics.jsonl", f"  samples  {out}/samples/0012.md",
    ]  # fmt: skip
    assert said[1].splitlines() == [
        "next:", f"  python plot.py '{out}'", f"  less '{out}/samples/0012.md'",
        f"  python evaluate.py --model '{out}/final' --ref-model '{out}/sft' --reward-model '{out}/reward' --dataset pydoc",
        f"  tensorboard --logdir '{out}'",
    ]  # fmt: skip
    given = dict(
        dataset="a.jsonl:0.7 b.jsonl:0.3", columns="prompt=q completion=a", eval_dataset="auto", template="paper"
    )
    run.args = SimpleNamespace(**{**vars(args), **given})
    ending.finish(run)  # the data are read as the run has read them
    words = shlex.split(said[-1].splitlines()[3])
    asked = ["--dataset", "a.jsonl:0.7 b.jsonl:0.3", "--columns", "prompt=q completion=a", "--template", "paper"]
    assert words[-6:] == asked


# ---- the phases of a script ----
def arguments(**given) -> SimpleNamespace:
    usual = dict(
        T=2, batch_size=4, num_train_epochs=2, eval_samples=5, max_new_tokens=8, judge_model="", num_chunks=2,
        replay="none", sft_epochs=1, scalar_models=2, total_episodes=10, rollout_batch_size=4, num_ppo_epochs=1,
        eval_updates=2, ref="initial", objective="self_play",
    )  # fmt: skip
    return SimpleNamespace(**usual | given)


def phases(script: str, n: int = 9, m: int = 6, **given) -> list[tuple[str, int]]:
    rows = [{"prompt_ids": [1] * 4, "response_ids": [2] * 3}] * n
    pairs = [{"prompt_ids": [1] * 4, "chosen_ids": [2] * 3, "rejected_ids": [2]}] * m
    return [(p.name, p.items) for p in schedule.of_run(script, arguments(**given), rows, pairs).planned]


def test_phases_of_irft_with_chunks_and_replay():
    start, end = [("reference on held-out rows", 20), ("evaluation 0", 25)], lambda i: (f"evaluation {i}", 25)
    one = [("iteration 0: answers", 4), ("iteration 0: reference", 8), ("iteration 0: training", 2), end(1)]
    two = [("iteration 1: answers", 5), ("iteration 1: reference", 10), ("iteration 1: training", 4), end(2)]
    assert phases("irft") == [*start, *one, *two]
    replayed = phases("irft", replay="all", judge_model="j")
    assert replayed[-4:] == [("iteration 1: reference", 18), ("iteration 1: training", 6), end(2), ("judge 2", 10)]


def test_phases_of_scripts_with_a_reward():
    assert phases("rft", T=1) == [
        ("SFT", 3), ("reference on held-out rows", 20), ("iteration 0: answers", 9), ("iteration 0: reward", 6),
        ("reward 0 on held-out rows", 15), ("iteration 0: PPO", 3),
    ]  # fmt: skip
    online = dict(T=1, sft_epochs=0, scalar_models=1, total_prompts=0, num_generations=2, num_policy_epochs=1)
    found = phases("aihf", n=4, demo_weight=1.0, prompts="preferences", **online)
    assert found[-3:] == [("iteration 0: reward", 4), ("reward 0 on held-out rows", 15), ("iteration 0: online DPO", 2)]
    assert "iteration 0: answers" not in dict(phases("aihf", demo_weight=0.0, **online))
    irl = dict(pairs="accumulated", reward_normalisation="mean", eval_preference_dataset="x", total_episodes=8)
    assert phases("irl_ppo_tldr", m=99, **irl)[-6:] == [
        ("iteration 1: answers", 9), ("iteration 1: reward", 10), ("reward 1 on demonstrations", 9),
        ("reward 1 on held-out rows", 15), ("reward 1 on preferences", 10), ("iteration 1: PPO", 2),
    ]  # fmt: skip
    best = phases("irl_dpo_ultrachat", policy_objective="best_of_n", **online)
    assert best[-1] == ("iteration 0: best of N", 3)


def test_phases_of_sft_and_of_preferences_without_a_reward():
    assert phases("sft", num_train_epochs=1, m=0) == [
        ("reference on held-out rows", 20), ("evaluation 0", 25), ("epoch 0", 3), ("evaluation 1", 25),
    ]  # fmt: skip
    names = [name for name, _ in phases("aihf_direct", objective="self_play", ref="previous")]
    assert names[2:7] == [
        "iteration 0: answers", "iteration 0: reference, iter_0", "iteration 0: reference, preferences_0",
        "iteration 0: training", "evaluation 1",
    ]  # fmt: skip
    direct = phases("aihf_direct", objective="direct", T=1)
    assert direct[2:] == [
        ("iteration 0: reference, preferences", 12),
        ("iteration 0: training", 6),
        ("evaluation 1", 25),
    ]
