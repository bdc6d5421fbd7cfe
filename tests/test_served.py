"""Saved models as others use them: the prompts of a chat server, the card, the hub."""

import json
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, ZEPHYR_TEMPLATE, child_environment, make_model, make_tokenizer, transformers_server
from hub import TOKEN, Hub
from test_data import BARE, CHATML, PHI, byte_level, sentencepiece, tokenizer_with_bos
from transformers import AutoModelForCausalLM, AutoTokenizer

import irft
import tiny
from common import UserError
from common.data import encode, render_prompt
from common.models import load_tokenizer
from common.store import read_pairs, write_manifest, write_pairs
from extras import card, curves, ending, hub, templates

USER, ASSISTANT = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a list"}
SYSTEM = {"role": "system", "content": "be kind"}
PROMPTS = [
    "open it",
    "two\n\nlines\n",
    [USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER],
    [{"role": "tool", "content": "x"}, USER],
]
TOKENIZERS = {
    "plain": lambda: make_tokenizer(),
    "plain with bos": lambda: tokenizer_with_bos(),
    "plain, bos unused": lambda: tokenizer_with_bos(adds=False),
    "plain, sentencepiece": lambda: sentencepiece(),
    "plain, space first": lambda: byte_level(prefix=True),
    "zephyr": lambda: make_tokenizer(chat_template=ZEPHYR_TEMPLATE),
    "zephyr with bos": lambda: tokenizer_with_bos(chat_template=ZEPHYR_TEMPLATE),
    "zephyr, sentencepiece": lambda: sentencepiece(template=ZEPHYR_TEMPLATE),
    "bos in the template": lambda: tokenizer_with_bos(chat_template="{{ bos_token }}" + ZEPHYR_TEMPLATE),
    "chatml": lambda: byte_level(template=CHATML, special=("<|im_start|>", "<|im_end|>")),
    "phi": lambda: byte_level(template=PHI, special=("<|end|>", "<|user|>", "<|assistant|>")),
    "bare": lambda: make_tokenizer(chat_template=BARE),
    "two templates": lambda: tokenizer_with_bos(chat_template={"default": ZEPHYR_TEMPLATE, "tool_use": CHATML}),
}


def saved(tokenizer, folder):
    templates.save_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def rows_of(tokenizer) -> list[dict]:
    rows = [{"row": i, "prompt": p, "response": "Answer it", "rejected": "no"} for i, p in enumerate(PROMPTS)]
    return encode(rows, tokenizer, 400, 300)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chat_server_sends_the_tokens_of_training(tmp_path, name):
    """apply_chat_template of the saved tokenizer, as chat servers call it, gives the ids that training used."""
    tokenizer = TOKENIZERS[name]()
    own, trained = tokenizer.chat_template, rows_of(tokenizer)
    again = saved(tokenizer, tmp_path / "saved")
    assert tokenizer.chat_template == own and len(trained) >= len(PROMPTS) - 1
    for row in trained:
        prompt = PROMPTS[row["row"]]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        ids = again.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == row["prompt_ids"], prompt


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_model_that_is_trained_further_sees_the_same_tokens(tmp_path, name):
    """Rows by the saved tokenizer are those by the first one; so they are by a tokenizer that is saved twice."""
    tokenizer = TOKENIZERS[name]()
    once = saved(tokenizer, tmp_path / "once")
    twice = saved(once, tmp_path / "twice")
    keys = ("row", "prompt_ids", "response_ids", "rejected_ids")
    first, second, third = ([{k: row[k] for k in keys} for row in rows_of(t)] for t in (tokenizer, once, twice))
    assert first == second == third and once.chat_template == twice.chat_template
    assert templates.read_frame(tokenizer).end == templates.read_frame(once).end


