"""benchmark/control_table.py: its rules, and its tables and figures of made-up runs."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from helpers import ROOT

import aihf_mujoco
from extras import episodes as episodes_file

sys.path.append(str(ROOT / "benchmark"))
import control_table as table

CONTROL = ("aihf", "rlhf", "irl")
EXPERT = dict(expert_steps=100_000, expert_alpha=0.0, expert_seeds=2, checkpoint_every=10_000)
FINAL = {"aihf": 400.0, "rlhf": 100.0, "irl": 300.0, "ipl": 50.0, "bc": 200.0}  # true return at the end, of seed 1


def make_log(folder, method: str, evaluations: dict[int, list[dict]], finished: bool = True, **settings) -> None:
    """A run folder: {step: a row for each of the seeds 1, 2, ..., or those from `seed` on}."""
    folder.mkdir(parents=True)
    first = settings.get("seed", 1)
    rows = [
        {"step": step, "seed": first + s, **row}
        for step, of_seeds in evaluations.items()
        for s, row in enumerate(of_seeds)
    ]
    args = aihf_mujoco.Args(method=method, num_seeds=len(next(iter(evaluations.values()))), **{**EXPERT, **settings})
    (folder / "args.json").write_text(json.dumps({"script": "aihf_mujoco", "args": dataclasses.asdict(args)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "final.safetensors").write_bytes(b"")


def make_run(folder, method: str, last: list[float], steps: int = 6, gap: float = 0.0, **settings) -> None:
    """Returns that rise by 10 an evaluation to `last`, one for each seed; the learned reward prefers the policy by `gap`."""
    rows = {}
    for k in range(steps):
        rows[10_000 * k] = [{"eval/return": x - 10 * (steps - 1 - k), "eval/length": 100.0} for x in last]
        if method == "aihf":
            reward = {"policy": gap + 1, "demonstrations": 1.0, "accuracy": 0.75, "rank_correlation": 0.5}
            for row in rows[10_000 * k]:
                row |= {f"eval/reward/{name}": value for name, value in reward.items()}
    make_log(folder, method, rows, total_steps=10_000 * (steps - 1), **settings)


def make_episodes(levels: list[float], each: int = 5) -> tuple[episodes_file.Episodes, np.ndarray]:
    """Episodes of one step, whose returns are those levels for each checkpoint, give or take 1."""
    rng, n = np.random.default_rng(0), len(levels) * each
    returns = np.repeat(levels, each) + rng.uniform(-1, 1, n)
    observations, actions = np.zeros((n, 2, 3), np.float32), np.zeros((n, 1, 2), np.float32)
    episodes = episodes_file.Episodes(observations, actions, np.ones(n, int), np.zeros(n, bool), returns)
    return episodes, np.repeat(np.arange(len(levels)), each)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of benchmark/control.sh, three seeds, Walker2d with one. AIHF is best; RLHF's reward prefers its policy."""
    root = tmp_path_factory.mktemp("control")
    for env in table.ENVIRONMENTS:
        spread = [0.0] if env == "Walker2d" else [0.0, 1.0, 2.0]
        for name, last in FINAL.items():
            method = name if name in ("bc", "ipl") else "aihf"
            gap = 0.5 if name == "rlhf" else -0.5
            make_run(root / env / name, method, [last + x for x in spread], gap=gap, env=f"{env}-v5")
        folder = root / "data" / f"{env}-v5__0123abcd"
        folder.mkdir(parents=True)
        episodes, checkpoint = make_episodes([0.0, 200.0, 550.0, 950.0, 1000.0])
        episodes_file.write_episodes(folder / "episodes.npz", episodes, checkpoint=checkpoint)
        made_by = dataclasses.asdict(aihf_mujoco.Args(env=f"{env}-v5", **EXPERT))
        made_by |= {name: made_by[flag] for name, flag in table.EXPERT_FLAGS.items()} | {"gymnasium": "0.0"}
        (folder / "made_by.json").write_text(
            json.dumps({name: made_by[name] for name in (*aihf_mujoco.EXPERT, "gymnasium")})
        )
        other = root / "data" / f"{env}-v5__another"  # of other settings
        other.mkdir()
        (other / "made_by.json").write_text(json.dumps({**made_by, "alpha": 0.2}))
        (other / "episodes.npz").write_bytes(b"")
        make_run(folder / "expert", "sac", [5000.0, 5100.0], steps=11, env=f"{env}-v5", alpha=0.0)
    for env, names in table.expected_runs().items():
        for name in (name for name in names if name not in FINAL):
            shift = [0.0, 1.0, 2.0] if name.startswith("irl") else [90.0, 91.0, 92.0]
            make_run(root / env / name, "aihf", [200 + x for x in shift], steps=4, env=f"{env}-v5")
    return root


