"""Curves of runs: data, groups, intervals and frontiers by hand; figures; errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from test_repo import SCRIPTS

import plot
from common import UserError
from common.store import write_pairs
from extras import curves, figures
from extras.statistics import bootstrap_interval


def make_run(folder: Path, rows: list[dict], script: str = "irft", evals: list[dict] | None = None, **args) -> Path:
    """The folder of a run with these rows of metrics, and with these columns by held-out row of its evaluations."""
    (folder / "evals").mkdir(parents=True)
    settings = {"seed": 1, "beta": 0.1, "output_dir": str(folder), "resume": "", "report_to": "none"} | args
    (folder / "args.json").write_text(json.dumps({"script": script, "args": settings}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, columns in enumerate(evals or []):
        table = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_pairs(folder / "evals" / f"{10 * i:04}.parquet", [{"sample": "x", **row} for row in table])
    return folder


def training(*losses: float | None) -> list[dict]:
    return [{"step": k + 1, "outer_iteration": 0, "loss": loss} for k, loss in enumerate(losses)]


def evaluation(step: int, nll: float, kl: float) -> dict:
    return {"step": step, "outer_iteration": 0, "eval/nll": nll, "eval/kl_k3": kl}


@pytest.fixture
def seeds(tmp_path) -> list[Path]:
    """Three runs that differ in the seed; the third has not got as far, and one loss was not finite."""
    losses = [(3.0, 2.0, 1.0), (5.0, 2.0, 4.0), (4.0, 8.0)]
    runs = []
    for i, own in enumerate(losses):
        rows = [evaluation(0, 10.0 + i, 0.0), *training(*own), evaluation(3, 7.0 + 2 * i, 1.0 + i)]
        runs.append(make_run(tmp_path / f"seed{i}", rows, seed=i))
    return runs


def words(runs) -> tuple[str, ...]:
    return tuple(map(str, runs))


# ---- groups ----
def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path, seeds):
    other = make_run(tmp_path / "other", training(1.0), seed=0, beta=0.5, T=2)
    script = make_run(tmp_path / "script", training(1.0), script="sft")
    groups = curves.read_groups(words([*seeds, other, script]))
    assert [len(runs) for runs in groups.values()] == [3, 1, 1]
    assert list(groups) == ["irft, beta 0.1", "irft, beta 0.5, T 2", "sft"]
    assert list(curves.read_groups(words(seeds))) == ["irft"]
    named = curves.read_groups((f"SPIN={seeds[0]},{other}", str(seeds[1])))
    assert {label: [run.folder.name for run in runs] for label, runs in named.items()} == {
        "SPIN": ["seed0", "other"],
        "irft": ["seed1"],
    }


def test_a_run_of_several_seeds_is_a_group_of_its_own(tmp_path):
    rows = [{"step": step, "seed": seed, "eval/return": 10.0 * seed + step} for step in (0, 5) for seed in (1, 2)]
    (group,) = curves.read_groups((str(make_run(tmp_path / "run", rows, script="aihf_mujoco")),)).values()
    found = curves.curve(group, "eval/return")
    assert found.mean.tolist() == [15.0, 20.0] and len(found.each) == 2 and found.kind == curves.SEEDS
    assert figures.axis_title("step", "aihf_mujoco") == "environment steps"


# ---- means and intervals ----
def test_a_curve_is_the_mean_where_all_seeds_are_and_its_band_is_students_t(seeds):
    (group,) = curves.read_groups(words(seeds)).values()
    found = curves.curve(group, "loss")
    assert found.x.tolist() == [1, 2] and found.mean.tolist() == [4.0, 4.0]
    half = 4.302653 * np.array([1.0, np.sqrt(12.0)]) / np.sqrt(3)  # t of two degrees; deviations of 3, 5, 4 and 2, 2, 8
    np.testing.assert_allclose(found.high - found.mean, half, rtol=1e-4)
    np.testing.assert_allclose(found.mean - found.low, half, rtol=1e-4)
    assert found.kind == curves.SEEDS and [x.tolist() for x, _ in found.each] == [[1, 2, 3], [1, 2, 3], [1, 2]]
    alone = curves.curve(group[:1], "loss")
    assert alone.mean.tolist() == [3.0, 2.0, 1.0] and alone.kind == ""
    assert curves.curve(group, "eval/nll", "episodes") is None


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (60, 2.00030)])
def test_students_quantile(degrees, quantile):
    assert curves.student(degrees) == pytest.approx(quantile, rel=2e-4)


def test_the_interval_of_an_evaluation_is_a_bootstrap_of_its_rows(tmp_path):
    stream = np.random.default_rng(0)
    runs, kept = [], []
    for seed in range(2):
        tables = [{"row": [4, 7, 9, 11], "nll": (stream.random(4) * 5).tolist()} for _ in range(2)]
        kept.append([np.array(t["nll"]) for t in tables])
        rows = [evaluation(5 * k, float(np.mean(t["nll"])), 0.0) for k, t in enumerate(tables)]
        runs.append(make_run(tmp_path / f"run{seed}", rows, seed=seed, evals=tables))
    (group,) = curves.read_groups(words(runs)).values()
    for own, values, kind in ((group[1:], kept[1:], curves.ROWS), (group, kept, curves.BOTH)):
        found = curves.curve(own, "eval/nll")
        for k in range(2):
            expected = bootstrap_interval(np.stack([v[k] for v in values]))
            assert (found.low[k], found.high[k]) == expected and found.kind == kind
    assert curves.curve(group, "eval/kl_k3").kind == curves.SEEDS  # a measure that is not kept by row
    write_pairs(runs[0] / "evals" / "0010.parquet", [{"row": 5, "sample": "x", "nll": 1.0}] * 4)
    (group,) = curves.read_groups(words(runs)).values()
    assert curves.curve(group, "eval/nll").kind == curves.SEEDS  # other held-out rows
    (runs[0] / "evals" / "0010.parquet").unlink()
    (group,) = curves.read_groups(words(runs)).values()
    assert curves.curve(group, "eval/nll").kind == curves.SEEDS  # fewer files than evaluations
    for own in runs:
        for k in range(3):
            write_pairs(own / "evals" / f"{10 * k:04}.parquet", [{"row": 5, "sample": "x", "nll": 1.0}] * 4)
    (group,) = curves.read_groups(words(runs)).values()
    assert curves.curve(group, "eval/nll").kind == curves.SEEDS  # more


def test_values_that_are_not_finite_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", training(1.0, None, 3.0))
    (group,) = curves.read_groups((str(run),)).values()
    assert curves.curve(group, "loss").x.tolist() == [1, 3]


def test_a_frontier_has_a_point_for_each_row_with_both_metrics(seeds):
    (group,) = curves.read_groups(words(seeds)).values()
    both = curves.frontier(group, "eval/nll", "eval/kl_k3")
    assert both.x.mean.tolist() == [0.0, 2.0] and both.y.mean.tolist() == [11.0, 9.0]
    np.testing.assert_allclose(both.y.high - both.y.mean, 4.302653 * np.array([1.0, 2.0]) / np.sqrt(3), rtol=1e-4)
    np.testing.assert_allclose(both.x.high - both.x.mean, 4.302653 * np.array([0.0, 1.0]) / np.sqrt(3), rtol=1e-4)
    assert curves.frontier(group, "loss", "eval/kl_k3") is None


# ---- names ----
def test_a_metric_is_found_by_its_end_and_the_nearest_is_named(seeds):
    groups = curves.read_groups(words(seeds))
    assert curves.resolve("kl_k3", groups) == "eval/kl_k3" and curves.resolve("loss", groups) == "loss"
    with pytest.raises(UserError, match="^--metric: found l_k3, which no run has"):  # half of a word
        curves.resolve("l_k3", groups)
    with pytest.raises(
        UserError, match="^--metric: found kl_k1, which no run has, expected eval/kl_k3, or another metric"
    ):
        curves.resolve("kl_k1", groups)
    with pytest.raises(
        UserError, match="^--x: found zzz, which no run has, expected one of step, outer_iteration, eval/nll"
    ):
        curves.resolve("zzz", groups, "--x")
    for run in next(iter(groups.values())):
        run.rows.append({"step": 9, "gold/nll": 1.0})
    with pytest.raises(UserError, match="^--metric: found nll, expected one of eval/nll, gold/nll$"):
        curves.resolve("nll", groups)


def test_units_follow_from_what_metrics_mean():
    found = figures.units(figures.meanings("rft"))
    assert {name: found[name] for name in UNITS_BY_HAND} == UNITS_BY_HAND
    assert figures.axis_title("eval/kl_k3", "rft") == "eval/kl_k3 [nats per response]"
    assert figures.axis_title("step", "rft") == "optimizer steps"
    assert figures.axis_title("eval/return", "aihf_mujoco") == "eval/return [reward units]"
    assert found["val/explained_variance"] == ""


UNITS_BY_HAND = {
    "eval/nll": "nats per response", "eval/logps/gap": "nats per pair", "eval/kl_k3": "nats per response",
    "eval/rewards/margins": "reward units", "eval/rewards/accuracies": "share", "eval/rewards/accuracies_shuffled": "share",
    "eval/rouge_l": "share", "eval/completions/mean_length": "tokens", "eval/gold/score": "reward units",
    "eval/gold/win_rate_baseline": "share", "eval/judge/win_rate_high": "share", "objective/kl": "nats per answer",
    "sft/loss": "nats per token", "policy/entropy_avg": "nats per token", "grad_norm": "",
    "reward/loss": "",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_meanings_are_read_from_the_source_of_every_script(script):
    found = figures.meanings(script.removesuffix(".py"))
    assert {name: found[name] for name in SCRIPTS[script].METRICS} == SCRIPTS[script].METRICS


# ---- figures ----
BAND = (221, 231, 240)  # of the first group: its colour at 18% over white


def share(path: Path, color: tuple[int, int, int]) -> float:
    """Share of a figure's pixels in a colour."""
    from matplotlib.image import imread

    return float((np.abs(imread(path)[..., :3] - np.array(color) / 255).max(-1) < 0.015).mean())


