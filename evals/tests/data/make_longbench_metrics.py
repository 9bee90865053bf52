"""Writes longbench_metrics.json: scores of LongBench's own code over generated answers.

Usage: make_longbench_metrics.py CHECKOUT > longbench_metrics.json
CHECKOUT is github.com/THUDM/LongBench (commit 2e00731). Needs Python 3.11 with rouge 1.0.1, jieba 0.42.1,
fuzzywuzzy 0.18.0 and rapidfuzz 3.14; python-Levenshtein must not be installed, or fuzzywuzzy would use it:
its ratio is rapidfuzz's indel similarity, which is called here by its own name.
"""

import ast
import json
import random
import re
import sys
import warnings
from pathlib import Path

CHECKOUT = Path(sys.argv[1])
warnings.filterwarnings("ignore")
sys.path.insert(0, str(CHECKOUT / "LongBench"))

import jieba  # noqa: E402
import metrics  # noqa: E402
from fuzzywuzzy import fuzz  # noqa: E402
from rapidfuzz.distance import Indel  # noqa: E402

if fuzz.SequenceMatcher.__module__ != "difflib":
    sys.exit("python-Levenshtein is installed: code_sim_score would not be that of the official requirements")
jieba.setLogLevel(60)

rng = random.Random(20240501)


def function_of(path, name, scope):
    """One function of a script whose other imports are not needed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return scope[name]


def assignment_of(path, name, scope):
    """The value of one assignment of a script."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return eval(compile(ast.Expression(node.value), str(path), "eval"), scope)
    raise KeyError(name)


ENGLISH = """the a an cat dog ran river of Barack Obama was born in 1961 and University College London It's well-known
U.S. e.g. however, government report (2019) costs $3.5 billion; "quoted" words The A An theory naïve café Σίσυφος ΣΑΣ İzmir
model's state-of-the-art x_1 and/or no. yes unanswerable — a–b the² don't I.B.M. summary: meeting agreed budget""".split()
CHINESE = """北京 大学 今天 天气 很 好 的 了 在 中国 人民 研究 会议 总结 经济 发展 问题 我们 认为 可以 进行 讨论 上海 银行 公司
系统 技术 他 来到 网易 杭研 大厦 小明 硕士 毕业 于 科学院 计算所 后 日本 京都 深造 工信处 女干事 每月 经过 下属 科室 都 要
亲口 交代 交换机 等 技术性 器件 安装 工作 诸葛亮 欧阳 锋 龘 魑魅 爱新觉罗 溥仪 T恤 卡拉OK AT&T c++ B超 iPhone14 3.14 50% 1.2.3
GPT-4 a_b-c 2023年 １２ Ａ 㐀㐁 𠮷野家 鿖鿗 ABC news.com x86-64 v1.5a 100.5% U.S. a.b.c""".split()
CHINESE_MARKS = ["。", "，", "！", "？", "、", "：", "“", "”", " ", "\n", "…", ".", "《", "》", "—", "·", "\u3000", "(", ")"]
CODE = """self. assertEqual ( ) result value = return x + 1 for i in range : if not None def foo bar , [ ] { } " ' import os
// # ` -> == != += public static void int String new List < > ; & | self.config.get( await async lambda""".split()


def english(words):
    text = " ".join(rng.choice(ENGLISH) for _ in range(words))
    for _ in range(words // 6):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([".", ". ", ", ", "\n", "  ", "..", "!", "\x1c", "\u00a0"]) + text[at:]
    return text


def chinese(words):
    return "".join(
        rng.choice(CHINESE) if rng.random() < 0.8 else rng.choice(CHINESE_MARKS) for _ in range(words)
    )


def code(words, pieces=CODE):
    return "".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(words))


def plain_code(words):
    """Without the signs for which the metric passes over a line."""
    return code(words, [piece for piece in CODE if not {"#", "`", "//"} & {piece}])


