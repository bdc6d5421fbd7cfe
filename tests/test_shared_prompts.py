"""Answers to one prompt in one row: the numbers of separate rows, chosen where it pays, refused where it would be wrong."""

import copy
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from architectures import WINDOW, documented_sharing, gradients, sharing
from helpers import ROOT, assert_same_metrics, command, make_data, make_model, run, slow_unless, weights
from safetensors.torch import load_file
from test_logprobs import SEQUENCES, Wrapper, tiny_config, tiny_model
from test_models import QUICK
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import irft
from common import models, rewards
from common.data import collate
from common.logprobs import masked_sum, plain_logprobs, response_logprobs
from common.rewards import ActorCritic, ScalarModel
from common.run import Run
from extras import fused_head, gather, packing, shared_prompts
from extras.adapters import add_lora
from extras.command_line import saved_args
from extras.packing import Limits, Rows

sys.path.append(str(ROOT / "benchmark"))
import shared_prompt as benchmark

ALWAYS = Limits(10**6, math.inf)  # of so wide a model that tokens alone decide
LONG, SHORT, ONE, ALONE = [5, 1, 7, 2, 9, 4, 4, 8, 1], [3, 3, 6], [2], [6, 5]
ANSWERS = [  # answers of one token, equal ones, one that begins another, one of a prompt of its own; prompts take turns
    (LONG, [1, 2, 3]), (ONE, [4]), (SHORT, [7, 7, 7, 7, 7, 7]), (LONG, [1, 2, 3]), (ALONE, [8, 3, 3, 1, 2]), (LONG, [9]),
    (SHORT, [7]), (ONE, [4, 10, 10, 0]), (LONG, [1, 2]), (SHORT, [0, 1]),
]  # fmt: skip


def shared(model, limits: Limits | None = ALWAYS):
    """The model, now sharing prompts."""
    model.shared_prompts = limits
    return model


def shapes_of(model) -> list[tuple[int, ...]]:
    """A list that gets the shape of the input ids of every forward pass."""
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


# ---- the numbers of separate rows ----
MODELS = {  # relative, learned and no positions; heads in groups; adapters; both forms of the mask
    "gpt_neox": {}, "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "gpt2": {}, "opt": {"word_embed_proj_dim": 16},
    "eager": {}, "lora": {}, "checkpointing": {},
}  # fmt: skip


def assert_close(found: torch.Tensor, expected: torch.Tensor, exact: bool = True) -> None:
    """Equal but for rounding, of float64, or of the float32 in which the norms of some models compute."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= (1e-12 if exact else 1e-6) * expected.abs().max()


def make(name: str):
    kind = {"eager": "llama", "lora": "mistral", "checkpointing": "qwen2"}.get(name, name)
    model = tiny_model(kind, **({"sliding_window": None} if kind == "mistral" else MODELS[name])).eval()
    with torch.no_grad():  # weights so large that what a token sees shows in its output
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.1)
    if name == "eager":
        model.set_attn_implementation("eager")
    if name == "lora":
        model = add_lora(model, irft.Args(lora_r=2))
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p)
    if name == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_separate_rows(name, monkeypatch):
    """In float64, through a wrapper, in chunks, at a model's first forward pass and at its second."""
    monkeypatch.setattr(fused_head, "CHUNK", 11 * 3)
    model, batch = make(name), collate(ANSWERS, 0)
    plain = plain_logprobs(model, batch, 0.7)
    separate, expected = response_logprobs(model, batch, 0.7), gradients(model, plain)
    assert expected.norm() > 1e-2 and plain[0, 0] == plain[3, 0] != plain[5, 0]
    exact = name in ("gpt_neox", "gpt2", "opt")
    inner = model.get_base_model() if name == "lora" else model
    fused_head.HEADS.clear()
    seen, wrapped = shapes_of(inner), Wrapper(model)
    shared(inner)
    for _ in range(2):
        found = response_logprobs(wrapped, batch, 0.7)
        assert_close(found.logprobs, plain, exact)
        assert_close(gradients(model, found.logprobs), expected, exact)
        for a, b in zip(found, separate, strict=True):
            assert_close(a, b, exact)
    assert set(seen) == {(4, 18)}  # four prompts; the longest row is LONG with its answers


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_prompt_may_stand_in_several_rows(k):
    model, batch = make("gpt2"), collate(ANSWERS, 0)
    groups = [[0, 3, 5, 8], [1, 7], [2, 6, 9], [4]]
    starts, lengths = batch.response_start.tolist(), batch.response_mask.sum(-1).tolist()
    rows = Rows.of([row for group in groups for row in packing.split(group, k)], starts, lengths)
    inputs, before, last = packing.shared_inputs(model, batch, rows)
    for found in (before, packing.padded_inputs(batch).before):  # any index of the output will do there
        assert (found[~batch.response_mask] == 0).all()
    assert len(inputs["input_ids"]) == {1: 10, 2: 2 + 1 + 2 + 1, 3: 2 + 1 + 1 + 1}[k]
    logp = model(**inputs).logits.flatten(0, 1).log_softmax(-1)
    found = logp[before].gather(-1, batch.response_ids[..., None])[..., 0]
    plain = plain_logprobs(model, batch)
    assert_close(torch.where(batch.response_mask, found, 0.0), plain)
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    end = batch.attention_mask.sum(-1) - 1
    assert_close(logp[last], hidden[torch.arange(len(end)), end].log_softmax(-1))


