"""The world of film reviews: its gold reward, its parts, the expert; and what the table says of runs."""

import json
import math
import sys
import zipfile

import numpy as np
import pytest
from helpers import ROOT, command, commands, jsonl, run

from common.store import read_pairs, write_pairs

sys.path.append(str(ROOT / "benchmark"))
import best_of
import film
import film_table
from demo import Point

GOOD, BAD = ["great", "lovely", "a gem", "very fine"], ["awful", "dull", "a mess", "very bad"]


# ---- texts and the gold reward ----
def test_ratings_and_reviews_become_alike():
    rated, review = "It's ''GREAT''—a half-way gem, isn’t it?", "it's \" great \" a half-way gem , isn't it ?"
    assert film.as_review("The café's film.") == "the cafe's film ."
    assert film.as_review(rated.replace("—", " ")) == review == film.as_review(review)
    assert film.terms(rated) == film.terms(review.replace(" , ", " "))
    assert film.terms("A very dull film.") == ["a", "very", "dull", "film", "a very", "very dull", "dull film"]


def hand_made(folder, least_norm: float = 0.0) -> film.Gold:
    stored = {
        "idf": {"good": 2.0, "film": 1.0, "good film": 3.0},
        "weight": {"good": 1.0, "film": -0.5, "good film": 2.0},
    }
    (folder / "gold.json").write_text(json.dumps({**stored, "bias": 0.25, "least_norm": least_norm, "peak_at": 1.0}))
    return film.Gold(folder)


def test_the_gold_reward_by_hand(tmp_path):
    gold = hand_made(tmp_path)
    twice = 1 + math.log(2)
    norm = math.sqrt((2 * twice) ** 2 + 1 + 9)  # "good good film": good twice, film, and "good film"
    assert gold.score(["Good good film!"])[0] == pytest.approx(0.25 + (2 * twice - 0.5 + 2 * 3) / norm)
    assert gold.score(["nothing known"])[0] == 0.25
    assert gold.score(["good"])[0] == pytest.approx(1.25) and gold.peak(["good"])[0] == pytest.approx(-(0.25**2))
    bounded = hand_made(tmp_path, least_norm=8.0)
    assert bounded.score(["good"])[0] == pytest.approx(0.25 + 2 / 8)


def rated_texts(n: int, seed: int = 0) -> list[tuple[str, float]]:
    stream = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        liked = bool(stream.integers(2))
        words = " ".join(stream.choice(["film", "plot", "actor", "scene", "story"], 4))
        rows.append((f"the {words} is {stream.choice(GOOD if liked else BAD)} {i}", 2.0 if liked else -2.0))
    return rows


def test_the_gold_reward_learns_what_people_like_and_says_how_well(tmp_path):
    pytest.importorskip("sklearn")
    reviews = [
        {"text": f"it is {word} . " * 3, "positive": liked} for liked, ws in ((True, GOOD), (False, BAD)) for word in ws
    ]
    gold = film.make_gold(tmp_path, rated_texts(300), [f"the film is {w}" for w in GOOD + BAD], reviews)
    assert gold.score(GOOD).min() > gold.score(BAD).max() + 0.5
    report = json.loads((tmp_path / "gold_report.json").read_text())
    assert report["ratings it is tested on"] == 60 and report["ratings it is fitted on"] == 240
    assert report["correlation with people"] > 0.9 and report["whole reviews on the right side of the median"] == 1
    assert gold.peak_at == pytest.approx(np.percentile(gold.score([f"the film is {w}" for w in GOOD + BAD]), 80))


def test_the_ratings_that_test_the_gold_reward_are_not_fitted(tmp_path):
    """Ratings that are noise cannot be predicted: a correlation far from 0 would be one of ratings that were fitted."""
    pytest.importorskip("sklearn")
    stream = np.random.default_rng(1)
    noise = [(text, float(stream.normal())) for text, _ in rated_texts(400)]
    film.make_gold(tmp_path, noise, ["a film"], [{"text": "a film", "positive": True}])
    report = json.loads((tmp_path / "gold_report.json").read_text())
    assert (
        abs(report["correlation with people"]) < 0.35
    )  # four standard errors of 80 pairs are 0.45, one of fitted ones near 1


