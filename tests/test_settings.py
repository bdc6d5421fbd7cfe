"""Settings that the papers name, the template they ask with, and the best epoch of supervised fine-tuning."""

import dataclasses
import json
import signal

import pytest
import torch
from helpers import ZEPHYR_TEMPLATE, jsonl, make_data, make_model, make_tokenizer, metrics

import aihf
import aihf_direct
import aihf_ppo
import irft
import irl_dpo_ultrachat
import irl_ppo_tldr
import rft
import sft
from common import UserError, models
from common.args import resolve_auto
from common.data import encode, render_prompt
from common.run import Run
from extras.sources import load_rows

SCRIPTS = (aihf, aihf_direct, aihf_ppo, irft, irl_dpo_ultrachat, irl_ppo_tldr, rft, sft)


def resolved(script, model: str, **given):
    args = script.Args(model=model, **given)
    resolve_auto(args, script.SETTINGS)
    args.check()
    return args


# ---- numbers of the papers' texts ----
@pytest.mark.parametrize(
    "script, model, devices, per_device",
    [
        (
            rft,
            "pythia-1.4b",
            2,
            4,
        ),  # RFT paper, App. C: "two NVIDIA A100-40G ... per device batch size of 4 for Algorithm 1"
        (irft, "pythia-1.4b", 2, 8),  # "and per device batch size of 8 for Algorithm 2"
        (irft, "zephyr-7b-sft-full", 8, 2),  # "For 7b models ... eight ... per device batch size of 2"
        (sft, "pythia-1.4b", 2, 8),  # Table 3: SFT's K by the same batch size
        (
            aihf,
            "mistral-7b-sft-beta",
            8,
            1,
        ),  # AIHF paper, App. A.1.4: "eight ... per-device batch size of 1 for 7B model"
        (aihf_direct, "mistral-7b-sft-beta", 8, 1),
        (irl_ppo_tldr, "pythia-1b-deduped", 1, 64),  # IRL paper, App. 8.1: batch size 64 of the reward
        (irl_dpo_ultrachat, "mistral-7b-sft-beta", 1, 64),  # App. 8.2
    ],
)
def test_batches_are_those_of_the_papers(script, model, devices, per_device):
    args = resolved(script, model)
    assert args.batch_size == devices * per_device
    assert args.per_device_train_batch_size <= per_device


def test_numbers_of_steps_are_those_of_the_papers():
    """K = samples / batch x epochs: 50,000 pairs of IRFT's in T parts; RFT's 10,000 demonstrations; 17,500 policy steps of Fig. 2."""
    args = resolved(irft, "pythia-1.4b", T=5)
    assert irft.make_plan(50_000, args).K == [2 * 10_000 // 16] * 5
    args = resolved(irft, "zephyr-7b-sft-full", T=5)
    assert irft.make_plan(50_000, args).K == [2 * 10_000 // 16] * 5
    steps = rft.count_steps(10_000, resolved(rft, "pythia-1.4b"))
    assert (steps.K, steps.updates * steps.per_update) == (2500, 17_500)


@pytest.mark.parametrize("script", [irft, rft])
def test_other_values_that_the_rft_paper_names(script):
    """Sec. 5.1, App. C: 2 epochs, 5e-7 and 1e-7, beta 0.1, windows of 1024 (1b) and 2048 (7b), RMSprop."""
    args = resolved(script, "pythia-1.4b")
    assert (args.num_train_epochs, args.learning_rate, args.beta, args.max_length) == (2, 5e-7, 0.1, 1024)
    assert args.optimizer == "rmsprop"
    if script is irft:
        assert (args.T, args.later_learning_rate, args.max_samples) == (5, 1e-7, 50_000)
        assert resolved(irft, "zephyr-7b-sft-full").max_length == 2048
    else:
        assert (args.T, args.reward_model, args.reward_learning_rate, args.dataset) == (1, "pythia-1b", 5e-7, "hh-rlhf")


def test_other_values_that_the_aihf_paper_names():
    """Sec. 5, App. A.1.4: 7B at 5e-7 with a cosine and windows of 512, 208k demonstrations; HH with 10k, one epoch of SFT."""
    large, small = resolved(aihf, "mistral-7b-sft-beta"), resolved(aihf, "pythia-1b")
    assert (large.learning_rate, large.reward_learning_rate, large.lr_scheduler_type) == (5e-7, 5e-7, "cosine")
    assert (large.max_length, large.max_samples) == (512, 0)
    assert (small.max_samples, small.reward_model, small.sft_epochs) == (10_000, "pythia-1.4b", 1)
    direct = resolved(aihf_direct, "mistral-7b-sft-beta")
    assert (direct.learning_rate, direct.lr_scheduler_type, direct.max_length) == (5e-7, "cosine", 512)


# ---- the paper's template ----
@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty")
    make_model(folder / "model", tokenizer=make_tokenizer(chat_template=ZEPHYR_TEMPLATE))
    return folder


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s is not irl_ppo_tldr])
def test_the_papers_template_is_for_any_model(script, chatty):
    own = models.load_tokenizer(resolved(script, str(chatty / "model"), max_length=96, max_new_tokens=8))
    paper = models.load_tokenizer(
        resolved(script, str(chatty / "model"), max_length=96, max_new_tokens=8, template="paper")
    )
    assert render_prompt(own, "Why?") == "<|user|>\nWhy?</s>\n<|assistant|>\n"
    assert render_prompt(paper, "Why?") == "### Instruction: Why?\n\n### Response: "


