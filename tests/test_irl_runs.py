"""irl_ppo_tldr.py as a user meets it: TL;DR in, what a run leaves, its variants, an expert, bad input, processes, resume."""

import signal
import sys

import pytest
import torch
from helpers import (
    OnDemand,
    assert_data_can_be_given_back,
    assert_phases_as_planned,
    assert_same_metrics,
    chosen,
    command,
    drive,
    jsonl,
    make_classifier,
    make_model,
    make_tokenizer,
    metrics,
    run,
    slow_unless,
    tldr_rows,
    weights,
)

import irl_ppo_tldr as irl
from common.store import read_pairs
from extras.metrics import JUDGE_METRICS

SMALL = "--sft-epochs 1 --total-episodes 8 --rollout-batch-size 4 --eval-updates 1 --num-ppo-epochs 2".split()
SMALL += "--reward-learning-rate 1e-3 --sft-learning-rate 1e-3 --prompts demonstrations --max-length 72".split()


def comparison(row: dict, i: int) -> dict:
    info = {k: row[k] for k in ("subreddit", "title", "post")}
    return {"info": info, "summaries": [{"text": " no " * (1 + i % 2)}, {"text": row["summary"]}], "choice": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("irl")
    make_model(folder / "model")
    jsonl(folder / "data.jsonl", tldr_rows(20))
    jsonl(folder / "people.jsonl", [comparison(r, i) for i, r in enumerate(tldr_rows(9))])
    make_classifier(folder / "gold", make_model(folder / "expert", "mistral", make_tokenizer(310)))
    return folder


def argv(place, out, *flags) -> list[str]:
    return command("irl_ppo_tldr.py", place / "model", place / "data.jsonl", out, *SMALL, *flags)[1:]


GREEDY = ["--greedy-temperature", "1e-6", "--mixed-precision", "no"]  # random models have nearly equal logits
FULL = ["--T", "3", "--pairs", "accumulated", "--select-top-k", "12", *GREEDY]


@pytest.fixture(scope="module")
def finished(place):
    """One run with every measurement: an expert and a gold reward of another tokenizer, people's pairs, three iterations."""
    out = place / "run"
    flags = [*FULL, "--gold-reward-model", str(place / "gold"), "--baseline", str(place / "expert")]
    flags += ["--expert-model", str(place / "expert"), "--eval-preference-dataset", str(place / "people.jsonl")]
    run([sys.executable, *argv(place, out, *flags)], CLEANIRL_CACHE=str(place / "cache"))
    return out


def test_a_run_leaves_what_it_promises(finished):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    assert_data_can_be_given_back(finished, make_tokenizer().eos_token_id)
    assert_phases_as_planned(finished, 12)
    rows = metrics(finished)
    unseen = {"eval/kl_k1", "eval/kl_k3", *JUDGE_METRICS}  # KL is of samples at temperature 1; there is no judge
    assert set().union(*rows) - {"step", "outer_iteration", "episodes", "updates"} == set(irl.METRICS) - unseen
    assert sum("sft/loss" in r for r in rows) == 3
    reward_steps = [sum("reward/loss" in r and r["outer_iteration"] == t for r in rows) for t in range(3)]
    assert reward_steps == [3, 6, 9]
    measured = [(r["outer_iteration"], r["updates"]) for r in rows if "eval/nll" in r]
    assert measured == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert tokenizer.chat_template == irl.TLDR_TEMPLATE
    for name in ("final", "sft"):
        AutoModelForCausalLM.from_pretrained(finished / name)
    reward = AutoModelForSequenceClassification.from_pretrained(finished / "reward")
    assert reward.config.num_labels == 1
    assert "arXiv:2503.13538" in (finished / "final" / "README.md").read_text()
    pairs = read_pairs(finished / "generations" / "iter_2.parquet")
    assert len(pairs) == 12 and all(p["prompt_text"].endswith("\n\nTL;DR:") for p in pairs)
    given_back = irl.encode_tldr(
        [{"row": p["row"], "prompt": p["prompt"], "response": "a"} for p in pairs], tokenizer, 96, 64
    )
    assert [r["prompt_ids"] for r in given_back] == [p["prompt_ids"] for p in pairs]


def test_demonstrations_and_held_out_summaries_are_the_experts(finished, place):
    """Greedy answers of the expert to the same query; they end in EOS only where the expert's did; kept in the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expert, theirs = AutoModelForCausalLM.from_pretrained(place / "expert"), AutoTokenizer.from_pretrained(place / "expert")  # fmt: skip
    pairs = read_pairs(finished / "generations" / "iter_0.parquet")
    eos = AutoTokenizer.from_pretrained(place / "model").eos_token_id
    ended = 0
    for p in pairs:
        ids = theirs(p["prompt_text"])["input_ids"]
        greedy = expert.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=theirs.eos_token_id,
            pad_token_id=theirs.eos_token_id,
        )[0, len(ids) :]  # fmt: skip
        assert theirs.decode(greedy, skip_special_tokens=True).strip() == p["chosen"]
        finished_ = greedy[-1].item() == theirs.eos_token_id
        assert len(p["chosen_ids"]) <= 8 and (p["chosen_ids"][-1] == eos) == (finished_ and len(p["chosen_ids"]) < 9)
        ended += finished_
    assert [f.name for f in (place / "cache").glob("expert-*.parquet")]
    held = read_pairs(finished / "evals" / "reference.parquet")
    last = [r for r in metrics(finished) if "eval/nll" in r][-1]
    assert last["eval/gold/demonstrations"] == pytest.approx(sum(r["gold_demonstrations"] for r in held) / len(held))


def test_an_experts_answers_are_made_once(finished, place, capsys):
    """Another run of the same expert samples nothing from it: its weights need not even be readable."""
    import shutil

    weights_file, hidden = place / "expert" / "model.safetensors", place / "hidden.safetensors"
    shutil.copy2(weights_file, hidden)
    weights_file.write_bytes(b"\0" * weights_file.stat().st_size)
    stamp = hidden.stat()
    import os

    os.utime(weights_file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    out = place / "again"
    try:
        words = [sys.executable, *argv(place, out, "--T", "1", "--expert-model", str(place / "expert"), *GREEDY)]
        run(words, CLEANIRL_CACHE=str(place / "cache"))
    finally:
        shutil.copy2(hidden, weights_file)
    chosen = [
        {p["row"]: p["chosen"] for p in read_pairs(o / "generations" / "iter_0.parquet")} for o in (finished, out)
    ]
    assert len(chosen[1]) > len(chosen[0]) and all(chosen[1][row] == text for row, text in chosen[0].items())


def test_accuracy_on_peoples_pairs_agrees_with_the_rows(finished, place):
    """Every pair of the file, scored after every reward step, the queries and summaries in the form of TL;DR."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    values = [r["eval/reward/accuracy_preferences"] for r in metrics(finished) if "eval/reward/accuracy_preferences" in r]  # fmt: skip
    assert len(values) == 3
    for t, value in enumerate(values):
        rows = read_pairs(finished / "evals" / f"preferences_{t:04d}.parquet")
        wins = [(r["chosen"] > r["rejected"]) + 0.5 * (r["chosen"] == r["rejected"]) for r in rows]
        assert len(rows) == 4 and value == pytest.approx(sum(wins) / 4)  # --eval-samples 4
    reward = AutoModelForSequenceClassification.from_pretrained(finished / "reward")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    source = tldr_rows(9)
    for r in rows:
        row = source[r["row"]]
        query = f"SUBREDDIT: r/x\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"
        while len(tokenizer(query)["input_ids"]) > 64:
            post = query.partition("POST: ")[2].removesuffix("\n\nTL;DR:")
            query = query.replace(post, post.rpartition("\n")[0] if "\n" in post else post[:-1])
        ids = tokenizer(query)["input_ids"] + tokenizer(f" {row['summary']}")["input_ids"] + [tokenizer.eos_token_id]
        score = reward(input_ids=torch.tensor([ids])).logits[0, 0].item() - reward.config.reward_center
        assert score == pytest.approx(r["chosen"], abs=1e-4)


def test_demonstrations_score_0_on_average(finished, place):
    """N+ 9, through plain transformers: the saved reward on the demonstrations of its last step."""
    from transformers import AutoModelForSequenceClassification

    reward = AutoModelForSequenceClassification.from_pretrained(finished / "reward")
    pairs = read_pairs(finished / "generations" / "iter_2.parquet")
    scores = [reward(input_ids=torch.tensor([p["prompt_ids"] + p["chosen_ids"]])).logits[0, 0].item() for p in pairs]
    assert sum(scores) / len(scores) == pytest.approx(reward.config.reward_center, abs=1e-4)


def test_first_update_sees_the_reference_and_the_policy_that_answered(finished):
    first = next(r for r in metrics(finished) if "objective/kl" in r)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and first["sampling/logp_difference"] < 1e-5
    for r in metrics(finished):
        if "objective/kl" in r:
            assert r["objective/rlhf_reward"] == pytest.approx(r["objective/scores"] - 0.05 * r["objective/kl"])


VARIANTS = {
    "released": [
        "--T",
        "3",
        *"--ref previous --pairs accumulated --negatives greedy --reward-normalisation mean_std".split(),
        *GREEDY,
    ],
    "carried": "--ref initial --T 2 --reward-init previous --reward-loss linear --num-mini-batches 2 --optimizer rmsprop".split(),
    "no_sft": "--sft-epochs 0 --T 1 --whiten-rewards --sft-tokens response --reward-normalisation none".split(),
    "all_posts": "--prompts all --max-samples 6 --T 1 --value-warmup-ratio 0.5".split(),
    "lora": "--lora-r 4 --gradient-checkpointing --T 2".split(),
    "autocast": "--mixed-precision bf16 --T 1".split(),
}


@pytest.fixture(scope="module")
def variants(place):
    """{name: folder of that run}, each made when a test asks for it."""

    def make(name: str):
        out = place / f"variant_{name}"
        statuses, printed = drive([{"argv": argv(place, out, *VARIANTS[name])}])
        assert statuses == [0], printed
        return out

    return OnDemand(make)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "released", VARIANTS))
