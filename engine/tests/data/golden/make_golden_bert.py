"""Writes the tiny seeded sentence encoder of `bert/` and the golden vectors of both it and all-MiniLM-L6-v2.

    pip install torch transformers safetensors tokenizers
    python make_golden_bert.py [FOLDER OF ALL-MINILM-L6-V2]

`golden.json` in `bert/`, and `minilm_l6_v2.json` where the real folder is given: texts and their vectors, mean of the
last layer's hidden states over all tokens, [CLS] and [SEP] among them, divided by its length; in `bert/` as `cls`, too,
those of the first token alone.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "The cat sat on the mat.",
    "A dog ran home!",
    "mats and cats",
    "",
    "unknownword \u4eac\u90fd cat",
    "the cat " * 40,
]
WORDS = "the a cat dog mat sat ran on home and ##s ##ed . ! , un ##known ##word".split()


def vector(model, ids, longest, pool):
    if len(ids) > longest:
        ids = ids[: longest - 1] + ids[-1:]
    with torch.no_grad():
        pooled = pool(model(torch.tensor([ids])).last_hidden_state[0])
    return [round(x, 7) for x in (pooled / pooled.norm()).tolist()]


def write(path, texts, model, tokenizer, longest, **others):
    pools = {"vectors": lambda states: states.mean(0), **others}
    golden = {
        name: [vector(model, tokenizer.encode(t).ids, longest, pool) for t in texts]
        for name, pool in pools.items()
    }
    path.write_text(json.dumps({"texts": texts, **golden}, ensure_ascii=True))


def tiny():
    folder = HERE / "bert"
    folder.mkdir(exist_ok=True)
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        type_vocab_size=2,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.3 * noise)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config.to_json_file(folder / "config.json")
    write(folder / "golden.json", TEXTS, model, tokenizer, 32, cls=lambda states: states[0])


def real(folder):
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
    write(HERE / "minilm_l6_v2.json", TEXTS, model.float().eval(), tokenizer, 256)


tiny()
if len(sys.argv) > 1:
    real(sys.argv[1])