@pytest.mark.parametrize("extra", [0, 9])
def test_padding_of_a_batch_changes_nothing(extra):
    """A batch that is wider than its sequences, with other ids outside the mask."""
    model, batch = shared(make("gpt2")), collate(ANSWERS, 0)
    plain = plain_logprobs(model, batch)
    pad = lambda x, value=0: torch.nn.functional.pad(x, (0, extra), value=value)  # noqa: E731
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, 10)
    answers = torch.where(batch.response_mask, batch.response_ids, 10)
    wide = dataclasses.replace(
        batch, input_ids=pad(ids, 10), attention_mask=pad(batch.attention_mask), response_ids=pad(answers, 10),
        response_mask=pad(batch.response_mask),
    )  # fmt: skip
    found = response_logprobs(model, wide).logprobs
    assert_close(found[:, : plain.shape[1]], plain)
    assert (found[:, plain.shape[1] :] == 0).all()


def scalar_model(seed: int = 0) -> ScalarModel:
    torch.manual_seed(seed)
    config = tiny_config("mistral", num_labels=1, sliding_window=None)
    inner = AutoModelForSequenceClassification.from_config(config).double()
    with torch.no_grad():
        for p in inner.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return ScalarModel(inner)


@pytest.mark.parametrize("every", [False, True])
def test_scalar_models_read_the_same_positions(every):
    scalar, batch = scalar_model(), collate(ANSWERS, 0)
    plain = scalar(batch, every=every)
    expected = gradients(scalar, plain)
    assert len(plain.unique()) > 8
    seen = shapes_of(scalar.model.model)
    shared(scalar.model)
    found = scalar(batch, every=every)
    assert_close(found, plain, exact=False)
    assert_close(gradients(scalar, found), expected, exact=False)
    assert seen == [(4, 18)]


def test_policy_and_value_model_together():
    both, batch = ActorCritic(make("llama"), scalar_model(1)), collate(ANSWERS, 0)
    scores, values = both(batch, 0.7)
    total = lambda scores, values: scores.logprobs + values.tanh()  # noqa: E731
    expected = gradients(both, total(scores, values))
    shared(both.policy), shared(both.value.model)
    found = both(batch, 0.7)
    for a, b in zip((*found[0], found[1]), (*scores, values), strict=True):
        assert_close(a, b, exact=False)
    assert_close(gradients(both, total(*found)), expected, exact=False)


def test_under_autocast_the_difference_is_rounding():
    """In bf16: far below what an answer changes that sees the answers before it."""
    model, batch = make("llama").float(), collate(ANSWERS, 0)
    with torch.autocast("cpu", torch.bfloat16):
        separate = response_logprobs(model, batch).logprobs
        found = response_logprobs(shared(model), batch).logprobs
    exact = plain_logprobs(model, batch)
    rounding = (separate - exact).abs().max()
    assert (found - exact).abs().max() < 3 * rounding
    inputs, before, _ = packing.model_inputs(model, batch)
    leaking = inputs | {"attention_mask": packing.attention_mask(model, torch.ones_like(inputs["input_ids"]))}
    logp = (
        model(**leaking).logits.flatten(0, 1).log_softmax(-1)[before].gather(-1, batch.response_ids[..., None])[..., 0]
    )
    assert (torch.where(batch.response_mask, logp, 0.0) - exact).abs().max() > 10 * rounding


