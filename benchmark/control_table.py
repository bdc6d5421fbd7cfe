"""Tables and figures of benchmark/control.sh: the AIHF paper's Fig. 5 and Tab. 1 on our scale, its claims, and the ablations.

A result is the mean of the last three evaluations, or the last one of a method that learns offline: no checkpoint is chosen.
Two runs are compared seed by seed, at the last step that both have. A claim held if the 95% interval over seeds lies on its side
of 0, did not hold if the interval lies on the other side, and cannot be told if the interval includes 0 or there is one seed.
Thin lines are single seeds.

    python benchmark/control_table.py --runs runs/control --output runs/control
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import aihf_mujoco  # noqa: E402
from benchmark.tables import markdown, read_json, read_log  # noqa: E402
from common import UserError  # noqa: E402
from common.args import main
from common.streams import stream_seed
from extras import figures
from extras.episodes import Episodes, read_episodes, sort_episodes
from extras.statistics import bootstrap_interval

ENVIRONMENTS = ("HalfCheetah", "Hopper", "Walker2d")
METHODS = {"aihf": "AIHF", "rlhf": "RLHF", "irl": "IRL alone", "ipl": "IPL", "bc": "BC"}
ONLINE = ("aihf", "rlhf", "irl")  # these act in the environment; the others learn from the data alone
COLORS = {
    **dict(zip(("irl", "rlhf", "aihf", "ipl", "bc"), figures.COLORS, strict=False)),
    "expert": figures.GREY,
}
DEMONSTRATIONS = {  # label -> suffix of a run's name; the main run has two
    "1, 100 steps": "_demonstrations_cut",
    "1": "_demonstrations_1",
    "2": "",
    "4": "_demonstrations_4",
}
REWARD_STEPS = {"5": "_reward_steps_5", "20": "", "80": "_reward_steps_80"}
LAST = 3  # evaluations of a result, of a method that acts in the environment
HELD, DID_NOT, CANNOT_TELL = "held", "did not", "cannot tell"
TIANSHOU = {  # environment -> {steps: mean and standard deviation of ten seeds of SAC}, (256, 256), -v3
    "Hopper": {100_000: (2613, 991), 300_000: (3388, 115), 1_000_000: (3532, 43)},
    "HalfCheetah": {100_000: (6515, 514), 300_000: (9059, 1051), 1_000_000: (12122, 1006)},
    "Walker2d": {100_000: (1305, 795), 300_000: (3387, 1182), 1_000_000: (4961, 327)},
}
SAC_STEPS = (100_000, 200_000, 300_000, 1_000_000)


@dataclass
class Args:
    runs: str
    """folder of benchmark/control.sh: <environment>/aihf, <environment>/rlhf, ..., and data."""
    sac: tuple[str, ...] = ()
    """more runs of --method sac for the check of SAC, for example with --hidden 256."""
    output: str = "runs/control"
    """folder for control.md, control.png, control_reward.png and control_ablation.png."""


# ---- runs ----
@dataclass
class Run:
    """The evaluations that all seeds of a run have."""

    args: dict
    seeds: list[int]
    steps: np.ndarray  # (evaluations,) environment steps; updates, of a method that learns offline
    values: dict[str, np.ndarray]  # metric -> (seeds, evaluations)
    finished: bool

    def late(self, metric: str = "eval/return", until: float = np.inf) -> dict[int, float]:
        """{seed: mean of the last three evaluations up to a step, or the last one of a method that learns offline}."""
        kept = np.flatnonzero(self.steps <= until)[-1 if self.offline else -LAST :]
        return dict(zip(self.seeds, self.values[metric][:, kept].mean(1).tolist(), strict=True))

    @property
    def offline(self) -> bool:
        """Say if it learns from the data alone: it settles, and its few evaluations begin with an untrained policy."""
        return self.args["method"] in ("bc", "ipl")

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.args[{"bc": "bc_steps", "ipl": "ipl_steps"}.get(self.args["method"], "total_steps")]


Runs = dict[str, dict[str, Run]]  # environment -> {name of a run: the run}


def load(folder: Path) -> Run | None:
    """A run of aihf_mujoco.py, finished or not; None where there is none, or one without an evaluation of every seed."""
    if not (folder / "metrics.jsonl").exists():
        return None
    args = read_json(folder / "args.json", "--runs").get("args", {})
    rows = [row for row in read_log(folder / "metrics.jsonl", "--runs") if "eval/return" in row]
    if "num_seeds" not in args or any("seed" not in row for row in rows):
        raise UserError(f"--runs: found no rows of seeds in {folder}, expected a run of aihf_mujoco.py")
    seeds = [args["seed"] + s for s in range(args["num_seeds"])]
    by_seed = {s: {row["step"]: row for row in rows if row["seed"] == s} for s in seeds}
    steps = sorted(set.intersection(*(set(found) for found in by_seed.values())))
    if not steps:
        return None
    names = set.intersection(*(set(by_seed[s][step]) for s in seeds for step in steps))
    values = {n: np.array([[by_seed[s][step][n] for step in steps] for s in seeds]) for n in names}
    return Run(args, seeds, np.array(steps), values, (folder / "final.safetensors").exists())


def load_all(folder: Path) -> Run | None:
    """A run and those of the same settings with other seeds, <folder>_seed_<first seed>, as one run at their common steps."""
    found = [run for path in (folder, *sorted(folder.parent.glob(f"{folder.name}_seed_*"))) if (run := load(path))]
    if len(found) < 2:
        return found[0] if found else None
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in found)))
    kept = [np.flatnonzero(np.isin(run.steps, steps)) for run in found]
    names = set.intersection(*(set(run.values) for run in found))
    values = {n: np.concatenate([run.values[n][:, k] for run, k in zip(found, kept, strict=True)]) for n in names}
    seeds = [s for run in found for s in run.seeds]
    return Run(found[0].args, seeds, np.array(steps), values, all(run.finished for run in found))


@dataclass
class Data:
    """What all methods of an environment learned from, and the experts of which the best made it."""

    classes: dict[str, Episodes]  # Tab. 1: name -> episodes
    expert: Run | None

    @property
    def demonstrations(self) -> float:
        """Mean true return of the demonstrations."""
        return float(self.classes["demonstrations"].returns.mean())


EXPERT_FLAGS = {  # a setting of an expert -> the flag that gives it
    "total_steps": "expert_steps",
    "seed": "expert_seed",
    "num_seeds": "expert_seeds",
    "alpha": "expert_alpha",
    "eval_every": "checkpoint_every",
}


def made_for(made_by: dict, args: dict) -> bool:
    """Say if a data set was made by a run's settings; gymnasium and MuJoCo may have other versions now."""
    flags = {name: EXPERT_FLAGS.get(name, name) for name in aihf_mujoco.EXPERT if name != "random_steps"}
    return all(name in made_by and made_by[name] == args.get(flag, made_by[name]) for name, flag in flags.items())


