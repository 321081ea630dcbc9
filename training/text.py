"""Before stage 2: teach a small CLIP text tower what words mean.

    python training/text.py --data data/emoji128 --teacher all-MiniLM-L6-v2 --wordnet wordnet \
        --out runs/emoji128-text

The teacher is the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019).
The tower's state at the end of a text, through one matrix, learns the teacher's embedding of that
text; its state at the end of each word, through another, the teacher's embedding of that word
alone. For a noun that WordNet knows, what the teacher makes of its gloss and of the most usual word
of the same meaning is mixed in. So the states of "automobile" and "car" come near each other before
a picture is seen. Ends by writing the tower, the tokenizer and the two matrices into OUT. Started
again, it takes what the teacher said from OUT and learns anew.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.data.captions import with_article
from latentdiff.data.colours import PAINTS
from latentdiff.data.held_out import SYNONYMS
from latentdiff.data.wording import is_plural, naming, plural, styled
from latentdiff.data.wordnet import CONCRETE, WordNet
from latentdiff.errors import UserError
from latentdiff.files import make_folder, writing_folder
from latentdiff.formats.weights import save_tensors
from latentdiff.learning.teaching import (
    Book,
    Lesson,
    Taught,
    batch_of,
    lessons,
    reduced,
    teaching_loss,
)
from latentdiff.models.fresh_text import WORD_END, build_text_encoder, train_tokenizer
from latentdiff.random_numbers import philox

COLOURS = (*PAINTS, "white")
SIZES = ("small", "big", "tiny", "large", "little")
PLACES = (
    "on a {c} background", "in the top left corner", "in the bottom right corner", "upside down",
    "on the left", "on the right", "at the top", "at the bottom", "in the middle", "in the corner",
)  # fmt: skip
RELATIONS = ("next to", "to the left of", "to the right of", "above", "below", "and", "beside")


class Teacher:
    """all-MiniLM-L6-v2: a text's embedding is the mean of its token states, at unit length."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} holds no model.safetensors of a sentence encoder")
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(64)
        self.tokenizer.enable_padding()
        config = json.loads((folder / "config.json").read_text("utf-8"))
        self.model: Any = BertModel(BertConfig(**config), add_pooling_layer=False).eval()
        state = load_file(folder / "model.safetensors")
        known = self.model.state_dict()
        self.model.load_state_dict({k: state[k] for k in known})
        self.width: int = config["hidden_size"]
        self.words: Tensor = self.model.embeddings.word_embeddings.weight.detach().float()

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch: int = 256, what: str = "teacher") -> Tensor:
        """Unit embeddings, float16 [N, D]; of nothing, [0, D]."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.width, dtype=torch.float16)
        for start in tqdm(range(0, len(order), batch), desc=what, mininterval=10):
            places = order[start : start + batch]
            coded = self.tokenizer.encode_batch([texts[i] for i in places])
            ids = torch.tensor([one.ids for one in coded])
            mask = torch.tensor([one.attention_mask for one in coded])
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            seen = mask[:, :, None].float()
            mean = (states.float() * seen).sum(1) / seen.sum(1)
            found[places] = F.normalize(mean, dim=1).half()
        return found


def collect(data: Path, words: WordNet, composed: int, lemmas: int, seed: int) -> list[str]:
    """Collect what the tower is taught on: captions, made-up compositions, nouns and glosses.

    The words of `held_out.SYNONYMS` may be here: the tower is to know them from the teacher. No
    caption that a picture is learned with has them.
    """
    lines = (data / "metadata.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    rows = [row for row in rows if row["split"] == "train"]
    random = philox(seed, 20)
    untoned = [row for row in rows if not row["skin_tone"]]
    texts = [caption.replace("-", " ") for row in untoned for caption in row["captions"]]
    for row in rows:  # a tenth of those that differ in their tone
        if row["skin_tone"] and random.random() < 0.1:
            texts += [caption.replace("-", " ") for caption in row["captions"]]
    named = {row["name"]: naming(row, words) for row in untoned}
    spoken = [name for one in named.values() for name in (one.name, *one.also, *one.broader)]
    texts += [keyword for row in untoned for keyword in row["keywords"]]
    usual = [word.replace("_", " ") for one in words.concrete() for word in one.words]
    usual = sorted({word for word in usual if len(word.split()) <= 2})
    things = [one.name for one in named.values() if len(one.name.split()) <= 3]
    for _ in range(composed):
        pool = things if random.random() < 0.7 else usual
        first, second = (pool[random.integers(len(pool))] for _ in range(2))
        texts.append(compose(first, second, random))
    chosen = random.permutation(len(usual))[:lemmas]
    texts += [usual[i] for i in chosen] + [with_article(usual[i]) for i in chosen]
    glosses = [one.gloss for one in words.concrete() if 2 < len(one.gloss.split()) <= 12]
    texts += [glosses[i] for i in random.permutation(len(glosses))[: lemmas // 2]]
    known = list(dict.fromkeys(text for text in texts if text.strip()))
    spoken += list(SYNONYMS)
    return known + 4 * (spoken + [with_article(word) for word in spoken])


def explained(text: str, words: WordNet) -> tuple[str, str]:
    """A noun with its gloss, and the most usual word of the same meaning; or the text, twice."""
    bare = text.lower()
    for start in ("a ", "an "):
        bare = bare.removeprefix(start)
    for offset in words.senses.get(bare.replace(" ", "_"), ())[:3]:
        found = words.meanings[offset]
        if found.file in CONCRETE:
            return f"{bare}, {found.gloss}", found.words[0].replace("_", " ")
    return text, text


def targets_of(texts: Sequence[str], teacher: Teacher, words: WordNet) -> Tensor:
    """Mix what the teacher makes of texts, of glosses and of usual words: float16 [N, D]."""
    unique = list(dict.fromkeys(texts))
    both = [explained(text, words) for text in unique]
    asked = list(dict.fromkeys([*unique, *(text for pair in both for text in pair)]))
    place = {text: at for at, text in enumerate(asked)}
    found = teacher.embed(asked).float()
    rows = [
        found[place[text]] + 0.5 * found[place[gloss]] + 0.5 * found[place[usual]]
        for text, (gloss, usual) in zip(unique, both, strict=True)
    ]
    mixed = F.normalize(torch.stack(rows), dim=1).half()
    at = {text: number for number, text in enumerate(unique)}
    return mixed[[at[text] for text in texts]]


def compose(first: str, second: str, random: np.random.Generator) -> str:
    """A description such as captions of composed pictures have, of any two nouns."""
    colour = COLOURS[random.integers(len(COLOURS))]
    kind = random.integers(7)
    if kind == 0:
        text = with_article(f"{colour} {first}")
    elif kind == 1 and not is_plural(first):
        text = f"{('two', 'three', 'four')[random.integers(3)]} {plural(first)}"
    elif kind == 2:
        relation = RELATIONS[random.integers(len(RELATIONS))]
        text = f"{with_article(first)} {relation} {with_article(second)}"
    elif kind == 3:
        text = with_article(f"{SIZES[random.integers(len(SIZES))]} {first}")
    elif kind == 4:
        place = PLACES[random.integers(len(PLACES))].format(c=colour)
        text = f"{with_article(first)} {place}"
    elif kind == 5:
        other = COLOURS[random.integers(len(COLOURS))]
        text = f"{with_article(f'{colour} {first}')} and {with_article(f'{other} {second}')}"
    else:
        text = with_article(first)
    names = ("noto", "twemoji", "fluent-3d", "fluent-flat", None, None)
    return styled(text, names[random.integers(len(names))], random)


def begin_from(teacher: Teacher, tower: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Give each token the mean of the teacher's vectors of its letters, turned into its width.

    The turn is the first principal directions of the teacher's table: nearness of words is kept
    about as well as the width allows.
    """
    table = teacher.words - teacher.words.mean(0)
    width = tower.config.hidden_size
    _, _, directions = torch.linalg.svd(table[1000:], full_matrices=False)
    turned = table @ directions[:width].T
    turned *= 0.02 / turned.std()
    weight: Any = tower.get_input_embeddings().weight
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            letters = token.removesuffix(WORD_END)
            pieces = teacher.tokenizer.encode(letters, add_special_tokens=False)
            own = [i for i, seen in zip(pieces.ids, pieces.attention_mask, strict=True) if seen]
            if letters.isascii() and letters.isalnum() and own:
                weight[number] = turned[own].mean(0)


