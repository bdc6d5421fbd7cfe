"""A known reward that stands for the truth, a baseline policy, and an expert model."""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import UserError, models
from common.data import Frame, render_prompt, respond, tokenise, tokenise_prompts
from common.demos import EVAL_SEED
from common.evals import pairwise_wins, sample_rows, sampled_texts
from common.generation import make_generator
from common.rewards import load_scalar_model
from extras import loading
from extras.cache import cache_folder, cached
from extras.templates import end_texts, read_frame, without_end

# ---- a gold reward model: text in, since its tokenizer is its own ----
FLAG = "--gold-reward-model"
BEAVER = ("BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:")  # the prompt format of safe-rlhf


def refuse_unusable(args) -> None:
    """UserError for a --baseline or a --gold-reward-model that cannot be loaded: weights missing or cut short, no tokenizer,
    no scalar head. Does nothing without these flags."""
    if args.baseline:
        models.load_tokenizer(args, args.baseline, "--baseline")
        models.load_model(args, args.baseline, "--baseline", only_check=True)
        models.check_window(args, args.baseline, "--baseline")
    if not args.gold_reward_model:
        return
    models.read_tokenizer(args.gold_reward_model, args.trust_remote_code, FLAG)
    load_scalar_model(args, args.gold_reward_model, FLAG, only_check=True)


def is_beaver(name: str) -> bool:
    return Path(name).name.startswith("beaver")


def render_gold(name: str, tokenizer, prompt) -> str:
    """The prompt as the gold model expects it: safe-rlhf's format for beaver, else chat template or plain template."""
    if not is_beaver(name):
        return render_prompt(tokenizer, prompt)
    begin, user, assistant = BEAVER
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    text = begin
    for turn in turns:
        text += (
            user.format(turn["content"]) + assistant
            if turn["role"] == "user"
            else turn["content"] + tokenizer.eos_token
        )
    return text


class GoldReward:
    """--gold-reward-model, loaded for as long as this object lives. A prompt too long for its window loses its beginning."""

    def __init__(self, run):
        self.run, self.name = run, run.args.gold_reward_model
        self.scalar = models.for_inference(run, load_scalar_model(run.args, self.name, FLAG))

    def score(
        self, rows: list[dict], responses: list[str], finished: list[bool], advance=lambda n: None
    ) -> list[float]:
        """Score of each response to its row's prompt, shared over ranks; EOS ends those that are finished."""
        sequences = gold_sequences(self.run.args, rows, responses, finished, self.scalar.model.config)
        return self.run.map_sequences(sequences, lambda batch: self.scalar(batch).tolist(), advance)


def gold_sequences(
    args, rows: list[dict], responses: list[str], finished: list[bool], config
) -> list[tuple[list[int], list[int]]]:
    """[(prompt ids, response ids)] in the gold model's tokens, cut to its window; the end of a turn after finished responses.

    A response that its sampler was cut in has no end, as in the policy's own tokens; one without any text has the end alone.
    """
    name = args.gold_reward_model
    tokenizer = models.read_tokenizer(name, args.trust_remote_code, FLAG)
    texts = []
    for row in rows:
        try:
            texts.append(render_gold(name, tokenizer, row["prompt"]))
        except UserError as error:
            raise UserError(f"{FLAG} {name}: row {row['row']}: {error}") from None
    prompts, ends = tokenise_prompts(tokenizer, texts), end_texts(tokenizer)
    bare = [without_end(t, ends) for t in responses]
    frame = Frame(end=tokenizer.eos_token_id) if is_beaver(name) else read_frame(tokenizer)
    alone = tokenise(tokenizer, bare, split_special=True)  # for an answer, such as an empty one, that none follow
    window = getattr(models.text_config(config), "max_position_embeddings", None) or 4096
    out, answers = [], respond(tokenizer, texts, bare, finished, frame)
    for prompt, answer, own, done in zip(prompts, answers, alone, finished, strict=True):
        answer = (own + [frame.end] * (done or not own) if answer is None else answer)[: window - 1]
        out.append((prompt[-(window - len(answer)) :], answer))
    return out


