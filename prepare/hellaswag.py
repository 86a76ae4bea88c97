"""HellaSwag: 10,042 unfinished texts with four endings each. Which one does a model find likeliest?

    python prepare/hellaswag.py                               downloads the items
    python prepare/hellaswag.py --input=hellaswag_val.jsonl   the same file, or some of its lines
    python prepare/hellaswag.py --checkpoint_path=logs/model_best.pt                evaluates
    python prepare/hellaswag.py --checkpoint_path=gpt2 --dtype=bfloat16 --max_items=1000
    python -m prepare.hellaswag --help

The folder: hellaswag_val.jsonl, a line each {"ctx": text, "endings": [4 texts], "label": number of
the right one, from 0}, and manifest.json. An evaluation takes the items from --input if that is
given, else from the folder, which is made first if need be.

acc counts how often the right ending is the likeliest of the four by the sum of its tokens' log p,
acc_norm by their mean. An ending begins with a blank; nothing stands before the context. GPT-2 124M
has acc 0.2859, acc_norm 0.2955. The scores are written to hellaswag.json beside the checkpoint.

Credit: Zellers, Holtzman, Bisk, Farhadi, Choi: HellaSwag (2019), arXiv 1905.07830. MIT license.
"""
import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import GPT, load_tokenizer
from prepare.fineweb import checked, download_bytes, encode, one_line_errors
from prepare.fineweb import parsed, write_file, write_json

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/hellaswag'  # folder of the items
input = ''             # a .jsonl with the keys ctx, endings and label; '' = download it
checkpoint_path = ''   # model to evaluate: a checkpoint, a folder, gpt2, gpt2-xl; '' = none
batch_size = 16        # endings at a time
max_items = 0          # items to evaluate, the first ones; 0 = all
device = ''            # cuda, cuda:1, cpu; '' = cuda if there is one, else cpu
dtype = 'float32'      # float32 | bfloat16 | float16; the last two by autocast

if __name__ == '__main__':
    configure(globals())

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
ROWS = 10042
LOGITS = 2 ** 23  # at a time: 32 MB of float32

# -----------------------------------------------------------------------------
# items

def text(value, where):
    if not checked(value, where).strip():
        fail(f'{where}: the text is empty')
    return value

def rows(content, name):
    """Yield {'ctx', 'endings', 'label'} of each line of a .jsonl (bytes), without other keys."""
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        where = f'{name} line {number}'
        row = parsed(line, where)
        if not isinstance(row, dict) or not {'ctx', 'endings', 'label'} <= row.keys():
            fail(f'{where}: expected an object with ctx, endings and label')
        endings, label = row['endings'], row['label']
        if not isinstance(endings, list) or len(endings) != 4:
            fail(f'{where}: endings is {endings!r:.40}, expected a list of 4 texts')
        # one that was converted from parquet is a string
        if type(label) not in (int, str) or str(label) not in ('0', '1', '2', '3'):
            fail(f'{where}: label is {label!r:.40}, expected 0, 1, 2 or 3')
        endings = [text(ending, f'{where}: ending {k}') for k, ending in enumerate(endings)]
        yield dict(ctx=text(row['ctx'], f'{where}: ctx'), endings=endings, label=int(label))

def read_items(path):
    """(the items of a file, or of the published one if path is None; the file's bytes; its name)"""
    if path is not None and not path.is_file():
        fail(f'--input: {path} is no file')
    content = path.read_bytes() if path else download_bytes(URL)
    name = str(path or URL)
    items = list(rows(content, name))
    if not items:
        fail(f'{name}: no items')
    return items, content, name

