"""The sampler: the distribution it claims, transformers' own tokens when greedy, and independence of the batch."""

import ast
import copy
import importlib.util
import sys
from types import SimpleNamespace

import architectures
import exact
import pytest
import torch
from helpers import ROOT, launcher, make_model, make_tokenizer, run

import irft
from common import UserError
from common.args import resolve_auto
from common.generation import Generator, inverse_cdf, make_generator
from extras import caches, decoding, vllm_engine
from extras.vllm_engine import VllmGenerator, checksum, full_weights, group, write_shards

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [30] * 7, [40, 41, 42, 43, 44]]


def load(folder, architecture, **overrides):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model(folder, architecture, **overrides)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["gpt_neox", "mistral"])
def test_greedy_equals_transformers_one_prompt_at_a_time(tmp_path, architecture):
    model, tokenizer = load(tmp_path, architecture)
    found = Generator(model, tokenizer, 3, 24).sample(PROMPTS, list(range(5)), seed=0, temperature=0)
    for prompt, response in zip(PROMPTS, found.response_ids, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id
        )[0, len(prompt) :].tolist()
        assert response == expected


def test_a_response_does_not_depend_on_its_batch(tmp_path):
    model, tokenizer = load(tmp_path, "gpt_neox")
    rows = [7, 1, 9, 4, 2]
    together = Generator(model, tokenizer, 5, 16).sample(PROMPTS, rows, seed=3)
    for size in (1, 2):
        assert Generator(model, tokenizer, size, 16).sample(PROMPTS, rows, seed=3).response_ids == together.response_ids
    turned = Generator(model, tokenizer, 2, 16).sample(PROMPTS[::-1], rows[::-1], seed=3)
    assert turned.response_ids == together.response_ids[::-1]
    assert Generator(model, tokenizer, 5, 16).sample(PROMPTS, rows, seed=4).response_ids != together.response_ids


# ---- rows that leave and join ----
def plain_answers(model, prompts, rows, seed, temperature, new, ends):
    """The specification: one prompt at a time, without a cache, the whole sequence read anew for every token."""
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        stream = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        uniforms = torch.rand(new, generator=stream, dtype=torch.float64)
        answer, logprobs = [], []
        while len(answer) < new and not (answer and answer[-1] in ends):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[:, -1] / (temperature or 1.0)
            uniform = uniforms[len(answer), None]
            answer.append((inverse_cdf(logits, uniform) if temperature else logits.argmax(-1)).item())
            logprobs.append(logits.log_softmax(-1)[0, answer[-1]].item())
        found.append((answer, answer[-1] in ends, logprobs))
    return found


MANY = [[*range(5 + n, 5 + 2 * n)] for n in (3, 30, 17, 9, 24, 5, 12, 31, 2, 7, 1)]
MANY = MANY[:4] + [MANY[1]] * 3 + MANY[4:] + [MANY[8]] * 2
ENDS = set(range(5, architectures.VOCABULARY, 9))
HOW = {  # architecture, and a window that no row outgrows -> what becomes of its rows that have ended
    "gpt_neox": "replaced", "llama": "replaced", "opt": "replaced", "gemma3_text 64": "replaced", "mixtral": "replaced",
    "bloom": "dropped", "lfm2": "dropped", "qwen3_next": "dropped", "jamba": "dropped", "falcon_h1": "dropped",
    "mamba": "dropped", "minimax": "dropped", "gemma3_text": "dropped", "gpt_neo": "dropped", "deepseek_v4": "kept",
}  # fmt: skip
DOUBLE = {"gpt_neox", "llama", "opt"}  # others compute some parts in float32