def load_data(root: Path, run: Run) -> Data | None:
    """The data of a run, sorted by its settings; None where they have not been made."""
    env = run.args["env"]
    found = sorted((root / "data").glob(f"{env}__*/episodes.npz"))
    found = [p for p in found if made_for(read_json(p.parent / "made_by.json", "--runs"), run.args)]
    if len(found) > 1:
        raise UserError(f"--runs: found {len(found)} such data sets of {env} in {root / 'data'}, expected one")
    if not found:
        return None
    known = {f.name for f in fields(aihf_mujoco.Args)}
    args = aihf_mujoco.Args(**{name: value for name, value in run.args.items() if name in known})
    episodes, more = read_episodes(found[0])
    low, medium, high = sort_episodes(episodes, more["checkpoint"], args)
    key = stream_seed(args.expert_seed, aihf_mujoco.DEMONSTRATIONS)
    shown = high[np.random.default_rng(key).permutation(len(high))[: args.num_demonstrations]]
    classes = {"non-preferred": low, "preferred": medium, "demonstrations": shown}
    return Data(classes, load(found[0].parent / "expert"))


# ---- numbers ----
def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a value for each seed, 95%; low and high are NaN where there is one seed."""
    values = np.array(list(values), dtype=float)
    if len(values) < 2:
        return float(values.mean()), np.nan, np.nan
    return float(values.mean()), *bootstrap_interval(values[:, None])


def cell(values: Iterable[float], digits: int = 0) -> str:
    """mean [low, high], or the mean alone where there is one seed."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def differences(first: Run, second: Run, metric: str = "eval/return") -> tuple[list[float], int]:
    """(first minus second for each seed that both have, the step of it): at the last step of both, in the environment's steps."""
    until = np.inf if first.offline or second.offline else min(first.steps[-1], second.steps[-1])
    a, b = first.late(metric, until), second.late(metric, until)
    return [a[s] - b[s] for s in a if s in b], int(min(until, first.steps[-1]))