def blue_and_red(path: Path) -> tuple[float, float]:
    """Shares of the colours of the first and of the second group."""
    return share(path, (68, 119, 170)), share(path, (238, 102, 119))


def test_plot_draws_curves_of_groups_and_a_frontier(tmp_path, seeds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", [evaluation(0, 9.0, 0.0), evaluation(3, 5.0, 0.5)], beta=0.5)
    assert plot.plot(plot.Args(words([*seeds, other]))) == Path("curves.png")
    blue, red = blue_and_red(tmp_path / "curves.png")
    assert blue > 0.0005 and red > 0.0005 and share(tmp_path / "curves.png", BAND) > 0.005
    first = (tmp_path / "curves.png").read_bytes()
    plot.plot(plot.Args(words([*seeds, other]), output="again.png"))
    assert (tmp_path / "again.png").read_bytes() == first  # nothing but what is drawn
    path = plot.plot(plot.Args(words([*seeds, other]), metric=("nll",), x="kl_k3", output="f/frontier.png"))
    assert min(blue_and_red(tmp_path / path)) > 0.0005
    assert plot.plot(plot.Args((str(other),), metric=("nll",))) == other / "curves.png"
    assert blue_and_red(other / "curves.png")[1] == 0 and share(other / "curves.png", BAND) < 0.001  # one run: no band


def test_what_is_drawn_unless_metrics_are_named(seeds):
    assert curves.default_metrics(curves.read_groups(words(seeds))) == ["loss", "eval/nll", "eval/kl_k3"]


def test_a_caption_names_the_intervals():
    assert curves.about({curves.SEEDS: True, "": True}) == "bands and bars: 95%, Student's t over seeds"
    assert curves.about({"": True}) == "one run: no intervals"


def test_a_run_draws_its_curves_at_its_end_and_says_what_to_install_if_it_cannot(seeds, monkeypatch):
    run = type("Run", (), {"dir": seeds[0]})
    assert curves.draw_run(run) == str(seeds[0] / "curves.png") and blue_and_red(seeds[0] / "curves.png")[0] > 0.0005
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curves.draw_run(run).startswith(
        "not drawn, for want of matplotlib: pip install matplotlib, then python plot.py"
    )


# ---- errors ----
def test_errors_are_one_line(tmp_path, seeds):
    (tmp_path / "empty").mkdir()
    bare = make_run(tmp_path / "bare", [])
    torn = make_run(tmp_path / "torn", [])
    (torn / "metrics.jsonl").write_text('{"step": 1}\n[2\n')
    listed = make_run(tmp_path / "listed", training(1.0))
    (listed / "args.json").write_text("[]")
    good = str(seeds[0])
    for given, message in (
        (dict(runs=()), "runs: found none, expected one or more folders of runs"),
        (dict(runs=(str(tmp_path / "empty"),)), "empty, which cannot be read as a run .*args.json.*, expected the folder of a run"),
        (dict(runs=(str(bare),)), "runs: found no metrics in .*bare"),
        (dict(runs=(str(torn),)), "torn, which cannot be read as a run"),
        (dict(runs=(str(listed),)), "listed, which cannot be read as a run"),
        (dict(runs=("A=",)), r"runs: found A=, expected DIR or LABEL=DIR\[,DIR...\]"),
        (dict(runs=(good,), metric=("lss",)), "--metric: found lss, which no run has, expected loss"),
        (dict(runs=(good,), metric=("loss",), x="kl_k3"), "--metric: found no row with both loss and eval/kl_k3"),
        (dict(runs=(good,), output="a.pdf"), "--output: found a.pdf, expected a name that ends in .png"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            plot.plot(plot.Args(**given))
        assert "\n" not in str(caught.value)


def test_plot_ends_with_one_line_and_status_2_for_a_folder_that_is_no_run(tmp_path):
    words = [sys.executable, "plot.py", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: runs: found ")