def batches(
    sizes: Sequence[int], batch: int, seed: int, step: int, steps: int
) -> Iterator[np.ndarray]:
    """Rows of texts of like length for each step: a function of (seed, step)."""
    lengths = np.asarray(sizes)
    for at in range(step, steps):
        random = philox(seed, 21, at)
        chosen = random.integers(len(lengths), size=8 * batch)
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        start = batch * int(random.integers(8))
        yield chosen[start : start + batch]


def write_book(
    texts: Sequence[str], table: Sequence[str], wanted: dict[str, Tensor], size: int, most: int,
    out: Path,
) -> None:  # fmt: skip
    """The most often read texts and their words with the teacher's vectors, made small."""
    counts = Counter(texts)
    first = {text: row for row, text in reversed(list(enumerate(texts)))}
    order = philox(0, 24).permutation(len(counts))
    keys = list(counts)
    unique = [keys[i] for i in order]
    chosen = sorted(unique, key=lambda text: -counts[text])[:most]
    used = {word for text in chosen for word in text.lower().split()}
    words = [row for row, word in enumerate(table) if word in used]
    rows = [first[text] for text in chosen]
    vectors = reduced(wanted["texts"][rows].float(), wanted["words"][words].float(), size)
    weights = torch.tensor([counts[text] for text in chosen])
    Book(chosen, [table[row] for row in words], weights, *vectors).write(out)


