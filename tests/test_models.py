"""Models: every architecture is right or refused, what cannot be loaded is one line, and what is saved is what was given."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import architectures
import pytest
import torch
from helpers import make_classifier, make_data, make_model, make_tokenizer, slow_unless
from transformers import AutoConfig, AutoModelForCausalLM

import irft
import tiny
from common import UserError, demos, generation, models, rewards
from common.args import resolve_auto
from common.data import collate
from common.generation import make_generator
from common.logprobs import response_logprobs
from extras import gold, loading, noise

SEQUENCES = [([5, 6, 7], [8, 9]), ([9] * 8, [4, 3, 20])]


def arguments(model, **given):
    size = dict(max_length=64, max_prompt_length=48, max_new_tokens=16, per_device_eval_batch_size=4)
    return irft.Args(model=str(model), mixed_precision="no", **size | given)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "good", "mistral")


@pytest.fixture(scope="module")
def classifier(good):
    return make_classifier(good.parent / "classifier", good)


# ---- every architecture ----
QUICK = [
    "bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "llama", "mamba", "mistral", "mixtral", "olmo2",
    "opt", "phi3", "phimoe", "qwen2", "qwen3", "qwen3_moe", "roberta", "openai-gpt",
]  # fmt: skip


def test_the_table_lists_every_architecture():
    assert list(architectures.documented()) == list(architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(QUICK) <= architectures.documented().keys()


@pytest.mark.parametrize(
    "name", slow_unless(lambda name: name in QUICK, architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
)
def test_every_architecture_is_right_or_refused(name):
    """Sampler, scorer, single rows, training mode, LoRA merged, saved and restored agree to 1e-5; or one line says why not."""
    status, detail = architectures.outcome(name)
    assert status == architectures.documented()[name], detail
    assert "\n" not in detail


# ---- what cannot be loaded ----
def edit_config(**given):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | given))

    return change


def cut_weights(share: float):
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern: str):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def only_adapter(folder):
    remove("*")(folder)
    write("adapter_config.json", '{"base_model_name_or_path": "owner/base"}')(folder)


def run_directory(folder):
    shutil.copytree(folder, folder / "final")
    remove("*.*")(folder)
    write("args.json", "{}")(folder)


BAD = {  # case -> how a good folder is spoilt, what the line says
    "more layers than weights": (edit_config(num_hidden_layers=4), r"no weights for model\.layers\.2\..* and \d+ more"),
    "other sizes": (
        edit_config(intermediate_size=32),
        r"weights \S+ of size \(.*\), expected \(.*\), which its config.json says",
    ),
    "weights cut short": (cut_weights(0.5), r"the folder could not be read \(SafetensorError\)"),
    "empty weights": (cut_weights(0), r"the folder could not be read \(SafetensorError\)"),
    "no weights": (remove("*.safetensors"), "no file named model.safetensors"),
    "broken config": (write("config.json", "{"), "not a valid JSON file"),
    "a list as config": (write("config.json", "[]"), "model_type"),
    "wrong type in config": (edit_config(num_hidden_layers="two"), "'num_hidden_layers' expected int, got str"),
    "unknown model type": (edit_config(model_type="nope"), "nope"),
    "not causal": (edit_config(architectures=["MistralForTokenClassification"]), "found MistralForTokenClassification"),
    "no tokenizer": (remove("token*"), "tokenizer"),
    "no vocabulary": (remove("tokenizer.json"), "tokenizer"),
    "broken tokenizer": (write("tokenizer.json", "{"), "found no tokenizer that can be read"),
    "empty tokenizer": (write("tokenizer.json", ""), "found no tokenizer that can be read"),
    "broken template": (
        write("chat_template.jinja", "{% for m in messages %}\n{{ m "),
        "chat template with an error in line 2",
    ),
    "wrong type in generation config": (
        write("generation_config.json", '{"max_new_tokens": "many"}'),
        "could not be read",
    ),
    "adapter": (only_adapter, "found a LoRA adapter without its base model, .*owner/base.*merge_and_unload"),
    "run directory": (run_directory, r"found a run directory, expected a model: did you mean \S+/bad/final\?"),
    "unfinished run": (
        lambda f: (remove("*")(f), write("args.json", "{}")(f)),
        "found a run directory without a final model",
    ),
    "empty folder": (remove("*"), "found an empty folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, good, case):
    change, line = BAD[case]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    change(folder)
    args = arguments(folder)
    with pytest.raises(UserError, match=f"--model {folder}: .*{line}") as found:
        models.load_tokenizer(args)
        models.load_model(args)
    assert "\n" not in str(found.value) and len(str(found.value).replace(str(folder), "")) < 400


def test_classifiers_are_no_policies(good, classifier):
    two = make_classifier(good.parent / "two", good, labels=2)
    for folder in (classifier, two):
        with pytest.raises(UserError, match="found MistralForSequenceClassification, expected a causal language model"):
            models.load_model(arguments(folder))
    edit_config(architectures=None)(two)  # as old checkpoints have it: the head would be random
    with pytest.raises(UserError, match="found no weights for lm_head.weight"):
        models.load_model(arguments(two))


def test_bert_is_a_policy_only_as_a_decoder(tmp_path):
    config = AutoConfig.for_model(
        "bert", vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="found BertLMHeadModel with is_decoder false"):
        models.load_model(arguments(tmp_path))
    edit_config(is_decoder=True)(tmp_path)
    models.load_model(arguments(tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("/nowhere/x", "--model /nowhere/x: found no local folder of that name"),
        ("./x", "--model ./x: found no local folder of that name"),
        ("a/b/c", "--model a/b/c: found no local folder of that name"),
        (
            "nobody/nothing",
            r"--model nobody/nothing: found no local folder ./nobody/nothing and the hub \(nobody/nothing\)",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name, line):
    with pytest.raises(UserError, match=line):
        models.load_config(name)


def test_errors_of_attention_name_its_flag(good):
    for given in ("flash_attention_2", "flashy"):
        with pytest.raises(UserError, match="^--attn-implementation: found .*expected auto, sdpa or eager"):
            models.load_model(arguments(good, attn_implementation=given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_is_a_folder_as_any_other_in_the_type_asked_for(monkeypatch, dtype):
    """Its weights are float16 on disk. Neither the cache nor the hub is asked for it."""
    monkeypatch.setenv("CLEANIRL_CACHE", "/dev/null/cache")
    monkeypatch.setattr(loading, "probe_hub", None)
    args = arguments(Path("tiny"), dtype=dtype)
    shipped, given = models.load_model(args), models.load_model(args, str(tiny.MODEL))
    assert {p.dtype for p in shipped.parameters()} == {getattr(torch, dtype)}
    for (name, p), q in zip(shipped.named_parameters(), given.parameters(), strict=True):
        assert torch.equal(p, q), name
    tokenizer = models.load_tokenizer(args)
    assert len(tokenizer) == shipped.config.vocab_size and tokenizer.eos_token_id != tokenizer.pad_token_id
    with pytest.raises(UserError, match="--max-length: found 9999, expected at most .*, the window of --model tiny"):
        models.load_tokenizer(arguments(Path("tiny"), max_length=9999))


def test_a_local_folder_of_the_embedded_models_name_wins_but_for_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.resolve_model("tiny") == str(tiny.MODEL)
    (tmp_path / "tiny").mkdir()
    assert loading.resolve_model("tiny") == "tiny"
    monkeypatch.chdir(tiny.FOLDER.parent)
    assert loading.resolve_model("tiny") == str(tiny.MODEL)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capsys):
    from huggingface_hub import constants, utils

    asked = []
    session = SimpleNamespace(head=lambda url, timeout: asked.append(timeout) or 1 / 0)
    monkeypatch.setattr(utils, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.probe_hub.cache_clear()
    for name in ("owner/one", "owner/two"):
        with pytest.raises(UserError, match="or a reachable hub"):
            models.load_config(name)
    assert asked == [loading.HUB_SECONDS] and constants.HF_HUB_OFFLINE
    assert "does not answer" in capsys.readouterr().err
    loading.probe_hub.cache_clear()


def test_a_hub_that_answers_stays_in_use(monkeypatch):
    from huggingface_hub import constants, utils

    monkeypatch.setattr(utils, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.probe_hub.cache_clear()
    loading.offline_if_unreachable("owner/one")
    assert not constants.HF_HUB_OFFLINE
    loading.probe_hub.cache_clear()


# ---- a gold reward model ----
def test_an_unusable_gold_model_is_refused_before_sampling(tmp_path, good, classifier):
    data = str(make_data(tmp_path / "data.jsonl"))
    cut = shutil.copytree(classifier, tmp_path / "cut")
    cut_weights(0.5)(cut)
    for unusable, line in (
        (good, "found no weights for score.weight"),
        (cut, "SafetensorError"),
        ("nobody/x", "reachable hub"),
    ):
        args = arguments(good, dataset=data, eval_dataset=data, gold_reward_model=str(unusable), eval_samples=4)
        with pytest.raises(UserError, match=f"--gold-reward-model {unusable}: .*{line}"):
            demos.load_held_out(args, models.load_tokenizer(args), [])
    gold.refuse_unusable(arguments(good, gold_reward_model=str(classifier)))
    cut_policy = shutil.copytree(good, tmp_path / "policy")
    cut_weights(0.5)(cut_policy)
    args = arguments(good, dataset=data, eval_dataset=data, gold_reward_model=str(classifier), baseline=str(cut_policy))
    with pytest.raises(UserError, match=f"--baseline {cut_policy}: .*SafetensorError"):
        demos.load_held_out(args, models.load_tokenizer(args), [])


# ---- windows ----
def test_answers_must_fit_the_window(good, tmp_path):
    """Said before anything is sampled, whatever the positions."""
    data = str(make_data(tmp_path / "data.jsonl"))
    sizes = dict(dataset=data, eval_dataset=data, eval_samples=4, max_length=128, max_prompt_length=112)
    for new in (16, 17):
        args = arguments(good, max_new_tokens=new, **sizes)
        tokenizer = models.load_tokenizer(args)
        if new == 16:
            demos.load_held_out(args, tokenizer, [])
            continue
        line = "--max-new-tokens: found 17, 129 tokens with --max-prompt-length 112; expected at most 128"
        with pytest.raises(UserError, match=line):
            demos.load_held_out(args, tokenizer, [])
    with pytest.raises(UserError, match="--max-length: found 129, expected at most 128"):
        models.load_tokenizer(arguments(good, max_length=129))


# ---- architectures whose parts differ ----
def test_auto_takes_the_attention_that_a_model_has():
    args = arguments("x")
    for name, expected in {
        "llama": "sdpa",
        "gpt_neox": "sdpa",
        "gptj": "eager",
        "bloom": "eager",
        "gpt_oss": "eager",
    }.items():
        assert loading.attention(args, AutoConfig.for_model(name)) == expected
    assert loading.attention(arguments("x", attn_implementation="sdpa"), AutoConfig.for_model("gptj")) == "sdpa"


def test_training_mode_is_the_same_function(tmp_path):
    """PhiMoE has jitter and samples its experts in training mode, by names without "dropout"."""
    architectures.build("phimoe").save_pretrained(tmp_path)
    batch, model = collate(SEQUENCES, 0), models.load_model(arguments(tmp_path))
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(response_logprobs(noisy.eval(), batch)[0], response_logprobs(noisy.train(), batch)[0])
    assert torch.equal(response_logprobs(model.eval(), batch)[0], response_logprobs(noisy.eval(), batch)[0])
    expected = response_logprobs(model, batch)[0]
    for args in (arguments(tmp_path), arguments(tmp_path, gradient_checkpointing=True), arguments(tmp_path, lora_r=2)):
        trained = models.prepare_policy(args).train()
        found = response_logprobs(trained, batch)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert trained.training and not trained.eval().training


def test_gradient_checkpointing_recomputes_all_the_same(good):
    """A layer's forward runs again in the backward pass."""
    calls = {}
    for checkpointing in (False, True):
        model = models.prepare_policy(arguments(good, gradient_checkpointing=checkpointing)).train()
        layers = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=layers: seen.append(1))
        response_logprobs(model, collate(SEQUENCES, 0))  # the first pass sees what follows the head
        layers.clear()
        response_logprobs(model, collate(SEQUENCES, 0))[0].sum().backward()
        calls[checkpointing] = len(layers)
    assert calls == {False: 1, True: 2}