def changed(text, make):
    """`text` with a few pieces cut, moved or put in, so that both have something in common."""
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(1, 9))
        piece = text[start:end]
        kind = rng.randrange(3)
        if kind == 0:
            text = text[:start] + text[end:]
        elif kind == 1:
            rest = text[:start] + text[end:]
            at = rng.randrange(len(rest) + 1)
            text = rest[:at] + piece + rest[at:]
        else:
            text = text[:start] + make(rng.randrange(1, 4)) + text[start:]
    return text


EDGES = ["", " ", ".", "...", "!?", "。", "\n", "x", "the", "a.", "。。", "..a", "段落", "\u3000", "\n\n`"]


# Where an article is a word: next to which signs, marks and digits.
ARTICLES = [(f"{word}{sign} cat", f"{sign} cat") for word in ["a", "an", "The"] for sign in "²\u0301—½_’é・あ\u200d"]


def pairs_of(make, num, longest):
    pairs = [(p, r) for p in EDGES for r in rng.sample(EDGES, 2)]
    while len(pairs) < num:
        reference = make(rng.randrange(1, longest))
        prediction = changed(reference, make) if rng.random() < 0.7 else make(rng.randrange(1, longest))
        pairs.append((prediction, reference))
    return pairs


def code_pairs():
    pairs = pairs_of(code, 60, 16) + pairs_of(plain_code, 140, 16)
    # On both sides of the length from which difflib ignores popular characters.
    for length in [199, 200, 201, 299, 300, 301] * 2:
        reference = plain_code(120)[:length]
        pairs.append((changed(reference, plain_code), reference))
        line = ((plain_code(5) + " ") * 40)[:length]
        pairs.append((changed(line, plain_code), line))
    # Halves of a per cent, which Python rounds to the even neighbour.
    pairs += [("a" * k + "x" * (8 - k), "a" * k + "y" * (8 - k)) for k in range(9)]
    # A backquote, a number sign or two slashes hide a line.
    for fence in ["```python\n", "\n\n", "# comment\n", "// comment\n", "\n```\n\n"]:
        reference = code(5)
        pairs.append((fence + reference + "\n" + code(4), reference))
    return pairs


def number_pairs(reference, words):
    pairs = []
    for _ in range(200):
        number = rng.choice([1, 2, 3, 12, 15, 30])
        near = [str(number)] * len(words) + [f"{number}0", f"0{number}"]
        parts = [rng.choice(words + near) for _ in range(rng.randrange(5))]
        pairs.append((rng.choice(["", " ", ", "]).join(parts), reference(number)))
    return pairs


NUMBER_WORDS = ["Paragraph", "段落", "no", "１２", "٣", "²", "Ⅻ", "1.5", "-3", "012", "12th", "\n", "(12)"]


def levenshtein_score(prediction, reference):
    """The official function with the similarity that fuzzywuzzy takes from python-Levenshtein."""
    ratio = metrics.fuzz.ratio
    metrics.fuzz.ratio = indel_percent
    try:
        return metrics.code_sim_score(prediction, reference)
    finally:
        metrics.fuzz.ratio = ratio


def indel_percent(a, b):
    if a == b:
        return 100
    if not a or not b:
        return 0
    return int(round(100 * Indel.normalized_similarity(a, b)))


extract_answer = function_of(CHECKOUT / "pred.py", "extract_answer", {"re": re})


def accuracy(prediction, reference):
    return float(extract_answer(prediction) == reference)


def choice_pairs():
    pairs = []
    for _ in range(120):
        start = rng.choice(["", "I think. ", "**", "\n", "The correct answer is A. "])
        middle = rng.choice(["The correct answer is ", "the correct answer is ", "The *correct* answer is ", "Answer: "])
        letter = rng.choice(["(A)", "(B)", "C", "D.", "(E)", "**(D)**", "( A )", "Bob", "[C]", "（A）"])
        response = start + middle + letter + rng.choice(["", ".", "**", "\nThe correct answer is (B)"])
        pairs.append((response, rng.choice([extract_answer(response) or "A", rng.choice("ABCD")])))
    return pairs