def test_the_masks_of_all_kinds_of_attention_say_the_same():
    owner = torch.tensor([[1, 1, 2, 2, 3, 0, 0], [1, 2, 3, 3, 3, 4, 4]])
    expected = torch.zeros(2, 7, 7, dtype=torch.bool)
    for r, own in enumerate(owner.tolist()):
        for q in range(7):
            for k in range(q + 1):
                expected[r, q, k] = own[k] == 1 or own[k] == own[q]
    assert expected.diagonal(dim1=1, dim2=2).all()  # no row of the softmax is empty
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), dtype=torch.float32)
    assert torch.equal(packing.attention_mask(model, owner), expected[:, None])
    model.config._attn_implementation = "eager"
    added = packing.attention_mask(model, owner)
    assert (
        torch.equal(added == 0, expected[:, None])
        and (added[~expected[:, None]] == torch.finfo(torch.float32).min).all()
    )
    model.config._attn_implementation = "flex_attention"
    sees = packing.attention_mask(model, owner).mask_mod
    indices = torch.meshgrid(torch.arange(2), torch.arange(7), torch.arange(7), indexing="ij")
    assert torch.equal(sees(indices[0], 0, *indices[1:]), expected)


# ---- which rows ----
def test_batches_know_equal_prompts():
    batch = collate([(SHORT, [1]), (LONG, [2]), (list(SHORT), [3]), (tuple(LONG), [1]), (SHORT[:2], [4])], 0)
    assert batch.prompt_of.tolist() == [0, 1, 0, 1, 2]
    assert batch.to("meta").prompt_of.device.type == "meta" and collate(SEQUENCES, 0).prompt_of is None
    assert collate(SEQUENCES, 0).to("cpu").prompt_of is None


def rows_of(prompt: int, answers: list[int], width: int, tokens: float = math.inf):
    """(rows, their tokens) that are chosen for so many answers to one prompt; None for padded rows."""
    batch = collate([([1] * prompt, [2] * n) for n in answers], 0)
    found = packing.cheapest_rows(batch, Limits(width, tokens))
    return found and (len(found.leaders), found.tokens)


def test_rows_are_shared_where_this_is_less_work():
    assert rows_of(50, [50, 50], 1000) == (1, 150)
    assert rows_of(2, [50, 50], 1000) is None  # 102 tokens instead of 104
    assert rows_of(500, [256] * 32, 10**6) == (1, 500 + 32 * 256)
    assert rows_of(500, [256] * 32, 512) == (8, 500 + 4 * 256)  # attention over long rows would cost more
    assert rows_of(500, [256] * 32, 64) is None  # and here it costs more than what is saved
    assert rows_of(50, [50] * 6, 1000, 349) == (2, 200) and rows_of(50, [50] * 6, 1000, 350) == (1, 350)
    assert rows_of(50, [50, 50], 1000, 149) is None
    assert rows_of(50, [90, 10], 1000) == (1, 150)
    mixed = collate([([i] * 50, [2] * 50) for i in range(9)] + [([0] * 50, [3] * 50)], 0)
    assert packing.cheapest_rows(mixed, Limits(1000, math.inf)) is None  # one pair would widen nine rows


