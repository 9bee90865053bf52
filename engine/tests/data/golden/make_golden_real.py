"""Writes smollm2_135m_q4_1.safetensors: golden logits of the default model, weights dequantised by `transformers`.

    pip install torch transformers safetensors gguf accelerate
    python make_golden_real.py SmolLM2-135M-Instruct-Q4_1.gguf

`ids` (t,) is the rendered chat prompt below, `logits` (vocab,) those after its last token, `greedy` (24,) the
continuation, all in float32 on the CPU.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

path = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
prompt = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(ids).logits[0, -1]
    seq = ids
    for _ in range(24):
        seq = torch.cat([seq, model(seq).logits[:, -1:].argmax(-1)], 1)
print(repr(tokenizer.decode(seq[0, ids.shape[1] :])))
save_file(
    {"ids": ids[0], "logits": logits.float().contiguous(), "greedy": seq[0, ids.shape[1] :].contiguous()},
    pathlib.Path(__file__).parent / "smollm2_135m_q4_1.safetensors",
)