@pytest.fixture(scope="module")
def expected():
    """{architecture: (model, {temperature: plain answers})}, made when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            kind, *window = name.split()
            model = architectures.build(kind).eval()
            model = model.double() if kind in DOUBLE else model
            if window:
                model.config.sliding_window = int(window[0])
            made[name] = model, {t: plain_answers(model, MANY, range(len(MANY)), 5, t, 14, ENDS) for t in (0.9, 0)}
        return made[name]

    return get


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("name", HOW)
def test_rows_that_end_leave_the_others_as_they_are(name, size, expected, monkeypatch):
    """Attention, with positions of several kinds, convolution and linear attention, both in one layer, a state alone, a cache of
    its own, sliding windows, and layers that cannot drop rows. Equal prompts, and answers of very uneven lengths."""
    model, plain = expected(name)
    seen = set()
    for owner, method, kind in ((caches.Slots, "keep", "replaced"), (caches, "keep_rows", "dropped")):
        own = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *a, own=own, kind=kind: seen.add(kind) or own(*a))
    sampler = Generator(model, make_tokenizer(), size, 14)
    sampler.eos_ids = ENDS
    for temperature, answers in plain.items():
        done = []
        found = sampler.sample(MANY, list(range(len(MANY))), 5, temperature, done.append)
        ids, finished, logprobs = (list(column) for column in zip(*answers, strict=True))
        assert found.response_ids == ids and found.finished == finished
        for x, y in zip(found.logprobs, logprobs, strict=True):
            assert x == pytest.approx(y, abs=1e-9 if model.dtype == torch.float64 else 1e-5)
        assert sum(done) == len(MANY) and min(done) > 0
        assert len({len(y) for y in ids}) > 4 or not temperature
    assert seen == ({HOW[name]} - {"kept"} if size > 1 else set())


def test_sampled_responses_have_the_models_distribution():
    """20,000 samples from the enumerable language against the exact probability of every response: chi-square within 4 sd."""
    model = exact.make_model("gpt_neox", 2, scale=2.0)
    tokenizer = make_tokenizer()
    tokenizer.eos_token_id = exact.EOS
    prompt, n = exact.PROMPTS[1], 20_000
    sampler = Generator(model, tokenizer, 2000, exact.LENGTH)
    sampler.eos_ids = {exact.EOS}
    rollout = sampler.sample([prompt] * n, list(range(n)), seed=1)
    index = {tuple(y): i for i, y in enumerate(exact.RESPONSES)}
    counts = torch.zeros(len(index), dtype=torch.float64)
    for y in rollout.response_ids:
        counts[index[tuple(y)]] += 1
    expected = n * exact.response_logprobs(model, prompt).exp().detach()
    usual = expected >= 5
    statistic = ((counts - expected)[usual] ** 2 / expected[usual]).sum().item()
    freedom = int(usual.sum()) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    assert [y[-1] == exact.EOS for y in rollout.response_ids] == rollout.finished
    logp = exact.response_logprobs(model, prompt).detach()
    picked = torch.tensor([logp[index[tuple(y)]] for y in rollout.response_ids])
    torch.testing.assert_close(
        torch.tensor([sum(t) for t in rollout.logprobs], dtype=torch.float64), picked, rtol=0, atol=1e-9
    )


def test_temperature_reaches_the_sampler():
    model = exact.make_model("gpt_neox", 2, scale=2.0)
    sampler = Generator(model, make_tokenizer(), 4000, 1)
    sampler.eos_ids = {exact.EOS}
    n = 8000
    for temperature in (0.5, 2.0):
        rollout = sampler.sample([[0]] * n, list(range(n)), seed=5, temperature=temperature)
        p = (model(input_ids=torch.tensor([[0]])).logits[0, -1] / temperature).softmax(-1).detach()
        share = torch.tensor([sum(y[0] == t for y in rollout.response_ids) / n for t in range(4)], dtype=torch.float64)
        assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_inverse_cdf_takes_the_interval_the_uniform_falls_in():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999])
    assert inverse_cdf(logits, uniforms).tolist() == [0, 0, 1, 1, 2]
    never = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert {inverse_cdf(never, torch.tensor([u])).item() for u in (0.0, 0.3, 0.5, 0.9)} == {0, 2}


@pytest.mark.parametrize("words", [1, 3, 256, 257, 5000])
def test_chosen_tokens_are_those_of_the_plain_rule(words, monkeypatch):
    """With flat and peaked logits, words of probability 0, also around the blocks' ends, and uniforms at both ends of [0, 1)."""
    monkeypatch.setattr(decoding, "CHUNK", 3 * words)  # several parts, the last one smaller
    draw = torch.Generator().manual_seed(words)
    scale = torch.tensor([0.0, 1e-3, 1.0, 5.0, 300.0, 1.0, 1.0, 1.0]).repeat(40)[:, None]
    logits = torch.randn(320, words, generator=draw) * scale + 1e4 * (scale == 300)
    never = torch.rand(320, words, generator=draw) < torch.tensor([0, 0, 0, 0, 0, 0.5, 0.99, 0]).repeat(40)[:, None]
    never[7::8, : words // 2], never[15::16, -(words // 3) :] = True, True
    never.scatter_(1, torch.randint(words, (320, 1), generator=draw), False)
    logits = logits.masked_fill(never, -torch.inf)
    uniforms = torch.rand(320, generator=draw, dtype=torch.float64)
    uniforms[:64], uniforms[64:128], uniforms[128:160] = 0.0, 1 - 2.0**-53, 2.0**-53
    for temperature in (1.0, 0.7):
        tokens, logprobs = decoding.choose_tokens(logits, uniforms, temperature)
        scored = logits / temperature
        assert tokens.tolist() == inverse_cdf(scored, uniforms).tolist()
        expected = scored.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
        assert logprobs.isfinite().all()
    tokens, logprobs = decoding.choose_tokens(logits, uniforms, 0)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1).amax(-1), rtol=1e-12, atol=1e-12)