def test_what_was_asked_with_the_papers_template_is_saved_so(chatty, tmp_path):
    """Rows are encoded with it, and the saved tokenizer asks alike without a flag; another model keeps its own template."""
    from transformers import AutoTokenizer

    args = resolved(sft, str(chatty / "model"), max_length=96, max_new_tokens=8, template="paper")
    tokenizer = models.load_tokenizer(args)
    rows = load_rows(jsonl(tmp_path / "d.jsonl", [{"prompt": "Why?", "completion": "So."}]), "all")
    (row,) = encode(rows, tokenizer, 96, 80)
    assert row["prompt_text"] == "### Instruction: Why?\n\n### Response: "
    tokenizer.save_pretrained(tmp_path / "saved")
    assert render_prompt(AutoTokenizer.from_pretrained(tmp_path / "saved"), "Why?") == row["prompt_text"]
    other = models.load_tokenizer(dataclasses.replace(args, model="another"), str(chatty / "model"), "--expert-model")
    assert render_prompt(other, "Why?").startswith("<|user|>")


def test_tldr_has_one_template():
    with pytest.raises(UserError, match="--template: found paper, expected auto"):
        resolved(irl_ppo_tldr, "tiny", template="paper")


# ---- the best epoch ----
NLL = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0}  # of the evaluation after each epoch: the second is the best


class Killed(Exception):
    pass


@pytest.fixture
def fine_tune(tmp_path, monkeypatch):
    """sft.train with the evaluations' NLL given; `after` counts updates or saved models until the run is cut off."""
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 8)
    monkeypatch.setattr(sft.evals, "print_table", lambda *_: None)
    monkeypatch.setattr(sft.evals, "evaluate", lambda *given: {"eval/nll": NLL[given[7]]})
    handler = signal.getsignal(signal.SIGTERM)

    def train(out: str, after: tuple[str, int] | None = None, resume: bool = False, **given):
        sizes = dict(max_length=96, max_new_tokens=8, max_prompt_length=64, batch_size=4, per_device_train_batch_size=4)
        place = dict(
            model=str(tmp_path / "model"),
            dataset=str(tmp_path / "data.jsonl"),
            eval_dataset=str(tmp_path / "data.jsonl"),
        )
        args = sft.Args(
            **sizes, **place, output_dir=str(tmp_path / out), resume=str(tmp_path / out) if resume else "", mixed_precision="no",
            num_train_epochs=3, learning_rate=1e-2, save_steps=1, eval_samples=2, max_samples=0, **given,
        )  # fmt: skip
        resolve_auto(args, sft.SETTINGS)
        args.check()
        with monkeypatch.context() as patch:
            if after:
                name, left = after
                real = getattr(Run, name)

                def struck(self, *rest, **more):
                    nonlocal left
                    left -= 1
                    if not left and name == "step":
                        raise Killed
                    found = real(self, *rest, **more)
                    if not left:
                        raise Killed
                    return found

                patch.setattr(Run, name, struck)
                with pytest.raises(Killed):
                    sft.train(args)
            else:
                sft.train(args)
        return tmp_path / out

    yield train
    signal.signal(signal.SIGTERM, handler)


def is_final(folder, state: dict[str, torch.Tensor]) -> bool:
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return all(torch.equal(found[k], v) for k, v in state.items())


def test_keep_best_saves_the_epoch_with_the_lowest_held_out_nll(fine_tune, monkeypatch):
    seen, real = [], sft.evals.evaluate
    copies = lambda model: {k: v.clone() for k, v in model.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(
        sft.evals, "evaluate", lambda run, model, *rest: (seen.append(copies(model)), real(run, model, *rest))[1]
    )
    last, best = fine_tune("last"), fine_tune("best", keep_best=True)
    assert is_final(last, seen[3]) and is_final(best, seen[4 + 2]) and not is_final(last, seen[2])
    assert not (best / "best").exists() and {p.name for p in best.iterdir()} == {p.name for p in last.iterdir()}
    card = (best / "final" / "README.md").read_text()
    assert "| eval/nll | 3 |" in card and "| eval/nll | 4 |" in (last / "final" / "README.md").read_text()
    assert (best / "metrics.jsonl").read_bytes() == (last / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "after",
    [("step", 3), ("save_final", 1), ("step", 5), ("save_final", 2), ("step", 6), ("save_checkpoint", 6)],
    ids=lambda a: f"{a[0]}_{a[1]}",
)
def test_the_best_epoch_survives_a_kill_and_a_resume(fine_tune, after):
    """Cut off inside an epoch, after a best model was saved but not yet noted, before the last evaluation."""
    whole = fine_tune("whole", keep_best=True)
    cut = fine_tune("cut", after=after, keep_best=True)
    assert not (cut / "final").exists()
    fine_tune("cut", resume=True, keep_best=True)
    for name in ("final/model.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert [r["eval/nll"] for r in metrics(cut) if "eval/nll" in r] == list(NLL.values())
    note = json.loads((max((cut / "checkpoint").iterdir()) / "position.json").read_text())
    assert (note["best_nll"], note["best_epoch"]) == (3.0, 2)