def test_the_plain_template_writes_an_exchange_as_training_does(tmp_path):
    """With the answer: its tokens and its end follow, as a trainer of TRL would render it."""
    tokenizer = tokenizer_with_bos()
    again = saved(tokenizer, tmp_path)
    for row in rows_of(tokenizer)[:4]:
        prompt = PROMPTS[row["row"]]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        whole = again.apply_chat_template([*messages, {"role": "assistant", "content": "Answer it"}], return_dict=False)
        assert whole == row["prompt_ids"] + row["response_ids"]
    frame, before = templates.read_frame(again), templates.read_frame(tokenizer)
    assert frame == before.__class__(**{**vars(before), "before": "<s>" + before.before})


def test_the_papers_template_is_saved_for_a_model_that_has_another(tmp_path):
    make_model(tmp_path / "model", tokenizer=tokenizer_with_bos(chat_template=ZEPHYR_TEMPLATE))
    args = SimpleNamespace(model=str(tmp_path / "model"), trust_remote_code=False, template="paper", max_length=96)
    tokenizer = load_tokenizer(args)
    again = saved(tokenizer, tmp_path / "saved")
    ids = again.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert again.decode(ids) == "<s>### Instruction: what is it?\n\n### Response: "
    assert render_prompt(again, "what is it?") == "<s>" + render_prompt(tokenizer, "what is it?")


