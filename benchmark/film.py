"""A world of film reviews whose reward is known: a gold reward from people's ratings, rows of prompts, and an untrained model.

The gold reward is a linear model on 1- and 2-grams, fitted by ridge regression to people's ratings of sentences about films.
It reads the answer alone. Rows are sentences of whole reviews: the first four words are the prompt, the rest is the answer.
A review is in one part only, and so is the family of a prompt where it would be held out (benchmark/families.py).

The files come from public sources: the ratings (a tab-separated table of id, rating and text) from vaderSentiment, the reviews
(a zip of pos/*.txt and neg/*.txt) from the corpora of NLTK. Neither is part of this repository.

    python benchmark/film.py --ratings movie_snippets_rated.tsv --reviews movie_reviews.zip --output-dir runs/film/world
"""

import math
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmark.families import digest, family_names  # noqa: E402
from benchmark.preferences import write_jsonl
from benchmark.tables import read_json
from common import UserError
from common.args import main
from common.store import write_json

PARTS = {"train": 0.75, "prompts": 0.15, "dev": 0.04, "held_out": 0.06}  # part -> share of the reviews
SHORTEST, LONGEST, PROMPT = 8, 28, 4  # words of a sentence, and of its prompt
TESTED = 0.2  # share of the ratings that the gold reward is tested on
RIDGE = 1.0
NORM = 25  # percentile of the norms of rated texts that is the least norm
PEAK = 80  # percentile of the answers at which the reward with an interior optimum has it
POSITIVE = 1.5  # rating above which a rated sentence is a positive demonstration
SHAPE = {  # of a GPT-NeoX
    "vocab_size": 3072,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": True,
}
TEMPLATE = (  # the answer goes on with the prompt's sentence
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@dataclass
class Args:
    ratings: str
    """table of people's ratings: id, mean rating from -4 to 4, text; separated by tabs (vaderSentiment)."""
    reviews: str
    """zip file of whole reviews, pos/*.txt and neg/*.txt, a sentence a line (corpus movie_reviews of NLTK)."""
    output_dir: str = "runs/film/world"
    """folder for gold.json, the rows of each part, and init/."""


# ---- texts ----
def plain(text: str) -> str:
    """Text in lower case without accents, with straight quotation marks."""
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("''", '"').replace("``", '"')
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def as_review(text: str) -> str:
    """The text as the reviews are written: lower case, a space around each word and each punctuation mark."""
    return " ".join(re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[^a-z0-9\s]", plain(text)))


def terms(text: str) -> list[str]:
    """The 1- and 2-grams of a text, in order; punctuation is left out."""
    words = re.findall(r"[a-z0-9]+(?:'[a-z]+)*", plain(text))
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


# ---- the gold reward ----
def weighted(text: str, idf: dict[str, float]) -> dict[str, float]:
    """{term: (1 + log count) idf} of the terms that idf knows."""
    counts = Counter(term for term in terms(text) if term in idf)
    return {term: (1 + math.log(n)) * idf[term] for term, n in counts.items()}


def features(text: str, idf: dict[str, float], least_norm: float) -> dict[str, float]:
    """tf-idf over its norm, {term: value}. The norm is at least `least_norm`, so that one strong word cannot win alone."""
    values = weighted(text, idf)
    norm = max(norm_of(values), least_norm)
    return {term: v / norm for term, v in values.items()}


def norm_of(values: dict[str, float]) -> float:
    return math.sqrt(sum(v * v for v in values.values()))


class Gold:
    """The gold reward in a folder that this file has made."""

    def __init__(self, folder: str | Path, flag: str = "--gold"):
        """UserError, which names `flag`, if the folder has no gold.json."""
        stored = read_json(Path(folder) / "gold.json", flag)
        self.idf: dict[str, float] = stored["idf"]
        self.weight: dict[str, float] = stored["weight"]
        self.bias: float = stored["bias"]
        self.least_norm: float = stored["least_norm"]
        self.peak_at: float = stored["peak_at"]

    def score(self, texts: list[str]) -> np.ndarray:
        """Predicted rating of each text, on the people's scale from -4 to 4. (texts,)"""
        each = (features(text, self.idf, self.least_norm) for text in texts)
        return np.array([self.bias + sum(self.weight[t] * v for t, v in values.items()) for values in each])

    def peak(self, texts: list[str]) -> np.ndarray:
        """A reward with an interior optimum, -(score - peak_at)^2, which no text wins by being extreme. (texts,)"""
        return -((self.score(texts) - self.peak_at) ** 2)


def fit(texts: list[str], ratings: np.ndarray) -> dict:
    """Ridge regression of ratings (texts,) on the features of texts -> the content of gold.json, without peak_at."""
    try:
        from sklearn.feature_extraction import DictVectorizer
        from sklearn.linear_model import Ridge
    except ImportError:
        raise UserError("--ratings: found no scikit-learn, expected it: pip install -r requirements/dev.txt") from None
    counts = Counter(term for text in texts for term in set(terms(text)))
    idf = {term: math.log(len(texts) / n) + 1 for term, n in sorted(counts.items()) if n > 1}
    least_norm = float(np.percentile([norm_of(weighted(text, idf)) for text in texts], NORM))
    vectors = DictVectorizer()
    values = vectors.fit_transform([features(text, idf, least_norm) for text in texts])
    model = Ridge(alpha=RIDGE).fit(values, ratings)
    weight = dict(zip(vectors.get_feature_names_out().tolist(), model.coef_.tolist(), strict=True))
    return {"bias": float(model.intercept_), "least_norm": least_norm, "idf": idf, "weight": weight}


def make_gold(folder: Path, rated: list[tuple[str, float]], answers: list[str], reviews: list[dict]) -> Gold:
    """Fit gold.json on a part of the ratings and print what it is worth on the rest, and on whole reviews.

    rated: (text, rating). answers: those whose percentile is the place of the interior optimum.
    """
    order = np.random.default_rng(0).permutation(len(rated))
    tested = int(TESTED * len(rated))
    test, train = [rated[i] for i in order[:tested]], [rated[i] for i in order[tested:]]
    stored = fit([text for text, _ in train], np.array([rating for _, rating in train]))
    write_json(folder / "gold.json", {**stored, "peak_at": 0.0})
    gold = Gold(folder)
    scores = gold.score(answers)
    write_json(folder / "gold.json", {**stored, "peak_at": float(np.percentile(scores, PEAK))})
    texts, people = [text for text, _ in test], np.array([rating for _, rating in test])
    found, whole = gold.score(texts), gold.score([r["text"] for r in reviews])
    liked = np.array([r["positive"] for r in reviews])
    said = {
        "ratings it is fitted on": len(train),
        "ratings it is tested on": len(test),
        "correlation with people": np.corrcoef(found, people)[0, 1],
        "sign as people's": np.mean((found > 0) == (people > 0)),
        "whole reviews on the right side of the median": np.mean((whole > np.median(whole)) == liked),
        "correlation with words, ratings": np.corrcoef(found, [len(t.split()) for t in texts])[0, 1],
        "correlation with words, answers": np.corrcoef(scores, [len(t.split()) for t in answers])[0, 1],
        "mean of answers": scores.mean(),
        "sd of answers": scores.std(),
    }
    for name, value in said.items():
        print(f"gold: {name}: {value:.3f}" if isinstance(value, float) else f"gold: {name}: {value}")
    write_json(folder / "gold_report.json", {name: float(value) for name, value in said.items()})
    return Gold(folder)


# ---- rows ----
def read_ratings(path: str) -> list[tuple[str, float]]:
    """(text, rating) of each rated sentence. UserError if there is no such table."""
    source = "a table of id, rating and text, such as vaderSentiment's movieReviewSnippets_GroundTruth.txt"
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        rows = [line.split("\t") for line in lines if line.strip()]
        rated = {text.strip(): float(rating) for _, rating, text in rows}
    except (OSError, ValueError) as error:
        raise UserError(f"--ratings: found {path} ({error}), expected {source}") from None
    if len(rated) < 10:
        raise UserError(f"--ratings: found {len(rated)} rows in {path}, expected 10 or more: {source}")
    return list(rated.items())


def read_reviews(path: str) -> list[dict]:
    """{name, positive, text} of each review. UserError if there is no such zip file."""
    source = "a zip file with pos/*.txt and neg/*.txt, such as the corpus movie_reviews of NLTK"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if re.search(r"(^|/)(pos|neg)/[^/]+\.txt$", n)]
            texts = [archive.read(n).decode("latin-1") for n in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--reviews: found {path} ({error}), expected {source}") from None
    if not names:
        raise UserError(f"--reviews: found no review in {path}, expected {source}")
    return [{"name": n, "positive": "pos/" in n, "text": t} for n, t in zip(names, texts, strict=True)]


def part_of(name: str) -> str:
    """The part of a review, by a hash of its name."""
    place = int.from_bytes(digest(Path(name).name, "film")[:4]) / 2**32
    ends = np.cumsum(list(PARTS.values()))
    return list(PARTS)[min(int(np.searchsorted(ends, place, side="right")), len(PARTS) - 1)]


def as_row(sentence: str) -> dict | None:
    """{prompt, completion} of a sentence in the reviews' form, or None if it is too short or too long."""
    words = sentence.split()
    if not SHORTEST <= len(words) <= LONGEST:
        return None
    return {"prompt": " ".join(words[:PROMPT]), "completion": " ".join(words[PROMPT:])}


def split(reviews: list[dict]) -> dict[str, list[dict]]:
    """{part: its rows}. Sentences are there once. No family of prompts is in a part for training and in another one."""
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    seen = set()
    for review in reviews:
        for line in review["text"].splitlines():
            sentence = as_review(line)
            row = as_row(sentence)
            if row and sentence not in seen:
                seen.add(sentence)
                parts[part_of(review["name"])].append(row)
    every = [(part, row) for part, rows in parts.items() for row in rows]
    names = family_names([row["prompt"] for _, row in every])
    known = {name for (part, _), name in zip(every, names, strict=True) if part in ("train", "prompts")}
    apart = [name not in known or part in ("train", "prompts") for (part, _), name in zip(every, names, strict=True)]
    return {part: [row for (p, row), own in zip(every, apart, strict=True) if p == part and own] for part in PARTS}


def positive_rows(rated: list[tuple[str, float]]) -> dict[str, list[dict]]:
    """Rows of the sentences that people rated above POSITIVE, as demonstrations: {train: 3 in 5 of them, held_out: the rest}."""
    rows = [as_row(as_review(text)) for text, rating in rated if rating > POSITIVE]
    parts: dict[str, list[dict]] = {"positive_train": [], "positive_held_out": []}
    for row in rows:
        if row:
            first = digest(row["prompt"], "positive")[0] < 0.6 * 256
            parts["positive_train" if first else "positive_held_out"].append(row)
    return parts


# ---- the model ----
def make_model(folder: Path, texts: list[str]) -> int:
    """A byte-level BPE of the texts and a GPT-NeoX with random weights, in one folder. Returns the number of weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def make(args: Args) -> None:
    rated, reviews = read_ratings(args.ratings), read_reviews(args.reviews)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(reviews)
    for part, rows in {**parts, **positive_rows(rated)}.items():
        write_jsonl(folder / f"{part}.jsonl", rows)
        print(f"{part}.jsonl: {len(rows)} rows")
        if not rows:
            raise UserError(
                f"--reviews: found no rows for {part}.jsonl in {len(reviews)} reviews, expected more reviews"
            )
    make_gold(folder, rated, [row["completion"] for row in parts["train"]], reviews)
    weights = make_model(folder / "init", [f"{row['prompt']} {row['completion']}" for row in parts["train"]])
    print(f"init: {weights:,} weights, untrained")


if __name__ == "__main__":
    main(lambda: make(tyro.cli(Args, description=__doc__)))
