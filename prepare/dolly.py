"""databricks-dolly-15k, 15,011 instructions with human answers, as rows of tokens for finetune_dolly.py.

    python prepare/dolly.py                                     downloads it (13 MB)
    python prepare/dolly.py --input=databricks-dolly-15k.jsonl  the same file, or your own rows: one JSON object a line with the
                                                                keys instruction, response and, where there are, context, category
    python prepare/dolly.py --tokenizer=bytes --max_length=512 --output_dir=data/dolly_bytes    for a model of bytes
    python -m prepare.dolly --help

A row is end-of-text, the prompt (model.py, instruction_prompt), the response, end-of-text. Wikipedia's citation marks such as [12]
are taken out of contexts and out of responses that repeat one. A row that is too long loses the end of its context, never
of its response; one that does not fit without a context is left out.

The folder: {name}_val_000000.npz, {name}_train_000001.npz, ... each with `tokens` (n,) uint16, the rows one after another, and for each
row `prompt` and `response`, its numbers of tokens, and `category`, a number; manifest.json, written last, says what they
hold. Running it again replaces everything.

Credit: Conover et al. 2023, databricks/databricks-dolly-15k, CC BY-SA 3.0; the prompt is that of databrickslabs/dolly.
"""
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import bucketed, instruction_prompt, load_tokenizer, padded_length
from prepare.fineweb import checked, download_bytes, encode, one_line_errors, parsed, write_file, write_json

# -----------------------------------------------------------------------------
# settings

output_dir = 'dolly15k'    # folder to write
input = ''                 # a .jsonl with the keys instruction, context, response, category; '' = download Dolly
name = 'dolly'             # the files are called {name}_val_000000.npz, {name}_train_000001.npz, ...
tokenizer = 'gpt2'         # gpt2 | bytes
max_length = 1024          # tokens of a row, at most: the model's block_size
val_fraction = 0.05        # share of the rows of each category that is held out
shard_size = 10000000      # tokens in a file, at most
seed = 1337                # of what is held out

if __name__ == '__main__':
    configure(globals())

URL = 'https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl'
ROWS = 15011
CITATION = re.compile(r'(?<=[\w.,;:!?)"\'\]])\[(?:\d{1,3}|(?:note|nb|n) \d{1,3}|[a-z ]*needed)\]', re.IGNORECASE)  # behind a word or a sentence


def examples(content, where):
    """(instruction, context, response, category) of each line."""
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        place = f'{where} line {number}'
        row = parsed(line, place)
        if not isinstance(row, dict) or not {'instruction', 'response'} <= row.keys():
            found = f'{sorted(row)!r:.100}' if isinstance(row, dict) else type(row).__name__
            fail(f'{place}: found {found}, expected an object with instruction and response')
        yield tuple(checked(row.get(key, default), f'{place}: {key}').strip()
                    for key, default in (('instruction', ''), ('context', ''), ('response', ''), ('category', 'none')))


def tokens_of(encoding, instruction, context, response, counts):
    """(prompt ids, response ids), both with end-of-text, of at most max_length together; None if that cannot be."""
    eot = [encoding.eot_token]
    answer = encode(encoding, response) + eot
    prompt = eot + encode(encoding, instruction_prompt(instruction, context))
    if len(prompt) + len(answer) > max_length and context:
        kept = encode(encoding, context)
        while kept and len(prompt) + len(answer) > max_length:
            kept = kept[:min(len(kept) - 1, len(kept) + max_length - len(prompt) - len(answer))]
            shortened = encoding.decode(kept, errors='ignore').strip()
            prompt = eot + encode(encoding, instruction_prompt(instruction, shortened))
        counts['shortened'] += 1
    return (prompt, answer) if len(prompt) + len(answer) <= max_length else None


def held_out(categories):
    """Numbers of the rows for validation: the same share of every category."""
    chosen, generator = [], np.random.default_rng(seed)
    for category in sorted(set(categories)):
        members = np.flatnonzero(np.array(categories) == category)
        chosen += generator.permutation(members)[:round(len(members) * val_fraction)].tolist()
    return set(chosen)


def arrays(rows, categories):
    return dict(tokens=np.array([i for prompt, response, _ in rows for i in prompt + response], np.uint16),
                prompt=np.array([len(prompt) for prompt, _, _ in rows], np.int32),
                response=np.array([len(response) for _, response, _ in rows], np.int32),
                category=np.array([categories.index(category) for _, _, category in rows], np.uint8))


def write_rows(folder, rows, split, first, categories):
    """Files of at most shard_size tokens, numbered from `first`; what the manifest says of them."""
    ends, files = np.cumsum([len(prompt) + len(response) for prompt, response, _ in rows]), []
    number = (ends - 1) // shard_size  # of the file in which a row ends
    for k in np.unique(number):
        content, part = io.BytesIO(), [rows[i] for i in np.flatnonzero(number == k)]
        np.savez(content, **arrays(part, categories))
        path = folder / f'{name}_{split}_{first + len(files):06d}.npz'
        files.append(dict(name=path.name, rows=len(part), tokens=sum(len(p) + len(r) for p, r, _ in part), sha256=write_file(path, content.getvalue())))
    return files