def rows_of(text: str, title: str) -> list[list[str]]:
    """Cells of the table below a title."""
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines[1:]]


def test_a_verdict_is_the_side_of_the_interval():
    sides = {
        table.HELD: [10.0, 11.0, 12.0],
        table.DID_NOT: [-10.0, -11.0, -12.0],
        table.CANNOT_TELL: [-1.0, 0.0, 3.0],
    }
    for verdict, values in sides.items():
        assert table.verdict(values) == verdict
        assert table.verdict([-v for v in values], side=-1) == verdict
    assert table.verdict([5.0]) == table.verdict([5.0], side=-1) == table.CANNOT_TELL  # one seed says nothing of others
    assert table.verdict([1.0, 2.0, 3.0]) == table.CANNOT_TELL  # all above 0, too few to tell


@pytest.mark.parametrize(
    "learned, true, verdict",
    [
        ([1.0, 1.1, 1.2], [-10.0, -11.0, -12.0], table.HELD),
        ([1.0, 1.1, 1.2], [10.0, 11.0, 12.0], table.DID_NOT),  # it is better, and the reward says so
        ([-1.0, -1.1, -1.2], [-10.0, -11.0, -12.0], table.DID_NOT),  # it is worse, and the reward says so
        ([-1.0, 0.1, 1.2], [-10.0, -11.0, -12.0], table.CANNOT_TELL),
        ([1.0, 1.1, 1.2], [-10.0, 0.0, 12.0], table.CANNOT_TELL),
        ([-1.0, 0.1, 1.2], [10.0, 11.0, 12.0], table.DID_NOT),
        ([1.0], [-10.0], table.CANNOT_TELL),
    ],
)
def test_a_reward_is_hacked_if_it_rises_above_the_demonstrations_and_the_return_does_not(learned, true, verdict):
    assert table.hacked(learned, true) == verdict
    opposite = {table.HELD: table.DID_NOT, table.DID_NOT: table.HELD, table.CANNOT_TELL: table.CANNOT_TELL}
    assert table.not_hacked(learned, true) == opposite[verdict]


def test_a_result_is_the_mean_of_the_last_three_evaluations_that_all_seeds_have(tmp_path):
    returns = {0: [1.0, 2.0], 10: [3.0, 5.0], 20: [4.0, 6.0], 30: [8.0, 10.0], 40: [9.0]}  # seed 2 was cut off
    rows = {step: [{"eval/return": x} for x in values] for step, values in returns.items()}
    make_log(tmp_path / "cut", "aihf", rows, finished=False, total_steps=100)
    run = table.load(tmp_path / "cut")
    assert run.late() == {1: 5.0, 2: 7.0} and run.late(until=20) == {1: 8 / 3, 2: 13 / 3}
    assert (run.finished, run.total, run.steps.tolist()) == (False, 100, [0, 10, 20, 30])
    assert table.load(tmp_path / "none") is None
    make_run(tmp_path / "offline", "bc", [30.0, 40.0], steps=3)  # of which the first is before any training
    assert table.load(tmp_path / "offline").late() == {1: 30.0, 2: 40.0}


