"""The vLLM backend on real engines (`make test-vllm`): the tokens, log-probs and distribution of the model that is trained."""

import contextlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import helpers
import psutil
import pytest
import torch
from helpers import command, make_classifier, make_data, make_model, metrics, run

import irft
from common import UserError
from common.args import resolve_auto
from common.data import collate
from common.generation import Generator, make_generator
from common.logprobs import response_logprobs
from common.run import Run
from common.store import read_pairs
from extras import vllm_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
)

LONG = [3 + i % 250 for i in range(150)]  # more than a block of vLLM's prefix cache, 128 tokens on CPU
PROMPTS = [[5, 6, 7], [9] * 20, LONG, [11, 12], [30] * 7]
SHAPE = dict(hidden_size=64, num_attention_heads=2, window=256)  # heads of 32 dimensions, the least vLLM has on CPU
NEW = 24
TOLERANCE = 2e-5  # nats per token, float32: what two orders of summation differ by; 1e-6 was seen


def make(folder, architecture="mistral", scale=3.0):
    """A random model, its weights `scale` times as large: near the uniform distribution errors would not show."""
    from safetensors.torch import load_file, save_file

    extra = dict(num_key_value_heads=1, head_dim=32, tie_word_embeddings=architecture == "tied")
    kind = "gpt_neox" if architecture == "gpt_neox" else "mistral"
    make_model(folder, kind, **SHAPE, **(extra if kind == "mistral" else {}))
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v * scale if v.ndim > 1 else v for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    for name in ("mistral", "tied", "gpt_neox"):
        make(folder / name, name)
    make_data(folder / "data.jsonl", 16)
    make_classifier(folder / "gold", folder / "mistral")
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture
def pair(place, tmp_path):
    """pair(model) -> (model, its vLLM sampler, its hf sampler, run)."""
    handler = signal.getsignal(signal.SIGTERM)

    def make_pair(architecture="mistral", prepare=lambda model: model, **given):
        sizes = dict(max_length=250, max_prompt_length=200, max_new_tokens=NEW, per_device_eval_batch_size=8)
        args = irft.Args(generation="vllm", mixed_precision="no", output_dir=str(tmp_path / "run"), **sizes, **given)
        resolve_auto(args, irft.SETTINGS)
        model, tokenizer = load(place / architecture)
        model, a_run = prepare(model), Run(args, "irft", irft.METRICS)
        return model, make_generator(a_run, model, tokenizer), Generator(model, tokenizer, 8, NEW), a_run

    yield make_pair
    signal.signal(signal.SIGTERM, handler)


def greedy(sampler):
    return sampler.sample(PROMPTS, list(range(len(PROMPTS))), seed=0, temperature=0)


def trainer_logprobs(model, rollout, temperature=1.0):
    batch = collate(list(zip(rollout.prompt_ids, rollout.response_ids, strict=True)), 0)
    with torch.no_grad():
        scores = response_logprobs(model, batch, temperature).logprobs.tolist()
    return [s[: len(y)] for s, y in zip(scores, rollout.response_ids, strict=True)]


