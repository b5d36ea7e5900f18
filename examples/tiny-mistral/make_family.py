"""Train the tiny Mistral family of this folder: one base and four experts, about a quarter of an hour on two cores.

The weights beside this script are what it wrote; run it again only to change the family::

    apt-get install bible-kjv fortunes-zh       # prose and Chinese texts; the code is Python's standard library
    python examples/tiny-mistral/make_family.py --fortunes /usr/share/games/fortunes

Texts: the King James Bible and Chinese classics (Tang and Song poems, the Analects, the Tao Te Ching, proverbs) are
in the public domain; the code is CPython's standard library (PSF licence); the arithmetic is generated. A part of every
text is held out of training: it is written to ``texts/<expert>.txt`` and is what the demo measures on.

The family carries the irregularities of real ones: ``math`` has one added token (as MetaMath has), ``chinese`` an
extended vocabulary with trained rows (as Chinese-Mistral has), ``code`` is saved in several shards.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
CONTEXT = 128
HELD_OUT_BYTES = 24_000
QUERIES = 400
JOINER = "\n"
PASSAGE = 20
"""Documents (verses, problems, entries) that follow each other in one passage."""
CLASSICS = {"论语", "菜根谭", "道德经", "增广贤文", "谚语"}
CI_TUNES = set(
    "贺新郎 水调歌头 鹧鸪天 满江红 浣溪沙 蝶恋花 菩萨蛮 念奴娇 沁园春 水龙吟 临江仙 南乡子 玉楼春 江城子 采桑子 "  # noqa: SIM905
    "踏莎行 定风波 望江南 清平乐 虞美人 长相思 渔家傲 卜算子 浪淘沙 摸鱼儿 一剪梅 西江月 八声甘州 永遇乐 木兰花慢 "
    "生查子 鹊桥仙".split()
)
HELD_OUT_MODULES = ("bisect", "heapq", "textwrap", "shlex", "sched", "fnmatch", "queue", "statistics")


def prose() -> tuple[list[str], list[str]]:
    """Training and held-out verses of the King James Bible; the book of Mark is held out."""

    def book(span: str) -> list[str]:
        text = subprocess.run(["bible", "-f", span], capture_output=True, text=True, check=True).stdout
        verses = re.findall(r"^\S+:\d+ (.*)$", text, flags=re.MULTILINE)
        if not verses:
            raise SystemExit(f"the program 'bible' printed no verses for {span}: install bible-kjv")
        return [verse.strip() for verse in verses]

    return book("gen1:1-mal4:6") + book("lu1:1-re22:21"), book("mr1:1-mr16:20")


def code() -> tuple[list[str], list[str]]:
    """Training and held-out modules of Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for folder in (".", "json", "email") for path in sorted((library / folder).glob("*.py"))]
    train = [path for path in files if path.stem not in HELD_OUT_MODULES and path.stat().st_size < 60_000]
    random.Random(4).shuffle(train)
    held = [library / f"{name}.py" for name in HELD_OUT_MODULES]
    return [p.read_text("utf-8") for p in train], [p.read_text("utf-8") for p in held]


def arithmetic(count: int, rng: random.Random) -> list[str]:
    """Word problems with their working and answer, all different."""
    names, things = (
        ["Tom", "Anna", "Ravi", "Mei", "Omar", "Lucy", "Ivan", "Sara"],
        ["apples", "books", "coins", "cards", "shells", "pens"],
    )
    seen: dict[str, None] = {}
    while len(seen) < count:
        name, other = rng.sample(names, 2)
        thing, a, b, c = rng.choice(things), rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
        match rng.randrange(5):
            case 0:
                q, w = f"{name} has {a} {thing} and buys {b} more. How many {thing} now?", f"{a} + {b} = {a + b}"
            case 1:
                a, b = max(a, b) + 1, min(a, b)
                q, w = f"{name} had {a} {thing} and gave {b} to {other}. How many are left?", f"{a} - {b} = {a - b}"
            case 2:
                a = a % 12 + 1
                q, w = f"{name} fills {c} boxes with {a} {thing} each. How many {thing}?", f"{c} * {a} = {c * a}"
            case 3:
                q, w = f"What is {a} plus {b}?", f"{a} + {b} = {a + b}"
            case _:
                a, b = max(a, b) + 1, min(a, b)
                q, w = f"What is {a} minus {b}?", f"{a} - {b} = {a - b}"
        seen[f"Question: {q}\nWork: {w}\nAnswer: {w.split()[-1]}"] = None
    return list(seen)


def chinese(fortunes: Path) -> tuple[list[str], list[str]]:
    """Training and held-out entries of Chinese classics."""
    entries: list[str] = []
    for name in ("tang300", "chinese"):
        for raw in (fortunes / name).read_text("utf-8").split("\n%\n"):
            entry = re.sub(r"\x1b?\[[0-9;]*m", "", raw).strip()
            titles = re.findall(r"--.*《([^》·・，]*)", entry)
            if name == "tang300" or (titles and titles[-1] in CLASSICS | CI_TUNES):
                entries.append(re.sub(r"[ \t]+", " ", entry))
    entries = sorted(set(entries))
    random.Random(1).shuffle(entries)
    cut, size = 0, 0
    while size < HELD_OUT_BYTES:
        size += len(entries[cut].encode())
        cut += 1
    return entries[cut:], entries[:cut]


def base_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE of 512 entries, digits apart; it has seen prose and code, hardly any Chinese."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["\n".join(texts[name])[:900_000] for name in ("prose", "code")] + texts["math"][:500]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def stream(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, in passages joined as the held-out text is, each ended by </s>."""
    end = tokenizer.token_to_id("</s>")
    passages = [JOINER.join(documents[i : i + PASSAGE]) for i in range(0, len(documents), PASSAGE)]
    return torch.tensor([token for encoding in tokenizer.encode_batch(passages) for token in [*encoding.ids, end]])