def test_nan_logits_give_nan_log_probs_and_a_word_of_the_vocabulary():
    tokens, logprobs = decoding.choose_tokens(torch.full((2, 300), torch.nan), torch.tensor([0.0, 0.9]), 1.0)
    assert ((0 <= tokens) & (tokens < 300)).all() and logprobs.isnan().all()


def spied(name):
    """(model, its forward passes so far: rows and tokens of each row)."""
    model, passes = architectures.build(name).eval(), []
    model.register_forward_pre_hook(
        lambda _, args, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return model, passes


@pytest.mark.parametrize(
    ("name", "reads"), [("llama", [(1, 9), (1, 7), (1, 7)]), ("bloom", [(1, 9), (3, 9), (1, 7)]), ("deepseek_v4", None)]
)
def test_candidates_of_a_prompt_share_its_forward_pass(name, reads):
    """Also those that start later; a cache that cannot repeat rows reads every prompt."""
    model, passes = spied(name)
    a, b, c = [7, *range(50, 58)], [7, *range(80, 86)], [9, *range(80, 86)]
    asked = [a] * 5 + [b] * 2 + [c] * 4
    found = Generator(model, make_tokenizer(), 4, 6)
    found.eos_ids = ENDS
    found.sample(asked, list(range(11)), seed=2)
    read = [shape for shape in passes if shape[1] > 1]
    assert read == reads if reads else sum(n for n, _ in read) >= 11


def test_free_places_are_taken_as_long_as_prompts_wait():
    """No row is fed after its end, none is idle, and the batch is never larger than asked for."""
    model, passes = spied("llama")
    for size, share in ((4, 1), (24, 3)):
        passes.clear()
        sampler = Generator(model, make_tokenizer(), size, 14)
        sampler.eos_ids = ENDS
        prompts = [[11 + i % 7] * (2 + i) for i in range(40)]
        found = sampler.sample(prompts, list(range(40)), seed=2)
        steps = [n for n, tokens in passes if tokens == 1]
        assert sum(steps) == sum(len(y) - 1 for y in found.response_ids) and max(steps) <= size
        last = max(i for i, (_, tokens) in enumerate(passes) if tokens > 1)
        waiting = [n for n, tokens in passes[:last] if tokens == 1]
        assert waiting and min(waiting) > size - share
        reads = [shape for shape in passes if shape[1] > 1]
        assert [n for n, _ in reads[1:-1]] == [share] * (len(reads) - 2) and sum(n for n, _ in reads) == 40
        assert reads == sorted(reads, key=lambda shape: -shape[1])


def test_the_cache_grows_in_blocks_up_to_what_a_row_can_fill(monkeypatch):
    """Columns that no token has filled hold zeros: attention multiplies what it masks by 0, and 0 times NaN is NaN."""
    columns = []
    own = caches.SlotLayer.enlarged

    def enlarged(layer, held, n):
        out = own(layer, held, n)
        assert torch.equal(out[:, :, : held.shape[2]], held) and not out[:, :, held.shape[2] :].any()
        columns.append(out.shape[2])
        return out

    monkeypatch.setattr(caches.SlotLayer, "enlarged", enlarged)
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with NaN
    try:
        model = architectures.build("llama").eval()
        sampler = Generator(model, make_tokenizer(), 2, 60)
        sampler.eos_ids = set()
        sampler.sample([[5] * 4, [6] * 3], [0, 1], seed=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert columns == [*[36] * 4, *[63] * 4]  # keys and values of two layers


def test_the_model_keeps_its_mode(tmp_path):
    model, tokenizer = load(tmp_path, "gpt_neox")
    model.train()
    Generator(model, tokenizer, 2, 4).sample(PROMPTS[:1], [0], seed=0)
    assert model.training


# ---- the other backend, as far as it needs no vLLM ----
def test_vllm_is_refused_in_one_line_where_it_is_not_installed(tmp_path, monkeypatch):
    missing = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else missing(name, *a))
    args = irft.Args(generation="vllm")
    resolve_auto(args, irft.SETTINGS)
    with pytest.raises(UserError) as found:
        args.check()
    line = "--generation: found vllm, which is not installed here, expected hf, or vLLM installed: pip install -r requirements-gpu"
    assert (
        str(found.value).startswith(line) and "\n" not in str(found.value) and "make install-vllm" in str(found.value)
    )
    args.dry_run = True  # the plan for another machine
    args.check()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("script", sorted({path.name for path in ROOT.glob("*.py")} - {"aihf_mujoco.py", "plot.py"}))
def test_no_script_falls_back_to_hf(tmp_path, script):
    done = run([sys.executable, script, "--generation", "vllm", "--output-dir", str(tmp_path / "out")], check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --generation: found vllm, which is not installed")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_every_generator_is_chosen_by_the_flag():
    """Nothing outside common/generation.py makes an hf Generator itself, but for a benchmark of this one sampler."""
    makers = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py"), *ROOT.glob("common/*.py")]:
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = [getattr(f, "id", getattr(f, "attr", "")) for f in calls]
        makers += "make_generator" in names
        torch_own = sum(ast.unparse(f) == "torch.Generator" for f in calls)
        assert path.name in ("generation.py", "rivals.py") or names.count("Generator") == torch_own, path
    assert makers >= len(list(ROOT.glob("*.py")))


def sampled_by(**given):
    run = SimpleNamespace(
        args=SimpleNamespace(per_device_eval_batch_size=2, max_new_tokens=3, **given), metrics={"a": "b"}
    )
    return make_generator(run, exact.make_model("gpt_neox", 2), make_tokenizer()), run


def test_the_flag_chooses_the_backend():
    sampler, run = sampled_by(generation="hf")
    assert type(sampler) is Generator and (sampler.batch_size, sampler.max_new_tokens) == (2, 3)
    sampler, run = sampled_by(generation="vllm")
    assert type(sampler) is VllmGenerator and set(run.metrics) == {"a", "sampling/vllm_logp_difference"}


def test_neighbours_with_one_prompt_and_consecutive_rows_are_one_request():
    a, b = [1, 2], [3]
    assert group([a, a, a, b, b, a], [4, 5, 6, 7, 9, 10]) == [(0, 3), (3, 1), (4, 1), (5, 1)]
    assert group([], []) == []


def test_lora_weights_are_those_of_merge_and_unload(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load(tmp_path, "mistral")
    assert {k: v.data_ptr() for k, v in full_weights(model)} == {k: p.data_ptr() for k, p in model.named_parameters()}
    names = [k for k, _ in full_weights(model)]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = dict(full_weights(model))
    assert list(found) == names and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert all(torch.equal(v, merged[k]) for k, v in found.items())
    assert not torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    )


def test_the_checksum_sees_every_way_to_change_a_weight(tmp_path):
    model, _ = load(tmp_path, "mistral")
    sums, weight = [checksum(model)], model.model.layers[1].mlp.up_proj.weight
    assert checksum(copy.deepcopy(model)) == sums[0]
    weight.data[3, 2] = weight.data[3, 2].nextafter(
        torch.tensor(9.0)
    )  # the smallest change there is, past autograd's eye
    sums.append(checksum(model))
    weight.data.neg_()
    sums.append(checksum(model))
    weight.data = torch.zeros_like(weight)
    sums.append(checksum(model))
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    sums.append(checksum(model))
    first, second = model.model.layers[0].input_layernorm.weight, model.model.layers[1].input_layernorm.weight
    first.data.fill_(0.5)
    second.data.fill_(2.0)
    sums.append(checksum(model))
    first.data, second.data = second.data, first.data
    sums.append(checksum(model))
    sums += [checksum(model.to(torch.bfloat16)), checksum(model.double())]
    assert len(set(sums)) == len(sums)


def test_weights_travel_in_files_and_come_back_in_order(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(vllm_engine, "SHARD_BYTES", 64)
    tensors = {f"w{i}": torch.arange(8.0) + i for i in range(5)}
    write_shards(tensors.items(), tmp_path, torch.bfloat16)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2  # four tensors of 16 bytes, and the last one
    loaded = {k: v for path in files for k, v in load_file(path).items()}
    assert list(loaded) == list(tensors) and all(v.dtype == torch.bfloat16 for v in loaded.values())
    assert all(torch.equal(loaded[k].float(), v) for k, v in tensors.items())


def test_a_tied_head_is_sent_beside_its_embeddings(tmp_path):
    from safetensors.torch import load_file

    model, _ = load(tmp_path / "model", "mistral", tie_word_embeddings=True)
    write_shards(full_weights(model), tmp_path, torch.float32)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    assert torch.equal(found["lm_head.weight"], model.model.embed_tokens.weight)
    assert set(found) == set(model.state_dict())


@pytest.mark.parametrize("kind", ["plain", "lora"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_weights_of_a_sharded_model_are_gathered_whole(tmp_path, engine, kind):
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    make_model(tmp_path, "mistral")
    torchrun = [launcher("torchrun"), "--standalone", "--nproc_per_node", "2"]  # a forked FSDP2 has crashed in malloc
    words = [*torchrun, str(ROOT / "tests" / "shard_weights.py"), engine, kind, str(tmp_path)]
    done = run(words, timeout=900)
    assert done.stdout.count("equal") == 2
