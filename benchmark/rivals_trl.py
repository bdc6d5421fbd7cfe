"""TRL's side of rivals.py, run by the Python of the rivals' environment: DPOTrainer, SFTTrainer or RewardTrainer, in turns.

    python benchmark/rivals_trl.py CASE.json best|default

best: no gradient checkpointing, rows in the order in which our side trains on them, sorted by length within an update.
default: gradient checkpointing, and rows in random order, as the trainers do by themselves. Neither logs, saves or evaluates.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from turns import Clock, Turns

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
}


def text(ids: list[int]) -> str:
    """The text that the case's tokenizer turns into these ids: a word for each, `w` and its id."""
    return " ".join(f"w{i}" for i in ids)


def rows_of(case: dict) -> list[dict[str, str]]:
    """Rows as TRL reads them. Its trainers add the end of text themselves."""
    rows = [
        {"prompt": text(r["prompt_ids"]) + " ", **{k: text(r[f"{k}_ids"][:-1]) for k in ("chosen", "rejected")}}
        for r in case["rows"]
    ]
    if case["what"] == "sft":
        return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    return rows


class TakeTurns(TrainerCallback):
    """Measure `updates` optimizer steps in each turn, after the first one, which warms up and is compared."""

    def __init__(self, turns: Turns, case: dict, seen: list[float]):
        self.turns, self.case, self.seen, self.started = turns, case, seen, Clock()
        self.trainer = None

    def on_step_end(self, args, state, control, **_):
        updates, step = self.case["updates"], state.global_step
        if step == self.case["first"]:
            per_update = len(self.seen) // step
            first = {"losses": [sum(self.seen[i * per_update : (i + 1) * per_update]) for i in range(step)]}
            for kind in ("chosen", "rejected"):
                if found := self.trainer._metrics["train"].get(f"logps/{kind}"):
                    first[kind] = sum(found[:per_update]) / per_update
            self.turns.report(**first)
        elif step > self.case["first"] and (step - self.case["first"]) % updates == 0:
            self.turns.report(seconds=self.started.seconds())
        else:
            return
        if not self.turns.wait():
            control.should_training_stop = True
        self.started = Clock()


def main(case: dict, kind: str) -> None:
    turns = Turns()
    trainer_class, config_class = TRAINERS[case["what"]]
    seen: list[float] = []

    class Trainer(trainer_class):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(loss.item())  # Trainer reads it too, at every step, to leave out what is not finite
            return loss

    options = {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"} if kind == "best" else {}
    if case["what"] == "dpo":
        options |= {"precompute_ref_log_probs": True, "beta": case["beta"]}
    config = config_class(
        output_dir=str(Path(case["folder"]) / f"trl_{kind}"), use_cpu=True, bf16=case["precision"] == "bf16",
        per_device_train_batch_size=case["micro"], gradient_accumulation_steps=case["batch"] // case["micro"],
        learning_rate=case["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        max_steps=len(case["rows"]) // case["batch"], logging_strategy="no", save_strategy="no", eval_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=1, **options,
    )  # fmt: skip
    model: object = case["model"]
    if case["what"] == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(case["reward"], num_labels=1, dtype=torch.float32)
    lora = None
    if case["lora_r"]:
        lora = LoraConfig(
            r=case["lora_r"], lora_alpha=16, target_modules="all-linear",
            task_type="SEQ_CLS" if case["what"] == "reward" else "CAUSAL_LM",
        )  # fmt: skip
    callback = TakeTurns(turns, case, seen)
    trainer = Trainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows_of(case)), peft_config=lora, callbacks=[callback],
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
    )  # fmt: skip
    callback.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