@torch.no_grad()
def encode(model: Taught, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """The tower's own embeddings of texts, unit vectors [N, D]."""
    coded = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)[
        "input_ids"
    ]
    found = []
    for ids in coded:  # pyright: ignore
        state = model(torch.tensor([ids]))[0, -1]
        found.append(F.normalize(model.of_text(state), dim=0))
    return torch.stack(found)


def synonyms_right(names: Sequence[str], names_in: Tensor, synonyms_in: Tensor) -> float:
    """Share of the held-out synonyms that have a name of their own thing nearest."""
    nearest = (synonyms_in.float() @ names_in.float().T).argmax(1)
    hits = [
        names[int(at)] in right.split("|")
        for at, right in zip(nearest, SYNONYMS.values(), strict=True)
    ]
    return sum(hits) / len(hits)


def main(
    data: Annotated[Path, typer.Option(help="Picture folder with metadata.jsonl.")],
    teacher: Annotated[Path, typer.Option(help="Folder of all-MiniLM-L6-v2.")],
    wordnet: Annotated[Path, typer.Option(help="Folder of data.noun and index.noun.")],
    out: Annotated[Path, typer.Option(help="Where the tower goes.")] = Path("runs/emoji128-text"),
    steps: Annotated[int, typer.Option(help="Steps.")] = 2400,
    batch: Annotated[int, typer.Option(help="Texts a step.")] = 384,
    rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1.5e-3,
    vocabulary: Annotated[int, typer.Option(help="Tokens.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a text at most.")] = 32,
    width: Annotated[int, typer.Option(help="Width of the tower.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the tower.")] = 4,
    composed: Annotated[int, typer.Option(help="Made-up descriptions.")] = 40_000,
    lemmas: Annotated[int, typer.Option(help="Nouns of WordNet.")] = 30_000,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, texts and order.")] = 0,
) -> None:
    """Teach a small text tower from a sentence encoder."""
    torch.manual_seed(seed)
    make_folder(out)
    words = WordNet(wordnet)
    texts = collect(data, words, composed, lemmas, seed)
    tokenizer = train_tokenizer(texts, vocabulary, window)
    read, table = lessons(texts, tokenizer)
    print(f"{len(texts)} texts, {len(table)} words, {len(tokenizer)} tokens", flush=True)
    targets = out / "teacher.safetensors"
    guide = Teacher(teacher)
    if not targets.is_file():
        found = {
            "texts": targets_of(texts, guide, words),
            "words": targets_of(table, guide, words),
        }
        save_tensors(found, targets, {}, replace=True)
    wanted = {name: value.float() for name, value in load_file(targets).items()}
    write_book(texts, table, wanted, 128, 60_000, out)
    tower = build_text_encoder(tokenizer, width, layers, width // 64)
    begin_from(guide, tower, tokenizer)
    model = Taught(tower, guide.width)
    lines = (data / "metadata.jsonl").read_text("utf-8").splitlines()
    names = sorted({str(json.loads(line)["name"]) for line in lines if line})
    names = [name for name in names if ":" not in name]
    spoken = [name.replace("-", " ").replace("automobile", "car") for name in names]
    asked = targets_of([*spoken, *SYNONYMS], guide, words)
    right = synonyms_right(names, asked[: len(names)], asked[len(names) :])
    print(f"nearest name of 100 synonyms: the teacher {right:.0%}", flush=True)

    def saved(step: int) -> None:
        right = synonyms_right(
            names, encode(model, tokenizer, spoken), encode(model, tokenizer, list(SYNONYMS))
        )
        print(f"step {step}: nearest name of 100 synonyms: {right:.0%}", flush=True)
        save(model, tokenizer, out)

    teach(model, read, wanted, batch, rate, seed, steps, save_every, saved)


def teach(
    model: Taught, read: Sequence[Lesson], wanted: dict[str, Tensor], batch: int, rate: float,
    seed: int, steps: int, save_every: int, saved: Callable[[int], None],
) -> None:  # fmt: skip
    """Take all steps on texts with the teacher's vectors; `saved` is called now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.98), weight_decay=0.01)
    for step, rows in enumerate(batches([len(o.ids) for o in read], batch, seed, 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        batch_ = batch_of([read[row] for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            values = teaching_loss(model, batch_, wanted["texts"][rows], wanted["words"])
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(step + 1, {k: round(v.item(), 4) for k, v in values.items()}, flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            saved(step + 1)


def save(model: Taught, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the tower and its tokenizer as transformers lays them out, and the two matrices."""
    with writing_folder(out / "text_encoder", replace=True) as stage:
        model.tower.save_pretrained(stage)
    with writing_folder(out / "tokenizer", replace=True) as stage:
        tokenizer.save_pretrained(stage)
    heads = {"of_text": model.of_text.weight.detach(), "of_word": model.of_word.weight.detach()}
    save_tensors(heads, out / "heads.safetensors", {}, replace=True)


if __name__ == "__main__":
    typer.run(main)