# ---- rows ----
def review_texts(n: int, seed: int = 0) -> list[dict]:
    stream, words = np.random.default_rng(seed), [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(20) for j in range(20)]
    sentences = [[" ".join(stream.choice(words, 12)) for _ in range(6)] for _ in range(n)]
    sentences[1][0] = sentences[0][0]  # the same sentence in two reviews
    return [
        {"name": f"{'pos' if i % 2 else 'neg'}/cv{i}.txt", "positive": bool(i % 2), "text": "\n".join(lines)}
        for i, lines in enumerate(sentences)
    ]


def test_no_review_and_no_sentence_is_in_two_parts():
    reviews = review_texts(120)
    parts = film.split(reviews)
    owner = {film.as_review(line): r["name"] for r in reversed(reviews) for line in r["text"].splitlines()}
    where: dict[str, set] = {}
    sentences = [f"{row['prompt']} {row['completion']}" for rows in parts.values() for row in rows]
    for part, rows in parts.items():
        assert rows
        for row in rows:
            assert len(row["prompt"].split()) == 4 and len(row["completion"].split()) == 8
            where.setdefault(owner[f"{row['prompt']} {row['completion']}"], set()).add(part)
    assert all(len(names) == 1 for names in where.values())
    assert len(sentences) == len(set(sentences)) and len(sentences) >= 120 * 6 - 1 - 6
    share = len(parts["train"]) / len(sentences)
    assert 0.6 < share < 0.9  # 0.75 of the reviews; four standard errors of 120 are 0.16


def test_a_family_of_prompts_is_not_both_trained_on_and_held_out():
    reviews = review_texts(120)
    opening = "this film is a"
    for review in reviews:
        review["text"] += f"\n{opening} w{review['name'][4:-4]} and so on and on"
    parts = film.split(reviews)
    assert sum(row["prompt"] == opening for row in parts["train"]) > 50
    assert not any(row["prompt"] == opening for part in ("dev", "held_out") for row in parts[part])


def test_lengths_of_sentences():
    assert film.as_row("a b c d e f g") is None and film.as_row(" ".join("a" * 29)) is None
    assert film.as_row("a b c d e f g h") == {"prompt": "a b c d", "completion": "e f g h"}
    assert film.as_row(" ".join("a" * 28)) is not None


def write_files(folder) -> list[str]:
    ratings, reviews = folder / "ratings.tsv", folder / "reviews.zip"
    ratings.write_text("".join(f"{i}\t{rating}\t{text}\n" for i, (text, rating) in enumerate(rated_texts(200))))
    with zipfile.ZipFile(reviews, "w") as archive:
        for review in review_texts(120):
            archive.writestr(f"movie_reviews/{review['name']}", review["text"])
        archive.writestr("movie_reviews/README", "no review")
    return ["--ratings", str(ratings), "--reviews", str(reviews)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("film")
    film.make(film.Args(*write_files(folder)[1::2], output_dir=str(folder / "world")))
    return folder / "world"


def test_the_model_goes_on_with_the_sentence(world):
    from common.data import encode
    from common.models import read_tokenizer

    tokenizer = read_tokenizer(str(world / "init"), False, "--model")
    row = encode([{"row": 0, "prompt": "the film is", "response": "a gem ."}], tokenizer, 64, 40)[0]
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"]) == "the film is a gem .<|endoftext|>"
    assert row["response_ids"][-1] == tokenizer.eos_token_id and tokenizer.decode(row["prompt_ids"]) == "the film is"


def test_the_best_of_the_samples_becomes_the_demonstration(world):
    reward = best_of.reward_of("", str(world))
    assert best_of.choose(reward(["a plot that is awful", "a plot that is great", "a plot that is dull"])) == 1
    gold = film.Gold(world)
    peak = best_of.reward_of("", str(world), "peak")(["it is great", "a film"])
    assert peak == pytest.approx(-((gold.score(["it is great", "a film"]) - gold.peak_at) ** 2))


def test_positive_sentences_are_those_people_like(world):
    parts = film.positive_rows([("a " * 9, 2.0), ("b " * 9, 1.5), ("c " * 9, -2.0), ("d", 3.0)])
    assert [row["prompt"] for rows in parts.values() for row in rows] == ["a a a a"]
    rated = [(f"w{i} " * 9, 2.0) for i in range(400)]
    parts = film.positive_rows(rated + rated)
    assert not {r["prompt"] for r in parts["positive_train"]} & {r["prompt"] for r in parts["positive_held_out"]}
    assert 0.5 < len(parts["positive_train"]) / 800 < 0.7  # 0.6; four standard errors are 0.1


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--ratings", "one column\n" * 20), ("--ratings", None), ("--reviews", "no zip"), ("--reviews", None)],
)
def test_files_that_are_missing_or_wrong_are_refused(tmp_path, flag, text):
    words = write_files(tmp_path)
    path = tmp_path / "wrong"
    if text is not None:
        path.write_text(text)
    words[words.index(flag) + 1] = str(path)
    done = run([sys.executable, "benchmark/film.py", *words, "--output-dir", str(tmp_path / "world")], check=False)
    assert done.returncode == 2 and f"{flag}: found" in done.stderr and "such as" in done.stderr


