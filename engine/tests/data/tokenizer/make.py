"""Makes the tokenizer fixtures beside this file: three small tokenizer.json and goldens.json.

    pip install tokenizers==0.23.* regex gguf && python make.py SmolLM2-135M-Instruct-Q4_1.gguf

The argument is optional; with it the goldens of that model's own vocabulary are made anew.

Each golden is encoded twice, by the `tokenizers` package and by the plain reference below
(the `regex` package and a textbook BPE loop); the script fails where the two disagree.
"""

import json
import pathlib
import sys
import unicodedata

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent

CORPUS = """The hotel in Kyoto was booked for the third of May, and we'll arrive by train from Osaka.
She said that she'd rather walk; they're tired, I'm not, you've seen it, he's late, it doesn't matter.
WE'LL SEE WHAT THEY'RE DOING, HE SAID, AND IT'S ALL THE SAME TO ME, SHE'D SAID.
In 1984 there were 12,345 people; in 2026 there are 67890 of them, or 3.14159 times as many.
def encode(text):\n    return [token for token in text.split()]\n\n    # two blanks before\n\tif x == 10:\r\n\t\treturn {}
Der Zug fährt über die Brücke nach Köln, größer und schöner. L'été dernier, nous étions à Paris, où ça allait.
Москва и Санкт-Петербург: в городе было тепло. Η Αθήνα είναι μεγάλη πόλη. 東京と京都へ行きました。北京和上海都很大。
서울은 한국의 수도입니다. مرحبا بالعالم. שלום עולם. नमस्ते दुनिया। สวัสดีชาวโลก 👩‍👩‍👧‍👦 👍🏽 🇯🇵 ❤️
""" * 3

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool_call>"]
# In the vocabulary, but made by no merge: only `ignore_merges` reaches them.
UNREACHABLE = ["Ġcounterrevolutionary", "XYZZY"]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading blanks and trailing  ",
    "\ttab\tthen\t\ttwo",
    "line\nfeed\r\ncarriage\r\n\r\nblank line\n\n\n",
    "   \n  \n x",
    "I'm you're HE'S WE'LL THEY'VE she'D don'T 'tis 'S",
    "it'ſ a long s",
    "1 12 123 1234 12345 1234567890",
    "3.14159, 1,000,000 and 1e-9",
    "٠١٢٣ ४५६ ೭೮ 一二三 Ⅷ ½ ² ⑨ 𝟙𝟚",
    "the counterrevolutionary XYZZY",
    "XYZZY",
    "café cafe\u0301 \u212b ﬁ",
    "ñ n\u0303 한국 \u1112\u1161\u11ab",
    "Москва и Αθήνα",
    "東京と京都へ行きました。",
    "مرحبا بالعالم שלום",
    "नमस्ते दुनिया สวัสดี",
    "👩‍👩‍👧‍👦 👍🏽 🇯🇵 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "a\u200db\u200cc\ufeffd\u00ade",
    "non\u00a0breaking\u2003em\u3000ideographic\u0085next",
    "nul\x00bell\x07del\x7f",
    "\U0010ffff\ufffd\ue000",
    "def f(x):\n    if x == 10:\r\n\t\treturn {'a': [1, 2]}  # end",
    "https://example.org/a_b?c=d&e=%20#f",
    "!!!???...;;;---===___",
    "hotel hotel  hotel   hotel    hotel",
    " " * 200,
    "\n" * 100,
    "a" * 300,
    "7" * 100,
    "ab " * 100,
    "<|im_start|>user\nhi<|im_end|>",
    "<tool_call> and <|endoftext|><|endoftext|>",
    "<|im_start <|im_end| <|unknown|>",
]


def byte_chars():
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {b: chr(b) for b in kept}
    chars.update({b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in chars)})
    return chars


def train():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=720,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for token in UNREACHABLE + USER_DEFINED:
        vocab[token] = len(vocab)
    return vocab, [tuple(merge) for merge in model["merges"]]


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def build(pre, vocab, merges, added=True):
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
    elif pre == "llama-bpe":
        tokenizer.pre_tokenizer = split_then_bytes(LLAMA_SPLIT)
        tokenizer.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = split_then_bytes(QWEN2_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    if not added:
        return tokenizer
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in USER_DEFINED])
    return tokenizer


def reference(pre, vocab, merges, text):
    """The ids of `text`, no added token parsed."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    chars = byte_chars()
    if pre == "smollm":
        # A digit is a piece of its own; what is left between digits goes through GPT-2's pattern.
        parts = regex.findall(r"\p{N}|\P{N}+", text)
        pieces = [piece for part in parts for piece in regex.findall(GPT2_SPLIT, part)]
    elif pre == "llama-bpe":
        pieces = regex.findall(LLAMA_SPLIT, text)
    else:
        pieces = regex.findall(QWEN2_SPLIT, unicodedata.normalize("NFC", text))
    ids = []
    for piece in pieces:
        word = [chars[b] for b in piece.encode()]
        if pre == "llama-bpe" and "".join(word) in vocab:
            ids.append(vocab["".join(word)])
            continue
        while len(word) > 1:
            rank, at = min((ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(word, word[1:])))
            if rank == 1 << 30:
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        ids.extend(vocab[part] for part in word)
    return ids


def make_smollm2(goldens, path):
    """The ids of the real vocabulary, read from a GGUF file."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    vocab = {token: id for id, token in enumerate(tokens)}
    missing = [b for b, char in byte_chars().items() if char not in vocab]
    print("bytes without a token:", [f"{b:02x}" for b in missing])
    plain = build("smollm", vocab, merges, added=False)
    for golden in goldens:
        ids = plain.encode(golden["text"], add_special_tokens=False).ids
        assert ids == reference("smollm", vocab, merges, golden["text"]), golden
    lines = [json.dumps(plain.encode(g["text"]).ids, separators=(",", ":")) for g in goldens]
    (HERE / "smollm2.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main():
    vocab, merges = train()
    goldens = [{"text": text} for text in TEXTS]
    for pre in ["smollm", "llama-bpe", "qwen2"]:
        tokenizer = build(pre, vocab, merges)
        plain = build(pre, vocab, merges, added=False)
        for golden in goldens:
            text = golden["text"]
            ids = plain.encode(text, add_special_tokens=False).ids
            expected = reference(pre, vocab, merges, text)
            assert ids == expected, (pre, text, ids, expected)
            golden[pre] = ids
            golden[pre + "+special"] = tokenizer.encode(text, add_special_tokens=False).ids
            if golden[pre + "+special"] == ids:
                del golden[pre + "+special"]
        out = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{pre}.json").write_text(out + "\n")
    lines = ",\n".join(json.dumps(g, separators=(",", ":")) for g in goldens)
    if len(sys.argv) > 1:
        make_smollm2(goldens, sys.argv[1])
    (HERE / "goldens.json").write_text("[\n" + lines + "\n]\n")


main()