def test_parts_that_text_never_passes_through_stay_as_they_are(tmp_path):
    architectures.build("gemma3").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    args = arguments(tmp_path, max_length=64)
    models.load_tokenizer(args)
    for lora_r in (0, 2):
        model = models.prepare_policy(arguments(tmp_path, lora_r=lora_r))
        response_logprobs(model, collate(SEQUENCES, 0))[0].sum().backward()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert not any("vision" in n or "projector" in n for n in trained)


def test_an_invalid_generation_config_can_be_saved(tmp_path, good):
    """That of Llama 2 chat, and one whose PAD is -1: what generate() does is kept."""
    folder = shutil.copytree(good, tmp_path / "model")
    given = {
        "do_sample": False,
        "temperature": 0.9,
        "top_p": 0.6,
        "pad_token_id": -1,
        "eos_token_id": [0, 3],
        "max_length": 99,
    }
    write("generation_config.json", json.dumps(given))(folder)
    with pytest.warns(UserWarning, match="contradicts itself, left out .*temperature 0.9"):
        model = models.load_model(arguments(folder))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 3] and saved["max_length"] == 99 and not saved.get("do_sample")
    assert not {"temperature", "top_p", "pad_token_id"} & saved.keys()
    assert models.load_model(arguments(tmp_path / "saved")).generation_config.eos_token_id == [0, 3]


