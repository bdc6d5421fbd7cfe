"""A run's models and pairs on the Hugging Face hub: --push-to-hub ID, or for a run that is finished: python -m extras.hub RUN ID.

ID is the policy's repository, ID-reward the reward model's, ID-pairs the data set of the pairs. New ones are private. The
token is that of the hub's client: HF_TOKEN, or what `hf auth login` has stored. It is written nowhere.
"""

import json
import re
import sys
from pathlib import Path

from common import UserError
from common.args import require

PAIR = {"prompt", "chosen", "rejected"}  # columns of a file of pairs


def check_hub(args) -> None:
    """Raise UserError for an ID that the hub does not take, and without a token, before hours of training."""
    if not hasattr(args, "push_to_hub") or not (name := args.push_to_hub):  # evaluate.py has no model to push
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(f"{name}-reward")
    except HFValidationError:
        require(False, "push_to_hub", name, "owner/name, or name")
    expected = "one: HF_TOKEN in the environment, or hf auth login"
    require(bool(get_token()), "push_to_hub", "no token for the hub", expected)


def push(folder: Path, name: str) -> list[str]:
    """Put final/, reward/ and the pairs of a run's folder on the hub -> addresses. UserError, in one line, if it fails."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not (folder / "final").is_dir():
        raise UserError(f"--push-to-hub: found no model in {folder / 'final'}, expected the folder of a finished run")
    parts = [(name, "model", folder / "final")]
    parts += [(f"{name}-reward", "model", folder / "reward")] if (folder / "reward").is_dir() else []
    parts += [(f"{name}-pairs", "dataset", folder / "generations")] if pair_files(folder / "generations") else []
    api, urls = HfApi(), []
    try:
        for repo, kind, source in parts:
            made = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
            whole = made.repo_id  # with its owner
            if api.repo_info(whole, repo_type=kind).private is False:
                print(f"--push-to-hub: {whole} was there before and is public", file=sys.stderr)
            files = pairs_of(folder, whole) if kind == "dataset" else model_of(source, whole)
            api.create_commit(whole, files, repo_type=kind, commit_message=f"Run {folder.name} of CleanIRL")
            urls.append(str(made))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(get_token() or "\0", "***")[:200]
        again = f"the run is whole in {folder}; again: python -m extras.hub {folder} {name}"
        raise UserError(f"--push-to-hub: found no way to put {name} on the hub ({reason}); {again}") from None
    return urls


def model_of(folder: Path, name: str) -> list:
    """The files of a saved model as they come to the hub: its card names the repository in place of the folder."""
    from huggingface_hub import CommitOperationAdd

    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("README.md", "manifest.json")]
    place = "/".join(map(re.escape, folder.resolve().parts[-2:]))
    card = re.sub(rf'[^\s"`]*\b{place}(?![\w/])', name, (folder / "README.md").read_text())
    added = [CommitOperationAdd(str(p.relative_to(folder)), p) for p in files]
    return [*added, CommitOperationAdd("README.md", card.encode())]


def pair_files(folder: Path) -> list[Path]:
    """Files of pairs with the same columns as the first."""
    import pyarrow.parquet as pq

    found = {path: set(pq.read_schema(path).names) for path in sorted(folder.glob("iter_*.parquet"), key=number)}
    found = {path: columns for path, columns in found.items() if columns >= PAIR}
    return [path for path, columns in found.items() if columns == next(iter(found.values()))]


def number(path: Path) -> int:
    """The outer iteration of iter_<t>.parquet."""
    return int(path.stem.rpartition("_")[2])


def pairs_of(folder: Path, name: str) -> list:
    """The run's pairs as they come to the hub, with a card."""
    from huggingface_hub import CommitOperationAdd, DatasetCardData

    run = json.loads((folder / "args.json").read_text())
    files = pair_files(folder / "generations")
    data = [{"split": "train", "path": [path.name for path in files]}]
    matter = DatasetCardData(tags=["cleanirl", run["script"]], configs=[{"config_name": "default", "data_files": data}])
    card = (
        f"---\n{matter.to_yaml()}\n---\n\n# Pairs of a run of {run['script']}.py\n\nEach file holds an outer iteration of the"
        f" run (CleanIRL), whose data were `{run['args']['dataset']}`.\n\n* `prompt`: as it came. `prompt_text`: as the model"
        " saw it.\n* `chosen`, `rejected`: the two responses. In most scripts `chosen` is the demonstration and `rejected` the"
        " policy's own answer.\n\n```python\nfrom datasets import load_dataset\n\n"
        f'pairs = load_dataset("{name}", split="train")\n```\n\n'
        "Licence: that of the demonstrations, and of the model that wrote the answers.\n"
    )
    return [*(CommitOperationAdd(path.name, path) for path in files), CommitOperationAdd("README.md", card.encode())]


if __name__ == "__main__":
    from extras import terminal

    if len(sys.argv) != 3:
        sys.exit(
            f"python -m extras.hub RUN ID: found {len(sys.argv) - 1} words, expected the folder of a run and an ID"
        )
    terminal.run(lambda: print(*push(Path(sys.argv[1]), sys.argv[2]), sep="\n"))