def prepare():
    """Write the folder. Returns its items."""
    items, content, name = read_items(Path(input) if input else None)
    path, manifest = Path(output_dir, 'hellaswag_val.jsonl'), Path(output_dir, 'manifest.json')
    manifest.unlink(missing_ok=True)  # a kill from here on leaves none, rather than another file's
    lines = [json.dumps(item, ensure_ascii=False).encode() + b'\n' for item in items]
    digest = write_file(path, *lines)
    source = Path(input).name if input else URL
    write_json(manifest, dict(rows=len(items), sha256=digest, source=source,
                              sha256_source=hashlib.sha256(content).hexdigest()))
    labels = [item['label'] for item in items]
    shares = [f'{label} {labels.count(label) / len(items):.1%}' for label in range(4)]
    print0(f'{path}: {len(items):,} items; right endings: {", ".join(shares)}')
    if len(items) != ROWS:
        print0(f'note: the published validation set has {ROWS:,} items, this is another number')
    return items

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def ending_losses(model, endings):
    """endings: [(ids, n)] -> (len(endings),) float32, the sum of -log p of the last n ids of each,
    in nats. What does not fit into block_size is cut off in front."""
    block_size, weight = model.config.block_size, model.transformer.wte.weight
    endings = [(ids[-block_size - 1:], min(n, block_size, len(ids) - 1)) for ids, n in endings]
    longest = max(len(ids) for ids, _ in endings)
    tokens = torch.zeros(len(endings), longest, dtype=torch.long)  # (B, T + 1), padded on the right
    counts = torch.zeros(len(endings), longest, dtype=torch.bool)
    for i, (ids, n) in enumerate(endings):
        tokens[i, :len(ids)] = torch.tensor(ids)
        counts[i, len(ids) - n:len(ids)] = True
    tokens, counts = tokens.to(weight.device), counts[:, 1:].to(weight.device)
    x, targets = model.hidden(tokens[:, :-1])[counts], tokens[:, 1:][counts]
    # Only these positions meet the head, and not all at once.
    at_once = max(1, LOGITS // len(weight))
    losses = [F.cross_entropy(F.linear(a, weight).float(), b, reduction='none')
              for a, b in zip(x.split(at_once), targets.split(at_once), strict=True)]
    sums = torch.zeros(len(endings), device=weight.device)
    return sums.index_add_(0, counts.nonzero()[:, 0], torch.cat(losses))

def scores(labels, sizes, losses):
    """(acc, acc_norm) of labels (N,), numbers of tokens (N, 4) and sums of -log p (N, 4)."""
    acc = (losses.argmin(1) == labels).mean()
    acc_norm = ((losses / sizes).argmin(1) == labels).mean()
    return float(acc), float(acc_norm)

def evaluate(model, encoding, items, batch_size, autocast):
    """(acc, acc_norm). Endings of like length are in a batch: that saves padding."""
    endings = []
    for item in items:
        context = encode(encoding, item['ctx'])
        for ending in item['endings']:
            ids = encode(encoding, ' ' + ending)
            endings.append((context + ids, len(ids)))
    order = sorted(range(len(endings)), key=lambda i: len(endings[i][0]))
    losses = np.zeros(len(endings))
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc='hellaswag', disable=None):
        chosen = order[start:start + batch_size]
        with autocast:
            losses[chosen] = ending_losses(model, [endings[i] for i in chosen]).tolist()
    sizes = np.array([n for _, n in endings]).reshape(-1, 4)
    labels = np.array([item['label'] for item in items])
    return scores(labels, sizes, losses.reshape(-1, 4))

def open_model():
    """(model on the device, encoding, autocast)"""
    chosen = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        model = GPT.from_pretrained(checkpoint_path)
        encoding = load_tokenizer(model.tokenizer['tokenizer'], download=True)
    except (OSError, ValueError) as error:
        fail(f'--checkpoint_path={checkpoint_path}: {error}')
    try:
        model.to(chosen)
    except (RuntimeError, AssertionError) as error:
        fail(f'--device={chosen}: {str(error)[:150]}')
    autocast = contextlib.nullcontext()
    if dtype != 'float32':
        autocast = torch.autocast(torch.device(chosen).type, getattr(torch, dtype))
    return model, encoding, autocast

def main():
    if not checkpoint_path:
        prepare()
        return
    model, encoding, autocast = open_model()
    prepared = Path(output_dir, 'hellaswag_val.jsonl')
    if input or prepared.is_file():
        items, _, _ = read_items(Path(input) if input else prepared)
    else:
        items = prepare()
    items = items[:max_items or None]
    acc, acc_norm = evaluate(model, encoding, items, batch_size, autocast)
    print0(f'hellaswag acc {acc:.4f} | acc_norm {acc_norm:.4f} ({len(items):,} items)')
    path = Path(checkpoint_path)
    folder = path.parent if path.is_file() else path
    if not path.exists():  # a name such as gpt2
        folder = Path(output_dir)
    write_json(folder / 'hellaswag.json', dict(
        checkpoint=checkpoint_path, acc=acc, acc_norm=acc_norm, items=len(items), dtype=dtype))

if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
