"""Peak memory of one training step: SFT, IRFT, and IRFT with a reference model beside it, on the same sequences.

The RFT paper's Table 2 says that Alg. 2 trains in the memory of SFT. Each case runs in a process of its own; the peak is
that of the resident set above its size before the model was made. The model is a random GPT-NeoX.

    python benchmark/memory.py
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES = {
    "sft": "SFT, 2B sequences",
    "irft": "IRFT, B pairs, stored reference log-probs",
    "irft_ref": "IRFT, B pairs, reference model in memory",
}


@dataclass
class Args:
    case: str = ""
    """one of sft, irft, irft_ref: measure it in this process; empty: all of them, a table."""
    hidden: int = 512
    """width of the model."""
    layers: int = 8
    """its depth."""
    pairs: int = 4
    """B."""
    length: int = 256
    """tokens per sequence, half of them response."""
    steps: int = 3
    """updates."""


def measure(args: Args) -> dict[str, float]:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    import irft
    import sft
    from common.data import collate
    from common.logprobs import masked_sum, response_logprobs

    def make():
        size = dict(vocab_size=4096, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8)
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=4 * args.hidden, max_position_embeddings=512, **size))

    torch.manual_seed(0)
    half = args.length // 2
    ids = torch.randint(0, 4096, (2 * args.pairs, args.length)).tolist()
    pairs = [
        {
            "prompt_ids": a[:half],
            "chosen_ids": a[half:],
            "rejected_ids": b[half:],
            "ref_chosen": -900.0,
            "ref_rejected": -900.0,
        }
        for a, b in zip(ids[::2], ids[1::2], strict=True)
    ]
    rows = [
        {"prompt_ids": p["prompt_ids"], "response_ids": p[k]} for p in pairs for k in ("chosen_ids", "rejected_ids")
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make()
    reference = make() if args.case == "irft_ref" else None
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)
    for _ in range(args.steps):
        if reference is not None:
            with torch.no_grad():
                for kind in ("chosen", "rejected"):
                    batch = collate([(p["prompt_ids"], p[f"{kind}_ids"]) for p in pairs], 0)
                    scores = masked_sum(response_logprobs(reference, batch).logprobs, batch.response_mask)
                    for pair, value in zip(pairs, scores.tolist(), strict=True):
                        pair[f"ref_{kind}"] = value
        if args.case == "sft":
            losses, _ = sft.demonstration_loss(model, rows, "cpu")
        else:
            losses, _ = irft.pair_loss(model, pairs, irft.Args(), "cpu")
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "parameters": sum(p.numel() for p in model.parameters())}


def main(args: Args) -> None:
    if args.case:
        print(json.dumps(measure(args)))
        return
    found = {}
    for case in CASES:
        words = [sys.executable, __file__, "--case", case, "--hidden", str(args.hidden), "--layers", str(args.layers)]
        words += ["--pairs", str(args.pairs), "--length", str(args.length), "--steps", str(args.steps)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['sft']['parameters'] / 1e6:.0f}M parameters, {2 * args.pairs} sequences of {args.length} tokens, float32"
    )
    print("| training step | peak, MiB | over SFT |\n|---|---|---|")
    for case, label in CASES.items():
        print(f"| {label} | {found[case]['mib']:.0f} | {found[case]['mib'] / found['sft']['mib']:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