def verdict(values: Iterable[float], side: int = 1) -> str:
    """Say if the mean of a difference, given for each seed, is on a side of 0: 1 above, -1 below."""
    _, low, high = interval(values)
    low, high = (low, high) if side > 0 else (-high, -low)
    return HELD if low > 0 else DID_NOT if high < 0 else CANNOT_TELL


def both(first: str, second: str) -> str:
    """The verdict on a claim of two parts."""
    if DID_NOT in (first, second):
        return DID_NOT
    return HELD if first == second == HELD else CANNOT_TELL


def hacked(learned: Iterable[float], true: Iterable[float]) -> str:
    """Say if the learned reward puts the policy above the demonstrations and the true return puts it below them."""
    return both(verdict(learned, 1), verdict(true, -1))


def not_hacked(learned: Iterable[float], true: Iterable[float]) -> str:
    """The verdict on the opposite of hacked."""
    return {HELD: DID_NOT, DID_NOT: HELD}.get(hacked(learned, true), CANNOT_TELL)


def reward_gaps(run: Run, data: Data) -> tuple[list[float], list[float]]:
    """(learned reward a step, true return) of the policy minus those of the demonstrations, for each seed."""
    own, shown = run.late("eval/reward/policy"), run.late("eval/reward/demonstrations")
    return [own[s] - shown[s] for s in own], [r - data.demonstrations for r in run.late().values()]


# ---- claims ----
CLAIMS = {
    "a": "AIHF is above RLHF and IPL",
    "b": "RLHF does not improve on BC",
    "c": "preferences add to demonstrations",
    "d": "RLHF's reward scores its policy above the demonstrations while the true return is below theirs; AIHF's does not",
}


@dataclass
class Claim:
    letter: str
    environment: str
    compared: str
    step: str
    number: str  # mean and interval
    seeds: str  # of each seed
    verdict: str


def compare(letter: str, env: str, what: str, first: Run | None, second: Run | None, side: int = 1) -> list[Claim]:
    """A claim on a difference of returns; none where a run is missing."""
    if first is None or second is None:
        return []
    found, step = differences(first, second)
    if not found:
        return []
    seeds = ", ".join(f"{d:+.0f}" for d in found)
    return [Claim(letter, env, what, at_step(step, first, second), cell(found), seeds, verdict(found, side))]


def at_step(step: int, *runs: Run) -> str:
    """A step, marked where one of the runs goes on."""
    return str(step) if all(run.finished for run in runs) else f"{step}, unfinished"


def claims(runs: Runs, data: dict[str, Data]) -> list[Claim]:
    """All that the runs say of the paper's claims."""
    found = []
    for env, named in runs.items():
        get = named.get
        for other in ("rlhf", "ipl"):
            found += compare("a", env, f"AIHF − {METHODS[other]}", get("aihf"), get(other))
        found += compare("b", env, "RLHF − BC", get("rlhf"), get("bc"), side=-1)
        found += compare("c", env, "AIHF − IRL, 2 demonstrations", get("aihf"), get("irl"))
        if env == "HalfCheetah":
            for label, suffix in DEMONSTRATIONS.items():
                if suffix:
                    what = f"AIHF − IRL, demonstrations: {label}"
                    found += compare("c", env, what, get(f"aihf{suffix}"), get(f"irl{suffix}"))
        for name, rule in (("rlhf", hacked), ("aihf", not_hacked)):
            run = get(name)
            if run is not None and env in data and "eval/reward/policy" in run.values:
                learned, true = reward_gaps(run, data[env])
                what = f"{METHODS[name]}: learned reward a step; true return; of the policy − of the demonstrations"
                seeds = ", ".join(f"{a:+.2f}; {b:+.0f}" for a, b in zip(learned, true, strict=True))
                number = f"{cell(learned, 2)}; {cell(true)}"
                step = at_step(int(run.steps[-1]), run)
                found.append(Claim("d", env, what, step, number, seeds, rule(learned, true)))
    return sorted(found, key=lambda c: c.letter)