def cached_gold_scores(run, rows: list[dict], responses: list[str], block: int = 4096) -> list[float]:
    """Gold scores of responses to rows through the user's cache folder; a row's response_finished says if it is False."""
    config = models.load_config(run.args.gold_reward_model, run.args.trust_remote_code, FLAG)
    precision = [run.args.dtype, run.accelerator.mixed_precision]
    path = cache_file("gold", run.args.gold_reward_model, config.to_json_string(use_diff=False), precision)
    finished = [r.get("response_finished", True) for r in rows]
    asked = zip(rows, responses, finished, strict=True)
    pairs = (json.dumps([r["prompt"], t] + ([] if done else ["unfinished"])) for r, t, done in asked)
    keys = [hashlib.sha256(p.encode()).hexdigest() for p in pairs]
    gold = functools.cache(lambda: GoldReward(run))  # loaded if a score is missing

    def work(part: list[int], advance) -> list[float]:
        return gold().score([rows[i] for i in part], [responses[i] for i in part], [finished[i] for i in part], advance)

    return cached(run, path, keys, work, "gold scores of demonstrations", block)


def cache_file(kind: str, model: str, *settings) -> Path:
    """Return the file that keeps a model's results under these settings. Other weights have another file."""
    name = loading.resolve_model(model)
    identity = json.dumps([kind, name, weights_identity(Path(name)), *settings])
    return cache_folder() / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.parquet"


def weights_identity(folder: Path) -> list:
    """Name, size and time of a local model's weight files; a hub model is known by its name."""
    return sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.glob("*")
        if p.suffix in (".safetensors", ".bin")
    )


def gold_columns(run, rows: list[dict], base: list[tuple[str, bool]] | None, temperature: float) -> dict[str, list]:
    """Gold rewards of demonstrations, of the reference's samples (where there are any) and of --baseline's, with the texts.

    base: [(text, ended in EOS)] of the reference's samples, or None.
    """
    samples = {} if base is None else {"base": base}
    if run.args.baseline:
        samples["baseline"] = baseline_samples(run, rows, temperature)
    columns: dict[str, list] = {f"{name}_sample": [text for text, _ in drawn] for name, drawn in samples.items()}
    gold = GoldReward(run)
    finished = [r.get("response_finished", True) for r in rows]
    columns["gold_demonstrations"] = gold.score(rows, [r["response_text"] for r in rows], finished)
    for name, drawn in samples.items():
        columns[f"gold_{name}"] = gold.score(rows, *map(list, zip(*drawn, strict=True)))
    return columns


def gold_measures(run, held, texts: list[str], finished: list[bool]) -> dict[str, np.ndarray]:
    """{name of a measure: (rows,)} of samples against the gold rewards in `held`; empty without --gold-reward-model.

    finished: whether each sample ended in EOS.
    """
    if not held.gold:
        return {}
    score = np.array(GoldReward(run).score(held.rows, texts, finished))
    columns = {"gold/score": score, "gold/demonstrations": np.array(held.gold["demonstrations"])}
    return columns | {
        f"gold/win_rate_{name}": pairwise_wins(score, np.array(values)) for name, values in held.gold.items()
    }


def baseline_samples(run, rows: list[dict], temperature: float) -> list[tuple[str, bool]]:
    """One sample of --baseline for each row, (text, ended in EOS), through its own tokenizer and template."""
    with run.phase("baseline on held-out rows", len(rows), step=0) as advance:
        return foreign_sampler(run, run.args.baseline, "--baseline", rows, temperature)(range(len(rows)), advance)