def largest_gap(first, second) -> float:
    return max(abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def change(model, scale=0.02):
    """Other weights, written through `.data`, which leaves no trace in a tensor's count of writes."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * scale)


# ---- the same model ----
@pytest.mark.parametrize("architecture", ["mistral", "tied", "gpt_neox"])
def test_greedy_tokens_and_logprobs_are_those_of_hf_before_and_after_a_change_of_weights(pair, architecture):
    model, sampler, hf, _ = pair(architecture)
    before = greedy(sampler)
    for step in range(2):
        found, expected = greedy(sampler), greedy(hf)
        assert found.response_ids == expected.response_ids and found.finished == expected.finished
        assert largest_gap(found.logprobs, expected.logprobs) < TOLERANCE
        assert (found.response_ids == before.response_ids) == (step == 0)
        change(model)
    assert vllm_engine.current_engine(sampler.run, model).inside == (architecture == "mistral")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_logprobs_are_those_of_the_sampling_distribution(pair, temperature):
    model, sampler, _, a_run = pair()
    rollout = sampler.sample(PROMPTS * 4, list(range(20)), seed=2, temperature=temperature)
    assert largest_gap(rollout.logprobs, trainer_logprobs(model, rollout, temperature)) < TOLERANCE / temperature
    logged = metrics(a_run.dir)[-1]
    assert 0 <= logged["sampling/vllm_logp_difference"] < TOLERANCE / temperature and logged["step"] == 0


def test_responses_end_at_eos_as_with_hf(pair):
    model, sampler, hf, _ = pair()
    tokens = [y[k] for y, k in zip(greedy(hf).response_ids, (0, 3, 7, 11, 15), strict=True)]
    sampler.eos_ids = hf.eos_ids = set(tokens)
    found, expected = greedy(sampler), greedy(hf)
    assert found.response_ids == expected.response_ids and found.finished == expected.finished == [True] * 5
    assert all(y[-1] in tokens and not set(y[:-1]) & set(tokens) for y in found.response_ids)
    assert found.response_ids[0] == [tokens[0]]
    sampler.eos_ids = hf.eos_ids = set()  # the tokenizer's own EOS ends nothing then
    assert greedy(sampler).response_ids == greedy(hf).response_ids and not any(greedy(sampler).finished)


def test_sampled_tokens_have_the_models_distribution(pair):
    """4,000 first tokens against their probabilities: chi-square within 4 sd. Half the mass is in about ten of 300 tokens."""
    model, sampler, _, _ = pair()
    sampler.run.args.max_new_tokens, n = 1, 4000
    rollout = sampler.sample([PROMPTS[1]] * n, list(range(n)), seed=7, temperature=0.8)
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double() / 0.8).softmax(-1)
    counts = torch.bincount(torch.tensor([y[0] for y in rollout.response_ids]), minlength=len(p)).double()
    usual = n * p >= 5
    statistic = ((counts - n * p)[usual] ** 2 / (n * p)[usual]).sum().item()
    assert usual.sum() > 10 and p.max() > 3 / len(p)
    assert abs(statistic - int(usual.sum())) < 4 * (2 * int(usual.sum())) ** 0.5


# ---- streams ----
def test_n_answers_to_a_prompt_are_one_request_and_the_answers_of_n_rows(pair, monkeypatch):
    model, sampler, _, _ = pair()
    llm, asked = vllm_engine.current_engine(sampler.run, model).llm, []
    enqueue = llm.enqueue
    monkeypatch.setattr(
        llm, "enqueue", lambda prompts, p, **k: asked.append([x.n for x in p]) or enqueue(prompts, p, **k)
    )
    prompts = [x for x in PROMPTS for _ in range(4)]
    together = sampler.sample(prompts, list(range(20)), seed=3)
    assert asked == [[4] * 5]
    order = [7 * i % 20 for i in range(20)]  # no two neighbours share a prompt
    apart = sampler.sample([prompts[i] for i in order], order, seed=3)
    assert asked[1] == [1] * 20
    assert [together.response_ids[i] for i in order] == apart.response_ids
    assert len({tuple(y) for y in together.response_ids}) == 20
    assert sampler.sample(prompts, list(range(20)), seed=4).response_ids != together.response_ids
    again = sampler.sample(prompts[:4], [0, 1, 2, 9], seed=3).response_ids
    assert asked[3] == [3, 1] and again[:3] == together.response_ids[:3] and again[3] != together.response_ids[3]


def test_progress_counts_every_answer_and_no_prompts_are_no_error(pair):
    _, sampler, _, _ = pair()
    counted = []
    sampler.sample([PROMPTS[0]] * 3 + [PROMPTS[1]], [0, 1, 2, 3], seed=0, advance=counted.append)
    assert sum(counted) == 4
    assert sampler.sample([], [], seed=0).response_ids == []


# ---- weights ----
def test_answers_of_stale_weights_stop_the_run(pair, monkeypatch):
    model, sampler, _, _ = pair()
    greedy(sampler)
    monkeypatch.setattr(vllm_engine.Engine, "load", lambda *_: None)
    change(model)
    with pytest.raises(UserError, match="the policy that is trained is not the one that answered"):
        sampler.sample(PROMPTS, list(range(5)), seed=0)


def test_a_stale_prefix_cache_stops_the_run(pair, monkeypatch):
    """Keys and values of the old weights, of which only the prompt longer than a block has any."""
    model, sampler, _, _ = pair()
    greedy(sampler)
    engine = vllm_engine.current_engine(sampler.run, model)
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
    change(model)
    with pytest.raises(UserError, match="found log-probs"):
        sampler.sample(PROMPTS, list(range(5)), seed=0)
    monkeypatch.undo()
    engine.llm.reset_prefix_cache()


def test_weights_are_sent_when_they_have_changed_and_only_then(pair, monkeypatch):
    model, sampler, _, _ = pair()
    sent, load = [], vllm_engine.Engine.load
    monkeypatch.setattr(vllm_engine.Engine, "load", lambda self, w: sent.append(1) or load(self, w))
    greedy(sampler)
    sent.clear()
    greedy(sampler)
    assert not sent
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    response_logprobs(model, collate([(PROMPTS[0], [4, 5])], 0)).logprobs.sum().backward()
    optimizer.step()
    greedy(sampler)
    assert len(sent) == 1


def test_lora_is_merged_on_the_way_and_the_model_keeps_its_weights(pair):
    def adapt(model):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    model, sampler, hf, _ = pair(prepare=adapt)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found, expected = greedy(sampler), greedy(hf)
    assert found.response_ids == expected.response_ids and largest_gap(found.logprobs, expected.logprobs) < TOLERANCE
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with model.disable_adapter():
        assert greedy(hf).response_ids != found.response_ids


# ---- what cannot be ----
def test_a_model_that_vllm_cannot_run_here_is_refused_in_one_line(tmp_path, pair):
    _, sampler, _, _ = pair()
    sampler.model, _ = load(make_model(tmp_path / "small", "mistral", window=256))
    with pytest.raises(
        UserError, match="--generation: found vllm for a model with heads of 8 dimensions, expected one of 32"
    ):
        greedy(sampler)


def test_prompt_and_answer_beyond_the_window_are_refused(place):
    config = load(place / "gpt_neox")[0].config
    vllm_engine.check_fits(config, 256, on_cpu=True)
    with pytest.raises(UserError, match="--max-new-tokens: found 257 tokens in all, expected .* at most 256"):
        vllm_engine.check_fits(config, 257, on_cpu=True)


# ---- runs ----
def words_of(place, script, out, *flags, architecture="mistral") -> list[str]:
    return command(script, place / architecture, place / "data.jsonl", out, "--generation", "vllm", *flags)[1:]


def launch(place, script, out, *flags, config="", **kind):
    start = helpers.launch(config) if config else [sys.executable]
    run([*start, *words_of(place, script, out, *flags, **kind)], timeout=1800, ACCELERATE_USE_CPU="true")
    rows = metrics(out)
    assert all(math.isfinite(v) for r in rows for v in r.values())
    return rows, [r["sampling/vllm_logp_difference"] for r in rows if "sampling/vllm_logp_difference" in r]


CONFIGS = ("", "cpu.yaml", "fsdp2.yaml")  # one process, and two, that have all weights or parts of them


@pytest.fixture(scope="module")
def runs(place):
    """{config: (rows of metrics.jsonl, gaps to vLLM, run directory)} of the same run of irft.py."""
    flags = ["--T", "2", "--mixed-precision", "no"]
    return {c: (*launch(place, "irft.py", place / f"run{c}", *flags, config=c), place / f"run{c}") for c in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_of_irft(runs, config):
    rows, gaps, out = runs[config]
    assert len(gaps) == 6 and max(gaps) < TOLERANCE  # held-out samples of the reference, 3 evaluations, 2 x answers
    steps = [r["step"] for r in rows if "sampling/vllm_logp_difference" in r]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == max(r["step"] for r in rows)
    margins = [r["rewards/margins"] for r in rows if "rewards/margins" in r]
    assert margins[-1] > margins[0] and (out / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_answers_do_not_depend_on_the_number_of_processes(runs, config):
    def answers(name):
        return [p["rejected_ids"] for p in read_pairs(runs[name][2] / "generations" / "iter_0.parquet")]

    one, two = answers(""), answers(config)
    assert len(one) == 7 and one == two and len({tuple(y) for y in one}) > 4


def engines_running() -> set[int]:
    """Process ids of vLLM's processes on this machine."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any("VLLM::" in word for word in process.cmdline()):
                found.add(process.pid)
    return found


def shared_folders() -> list[Path]:
    """Where engines find their configuration, and weights on their way."""
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return [path.parent for path in parent.glob("tmp*/config.json")]


def test_an_engine_ends_with_its_trainer(place, tmp_path):
    """A killed trainer can end nothing itself; its engine would keep its memory."""
    words = words_of(place, "sft.py", tmp_path / "run", architecture="gpt_neox")
    strike = {"argv": words, "at": "extras.vllm_engine.VllmGenerator.check", "n": 1}
    before, seen, folders = engines_running(), set(), set(shared_folders())
    trainer = subprocess.Popen([sys.executable, "tests/kill_at.py", json.dumps(strike)], cwd=helpers.ROOT)
    while trainer.poll() is None:
        seen |= engines_running() - before
        time.sleep(0.2)
    assert trainer.returncode == -signal.SIGKILL and seen
    deadline = time.time() + 60
    while (seen & engines_running() or set(shared_folders()) - folders) and time.time() < deadline:
        time.sleep(0.2)
    assert not seen & engines_running() and not set(shared_folders()) - folders


def test_two_processes_with_engines_of_their_own(place, tmp_path):
    rows, gaps = launch(
        place, "sft.py", tmp_path / "run", "--mixed-precision", "no", config="cpu.yaml", architecture="gpt_neox"
    )
    assert len(gaps) == len([r for r in rows if "eval/nll" in r]) + 1 and max(gaps) < TOLERANCE


def test_a_run_of_rft_in_bf16_with_a_baseline_of_another_architecture(place, tmp_path):
    """PPO's first step compares the policy's log-probs with vLLM's; the baseline has an engine in a process of its own."""
    judged = ["--gold-reward-model", str(place / "gold"), "--baseline", str(place / "gpt_neox")]
    rows, gaps = launch(
        place, "rft.py", tmp_path / "run", "--T", "1", "--total-episodes", "8", "--rollout-batch-size", "4", "--mixed-precision",
        "bf16", *judged,
    )  # fmt: skip
    assert 0 < max(gaps) < 0.05
    first = next(r for r in rows if "objective/kl" in r)
    assert first["sampling/logp_difference"] < 0.05 and "eval/gold/win_rate_baseline" in rows[-1]