def test_the_work_is_counted_as_documented():
    """The answers of a group are spread evenly over rows of at most k, and the least rows * W (6 width + W) wins."""
    answers, width, prompt = [7, 3, 9, 2, 5, 11, 4], 20, 40
    counted = {}
    for k in (2, 4, 7):
        rows = math.ceil(7 / k)
        parts = [answers[7 * p // rows : 7 * (p + 1) // rows] for p in range(rows)]
        assert max(map(len, parts)) <= k and min(map(len, parts)) >= max(map(len, parts)) - 1
        tokens = prompt + max(map(sum, parts))
        counted[k] = (rows * tokens * (6 * width + tokens), rows, tokens)
    work, *best = min(counted.values())
    assert work < packing.WORTH * 7 * (prompt + 11) * 6 * width
    assert rows_of(prompt, answers, width) == tuple(best)


# ---- which models ----
ALL = list(documented_sharing())


@pytest.mark.parametrize("name", slow_unless(lambda name: name in QUICK, ALL))
def test_every_architecture_shares_exactly_or_is_refused(name):
    assert sharing(name) == documented_sharing()[name]


def settled(model, **given):
    shared_prompts.DECISIONS.clear()
    return shared_prompts.settle(model, irft.Args(**given), "--model x").shared_prompts


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("llama", {}, "on"),
        ("mistral", {"sliding_window": 20}, "on, in rows of 20 tokens at most"),
        ("mistral", {"sliding_window": 7}, "off (--model x: MistralForCausalLM sees 7 tokens)"),
        ("bloom", {}, "off (--model x: BloomForCausalLM takes no positions)"),
        ("mamba", {}, "off (--model x: MambaForCausalLM has convolutional or recurrent layers)"),
    ],
)
def test_the_log_says_once_what_was_chosen_and_why(name, given, line, capsys, monkeypatch):
    monkeypatch.setattr(shared_prompts, "SAID", set())
    model = AutoModelForCausalLM.from_config(tiny_config(name, **given))
    limits = [settled(model), settled(model)]
    assert capsys.readouterr().out == f"shared prompts: {line}\n"
    assert limits == [Limits(16, given.get("sliding_window", math.inf)) if line.startswith("on") else None] * 2
    monkeypatch.setenv("RANK", "1")
    shared_prompts.SAID.clear()
    settled(model)
    assert capsys.readouterr().out == ""


def test_the_flag_switches_it_off(capsys, monkeypatch):
    monkeypatch.setattr(shared_prompts, "SAID", set())
    model = tiny_model("llama")
    assert settled(model, share_prompts=False) is None and not shared_prompts.DECISIONS
    assert capsys.readouterr().out == "shared prompts: off (--no-share-prompts)\n"


def reason_of(model) -> str:
    settled(model)
    return shared_prompts.DECISIONS[shared_prompts.identity(model)]


def test_attention_without_a_mask_of_pairs_and_encoders_are_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert reason_of(model) == "flash_attention_2 takes no mask for each pair of tokens"
    bert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(
        "bert", vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    ))  # fmt: skip
    assert reason_of(bert) == "BertForSequenceClassification is an encoder"


def change(**replaced):
    """A model's forward with some of its inputs replaced, as by a model that reads them in another way."""

    def apply(model):
        forward = model.forward

        def changed(input_ids=None, attention_mask=None, position_ids=None, **rest):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            return forward(**{k: replaced[k](x) if k in replaced else x for k, x in given.items()}, **rest)

        model.forward = changed
        return model

    return apply


WRONG = {
    "ignores the mask": change(attention_mask=lambda x: None if x is not None and x.dim() == 4 else x),
    "ignores the positions": change(position_ids=lambda x: None),
    "counts positions from the row": change(position_ids=lambda x: x if x is None else torch.arange(x.shape[1])[None]),
    "shifts the positions by one": change(position_ids=lambda x: x if x is None else x + (x > 3).long()),
    "refuses the mask": change(attention_mask=lambda x: x[:, :, :, :, 0] if x.dim() == 4 else x),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_at_load_time_finds_what_rules_do_not(wrong, dtype):
    right = make("gpt2").to(dtype)
    assert reason_of(right) == ""
    expected = (
        "GPT2LMHeadModel cannot run such rows, IndexError" if "refuses" in wrong else "scores such rows differently"
    )
    assert expected in reason_of(WRONG[wrong](right))


def test_a_scalar_model_is_asked_as_it_is_scored():
    assert reason_of(scalar_model().model.float()) == ""
    scalar = scalar_model().float()
    WRONG["ignores the mask"](scalar.model.model)
    assert "scores such rows differently" in reason_of(scalar.model)


def test_windows_that_bite_are_kept_whole():
    """Rows inside the window are shared, with the numbers of separate rows; a longer batch is scored in separate rows."""
    model = make("mistral")
    model.config.sliding_window = 8
    assert settled(model).tokens == 8
    model.shared_prompts = model.shared_prompts._replace(width=10**6)
    seen = shapes_of(model)
    for sequences, shape in (
        ([(SHORT, [1, 2]), (SHORT, [4, 5, 6])], (1, 8)),
        ([(SHORT, [1, 2, 3]), (SHORT, [4, 5, 6])], (2, 6)),
    ):
        batch = collate(sequences, 0)
        torch.testing.assert_close(
            response_logprobs(model, batch).logprobs, plain_logprobs(model, batch), rtol=0, atol=1e-11
        )
        assert shape in seen
    assert (1, 9) not in seen


def test_a_mask_of_the_models_own_bounds_the_row():
    """GPT-Neo's counts places in the row, and has as many as the window of the model."""
    config = AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global"], 2]], hidden_size=16, num_heads=2,
                                  vocab_size=20, max_position_embeddings=WINDOW, window_size=500)  # fmt: skip
    assert settled(AutoModelForCausalLM.from_config(config)).tokens == WINDOW


