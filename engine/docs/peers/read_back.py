"""Reads a trained model with `transformers` and compares its held-out loss with the one in the run's log.

    pip install torch transformers safetensors
    python read_back.py RUN HELD_OUT.txt SEQUENCE_TOKENS SEQUENCES

For a run with memory.kind = "none" and no window: `transformers` knows the weights, not the memory. Prints both losses
and fails where they differ by more than 1e-3.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

run, text, length, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(run / "model")
ids = tokenizer.encode(pathlib.Path(text).read_text(), add_special_tokens=False)
if tokenizer.eos_token_id is not None:
    ids.append(tokenizer.eos_token_id)
sequences = (len(ids) - 1) // length
count = min(count, sequences)
losses = []
with torch.no_grad():
    for i in range(count):
        start = i * sequences // count * length
        part = torch.tensor(ids[start : start + length + 1])
        logits = model(part[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, part[1:]))
found = float(torch.stack(losses).mean())
logged = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["held_out"]["loss"]
print(f"{model.config.architectures} read back: held-out loss {found:.6f}, logged {logged:.6f}")
sys.exit(abs(found - logged) > 1e-3)