# ---- tables ----
def gaps_of(root: Path, runs: Runs, expected: dict[str, list[str]]) -> list[str]:
    """Lines on runs that are missing or unfinished."""
    lines = []
    for env, names in expected.items():
        missing = [name for name in names if name not in runs[env]]
        if missing:
            lines.append(f"Missing in {env}: {', '.join(missing)}.")
        for name, run in runs[env].items():
            if not run.finished:
                lines.append(f"Unfinished: {env}/{name}, measured to step {run.steps[-1]} of {run.total}.")
    return lines


def seeds_of(run: Run) -> str:
    return f"{len(run.seeds)} seed{'s' * (len(run.seeds) != 1)}"


def table_1(data: dict[str, Data]) -> str:
    rows = []
    for env, made in data.items():
        cells = [f"{e.returns.mean():.0f} ± {e.returns.std():.0f} ({len(e)})" for e in made.classes.values()]
        rows.append([env, *cells])
    return markdown(["true return, mean ± sd (episodes)", "non-preferred", "preferred", "demonstrations"], rows)


def results(runs: Runs) -> str:
    rows = []
    for env, named in runs.items():
        for name, label in METHODS.items():
            if run := named.get(name):
                of = "updates" if run.offline else "steps"
                over = cell(differences(run, named["bc"])[0]) if "bc" in named and name != "bc" else ""
                cells = [f"{run.steps[-1]} {of}", seeds_of(run), cell(run.late().values()), over]
                rows.append([env, label, *cells, cell(run.late("eval/length").values())])
    return markdown(["", "method", "after", "seeds", "true return", "less BC's", "episode length"], rows)


def rewards(runs: Runs, data: dict[str, Data]) -> str:
    rows = []
    for env, named in runs.items():
        for name in ONLINE:
            run = named.get(name)
            if run is not None and "eval/reward/accuracy" in run.values and env in data:
                learned, true = reward_gaps(run, data[env])
                kinds = ("accuracy", "rank_correlation")
                judged = [cell(run.late(f"eval/reward/{k}").values(), 2) for k in kinds]
                rows.append([env, METHODS[name], *judged, cell(learned, 2), cell(true)])
    head = ["", "reward of", "accuracy, held-out pairs", "rank correlation with the true return"]
    return markdown([*head, "learned reward a step, policy − demonstrations", "true return, the same"], rows)


def claims_table(found: list[Claim]) -> str:
    rows = [[f"({c.letter})", c.environment, c.compared, c.step, c.number, c.seeds, f"**{c.verdict}**"] for c in found]
    text = markdown(["", "", "compared", "at step", "mean [95% interval]", "each seed", "claim"], rows)
    counts = []
    for letter, claim in CLAIMS.items():
        own = [c.verdict for c in found if c.letter == letter]
        numbers = ", ".join(f"{kind} {own.count(kind)}" for kind in (HELD, DID_NOT, CANNOT_TELL))
        counts.append(f"* ({letter}) {claim}: {numbers}, of {len(own)}.")
    return "\n".join(counts) + "\n\n" + text


def ablations(runs: Runs) -> str:
    """Changed settings beside the main run, at the last step of both."""
    rows = []
    for env, named in runs.items():
        for name, run in named.items():
            base = named.get(name.partition("_")[0])
            if base is None or run is base or name in METHODS:
                continue
            found, step = differences(run, base)
            values = [r.late("eval/return", step).values() for r in (run, base)]
            lengths = [r.late("eval/length", step).values() for r in (run, base)]
            changed = name.partition("_")[2].replace("_", " ")
            label = METHODS[name.partition("_")[0]]
            cells = [cell(values[0]), cell(values[1]), cell(found), cell(lengths[0]), cell(lengths[1])]
            rows.append([env, label, changed, str(step), *cells])
    head = ["", "method", "changed", "at step", "true return", "of the main run", "difference"]
    return markdown([*head, "episode length", "of the main run"], rows)