CLASSES = [
    [],
    ["Food", "Food Group", "City", "City Area", "Individual"],
    ["Abb", "Abbr", "Abbrev", "Abbreviation"],
    ["体育", "体育新闻", "农业、农村", "农业", "经济", "经济", "财"],
    ["a", "aa", "aaa", "aaaa", "b", "ab", ""],
]


def classification_rows():
    rows = []
    while len(rows) < 200:
        idx = rng.randrange(1, len(CLASSES))
        names = [rng.choice(CLASSES[idx]) for _ in range(rng.randrange(4))]
        prediction, reference = rng.choice([" ", "", "\n"]).join(names), rng.choice(CLASSES[idx])
        score = metrics.classification_score(prediction, reference, all_classes=CLASSES[idx])
        rows.append([prediction, reference, idx, score])
    return rows


def task_rows():
    """All tasks with several references: the cut to the first line and the best of them."""
    evaluation = CHECKOUT / "LongBench" / "eval.py"
    scope = dict(vars(metrics))
    scope["dataset2metric"] = assignment_of(evaluation, "dataset2metric", scope)
    scorer = function_of(evaluation, "scorer", scope)
    rows = []
    for task, metric in scope["dataset2metric"].items():
        for _ in range(10):
            classes = 0
            if metric is metrics.classification_score:
                classes = rng.randrange(1, len(CLASSES))
                make = lambda _: rng.choice(CLASSES[classes])
            elif metric is metrics.retrieval_score:
                make = lambda _: f"Paragraph {rng.randrange(1, 4)}"
            elif metric is metrics.retrieval_zh_score:
                make = lambda _: f"段落{rng.randrange(1, 4)}"
            elif metric is metrics.count_score:
                make = lambda _: str(rng.randrange(1, 4))
            elif metric is metrics.code_sim_score:
                make = code
            else:
                make = chinese if "zh" in metric.__name__ else english
            references = [make(6) for _ in range(rng.randrange(1, 4))]
            lines = rng.choice(["", "\n", "\n\n"]) + rng.choice(references) + rng.choice(["", " ", "\n"]) + make(3)
            score = scorer(task, [lines], [references], CLASSES[classes])
            rows.append([task, lines, references, classes, score])
    return rows


def scored(score, pairs):
    return [[prediction, reference, float(score(prediction, reference))] for prediction, reference in pairs]


codes = code_pairs()
golden = {
    "pairs": {
        "qa_f1_score": scored(metrics.qa_f1_score, ARTICLES + pairs_of(english, 170, 12)),
        "qa_f1_zh_score": scored(metrics.qa_f1_zh_score, pairs_of(chinese, 200, 14)),
        "rouge_score": scored(metrics.rouge_score, pairs_of(english, 200, 22)),
        "rouge_zh_score": scored(metrics.rouge_zh_score, pairs_of(chinese, 200, 18)),
        "count_score": scored(metrics.count_score, number_pairs(str, NUMBER_WORDS)),
        "retrieval_score": scored(metrics.retrieval_score, number_pairs(lambda n: f"Paragraph {n}", NUMBER_WORDS)),
        "retrieval_zh_score": scored(metrics.retrieval_zh_score, number_pairs(lambda n: f"段落{n}", NUMBER_WORDS)),
        "code_sim_score": scored(metrics.code_sim_score, codes),
        "code_sim_score_levenshtein": scored(levenshtein_score, codes),
        "accuracy": scored(accuracy, choice_pairs()),
    },
    "classes": CLASSES,
    "classification": classification_rows(),
    "tasks": task_rows(),
}


def rows(values, indent):
    lines = (indent + json.dumps(value, ensure_ascii=False) for value in values)
    return "[\n" + ",\n".join(lines) + "\n]"


sections = ",\n".join(f"{json.dumps(name)}: {rows(values, ' ')}" for name, values in golden["pairs"].items())
parts = [f'"pairs": {{\n{sections}\n}}']
parts += [f'"{name}": {rows(golden[name], " ")}' for name in ["classes", "classification", "tasks"]]
sys.stdout.reconfigure(encoding="utf-8")
print("{\n" + ",\n".join(parts) + "\n}")
