"""The validation set of HellaSwag, 10,042 unfinished texts with four endings each, for the evaluation in train_gpt2.py.

    python prepare/hellaswag.py                                 downloads it
    python prepare/hellaswag.py --input=hellaswag_val.jsonl     the same file, or some of its lines, from this machine
    python -m prepare.hellaswag --output_dir=data/hellaswag

The folder: hellaswag_val.jsonl, one {"ctx": text, "endings": [4 texts], "label": number of the right one, from 0} per line,
and manifest.json, written last. Running it again replaces both.

Credit: Zellers, Holtzman, Bisk, Farhadi, Choi: HellaSwag (2019), arXiv 1905.07830. The data is under the MIT license.
"""
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from prepare.fineweb import checked, download_bytes, one_line_errors, parsed, write_file, write_json

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/hellaswag'  # folder to write
input = ''                     # a .jsonl with the keys ctx, endings and label; '' = download it

if __name__ == '__main__':
    configure(globals())

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
ROWS = 10042


def text(value, where):
    if not checked(value, where).strip():
        fail(f'{where}: the text is empty')
    return value


def rows(content, name):
    """Yield {'ctx', 'endings', 'label'} of each line; other keys are left out."""
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        where = f'{name} line {number}'
        row = parsed(line, where)
        if not isinstance(row, dict) or not {'ctx', 'endings', 'label'} <= row.keys():
            found = f'{sorted(row)!r:.100}' if isinstance(row, dict) else type(row).__name__
            fail(f'{where}: found {found}, expected an object with ctx, endings and label')
        endings, label = row['endings'], row['label']
        if not isinstance(endings, list) or len(endings) != 4:
            found = f'a list of {len(endings)}' if isinstance(endings, list) else type(endings).__name__
            fail(f'{where}: endings is {found}, expected a list of 4 texts')
        if type(label) not in (int, str) or str(label) not in ('0', '1', '2', '3'):  # converted from parquet it is a string
            found = f'{label!r:.40}' if isinstance(label, (int, str)) else type(label).__name__
            fail(f'{where}: label is {found}, expected 0, 1, 2 or 3')
        endings = [text(ending, f'{where}: ending {k}') for k, ending in enumerate(endings)]
        yield {'ctx': text(row['ctx'], f'{where}: ctx'), 'endings': endings, 'label': int(label)}


if __name__ == '__main__':
    with one_line_errors(input or output_dir):
        if input and not os.path.isfile(input):
            fail(f'--input: {input} ' + ('is a folder: name the file in it' if os.path.isdir(input) else 'does not exist'))
        content = Path(input).read_bytes() if input else download_bytes(URL)
        items = list(rows(content, input or URL))
    if not items:
        fail(f'{input or URL}: no items, nothing to write')
    path, manifest = Path(output_dir, 'hellaswag_val.jsonl'), Path(output_dir, 'manifest.json')
    with one_line_errors(output_dir):
        try:
            manifest.unlink(missing_ok=True)  # a kill from here on leaves none, rather than that of another file
            digest = write_file(path, *(json.dumps(row, ensure_ascii=False).encode() + b'\n' for row in items))
            write_json(manifest, {'rows': len(items), 'sha256': digest, 'source': Path(input).name if input else URL,
                                  'sha256_source': hashlib.sha256(content).hexdigest()})
        finally:
            for file in (path, manifest):  # a full disk leaves half a file
                with contextlib.suppress(OSError):
                    file.with_name(file.name + '.tmp').unlink()
    shares = ', '.join(f'{label} {sum(row["label"] == label for row in items) / len(items):.1%}' for label in range(4))
    print0(f'{path}: {len(items):,} items; right endings: {shares}')
    if len(items) != ROWS:
        print0(f'note: the published validation set has {ROWS:,} items, this is another number')