def sac_check(experts: list[Run]) -> str:
    """SAC on the true reward beside Tianshou's."""
    rows = []
    for env, reference in TIANSHOU.items():
        for run in (e for e in experts if e.args["env"].startswith(env)):
            a, hidden = run.args, run.args["hidden"]
            setting = f"alpha {a['alpha']:g}" if a["alpha"] else "alpha learned"
            label = f"ours, {a['env']}, ({hidden}, {hidden}), {setting}, batch {a['batch_size']}, {seeds_of(run)}"
            at = {int(step): run.values["eval/return"][:, i] for i, step in enumerate(run.steps)}
            cells = []
            for step in SAC_STEPS:
                if step not in at:
                    cells.append("")
                    continue
                text = f"{at[step].mean():.0f}" + (f" ± {at[step].std():.0f}" if len(at[step]) > 1 else "")
                if step in reference:
                    mean, sd = reference[step]
                    text += f" ({(at[step].mean() - mean) / sd:+.1f} sd)"
                cells.append(text)
            rows.append([label, *cells])
        shown = [f"{reference[s][0]} ± {reference[s][1]}" if s in reference else "" for s in SAC_STEPS]
        rows.append([f"Tianshou, {env}-v3, (256, 256), ten seeds", *shown])
    return markdown(["SAC, true return after", *(f"{s // 1000}k steps" for s in SAC_STEPS)], rows)


# ---- figures ----
def draw(ax, steps: np.ndarray, values: np.ndarray, color: str, label: str, ls: str = "-", band: bool = True) -> None:
    """Mean of seeds, an interval at each step, and thin lines of seeds. values (seeds, evaluations)."""
    x = steps / 1000
    for own in values[: len(values) * (len(values) > 1)]:
        ax.plot(x, own, color=color, alpha=0.5, lw=0.8, ls=ls)
    if band and len(values) > 1:
        _, low, high = zip(*(interval(v) for v in values.T), strict=True)
        ax.fill_between(x, low, high, color=color, alpha=0.07, lw=0)
    ax.plot(x, values.mean(0), color=color, lw=1.9, ls=ls, label=label)


def fit(ax, shown: list[np.ndarray]) -> None:
    """Let the axis show these values; an interval of three seeds may reach beyond it."""
    if shown:
        flat = np.concatenate([np.ravel(v) for v in shown])
        margin = 0.06 * max(np.ptp(flat), 1e-6)
        ax.set_ylim(flat.min() - margin, flat.max() + margin)