def test_every_variant_trains_and_starts_at_its_reference(variants, name):
    out, flags = variants[name], dict(zip(VARIANTS[name], VARIANTS[name][1:], strict=False))
    rows = [r for r in metrics(out) if "objective/kl" in r]
    starts = [next(r for r in rows if r["outer_iteration"] == t) for t in {r["outer_iteration"] for r in rows}]
    for r in starts if flags.get("--ref") != "initial" else starts[:1]:  # the policy is carried over
        assert r["objective/kl"] == pytest.approx(0, abs=0.2 if name == "autocast" else 1e-3), name
    if flags.get("--ref") == "initial":
        assert abs(starts[1]["objective/kl"]) > 1e-3  # still measured from the SFT policy
    assert rows[-1]["policy/approxkl_avg"] > 0
    assert (out / "final" / "model.safetensors").is_file() and (out / "reward" / "model.safetensors").is_file()


@pytest.mark.slow
def test_greedy_negatives_are_the_most_likely_answers(variants):
    """Those of the other variant are sampled: almost none of them is the greedy one."""
    from transformers import AutoModelForCausalLM

    same = {}
    for name in ("released", "carried"):
        policy = AutoModelForCausalLM.from_pretrained(variants[name] / "sft")
        pairs, same[name] = read_pairs(variants[name] / "generations" / "iter_0.parquet"), 0
        for p in pairs:
            ids = torch.tensor([p["prompt_ids"]])
            greedy = policy.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
                0, ids.shape[1] :
            ]
            same[name] += greedy.tolist() == p["rejected_ids"]
    assert same["released"] >= len(pairs) - 1 and same["carried"] < len(pairs) / 4