# ---- the table ----
def point(good, kl, step=0, texts=()) -> Point:
    return Point(step, {"good": np.array(good, float), "kl_k3": np.array(kl, float)}, list(texts))


def test_gold_at_equal_kl_by_hand():
    points = [point([0, 1], [0, 0]), point([2, 5], [0.5, 1.5]), point([4, 4], [4, 4])]
    assert film_table.at_kl(points, 1.0).tolist() == [2, 5]
    assert film_table.at_kl(points, 0.25) == pytest.approx([1, 3])  # half of the way in the root of the KL
    assert film_table.at_kl(points[::-1], 2.25) == pytest.approx([3, 4.5])
    assert film_table.at_kl(points, 4.1) is None


def test_arms_of_one_method_make_one_path():
    runs = {
        "SPIN, 1": [[point([0], [0])], [point([1], [0])]],
        "SPIN, 2": [[point([2], [1])]],
        "SFT": [[point([3], [0])]],
    }
    found = film_table.paths(runs)
    assert {name: [[p.columns["good"][0] for p in seed] for seed in seeds] for name, seeds in found.items()} == {
        "SPIN": [[0, 2], [1]], "SFT": [[3]],
    }  # fmt: skip


def test_the_best_of_m_by_hand():
    rewards = np.array([3.0, 1.0, 2.0])
    assert film_table.best_of(rewards, 1) == pytest.approx(2)
    assert film_table.best_of(rewards, 2) == pytest.approx((1 * 1 + 2 * 3 + 3 * 5) / 9)
    assert film_table.best_of(rewards, 2, by=-rewards) == pytest.approx((3 * 1 + 2 * 3 + 1 * 5) / 9)
    assert film_table.kl_of_best(1) == 0 and film_table.kl_of_best(8) == pytest.approx(math.log(8) - 7 / 8)


def test_distinct_2():
    assert film_table.distinct_2(["a b c", "a b"]) == pytest.approx(2 / 3) and film_table.distinct_2(["a"]) == 0


def test_the_two_sample_test():
    """Near 0.5 for texts of one kind (four standard errors of 400 are 0.1), near 1 for texts of two."""
    pytest.importorskip("sklearn")
    stream = np.random.default_rng(0)
    one, same = ([" ".join(stream.choice(list("abcdefgh"), 6)) for _ in range(200)] for _ in range(2))
    other = [" ".join(stream.choice(list("abcdefgx"), 6)) + " x" for _ in range(200)]
    assert film_table.two_sample(one, same) == pytest.approx(0.5, abs=0.1)
    assert film_table.two_sample(one, one) == pytest.approx(0.5, abs=0.1)
    assert film_table.two_sample(one, other) > 0.95


def test_gold_at_equal_updates_by_hand():
    points = [point([0], [0], 0), point([1], [0], 40), point([5], [0], 80)]
    assert film_table.at_step(points, 60) == pytest.approx([3]) and film_table.at_step(points, 81) is None
    text = film_table.equal_table(
        {"A": [points], "B": [points[:2]]}, "A", ["60"], [lambda p: film_table.at_step(p, 60)]
    )
    assert text.splitlines()[2:] == ["| A | 3.00 [3.00, 3.00] |  |", "| B |  |  |"]