# ---- the first answers ----
def answers(folder, said, **given):
    args = arguments(folder, **given)
    model = models.load_model(args)
    run = SimpleNamespace(args=args, metrics={}, print=said.append)
    generator = make_generator(run, model, models.load_tokenizer(args))
    return lambda seed=0: generator.sample([x for x, _ in SEQUENCES], [0, 1], seed)


def test_the_first_answers_are_compared_once(good):
    said = []
    sample = answers(good, said)
    sample(), sample(1)
    assert len(said) == 1 and "largest difference" in said[0]


@pytest.mark.parametrize(
    ("name", "line"), [("roberta", "nats per token apart"), ("openai-gpt", "keeps no KV cache"), ("xmod", "cannot run")]
)
def test_a_sampler_that_is_not_the_scorer_stops_the_run(tmp_path, name, line):
    architectures.build(name).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    sample = answers(tmp_path, [], max_length=32, max_prompt_length=20, max_new_tokens=8)
    with pytest.raises(UserError, match=f"--model: found .*{line}") as found:
        sample()
    assert "\n" not in str(found.value)


def test_noise_in_training_mode_stops_the_run(tmp_path, monkeypatch):
    architectures.build("phimoe").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(noise, "without_noise", lambda model: model)
    with pytest.raises(UserError, match="in training mode differ from those in evaluation mode"):
        answers(tmp_path, [], max_length=48, max_prompt_length=32, max_new_tokens=8)()


def test_running_out_of_memory_is_not_taken_for_a_fault_of_the_model(good, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(generation.Generator, "_answer", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        answers(good, [])()


def test_a_saved_model_has_the_config_of_the_model_it_was_made_from(good, tmp_path):
    args = arguments(good)
    resolve_auto(args, irft.SETTINGS)
    model = models.load_model(args)
    response_logprobs(model, collate(SEQUENCES, 0))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (good / "config.json").read_text()
    scalar = rewards.load_scalar_model(args, str(good), "--reward-model", head_seed=0)
    assert scalar.model.config.use_cache is True