def test_models_of_the_scripts_are_settled_when_loaded(tmp_path):
    folder = make_model(tmp_path / "model")
    args = irft.Args(model=str(folder), mixed_precision="no", lora_r=2)
    policy = models.prepare_policy(args)
    reward = rewards.prepare_scalar(args, args.model, "--reward-model")
    for model in (policy.get_base_model(), reward.inner, copy.deepcopy(reward).inner):
        assert model.shared_prompts == Limits(32, math.inf)
    off = irft.Args(model=str(folder), mixed_precision="no", share_prompts=False)
    assert models.load_model(off).shared_prompts is None
    policy.get_base_model().save_pretrained(tmp_path / "saved")
    assert "shared_prompts" not in (tmp_path / "saved" / "config.json").read_text()


# ---- runs ----
def fake_run(rank: int = 0, world: int = 1, **given) -> Run:
    run = Run.__new__(Run)
    run.args, run.accelerator = irft.Args(**given), SimpleNamespace(device="cpu")
    run.rank, run.world = rank, world
    return run


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_scores_come_in_the_order_of_the_sequences(size, monkeypatch):
    """Same prompts stand together, the longest first; a batch holds as many sequences as the flag says."""
    monkeypatch.setattr(shared_prompts, "DECISIONS", {("x",): ""})
    model, batches = make("gpt2"), []

    def score(batch):
        batches.append(batch.input_ids.tolist())
        return masked_sum(response_logprobs(model, batch).logprobs, batch.response_mask).tolist()

    expected = [
        masked_sum(plain_logprobs(model, b), b.response_mask).item() for b in (collate([s], 0) for s in ANSWERS)
    ]
    shared(model)
    for method in (
        fake_run(per_device_eval_batch_size=size).score_batches,
        fake_run(per_device_eval_batch_size=size).map_sequences,
    ):
        assert method(ANSWERS, score) == pytest.approx(expected, abs=1e-11)
        rows = [row for batch in batches for row in batch]
        assert max(map(len, batches)) == min(size, len(ANSWERS)) and len(rows) == len(ANSWERS)
        starts = ["".join(map(str, row)) for row in rows]
        keys = ["".join(map(str, prompt)) for prompt in (LONG, SHORT, ALONE, ONE)]
        found = [next(i for i, key in enumerate(keys) if start.startswith(key)) for start in starts]
        assert found == [0] * 4 + [1] * 3 + [2] + [3] * 2
        batches.clear()
    off = fake_run(per_device_eval_batch_size=100, share_prompts=False)
    assert off.score_batches(ANSWERS, score) == pytest.approx(expected, abs=1e-11)
    lengths = [sum(i > 0 for i in row) for row in batches[0]]
    order = sorted(range(len(ANSWERS)), key=lambda i: -len(ANSWERS[i][0]) - len(ANSWERS[i][1]))
    assert [row[: len(ANSWERS[i][0])] for row, i in zip(batches[0], order, strict=True)] == [
        ANSWERS[i][0] for i in order
    ], lengths


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_process_scores_all_answers_to_a_prompt(world, monkeypatch):
    monkeypatch.setattr(shared_prompts, "DECISIONS", {("x",): ""})
    scored, results = [], {}
    for rank in range(world):
        run, own = fake_run(rank, world, per_device_eval_batch_size=2), []

        def score(batch, own=own):
            own += [
                tuple(row[:start])
                for row, start in zip(batch.input_ids.tolist(), batch.response_start.tolist(), strict=True)
            ]
            return [sum(row) for row in batch.response_ids.tolist()]

        def gather_rows(_, shares, mine, rank=rank):
            results.update(zip(shares[rank], mine, strict=True))
            return [results.get(i) for i in range(sum(map(len, shares)))]

        monkeypatch.setattr(gather, "gather_rows", gather_rows)
        gathered = run.map_sequences(ANSWERS, score)
        scored.append(own)
    assert gathered == [sum(y) for _, y in ANSWERS]
    prompts = [set(own) for own in scored]
    assert sum(map(len, scored)) == len(ANSWERS) and sum(map(len, prompts)) == 4