def test_gold_over_iterations_by_hand():
    long = {"loop": [[point([g, g + 0.5], 0.1 * k, k) for k, g in enumerate((0.0, 1.0, 3.0, 2.0))]] * 2}
    short = {"one": [[point([9.0, 9.0], 0.0), point([9.0, 9.0], 0.1, 1)]] * 3}
    for points in long["loop"]:
        for i, p in enumerate(points):
            p.columns["completions/mean_length"] = np.array([10.0 + i, 12.0 + i])
    table = film_table.iterations_table({**short, **long}).splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table]
    assert rows[0] == ["", "", "start", "1", "2", "3", "last less first"] and len(rows) == 4
    assert rows[2][0] == "loop (2 seeds)" and [c.split()[0] for c in rows[2][2:]] == [
        "0.25",
        "1.25",
        "3.25",
        "2.25",
        "1.00",
    ]
    assert rows[3] == ["", "tokens", "11.0", "12.0", "13.0", "14.0", ""]
    assert film_table.iterations_table(short) == ""


def test_length_alone_by_hand():
    """Demonstrations that are longer are told apart; ones of the same lengths are not."""
    pytest.importorskip("sklearn")
    longer = [{"chosen": (10 + i % 5, True), "rejected": (5 + i % 4, True)} for i in range(60)]
    assert film_table.length_accuracy(longer, longer) == 1
    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in longer]
    assert film_table.length_accuracy(longer, swapped) == 0
    ended = [{"chosen": (8, True), "rejected": (8, False)}] * 30
    assert film_table.length_accuracy(ended, ended) == 1
    assert film_table.length_accuracy(longer, [{"chosen": (7, True), "rejected": (7, True)}]) == 0.5


def test_the_length_of_each_row_is_compared_with_its_own_sample(tmp_path):
    pytest.importorskip("sklearn")
    for name in ("evals", "generations", "final"):
        (tmp_path / name).mkdir()
    (tmp_path / "final" / "config.json").write_text('{"eos_token_id": 0}')
    pairs = [{"chosen_ids": [5] * (6 + i % 4) + [0], "rejected_ids": [5] * (2 + i % 4) + [0]} for i in range(40)]
    write_pairs(tmp_path / "generations" / "iter_0.parquet", pairs)
    rows = [{"row": 3 * i, "sample": "", "lengths/demonstrations": float(n)} for i, n in enumerate((10, 6, 4))]
    write_pairs(tmp_path / "evals" / "0000.parquet", rows)
    reference = [{"row": 3 * i, "rejected_ids": [5] * (n - 1) + [0]} for i, n in enumerate((9, 5, 3))]
    write_pairs(tmp_path / "evals" / "reference.parquet", reference)
    held: dict[int, dict] = {0: {}, 3: {}, 6: {}}
    assert film_table.length_gate(tmp_path, held) == 1
    write_pairs(tmp_path / "evals" / "reference.parquet", [*reference[1:], reference[0]])
    assert film_table.length_gate(tmp_path, held) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("values", "failed"),
    [
        ((0.8, 0.7, 0.65), []),
        ((0.79, 0.5, 0.9), ["right"]),
        ((0.9, 0.81, 0.9), ["length"]),
        ((0.9, 0.5, 0.6), ["other row"]),
    ],
)
def test_gates(values, failed):
    said = film_table.passed(*values)
    assert (said == "all three") == (not failed) and all(word in said for word in failed)