def curves(runs: Runs, data: dict[str, Data], path: Path) -> None:
    fig, axes = figures.subplots(1, len(runs), (4.3 * len(runs), 4.2))
    for ax, (env, named) in zip(axes[0], runs.items(), strict=True):
        shown = []
        for name in ONLINE:
            if run := named.get(name):
                draw(ax, run.steps, run.values["eval/return"], COLORS[name], METHODS[name])
                shown.append(run.values["eval/return"])
        longest = max([r.steps[-1] for name, r in named.items() if name in ONLINE], default=1) / 1000
        for name in ("ipl", "bc"):
            if run := named.get(name):
                level = np.mean(list(run.late().values()))
                ax.axhline(level, color=COLORS[name], lw=1.6, ls="--", label=METHODS[name])
                shown.append(np.array([level]))
        if env in data:
            for kind, episodes in data[env].classes.items():
                level = episodes.returns.mean()
                ax.axhline(level, color="#999999", lw=0.8, ls=":")
                box = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.5)
                place = dict(ha="right", va="bottom", zorder=5, bbox=box)
                ax.annotate(kind, (0.99 * longest, level), fontsize=7, color="#444444", **place)
                shown.append(np.array([level]))
            if expert := data[env].expert:
                best = np.argmax(list(expert.late().values()))
                own = expert.values["eval/return"][best]
                ax.plot(expert.steps / 1000, own, color=COLORS["expert"], lw=0.9, label="expert: SAC, true reward")
                shown.append(own)
        fit(ax, shown)
        ax.set(xlabel="environment steps, thousands", xlim=(0, longest))
        seeds = sorted({len(r.seeds) for name, r in named.items() if name in ONLINE})
        ax.set_title(f"{env}-v5, seeds: {' or '.join(map(str, seeds))}", loc="left")
    axes[0, 0].set_ylabel("true return of the deterministic policy, reward units")
    handles = {}
    for ax in axes[0]:
        handles |= {label: h for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    figures.caption(fig, "bands and bars: 95% interval over seeds")
    figures.save(fig, path)


def reward_curves(runs: Runs, data: dict[str, Data], path: Path) -> None:
    fig, axes = figures.subplots(2, len(runs), (4.3 * len(runs), 6.0), sharex="col")
    for (top, bottom), (env, named) in zip(axes.T, runs.items(), strict=True):
        shown: list[list[np.ndarray]] = [[], []]
        for name in ONLINE:
            run = named.get(name)
            if run is None or "eval/reward/policy" not in run.values or env not in data:
                continue
            learned = run.values["eval/reward/policy"] - run.values["eval/reward/demonstrations"]
            true = run.values["eval/return"] - data[env].demonstrations
            for ax, values, kept in zip((top, bottom), (learned, true), shown, strict=True):
                draw(ax, run.steps, values, COLORS[name], METHODS[name])
                kept.append(values)
        for ax, kept in zip((top, bottom), shown, strict=True):
            fit(ax, [*kept, np.zeros(1)])
            ax.axhline(0, color="#999999", lw=1)
        top.set_title(f"{env}-v5", loc="left")
        bottom.set(xlabel="environment steps, thousands")
    axes[0, 0].set_ylabel("learned reward a step:\npolicy − demonstrations")
    axes[1, 0].set_ylabel("true return, reward units:\npolicy − demonstrations")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figures.caption(fig, "bands and bars: 95% interval over seeds")
    figures.save(fig, path)


def points(
    ax, places: list[float], values: list[Iterable[float] | None], color: str, label: str, ls: str = "-"
) -> None:
    """A mean with its interval at each place that has values, and the seeds as small dots."""
    drawn = [(x, list(v)) for x, v in zip(places, values, strict=True) if v is not None]
    if not drawn:
        return
    x = [place for place, _ in drawn]
    mean, low, high = (np.array(n) for n in zip(*(interval(v) for _, v in drawn), strict=True))
    errors = np.nan_to_num(np.array([mean - low, high - mean]))
    ax.errorbar(x, mean, errors, fmt="o", ls=ls, lw=1.2, color=color, ms=5, capsize=3, label=label)
    for place, own in drawn:
        ax.plot([place] * len(own), own, ls="", marker=".", ms=4, color=color, alpha=0.5)


def ablation_figure(runs: Runs, path: Path) -> None:
    fig, axes = figures.mosaic("AABBCC;DDDEEE", (12, 7.2))
    cheetah, hopper = runs.get("HalfCheetah", {}), runs.get("Hopper", {})
    changed = [r.steps[-1] for name, r in cheetah.items() if name not in METHODS]
    until = min(changed) if changed else np.inf

    def at(name: str) -> Iterable[float] | None:
        return cheetah[name].late(until=until).values() if name in cheetah else None

    when = f", HalfCheetah, {until // 1000:.0f}k steps" if changed else ""
    x = list(range(len(DEMONSTRATIONS)))
    for i, name in enumerate(("aihf", "irl")):
        found = [at(f"{name}{suffix}") for suffix in DEMONSTRATIONS.values()]
        points(axes["A"], [place + 0.1 * i - 0.05 for place in x], found, COLORS[name], METHODS[name])
    if (rlhf := at("rlhf")) is not None:
        level = np.mean(list(rlhf))
        axes["A"].axhline(level, color=COLORS["rlhf"], lw=1.4, ls="--", label="RLHF")
    axes["A"].set_xticks(x, list(DEMONSTRATIONS))
    axes["A"].set(xlabel="demonstrations, episodes", ylabel="true return, reward units")
    axes["A"].set_title(f"(a) demonstrations{when}", loc="left")
    for i, name in enumerate(("aihf", "rlhf")):
        places = [0.1 * i - 0.05, 0.95 + 0.1 * i]
        points(axes["B"], places, [at(name), at(f"{name}_flipped")], COLORS[name], METHODS[name])
    axes["B"].set_xticks([0, 1], ["0", "0.3"])
    axes["B"].set(xlabel="share of preferences with the wrong order", xlim=(-0.4, 1.4))
    axes["B"].set_title(f"(b) wrong labels{when}", loc="left")
    places = list(range(len(REWARD_STEPS)))
    found = [at(f"aihf{suffix}") for suffix in REWARD_STEPS.values()]
    points(axes["C"], places, found, COLORS["aihf"], METHODS["aihf"])
    axes["C"].set_xticks(places, list(REWARD_STEPS))
    axes["C"].set(xlabel="reward steps for 1000 environment steps")
    axes["C"].set_title(f"(c) reward steps{when}", loc="left")
    heights = [limit for key in "ABC" for limit in axes[key].get_ylim() if axes[key].has_data()]
    for key in "ABC":  # one quantity, one scale
        axes[key].set_ylim(min(heights, default=0), max(heights, default=1))
    for key, metric, title, unit in (
        ("D", "eval/return", "(d) horizon, Hopper: true return", "true return, reward units"),
        ("E", "eval/length", "(e) horizon, Hopper: episode length", "steps of an episode"),
    ):
        last = max([r.steps[-1] for name, r in hopper.items() if name.endswith("_terminate")], default=np.inf)
        for name in ("aihf", "rlhf"):
            for suffix, kind, ls in (("", "absorbing", "-"), ("_terminate", "terminate", "--")):
                if run := hopper.get(name + suffix):
                    kept = run.steps <= last
                    values = run.values[metric][:, kept]
                    draw(axes[key], run.steps[kept], values, COLORS[name], f"{METHODS[name]}, {kind}", ls, band=False)
        axes[key].set(xlabel="environment steps, thousands", ylabel=unit)
        axes[key].set_title(title, loc="left")
    for ax in axes.values():
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    figures.caption(fig, "bands and bars: 95% interval over seeds")
    figures.save(fig, path)


# ---- all ----
def expected_runs() -> dict[str, list[str]]:
    """{environment: names of the runs of benchmark/control.sh}."""
    found = {env: list(METHODS) for env in ENVIRONMENTS}
    changed = [s for s in (*DEMONSTRATIONS.values(), *REWARD_STEPS.values()) if s]
    found["HalfCheetah"] += [f"{name}{s}" for s in changed for name in ("aihf", "irl") if name == "aihf" or "demo" in s]
    found["HalfCheetah"] += ["aihf_flipped", "rlhf_flipped"]
    found["Hopper"] += ["aihf_terminate", "rlhf_terminate"]
    return found


def show(args: Args) -> None:
    root, expected = Path(args.runs), expected_runs()
    runs: Runs = {env: {} for env in ENVIRONMENTS}
    for env, names in expected.items():
        for name in names:
            if (run := load_all(root / env / name)) is not None:
                runs[env][name] = run
    if not any(runs.values()):
        raise UserError(f"--runs: found no evaluation under {root}, expected the folder of benchmark/control.sh")
    data = {env: load_data(root, next(iter(named.values()))) for env, named in runs.items() if named}
    data = {env: made for env, made in data.items() if made is not None}
    given = []
    for folder in args.sac:
        if (run := load(Path(folder))) is None:
            raise UserError(f"--sac: found no evaluation in {folder}, expected a run of --method sac")
        given.append(run)
    experts = [made.expert for made in data.values() if made.expert is not None] + given
    sections = {
        "Tab. 1: the data": table_1(data),
        "Results": results(runs),
        "Claims": claims_table(claims(runs, data)),
        "The learned reward": rewards(runs, data),
        "Ablations": ablations(runs),
        "SAC on the true reward": sac_check(experts),
    }
    head = [
        "Mean of the last three evaluations (BC and IPL: of the last one), with a 95% interval over seeds, which is as wide as"
        " Student's t. One seed has no interval.",
        *gaps_of(root, runs, expected),
    ]
    text = "\n\n".join([*head, *(f"## {title}\n\n{table}" for title, table in sections.items())])
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "control.md").write_text(text)
    measured = {env: named for env, named in runs.items() if named}
    curves(measured, data, out / "control.png")
    reward_curves(measured, data, out / "control_reward.png")
    ablation_figure(measured, out / "control_ablation.png")
    print(f"{text}\ntable: {out / 'control.md'}   figures: {out}/control.png, control_reward.png, control_ablation.png")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