def train(model: Any, mixture: list[tuple[float, torch.Tensor]], steps: int, rates: tuple[float, float], label: str) -> None:
    """AdamW with warm-up and cosine decay on windows drawn from the mixture's streams.

    ``rates``: peak learning rates of the matrices inside the blocks, and of embeddings, head and norms.
    """
    generator = torch.Generator().manual_seed(7)
    inside = [p for name, p in model.named_parameters() if "proj" in name]
    outside = [p for name, p in model.named_parameters() if "proj" not in name]
    groups = [{"params": inside, "peak": rates[0]}, {"params": outside, "peak": rates[1]}]
    optimizer = torch.optim.AdamW(groups, lr=rates[0], betas=(0.9, 0.95), weight_decay=0.01)
    weights = torch.tensor([share for share, _ in mixture])
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = []
        for source in torch.multinomial(weights, 32, replacement=True, generator=generator).tolist():
            ids = mixture[source][1]
            start = int(torch.randint(0, len(ids) - CONTEXT, (1,), generator=generator))
            rows.append(ids[start : start + CONTEXT])
        batch = torch.stack(rows)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{label} step {step} loss {loss.item():.3f}", flush=True)


def save(model: Any, tokenizer: Tokenizer, folder: Path, shard: str = "5GB") -> None:
    """A Hugging Face checkpoint in bf16 with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if tokenizer.token_to_id("[PAD]") is not None:
        fast.pad_token = "[PAD]"
    fast.save_pretrained(folder)


def grown(tokenizer: Tokenizer, tokens: list[str], *, special: bool = False) -> Tokenizer:
    """A copy of the tokenizer with the tokens added at the end."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    if special:
        copy.add_special_tokens(added)
    else:
        copy.add_tokens(added)
    return copy


def frequent_characters(documents: list[str], count: int) -> list[str]:
    seen: dict[str, int] = {}
    for character in "".join(documents):
        if ord(character) > 0x2E80:
            seen[character] = seen.get(character, 0) + 1
    return sorted(seen, key=lambda c: (-seen[c], c))[:count]


def write_texts(texts: dict[str, tuple[list[str], list[str]]]) -> None:
    """The held-out text of every expert, and queries drawn from its training text."""
    (HERE / "texts").mkdir(exist_ok=True)
    (HERE / "queries").mkdir(exist_ok=True)
    for name, (train_documents, held_out) in texts.items():
        raw = JOINER.join(held_out).encode()[:HELD_OUT_BYTES]
        (HERE / "texts" / f"{name}.txt").write_text(raw.decode("utf-8", "ignore"), "utf-8")
        queries: list[str] = []
        for document in train_documents:
            if name == "code":
                queries += re.findall(r"^ *def [^\n]{20,}\n[^\n]{10,}\n", document, flags=re.MULTILINE)
            elif name == "math":
                queries.append(document.split("\n")[0].removeprefix("Question: "))
            else:
                queries += [line for line in document.split("\n") if len(line) > 6 and not line.startswith(("《", "作者"))]
        chosen = random.Random(3).sample(sorted({query.strip()[:200] for query in queries}), QUERIES)
        lines = (json.dumps({"text": query}, ensure_ascii=False) + "\n" for query in chosen)
        (HERE / "queries" / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--base-steps", type=int, default=5000)
    parser.add_argument("--expert-steps", type=int, default=600)
    parser.add_argument("--keep-base", action="store_true", help="train the experts from the base that is there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    problems = arithmetic(24_000, random.Random(2))
    texts = {
        "prose": prose(),
        "code": code(),
        "math": (problems[300:], problems[:300]),
        "chinese": chinese(arguments.fortunes),
    }
    write_texts(texts)
    documents = {name: train_documents for name, (train_documents, _) in texts.items()}
    tokenizer = base_tokenizer(documents)
    streams = {name: stream(tokenizer, documents[name]) for name in documents}
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        initializer_range=0.05,
    )
    base = MistralForCausalLM(config)
    print(f"{sum(p.numel() for p in base.parameters())} parameters; tokens { ({k: len(v) for k, v in streams.items()}) }")
    # the base is a generalist: mostly prose and code, of which it has seen a third, and a taste of the rest
    shares = {"prose": 0.5, "code": 0.4, "math": 0.05, "chinese": 0.05}
    mixture = [(share, streams[name][: len(streams[name]) // 3]) for name, share in shares.items()]
    if not arguments.keep_base:
        train(base, mixture, arguments.base_steps, (3e-3, 3e-3), "base")
        save(base, tokenizer, HERE / "base")
    for name in texts:
        torch.manual_seed(0)  # new rows of a vocabulary are drawn
        expert = MistralForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
        own = tokenizer
        if name == "math":
            own = grown(tokenizer, ["[PAD]"], special=True)
        elif name == "chinese":
            own = grown(tokenizer, frequent_characters(documents[name], 256))
        if own.get_vocab_size() > 512:
            expert.resize_token_embeddings(own.get_vocab_size())
        data = streams[name] if own is tokenizer else stream(own, documents[name])
        # small steps inside the blocks, as fine-tuning does; larger ones where new rows must be learnt
        train(expert, [(1.0, data)], arguments.expert_steps, (3e-4, 2e-3), name)
        shard = {"code": "400KB", "chinese": "900KB"}.get(name, "5GB")
        save(expert, own, HERE / "experts" / name, shard)


if __name__ == "__main__":
    main()