# ---- a server ----
@pytest.mark.slow
def test_transformers_serve_answers_the_prompt_of_training(tmp_path):
    """Its greedy answer to messages is that of the model to the ids of training, and it counts as many prompt tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.MODEL), AutoTokenizer.from_pretrained(tiny.MODEL)
    place = tmp_path / "model"
    model.save_pretrained(place)
    templates.save_tokenizer(tokenizer, place)
    question = "def total(values):\n    return sum(values)"
    (row,) = encode([{"row": 0, "prompt": question, "response": "x"}], tokenizer, 200, 150)
    ids = torch.tensor([row["prompt_ids"]])
    whole = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    with transformers_server(place, tmp_path / "log") as url:
        asked = {
            "model": str(place),
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 12,
        }
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        reply = json.loads(urllib.request.urlopen(request, timeout=900).read())
    assert reply["choices"][0]["message"]["content"].strip() == expected.strip() != ""
    assert reply["usage"]["prompt_tokens"] == len(row["prompt_ids"])


# ---- the card ----
def run_of(folder, **given) -> SimpleNamespace:
    """What model_card reads of a run."""
    args = irft.Args(
        model="EleutherAI/pythia-70m", dataset="HuggingFaceH4/ultrachat_200k@main:0.5 own.jsonl:0.5", lora_r=0
    )
    for name, value in given.items():
        setattr(args, name, value)
    rows = [{"eval/nll": 3.0}, {"eval/nll": 2.5, "eval/rouge_l": None, "step": 3}]
    metrics = {"eval/nll": "mean | nats", "eval/rouge_l": "ROUGE-L"}
    return SimpleNamespace(args=args, script="irft", metrics=metrics, is_main=True, logged=lambda: rows, dir=folder)


def card_of(folder, tokenizer, saved_model, **given):
    from huggingface_hub import ModelCard

    text = card.model_card(run_of(folder, **given), "IRFT", "arXiv:2405.17888", "A note.\n\n", "", "eval/nll")
    (folder / "final").mkdir(parents=True)
    card.write_card(folder / "final", folder / "final", text, tokenizer, saved_model)
    return ModelCard.load(folder / "final" / "README.md")


class GPTNeoXForSequenceClassification:
    """A reward model, by its name."""


def test_the_card_says_what_a_reader_of_the_hub_looks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["irft.py", "--dataset", "a b"])
    found = card_of(tmp_path, make_tokenizer(chat_template=ZEPHYR_TEMPLATE), object())
    data = found.data
    assert data.base_model == "EleutherAI/pythia-70m" and data.datasets == ["HuggingFaceH4/ultrachat_200k"]
    assert data.library_name == "transformers" and data.tags == ["cleanirl", "irft"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("eval/nll", 2.5)
    text = found.text
    assert (
        "| eval/nll | 2.5 | mean \\| nats |" in text
        and "eval/rouge_l" not in text
        and "python irft.py --dataset 'a b'" in text
    )
    assert "<|user|>\nWhat is two plus two?</s>\n<|assistant|>\n" in text and "Licence: that of the base model" in text
    place = str(tmp_path / "final")
    assert f'pipeline("text-generation", model="{place}")' in text and f"transformers serve {place} --port 8000" in text
    assert f"vllm serve {place}" in text


def test_the_card_of_a_reward_model_shows_how_to_score(tmp_path):
    found = card_of(tmp_path, make_tokenizer(), GPTNeoXForSequenceClassification())
    assert "AutoModelForSequenceClassification" in found.text and "pipeline(" not in found.text
    assert "### Instruction: What is two plus two?\n\n### Response: " in found.text


def test_the_base_is_the_models_hub_id_over_all_runs_in_between(tmp_path, monkeypatch):
    """And its licence is that of its card, where that is known."""
    monkeypatch.setattr(card, "cached_card", lambda hub: str(tmp_path / "pythia.md") if "pythia" in hub else "")
    (tmp_path / "pythia.md").write_text("---\nlicense: apache-2.0\n---\n\n# Pythia\n")
    assert card.base_of("pythia-70m") == ("EleutherAI/pythia-70m", "apache-2.0")
    assert card.base_of("someone/other") == ("someone/other", "") and card.base_of("tiny") == ("", "")
    assert card.base_of("./missing/model") == ("", "")
    for run, model in (("one", "pythia-70m"), ("two", str(tmp_path / "one" / "final"))):
        (tmp_path / run / "final").mkdir(parents=True)
        (tmp_path / run / "args.json").write_text(json.dumps({"args": {"model": model}}))
    assert card.base_of(str(tmp_path / "two" / "final")) == ("EleutherAI/pythia-70m", "apache-2.0")
    copied = tmp_path / "copy"
    copied.mkdir()
    assert card.base_of(str(copied)) == ("", "")
    (copied / "README.md").write_text("---\nbase_model: a/b\nlicense: mit\n---\n")
    assert card.base_of(str(copied)) == ("a/b", "mit")
    for broken in ("no front matter", "---\n: [\n---\n", "---\n- 1\n---\n", "---\nbase_model: [a, b]\n---\n"):
        (copied / "README.md").write_text(broken)
        assert card.base_of(str(copied)) == ("", "")
    found = card_of(
        tmp_path / "run", make_tokenizer(), object(), model=str(tmp_path / "two" / "final"), dataset="pydoc"
    )
    assert (
        found.data.base_model == "EleutherAI/pythia-70m"
        and found.data.license == "apache-2.0"
        and not found.data.datasets
    )


# ---- the hub ----
@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, as far as the hub is concerned."""
    folder = tmp_path / "runs" / "x"
    for name in ("final", "reward"):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"model_type": name}))
        (folder / name / "sub" / "weights.bin").write_bytes(bytes(range(256)) * 40)
        (folder / name / "README.md").write_text(
            f'---\ntags: [x]\n---\n\nfrom runs/y/{name}\nvllm serve {folder / name}\n"runs/x/{name}"\n'
        )
        write_manifest(folder / name)
    (folder / "args.json").write_text(json.dumps({"script": "irft", "args": {"dataset": "pydoc"}}))
    (folder / "generations").mkdir()
    for t in (0, 10, 2):
        pairs = [{"prompt": "p", "chosen": f"c{t}", "rejected": "r"}]
        write_pairs(folder / "generations" / f"iter_{t}.parquet", pairs)
    write_pairs(folder / "generations" / "iter_11.parquet", [{"prompt": "p", "response": "no pair"}])
    write_pairs(folder / "generations" / "selected.parquet", [{"row": 1}])
    return folder


