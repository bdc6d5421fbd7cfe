"""The notebook: its cells run in order, and what is committed holds no outputs."""

import json
import os

import pytest
from helpers import ROOT

TOUR = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_not_committed():
    for cell in TOUR["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert TOUR["nbformat"] == 4 and len({cell["id"] for cell in TOUR["cells"]}) == len(TOUR["cells"])


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """Figures that the cells show; the cells start in the notebook's folder, as Jupyter starts them."""
    import sys

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures: list = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path))
    yield figures
    plt.close("all")


def test_the_cells_run_in_order_and_show_what_the_text_says(shown, capsys):
    """On fewer rows than a reader takes. exec gives the cells one namespace, as a kernel does."""
    before, names = set(os.listdir(ROOT)), {"__name__": "__main__"}
    for source in code_cells():
        if "ROWS = 256" in source:
            source = source.replace("ROWS = 256", "ROWS = 64")
            names["shrunk"] = True
        exec(compile(source, "tour.ipynb", "exec"), names)
    assert names["shrunk"] and len(shown) == 2 and set(os.listdir(ROOT)) == before
    policies = names["policies"]
    assert policies["SFT"][45:].sum() == 0 and policies["RLHF"][45:].sum() == 0 < policies["AIHF"][45:].sum()
    assert len(names["losses"]) == names["plan"].K[0] == 4
    rewards = names["rewards"]
    assert rewards.shape == (2, 32) and rewards[0].mean() > rewards[1].mean()
    assert {row["row"] for row in names["demonstrations"]}.isdisjoint(row["row"] for row in names["held_out"])
    assert (
        "4 updates; loss 0.6931 at the first" in (printed := capsys.readouterr().out)
        and "of 32 held-out pairs" in printed
    )
