"""What auto means for SmolLM2-135M: a pretrained model that two CPU cores train in minutes to an hour."""

import dataclasses

# Ours, not tuned: the embedded data, since no hub is needed for them; lengths that hold their rows; rates as they are usual for
# models of this size; numbers of rows and answers for two cores in bf16 (241 training tokens/s, 1 pair/s).
ROW = dict(
    dataset="pydoc", max_samples=400, preference_dataset="pydoc", max_preferences=400, prompts="demonstrations",
    eval_samples=100, max_length=256, max_new_tokens=48, batch_size=16, per_device_train_batch_size=4,
    per_device_eval_batch_size=16, learning_rate=5e-6, later_learning_rate=1e-6, lr_scheduler_type="linear", sft_epochs=1,
    sft_learning_rate=2e-5, reward_model="", reward_learning_rate=2e-5, policy_objective="dpo", num_generations=4,
    total_prompts=80, total_episodes=320, rollout_batch_size=32, value_warmup_ratio=0.125, eval_updates=5,
    eval_temperature=0.7,
)  # fmt: skip


def row(cls, **own) -> dict:
    """Row of SETTINGS of the script with the flags `cls`, a dataclass: its flags that are auto by default. own: other values."""
    automatic = {f.name for f in dataclasses.fields(cls) if f.default == "auto"}
    return {name: value for name, value in (ROW | own).items() if name in automatic}