def foreign_sampler(run, name: str, flag: str, rows: list[dict], temperature: float, render=None):
    """A function (indices, advance) -> [(text, ended in EOS)]: samples of the model of that name, loaded when first called.

    render(tokenizer, row) -> the text before the response; its own template unless given. A prompt that is longer in its
    tokens than --max-prompt-length loses its beginning.
    """
    args = run.args
    render = render or (lambda tokenizer, row: render_prompt(tokenizer, row["prompt"]))

    @functools.cache
    def load():
        tokenizer = models.load_tokenizer(args, name, flag)
        models.check_window(args, name, flag)
        model = models.for_inference(run, models.load_model(args, name, flag))
        return tokenizer, make_generator(run, model, tokenizer)

    def work(indices, advance) -> list[tuple[str, bool]]:
        tokenizer, generator = load()
        texts = []
        for i in indices:
            try:
                texts.append(render(tokenizer, rows[i]))
            except UserError as error:
                raise UserError(f"{flag} {name}: row {rows[i]['row']}: {error}") from None
        prompts = tokenise_prompts(tokenizer, texts)
        asked = [
            {"row": rows[i]["row"], "prompt_ids": p[-args.max_prompt_length :]}
            for i, p in zip(indices, prompts, strict=True)
        ]
        rollout = sample_rows(run, generator, asked, EVAL_SEED, temperature, advance)
        texts = sampled_texts(tokenizer, rollout)
        return list(zip(texts, rollout.finished, strict=True))

    return work


def expert_rows(
    run,
    tokenizer,
    rows: list[dict],
    temperature: float,
    longest: Callable[[dict], int],
    frame: Frame | None = None,
    render=None,
) -> list[dict]:
    """The rows with the answers of --expert-model as demonstrations, kept in the user's cache folder; without it the rows.

    The answers' tokens are those of data.respond with `frame`, the tokenizer's own unless given, without the end of a
    turn where the expert was cut, and up to longest(row) of them. render: as in foreign_sampler. Rows with an empty answer
    are left out.
    """
    args = run.args
    if not args.expert_model:
        return rows
    sampler = foreign_sampler(run, args.expert_model, "--expert-model", rows, temperature, render)
    sizes = [temperature, args.max_prompt_length, args.max_new_tokens, args.dtype, run.accelerator.mixed_precision]
    path = cache_file("expert", args.expert_model, *sizes)
    keys = [hashlib.sha256(f"{r['row']} {r['prompt_text']}".encode()).hexdigest() for r in rows]

    def work(part: list[int], advance) -> list[dict]:
        return [{"text": text, "finished": finished} for text, finished in sampler(part, advance)]

    answers = cached(run, path, keys, work, "expert's answers", 1024)
    texts = [r["prompt_text"] for r in rows]
    written, finished = [a["text"] for a in answers], [a["finished"] for a in answers]
    ids = respond(tokenizer, texts, written, finished, frame)
    kept = [
        r | {"response_text": a["text"], "response_ids": own[: longest(r)], "response_finished": a["finished"]}
        for r, a, own in zip(rows, answers, ids, strict=True)
        if a["text"] and own
    ]
    found = f"--expert-model {args.expert_model}: found {len(rows) - len(kept)} of {len(rows)} answers empty"
    if not kept:
        raise UserError(f"{found}, expected text")
    if len(kept) < len(rows):
        warnings.warn(f"{found}: left out", stacklevel=2)
    return kept


# ---- the best demonstrations ----
def select_top(run, demonstrations: list[dict]) -> list[dict]:
    """The --select-top-k demonstrations that the gold reward scores highest, in their old order.

    RFT paper, Sec. 5.2. Ties go to the earlier row. Their ids and scores are kept in generations/selected.parquet, with
    prompt and completion columns that any script here reads as --dataset.
    """
    k = run.args.select_top_k

    def make() -> list[dict]:
        scores = cached_gold_scores(run, demonstrations, [d["response_text"] for d in demonstrations])
        best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])
        mean = sum(scores[i] for i in best) / len(best)
        found = f"mean gold score {mean:.3f} against {np.mean(scores):.3f} of all"
        run.print(f"kept {len(best)} of {len(scores)} demonstrations, {found}")
        return [
            {
                "row": d["row"], "prompt": d["prompt"], "completion": d["response_text"],
                "finished": d.get("response_finished", True), "gold_score": scores[i],
            }
            for i, d in ((i, demonstrations[i]) for i in best)
        ]  # fmt: skip

    kept = {row["row"] for row in run.stored(run.dir / "generations" / "selected.parquet", make)}
    return [d for d in demonstrations if d["row"] in kept]