def test_the_benchmark_counts_and_draws(tmp_path, capsys):
    """Its operations, counted token by token; its table, its figure and its two kinds of rows at a small size."""
    model = benchmark.make_model("tiny")
    c = model.config
    matrices = c.num_hidden_layers * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size)
    for prompt, answers, copies in ((3, [2, 4], 1), (3, [2, 4], 2), (5, [1], 1)):
        seen = [q + 1 for _ in range(copies) for q in range(prompt)] + [
            prompt + q + 1 for n in answers for q in range(n)
        ]
        work = sum(2 * matrices + 4 * c.hidden_size * c.num_hidden_layers * n for n in seen)
        work += 2 * c.vocab_size * c.hidden_size * sum(answers)
        assert benchmark.operations(model, prompt, answers, copies) == work
    small = dict(
        shapes=("tiny",), prompts=(64,), responses=(8, 16), pairs=2, candidates=3, repeats=1, mixed_precision="no"
    )
    seen = shapes_of(model)
    benchmark.measure(model, benchmark.Args(**small), "training", 64, 8)
    assert seen == [(4, 72), (2, 80)] * 2 and model.shared_prompts
    benchmark.shared_prompt(benchmark.Args(**small, output=str(tmp_path)))
    rows = json.loads((tmp_path / "shared_prompt.json").read_text())["tiny"]
    assert [(r["kind"], r["answers"], r["response"]) for r in rows] == [
        ("training", 2, 8), ("training", 2, 16), ("scoring", 3, 8), ("scoring", 3, 16)
    ]  # fmt: skip
    assert all(1 < r["bound"] < r["answers"] and r["speed_up"] > 0 for r in rows)
    assert rows[0]["tokens"] == pytest.approx(2 * 72 / 80)
    assert (tmp_path / "shared_prompt.md").read_text() in capsys.readouterr().out + "\n"
    assert (tmp_path / "shared_prompt.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 12)
    return folder


def irft_words(place, name: str, *flags: str) -> list[str]:
    small = ["--T", "1", "--num-train-epochs", "1", "--negatives", "greedy", *flags]
    return command("irft.py", place / "model", place / "data.jsonl", place / name, *small)


def test_a_run_is_the_same_to_rounding_and_on_two_processes(place):
    """irft.py with shared prompts, without, and on two processes with gradient checkpointing: the same weights and metrics."""
    done = run(irft_words(place, "on"))
    assert done.stdout.count("shared prompts: on\n") == 1
    off = run(irft_words(place, "off", "--no-share-prompts"))
    assert off.stdout.count("shared prompts: off (--no-share-prompts)\n") == 1
    two = run(irft_words(place, "two", "--gradient-checkpointing"), ranks=2)
    assert two.stdout.count("shared prompts: on\n") == 1
    start = load_file(place / "model" / "model.safetensors")
    for name in ("off", "two"):
        assert_same_metrics(place / "on", place / name)
        a, b = weights(place / "on"), weights(place / name)
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5 < 1e-3 < max((a[k] - start[k]).abs().max() for k in a)


def test_a_run_older_than_the_flag_goes_on_without_it(place):
    run(irft_words(place, "older"))
    path = place / "older" / "args.json"
    saved = json.loads(path.read_text())
    assert saved["args"].pop("share_prompts") is True
    path.write_text(json.dumps(saved))
    assert saved_args(irft.Args, str(place / "older")).share_prompts is False