def test_two_runs_are_compared_seed_by_seed_at_the_last_step_of_both(tmp_path):
    make_run(tmp_path / "long", "aihf", [100.0, 200.0, 400.0], steps=6)
    make_run(tmp_path / "short", "aihf", [10.0, 20.0], steps=4)  # seeds 1 and 2, to step 30,000
    make_run(tmp_path / "offline", "bc", [1.0, 2.0, 3.0], steps=3)
    long, short, offline = (table.load(tmp_path / name) for name in ("long", "short", "offline"))
    assert table.differences(long, short) == ([100 - 20 - 10.0, 200 - 20 - 20.0], 30_000)
    assert table.differences(short, long) == ([-70.0, -160.0], 30_000)
    assert table.differences(long, offline) == ([89.0, 188.0, 387.0], 50_000)  # updates are no steps


def test_demonstrations_are_those_that_the_runs_learn_from(runs, monkeypatch):
    run = table.load(runs / "Hopper" / "aihf")
    found = table.load_data(runs, run).classes["demonstrations"]
    made = episodes_file.read_episodes(runs / "data" / "Hopper-v5__0123abcd" / "episodes.npz")
    monkeypatch.setattr(aihf_mujoco, "expert_episodes", lambda *_: (made[0], made[1]["checkpoint"], runs))
    data = aihf_mujoco.Data(aihf_mujoco.Args(**run.args))
    assert len(found) == 2 and found.returns.tolist() == data.demonstrations.returns.tolist()