def main():
    if input and not os.path.isfile(input):
        fail(f'--input: {input} ' + ('is a folder: name the file in it' if os.path.isdir(input) else 'does not exist'))
    if not re.fullmatch(r'[\w.-]+', name) or 'val' in name:
        fail(f'--name={name}: letters, digits, "_", "-" and "." only, and not "val", which marks the file for validation')
    if not val_fraction < 1:
        fail(f'--val_fraction={val_fraction}: expected less than 1')
    try:
        encoding = load_tokenizer(tokenizer, download=True)
    except (OSError, ValueError) as error:
        fail(f'the {tokenizer} tokenizer was not loaded ({error}): it is downloaded once, --tokenizer=bytes needs no network', 1)
    content = Path(input).read_bytes() if input else download_bytes(URL)
    counts = dict(read=0, empty=0, too_long=0, shortened=0, citation_marks=0)
    rows = []
    for instruction, context, response, category in examples(content, input or URL):
        counts['read'] += 1
        if not instruction or not response:
            counts['empty'] += 1
            continue
        context, in_context = CITATION.subn('', context)
        response, in_response = CITATION.subn('', response) if in_context else (response, 0)  # else it may be the code x[1]
        counts['citation_marks'] += in_context + in_response
        found = tokens_of(encoding, instruction, context, response, counts)
        if found is None:
            counts['too_long'] += 1
        else:
            rows.append((*found, category))
    categories = sorted({category for _, _, category in rows})
    if len(categories) > 255:
        fail(f'{input or URL}: {len(categories)} categories, at most 255')
    val = held_out([category for _, _, category in rows])
    splits = {'val': [row for i, row in enumerate(rows) if i in val], 'train': [row for i, row in enumerate(rows) if i not in val]}
    if not splits['val'] or not splits['train']:
        fail(f'{input or URL}: {len(rows)} usable rows are too few to hold out {val_fraction:.0%} of them')

    folder = Path(output_dir)
    ours = [path for path in folder.glob('*.npz') if re.fullmatch(r'[\w.-]+_(val|train)_\d{6}\.npz', path.name)]
    strange = sorted(set(folder.glob('*.npz')) - set(ours))
    if strange:  # the trainer would read it, too
        fail(f'{strange[0]} was not written by this script: choose another --output_dir')
    for old in [folder / 'manifest.json', *ours]:  # the manifest first: a kill from here on leaves none
        old.unlink(missing_ok=True)
    files = write_rows(folder, splits['val'], 'val', 0, categories)
    files += write_rows(folder, splits['train'], 'train', len(files), categories)
    table = {category: {split: sum(row[2] == category for row in part) for split, part in splits.items()} for category in categories}
    tokens = sum(len(prompt) + len(response) for prompt, response, _ in rows)
    answers = sum(len(response) for _, response, _ in rows)
    write_json(folder / 'manifest.json', dict(
        tokenizer=tokenizer, vocab_size=encoding.n_vocab, eot=encoding.eot_token, max_length=max_length, seed=seed, val_fraction=val_fraction,
        categories=categories, rows=table, counts=counts, tokens=tokens, response_tokens=answers, files=files,
        source=Path(input).name if input else URL, sha256_source=hashlib.sha256(content).hexdigest()))

    for category, row in table.items():
        print0(f'{category:24} {row["train"]:7,} rows to train, {row["val"]:5,} held out')
    print0(f'{"all":24} {len(splits["train"]):7,} rows to train, {len(splits["val"]):5,} held out')
    print0(f'{counts["read"]:,} rows read: {counts["empty"]:,} without instruction or response and {counts["too_long"]:,} longer than {max_length} tokens '
           f'without their context left out, {counts["shortened"]:,} contexts shortened, {counts["citation_marks"]:,} citation marks removed')
    print0(f'{tokens:,} tokens, {tokens / len(rows):.0f} a row; {answers:,} of them, {answers / tokens:.1%}, in responses')
    lengths = np.array([len(prompt) + len(response) - 1 for prompt, response, _ in splits['train']])
    for how, batches in (('batches of 16 rows of like length', bucketed(lengths, 16, seed, 0)), ('batches of 16 random rows', random_batches(lengths))):
        width = sum(len(batch) * padded_length(lengths[batch].max()) for batch in batches)
        print0(f'padding in {how}: {1 - lengths.sum() / width:.0%}')
    if not input and counts['read'] != ROWS:
        print0(f'note: the published file has {ROWS:,} rows, this is another number')
    print0(f'wrote {folder}: ' + ', '.join(file['name'] for file in files))


def random_batches(lengths):
    order = np.random.default_rng(seed).permutation(len(lengths))
    return [order[i:i + 16] for i in range(0, len(order), 16)]


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
