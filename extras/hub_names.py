"""Names of data sets on the hub: short ones, those with a revision, those that are streamed."""

import re
from dataclasses import dataclass
from pathlib import Path

DATASETS = {  # short name -> (hub id, configuration, training split, held-out split); a local path of the name wins
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft"),
    "ultrafeedback_binarized": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, "train", "test"),
    "tldr-sft": ("vwxyzjn/summarize_from_feedback_tldr_3_filtered", None, "train", "validation"),
    "tldr-preferences": ("vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144", None, "train", "validation"),
    "spin_iter0": ("UCLA-AGI/SPIN_iter0", None, "train", "test"),
}
STREAM = "stream:"  # before the name of a hub set that is read only as far as its rows are needed
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A hub set as its name says it: stream:owner/name@revision. config, train and test: of the table, else None."""

    id: str
    revision: str | None
    streamed: bool
    config: str | None = None
    train: str | None = None
    test: str | None = None


def hub_name(name: str) -> HubName:
    """What the name of a hub set says; a short name may have a revision, too."""
    bare, _, revision = name.removeprefix(STREAM).partition("@")
    streamed = name.startswith(STREAM) and not Path(name).exists()
    hub, *rest = DATASETS.get(bare, (bare,))
    return HubName(hub, revision or None, streamed, *rest)


def cached_commit(kind: str, name: str, revision: str = "main") -> str:
    """Commit of a hub repository's revision as the hub's cache on this machine has it; empty if it is not there.

    kind: models or datasets. The hub's client notes the commit there whenever it reads a repository's card or config.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if COMMIT.fullmatch(revision):
        return revision
    ref = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else ""