def test_tables_and_figures_of_all_runs(runs, tmp_path, capsys):
    table.show(
        table.Args(runs=str(runs), output=str(tmp_path), sac=(str(runs / "data" / "Hopper-v5__0123abcd" / "expert"),))
    )
    text = (tmp_path / "control.md").read_text()
    assert "Missing" not in text and "Unfinished" not in text
    for name in ("control.png", "control_reward.png", "control_ablation.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    first = {row[0]: row[1:] for row in rows_of(text, "Tab. 1: the data")}
    assert first["Hopper"][0].startswith("100 ± 100") and first["Hopper"][0].endswith("(10)")  # levels 0 and 200
    assert first["Hopper"][1].startswith(("549", "550", "551")) and first["Hopper"][2].endswith("(2)")
    results = {tuple(row[:2]): row[2:] for row in rows_of(text, "Results")}
    assert results["Walker2d", "AIHF"] == ["50000 steps", "1 seed", "390", "190", "100"]  # the mean of 380, 390 and 400
    low, high = table.interval([390.0, 391.0, 392.0])[1:]
    assert results["Hopper", "AIHF"][1:3] == ["3 seeds", f"391 [{low:.0f}, {high:.0f}]"]
    assert results["Hopper", "BC"][0] == "50000 updates"
    claims = {tuple(row[:3]): row[3:] for row in rows_of(text, "Claims")}
    assert claims["(a)", "Hopper", "AIHF − RLHF"] == ["50000", "300 [300, 300]", "+300, +300, +300", "**held**"]
    assert claims["(a)", "Walker2d", "AIHF − RLHF"] == ["50000", "300", "+300", "**cannot tell**"]
    assert claims["(b)", "HalfCheetah", "RLHF − BC"][-1] == "**held**"
    assert claims["(c)", "HalfCheetah", "AIHF − IRL, demonstrations: 4"][:2] == ["30000", "90 [90, 90]"]
    hacked = [row for key, row in claims.items() if key[:2] == ("(d)", "Hopper")]
    assert [row[-1] for row in hacked] == ["**held**", "**held**"] and "-0.50 [-0.50, -0.50]" in hacked[1][1]
    assert "* (a) AIHF is above RLHF and IPL: held 4, did not 0, cannot tell 2, of 6." in text
    ablations = {tuple(row[:3]): row[3:] for row in rows_of(text, "Ablations")}
    main, changed = 400 - 20 - 10, 290 - 10  # the main run at the changed one's last step, 20,000 before its end
    low, high = table.interval([changed, changed + 1, changed + 2])[1:]
    assert ablations["Hopper", "AIHF", "terminate"][:2] == ["30000", f"{changed + 1} [{low:.0f}, {high:.0f}]"]
    assert ablations["HalfCheetah", "AIHF", "reward steps 5"][3].startswith(f"{changed - main} [")
    assert len(ablations) == 12
    sac = rows_of(text, "SAC on the true reward")
    assert sum(row[0].startswith("ours, Hopper-v5, (64, 64), alpha learned") for row in sac) == 2
    hopper = next(row for row in sac if row[0].startswith("ours, Hopper-v5"))
    assert hopper[1:] == [f"5050 ± 50 ({(5050 - 2613) / 991:+.1f} sd)", "", "", ""]
    assert capsys.readouterr().out.startswith(text)


def test_what_is_missing_or_unfinished_is_said(runs, tmp_path):
    for name, last in {"rlhf": 1.0, "irl": 1.0, "aihf": 2.0}.items():
        make_run(tmp_path / "Hopper" / name, "aihf", [last, last + 1, last + 2], env="Hopper-v5")
    (tmp_path / "Hopper" / "rlhf" / "final.safetensors").unlink()
    table.show(table.Args(runs=str(tmp_path), output=str(tmp_path)))
    text = (tmp_path / "control.md").read_text()
    assert "Missing in Hopper: ipl, bc, aihf_terminate, rlhf_terminate." in text
    assert "Unfinished: Hopper/rlhf, measured to step 50000 of 50000." in text
    steps = {row[2]: row[3] for row in rows_of(text, "Claims")}
    assert steps == {"AIHF − RLHF": "50000, unfinished", "AIHF − IRL, 2 demonstrations": "50000"}
    assert "* (b) RLHF does not improve on BC: held 0, did not 0, cannot tell 0, of 0." in text
    with pytest.raises(table.UserError, match="--runs: found no evaluation under .*none"):
        table.show(table.Args(runs=str(tmp_path / "none"), output=str(tmp_path)))
    with pytest.raises(table.UserError, match="--sac: found no evaluation in .*none"):
        table.show(table.Args(runs=str(runs), sac=(str(tmp_path / "none"),), output=str(tmp_path)))
    (tmp_path / "Hopper" / "rlhf" / "args.json").write_text("{}")
    with pytest.raises(table.UserError, match="--runs: found no rows of seeds in .*rlhf"):
        table.show(table.Args(runs=str(tmp_path), output=str(tmp_path)))


def test_a_run_and_its_other_seeds_are_one(tmp_path):
    make_run(tmp_path / "aihf", "aihf", [100.0, 200.0, 300.0], gap=1.0)
    make_run(tmp_path / "aihf_seed_4", "aihf", [400.0, 500.0], steps=5, seed=4)  # an evaluation fewer
    make_run(tmp_path / "aihf_flipped", "aihf", [900.0])
    alone, run = table.load(tmp_path / "aihf"), table.load_all(tmp_path / "aihf")
    assert (
        alone.seeds == [1, 2, 3] and run.seeds == [1, 2, 3, 4, 5] and list(run.steps) == [0, 10000, 20000, 30000, 40000]
    )
    assert run.values["eval/return"][:, -1].tolist() == [90.0, 190.0, 290.0, 400.0, 500.0]
    assert run.values["eval/reward/policy"][:, 0].tolist() == [2.0, 2.0, 2.0, 1.0, 1.0] and run.finished
    (tmp_path / "aihf_seed_4" / "final.safetensors").unlink()
    assert not table.load_all(tmp_path / "aihf").finished and table.load_all(tmp_path / "rlhf") is None