# ---- from the world to the table ----
@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A base model that ends its answers, an expert that takes the best of its samples, and three runs that learn from it."""
    folder = tmp_path_factory.mktemp("runs")
    stream, small = np.random.default_rng(0), "--max-length 40 --max-prompt-length 32 --max-new-tokens 6".split()
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    answers = [" ".join(stream.choice([*GOOD, *BAD], 1 + i % 2)) for i in range(len(prompts))]
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    data, epochs = jsonl(folder / "short.jsonl", rows), ["--num-train-epochs", "2"]
    shared = ["--optimizer", "adamw", "--per-device-train-batch-size", "4"]
    # until it writes whole words, so that rows differ in gold
    long = "--learning-rate 1e-2 --num-train-epochs 8".split()
    run(command("sft.py", world / "init", data, folder / "base", *small, *shared, *long))
    base = folder / "base" / "final"
    words = [
        "benchmark/best_of.py",
        "--model",
        str(base),
        "--gold",
        str(world),
        "--best-of",
        "3",
        "--mixed-precision",
        "no",
    ]
    words += [*small, "--dataset", str(world / "prompts.jsonl"), "--eval-dataset", str(world / "held_out.jsonl")]
    words += ["--eval-samples", "12", "--per-device-eval-batch-size", "16", "--max-samples", "12"]
    run([sys.executable, *words, "--output-dir", str(folder / "expert")])
    train, held = folder / "expert" / "train.jsonl", str(folder / "expert" / "held_out.jsonl")
    flags = ["--eval-dataset", held, *small, *shared, "--learning-rate", "1e-3", "--eval-samples", "12"]
    rft = "--sft-epochs 0 --num-train-epochs 1 --reward-learning-rate 1e-2 --total-episodes 8 --rollout-batch-size 4"
    rft += " --eval-updates 1 --reward-model= --value-warmup-ratio 0"
    for name, script, own in (("sft", "sft.py", ""), ("spin", "irft.py", "--T 1"), ("rft", "rft.py", rft)):
        run(command(script, base, train, folder / name, *flags, *([] if own == rft else epochs), *own.split()))
    return folder


def test_the_expert_is_the_best_of_its_samples(world, place):
    said, gold = json.loads((place / "expert" / "expert.json").read_text()), film.Gold(world)
    rewards = np.array(said["rewards"])
    assert said["best_of"] == 3 and rewards.shape == (12, 3)
    assert said["held_out"]["expert"] == pytest.approx(rewards.max(1).mean())
    rows = [json.loads(line) for line in (place / "expert" / "held_out.jsonl").read_text().splitlines()]
    found, best = gold.score([row["completion"] for row in rows]), iter(rewards.max(1))
    assert len(found) >= 8  # an answer without text is left out
    assert all(any(abs(value - own) < 1e-9 for own in best) for value in found)  # in the order of the prompts


def cells_of(text: str, label: str, table: str) -> list[str]:
    """The cells of a row of the table under the heading `table`."""
    part = text.partition(f"### {table}\n")[2].partition("###")[0]
    return next(
        [c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith(f"| {label} |")
    )


def test_the_table_says_what_the_runs_measured(world, place, tmp_path):
    flags = ["--expert", str(place / "expert"), "--output", str(tmp_path), "--runs", f"SFT={place / 'sft'}"]
    flags += [f"SPIN, beta 0.1={place / 'spin'}", f"RFT, beta 0.1={place / 'rft'}"]
    printed = run([sys.executable, "benchmark/film_table.py", *flags]).stdout
    gold = film.Gold(world)
    last = {
        name: read_pairs(sorted((place / name / "evals").glob("[0-9]*.parquet"))[-1]) for name in ("sft", "spin", "rft")
    }
    scores = {name: gold.score([row["sample"] for row in rows]) for name, rows in last.items()}
    changed = [r["sample"] for r in read_pairs(place / "sft" / "evals" / "0000.parquet")] != [
        r["sample"] for r in last["sft"]
    ]
    assert changed and all(len(set(scores[name])) > 1 for name in ("sft", "spin"))  # else another row is not told apart
    row = cells_of(printed, "SPIN, beta 0.1", "At the end of each run")
    assert row[1].split()[0] == f"{scores['spin'].mean():.2f}"
    written = [json.loads(line) for line in (place / "expert" / "held_out.jsonl").read_text().splitlines()]
    best = gold.score([written[r["row"]]["completion"] for r in last["spin"]])
    assert row[2].split()[0] == f"{(scores['spin'] - best).mean():.2f}"
    assert row[3].split()[0] == f"{(scores['spin'] - scores['sft']).mean():.2f}"
    wins = (scores["spin"] > scores["sft"]) + 0.5 * (scores["spin"] == scores["sft"])
    assert (
        row[4].split()[0] == f"{wins.mean():.2f}"
        and row[5].split()[0] == f"{np.mean([r['nll'] for r in last['spin']]):.2f}"
    )
    gates = cells_of(printed, "SPIN, beta 0.1", "Gates")
    assert gates[1].split()[0] == f"{np.mean([r['rewards/accuracies'] for r in last['spin']]):.3f}"
    reward = read_pairs(place / "rft" / "evals" / "reward_0000.parquet")
    right = np.mean([(r["chosen"] > r["rejected"]) + 0.5 * (r["chosen"] == r["rejected"]) for r in reward])
    gates = cells_of(printed, "RFT, beta 0.1", "Gates")
    assert gates[1].split()[0] == f"{right:.3f}"
    first = read_pairs(place / "rft" / "evals" / "0000.parquet")
    order = np.argsort([r["rejected"] for r in reward], kind="stable")
    ranked = gold.score([first[i]["sample"] for i in order])
    expected = (ranked * np.diff((np.arange(len(ranked) + 1) / len(ranked)) ** 3)).sum()
    reference = read_pairs(place / "rft" / "evals" / "reference.parquet")
    pairs = read_pairs(place / "rft" / "generations" / "iter_0.parquet")
    train = [{k: (len(p[f"{k}_ids"]), p[f"{k}_ids"][-1] == 0) for k in ("chosen", "rejected")} for p in pairs]
    measured = [
        {
            "chosen": (int(r["lengths/demonstrations"]), written[r["row"]]["finished"]),
            "rejected": (len(ids), ids[-1] == 0),
        }
        for r, ids in zip(first, (own["rejected_ids"] for own in reference), strict=True)
    ]
    assert gates[2] == f"{film_table.length_accuracy(train, measured):.3f}"
    assert gates[5] == f"{expected:.2f}" and (tmp_path / "figure.png").stat().st_size > 10_000
    assert cells_of(printed, "ceiling of any reward, N/(N+1)", "Gates")[1] == "0.750"
    assert cells_of(printed, "SFT", "Gates")[2] == ""
    assert all(r["sample"] in printed for r in last["rft"][:4])


def test_demonstrations_of_people_need_no_expert(world, place, tmp_path):
    flags = [
        "--gold",
        str(world),
        "--demonstrations",
        str(place / "expert" / "held_out.jsonl"),
        "--output",
        str(tmp_path),
    ]
    printed = run([sys.executable, "benchmark/film_table.py", *flags, "--runs", f"SFT={place / 'sft'}"]).stdout
    assert "Theory" not in printed and cells_of(printed, "SFT", "At the end of each run")


def test_the_commands_of_irl(tmp_path):
    out = tmp_path / "out"
    for path in ("world/gold.json", "base/final/manifest.json", "expert/expert.json", "development/expert.json"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).touch()
    arms = "irl-previous irl-initial irl-accumulated irl-long irl-carried"
    said = commands(tmp_path, "benchmark/film.sh", str(out), SEEDS="1 2", ARMS=arms, CARRIED_RATE="3e-5")
    for seed, lines in (("1", said[:5]), ("2", said[5:10])):
        assert all(line.startswith(f"irl_dpo_ultrachat.py --output-dir {out}/{seed}/irl-") for line in lines)
        assert all(f" --seed {seed} " in line for line in lines)
        assert [" --ref initial " in line for line in lines] == [False, True, True, True, True]
        for flag, only in (("pairs accumulated", 2), ("num-train-epochs 4", 3), ("reward-init previous", 4)):
            assert [f" --{flag} " in line for line in lines] == [k == only for k in range(5)]
        assert [" --reward-loss linear " in line for line in lines] == [False] * 4 + [True]
        assert [line.split("--reward-learning-rate ")[1].split()[0] for line in lines] == ["2e-3"] * 4 + ["3e-5"]
    assert said[10].startswith("benchmark/film_table.py") and len(said) == 11


def test_the_grid_of_the_carried_reward(tmp_path):
    out, finished = tmp_path / "out", ("2e-4", "2e-3")
    made = [f"100/irl-carried-{rate}/final/manifest.json" for rate in finished]
    for path in ("world/gold.json", "base/final/manifest.json", "expert/expert.json", "development/expert.json", *made):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).touch()
    *runs, table = commands(tmp_path, "benchmark/film.sh", str(out), GRID="1")
    (line,) = (line for line in runs if "irl-carried" in line)
    flags = "--ref initial --reward-init previous --reward-loss linear --reward-learning-rate 6e-4 --learning-rate 4e-4"
    assert line.endswith(flags) and f" --eval-dataset {out}/development/held_out.jsonl " in line
    assert all(f" irl-carried-{rate}={out}/100/irl-carried-{rate}" in table for rate in finished)


def test_an_expert_of_a_word_is_refused(place, tmp_path):
    (tmp_path / "expert.json").write_text(json.dumps({"word": "Return", "best_of": 4}))
    words = ["benchmark/film_table.py", "--expert", str(tmp_path), "--runs", f"SFT={place / 'sft'}"]
    done = run([sys.executable, *words], check=False)
    assert done.returncode == 2 and "--expert: found no rewards" in done.stderr