def push(hub: Hub, folder, name: str, token: str):
    online = child_environment(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=token)
    online |= {"HF_HOME": str(folder.parent / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, "-m", "extras.hub", str(folder), name]
    return subprocess.run(words, cwd=ROOT, env=online, capture_output=True, text=True, check=False)


def test_models_and_pairs_of_a_run_are_put_on_the_hub_in_private(finished):
    with Hub() as hub:
        done = push(hub, finished, "me/policy", TOKEN)
        assert done.returncode == 0, done.stderr
        assert hub.private == {
            ("model", "me/policy"): True, ("model", "me/policy-reward"): True, ("dataset", "me/policy-pairs"): True,
        }  # fmt: skip
        assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.stdout + done.stderr
        for name, part in (("me/policy", "final"), ("me/policy-reward", "reward")):
            _, files = hub.at("model", name, "main")
            assert files.keys() == {"config.json", "sub/weights.bin", "README.md"}
            assert files["sub/weights.bin"] == (finished / part / "sub" / "weights.bin").read_bytes()
            assert json.loads(files["config.json"]) == {"model_type": part}
            assert (
                f"vllm serve {name}\n" in files["README.md"].decode()
                and str(finished) not in files["README.md"].decode()
            )
        _, files = hub.at("dataset", "me/policy-pairs", "main")
        assert files.keys() == {"iter_0.parquet", "iter_2.parquet", "iter_10.parquet", "README.md"}
        (finished / "back.parquet").write_bytes(files["iter_10.parquet"])
        assert read_pairs(finished / "back.parquet")[0]["chosen"] == "c10"
        front = card.yaml_of(files["README.md"].decode())
        assert front["configs"][0]["data_files"][0]["path"] == ["iter_0.parquet", "iter_2.parquet", "iter_10.parquet"]
        assert len(done.stdout.split()) == 3 and all(url.startswith(hub.url) for url in done.stdout.split())
        hub.private["model", "me/policy"] = False
        again = push(hub, finished, "me/policy", TOKEN)  # what is there gets a new commit
        assert again.returncode == 0 and "me/policy was there before and is public" in again.stderr
        assert len(hub.commits["model", "me/policy"]) == 3


def test_a_hub_that_refuses_is_one_line_without_the_token(finished):
    wrong = "hf_" + "wrong" * 6
    with Hub() as hub:
        done = push(hub, finished, "me/policy", wrong)
        assert done.returncode and not hub.commits and wrong not in done.stdout + done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: --push-to-hub: found no way to put me/policy on the hub (") and "401" in line
        assert f"again: python -m extras.hub {finished} me/policy" in line


def test_a_push_is_checked_before_the_run(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub.check_hub(SimpleNamespace(push_to_hub=""))
    for name, words in (
        ("me/policy", "found no token for the hub, expected one: HF_TOKEN"),
        ("a/b/c", "found a/b/c, expected owner"),
    ):
        with pytest.raises(UserError, match=f"--push-to-hub: {words}"):
            hub.check_hub(SimpleNamespace(push_to_hub=name))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    hub.check_hub(SimpleNamespace(push_to_hub="me/policy"))


def test_a_run_that_ends_is_pushed_by_one_process(finished, monkeypatch, tmp_path):
    pushed, said = [], []
    monkeypatch.setattr(hub, "push", lambda folder, name: pushed.append((folder, name)) or ["url"])
    monkeypatch.setattr(curves, "draw_run", lambda run: run.dir / "curves.png")
    monkeypatch.setattr(ending, "commands", lambda run, samples: [])
    stopped = tmp_path  # by --stop-after: it has no model yet
    for is_main, name, folder in (
        (True, "", finished), (False, "me/policy", finished), (True, "me/policy", stopped), (True, "me/policy", finished),
    ):  # fmt: skip
        given = SimpleNamespace(push_to_hub=name)
        ending.finish(SimpleNamespace(args=given, is_main=is_main, dir=folder, print=said.append))
    assert pushed == [(finished, "me/policy")] and said[-1] == "pushed: url" and "".join(said).count("pushed: ") == 1
    ending.finish(
        SimpleNamespace(args=SimpleNamespace(), is_main=True, dir=finished, print=said.append)
    )  # without the flag
    with pytest.raises(UserError, match="found no model in .*never/final, expected the folder of a finished run"):
        monkeypatch.undo()
        hub.push(finished.parent / "never", "me/policy")