@pytest.mark.slow
def test_all_posts_are_summarised_by_ppo_but_few_are_demonstrations(variants):
    assert len(read_pairs(variants["all_posts"] / "generations" / "iter_0.parquet")) == 6


# ---- bad input ----
BAD = {
    "T": (["--T", "0"], "--T: found 0, expected 1 or more"),
    "greedy temperature": (["--greedy-temperature", "0"], "--greedy-temperature: found 0.0, expected a number above 0"),
    "eval temperature": (["--eval-temperature", "-1"], "--eval-temperature: found -1.0, expected a number above 0"),
    "epsilon": (["--adam-epsilon", "0"], "--adam-epsilon: found 0.0, expected a number above 0"),
    "decay": (["--weight-decay", "-1"], "--weight-decay: found -1.0, expected 0 or more"),
    "window": (["--max-length", "70"], "--max-length: found 70, expected room for a query and an answer: 64 + 8"),
    "expert": (["--expert-model", "no-such"], "--expert-model no-such: found no local folder ./no-such"),
    "people": (["--eval-preference-dataset", "DATA"], "expected a preference: prompt/chosen/rejected"),
    "dialogue": (["--dataset", "DIALOGUE"], "--dataset: found a prompt of 3 turns, expected one text to summarise"),
    "diverged": (["--reward-learning-rate", "1e30", "--reward-loss", "linear"], "Lower --reward-learning-rate"),
}


