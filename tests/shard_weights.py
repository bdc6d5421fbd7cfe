"""Run by torchrun on two processes: `shard_weights.py fsdp2|zero3 plain|lora FOLDER`. Full weights of a sharded model.

They are, before and after an update, those of the same model that was never cut up; and a rank's checksum sees the update.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM

from extras.terminal import leave_ranks
from extras.vllm_engine import checksum, full_weights


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    return model


def shard(engine: str, model, lr: float):
    """(model whose parameters are shards, step(loss))"""
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for module in model.modules():
            if type(module).__name__ == "MistralDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        return model, lambda loss: (loss.backward(), optimizer.step())
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1e9,  # DeepSpeed's default is 1
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    }  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, lambda loss: (engine.backward(loss), engine.step())


def main(engine: str, kind: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = lora(plain) if kind == "lora" else plain
    ids, lr = torch.tensor([[5, 6, 7, 8]]), 0.1
    sharded, step = shard(engine, copy.deepcopy(plain), lr)
    inner = getattr(sharded, "module", sharded)  # DeepSpeed's engine is not the model
    inner = sharded if engine == "fsdp2" else inner
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=lr)
    sums = []
    for _ in range(2):
        expected, found = dict(full_weights(plain)), {k: v.clone() for k, v in full_weights(inner)}
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        local = sum(getattr(p, "ds_tensor", p).numel() for p in inner.parameters())
        assert engine == "fsdp2" or local < sum(p.numel() for p in plain.parameters())  # it really was cut up
        sums.append(checksum(inner))
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        step(sharded(input_ids=ids, labels=ids).loss)
    assert sums[0] != sums[1]
    print("equal")
    torch.distributed.destroy_process_group()
    leave_ranks(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