@pytest.fixture(scope="module")
def outcomes(place):
    turns = [{"role": r, "content": f"{r} text"} for r in ("user", "assistant", "user", "assistant")]
    files = {"DATA": str(place / "data.jsonl"), "DIALOGUE": jsonl(place / "dialogue.jsonl", [{"messages": turns}] * 30)}
    scenarios = [
        {"argv": argv(place, place / f"never_{i}", *(files.get(f, f) for f in flags)), "mark": name}
        for i, (name, (flags, _)) in enumerate(BAD.items())
    ]
    statuses, printed = drive(scenarios)
    return dict(zip(BAD, zip(statuses, printed.split("=== ")[1:], strict=True), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(outcomes, name):
    status, printed = outcomes[name]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and BAD[name][1] in errors[0], printed
    assert "Traceback" not in printed


def test_dry_run_counts_what_a_run_would_do(place, killed):
    """20 or 40 pairs in batches of 4: the steps that the run of the same flags has logged."""
    out = place / "dry"
    done = run([sys.executable, *argv(place, out, "--T", "2", "--pairs", "accumulated", "--dry-run")])
    assert not out.exists()
    assert "20 answers of up to 8 tokens" in done.stdout and "K = 5 to 10 reward steps" in done.stdout
    assert "5 SFT steps" in done.stdout and "2 PPO updates of 2 optimizer steps on 4 answers" in done.stdout
    assert "in all 28 optimizer steps" in done.stdout and "memory per device, policy update" in done.stdout
    assert metrics(killed / "whole")[-1]["step"] == 28


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place):
    from safetensors.torch import load_file

    flags = "--T 2 --batch-size 5 --rollout-batch-size 5 --total-episodes 10 --learning-rate 1e-4".split()
    flags += "--reward-learning-rate 1e-4 --expert-model".split() + [str(place / "expert")]
    one, two = place / "one", place / "two"
    run([sys.executable, *argv(place, one, *flags)], CLEANIRL_CACHE=str(place / "cache_one"))
    run([sys.executable, *argv(place, two, *flags)], ranks=2, CLEANIRL_CACHE=str(place / "cache_two"))
    for name in ("final", "reward"):
        a, b = (load_file(out / name / "model.safetensors") for out in (one, two))
        start = load_file(place / "model" / "model.safetensors")
        assert max((a[k] - start[k]).abs().max() for k in a if k in start) > 5e-4
        # no difference of two scores depends on the last bias: its gradient is rounding, which AdamW makes a step of
        told = [k for k in a if (name, k) != ("reward", "gpt_neox.final_layer_norm.bias")]
        assert max((a[k] - b[k]).abs().max() for k in told) < 2e-6
    assert_same_metrics(one, two)


# ---- resume ----
POINTS = [  # (function, n-th call): in every phase of both iterations
    ("common.run.Run.step", 2),  # SFT: steps 1 to 5
    ("common.run.Run.save_final", 1),
    ("common.evals.sample_rows", 1),
    ("common.run.write_pairs", 2),
    ("common.run.Run.step", 7),  # reward step: 6 to 10
    ("irl_ppo_tldr.IRL.normalise", 1),
    ("extras.preference_data.evaluate_preferences", 1),
    ("common.evals.evaluate", 1),
    ("irl_ppo_tldr.collect", 2),
    ("common.run.Run.step", 13),  # inside a PPO update
    ("common.evals.evaluate", 3),
    ("common.run.write_pairs", 3),
    ("common.run.Run.step", 20),  # reward step of iteration 1
    ("irl_ppo_tldr.IRL.normalise", 2),
    ("irl_ppo_tldr.IRL.start_policy", 2),
    ("irl_ppo_tldr.collect", 4),
    ("common.run.Run.save_final", 3),
]
QUICK = [("common.run.Run.step", 13)]


@pytest.fixture(scope="module")
def killed(place, request):
    flags = "--T 2 --ref previous --pairs accumulated --reward-normalisation mean_std --eval-preference-dataset".split()
    flags += [str(place / "people.jsonl")]
    scenarios, expected = [{"argv": argv(place, place / "whole", *flags)}], [0]
    for i in chosen(request, "i"):
        (at, n), out = POINTS[i], place / f"killed_{i}"
        scenarios += [
            {"argv": argv(place, out, *flags), "at": at, "n": n},
            {"argv": ["irl_ppo_tldr.py", "--resume", str(out)]},
        ]
        expected += [-signal.SIGKILL, 0]
    statuses, printed = drive(scenarios)
    assert statuses == expected, printed
    return place


@pytest.mark.parametrize(
    "i", slow_unless(lambda i: POINTS[i] in QUICK, range(len(POINTS))), ids=lambda i: "-".join(map(str, POINTS[i]))
)
def test_killed_and_resumed_equals_left_alone(killed, i):
    from safetensors.torch import load_file

    whole, resumed = killed / "whole", killed / f"killed_{i}"
    for name in ("final", "reward", "sft"):
        expected, found = (load_file(out / name / "model.safetensors") for out in (whole, resumed))
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    for folder in ("samples", "evals", "generations"):
        for path in (whole / folder).iterdir():
            assert path.read_bytes() == (resumed / folder / path.name).read_bytes()


def test_training_moved_the_weights(killed):
    """Guards the test above against comparing runs that did nothing."""
    from safetensors.torch import load_file

    sft = load_file(killed / "whole" / "sft" / "model.safetensors")
    middle = load_file(killed / "whole" / "policy_1" / "model.safetensors")
    after = weights(killed / "whole")
    assert max((sft[k] - middle[k]).abs().max() for k in sft) > 1e-4
    assert max((after[k] - middle[k]).abs().max() for k in after) > 1e-4
