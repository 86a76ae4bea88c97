"""The scripts are one house: the same banners in the same order, and blocks marked (=) the same to the byte.

A script is any .py file beside train_gpt2.py that has such a block. To change one in a single script, drop
the (=) of its banner there: that block is then compared with no other.
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = '# ---- devices and ranks (=) '
BANNERS = '''settings, command line, devices and ranks, data, model and optimizer, learning rate, generators,
writing, checkpoint, resume, evaluation, one-shot modes, training loop, end'''.replace('\n', ' ').split(', ')


def find_scripts(folder):
    """{file name: source}"""
    sources = {path.name: path.read_text() for path in sorted(folder.glob('*.py'))}
    return {name: source for name, source in sources.items() if f'\n{MARK}' in source}


def sections(source):
    """{banner: the text below it, up to the next one}"""
    parts = re.split(r'^# ---- (.*?) -+\n', source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def drifted(scripts):
    """(banner, script, script) of each block marked (=) that differs from the first one of its name."""
    first, found = {}, []
    for name, source in scripts.items():
        for banner, text in sections(source).items():
            if banner.endswith('(=)'):
                known, expected = first.setdefault(banner, (name, text))
                found += [(banner, known, name)] if text != expected else []
    return found


@pytest.mark.parametrize('name', find_scripts(ROOT))
def test_banners_stand_in_order(name):
    source = (ROOT / name).read_text()
    assert [banner.removesuffix(' (=)') for banner in sections(source)] == BANNERS
    assert len({len(line) for line in source.splitlines() if line.startswith('# ---- ')}) == 1


def test_blocks_are_identical():
    assert 'train_gpt2.py' in find_scripts(ROOT) and drifted(find_scripts(ROOT)) == []


def test_a_drifted_copy_is_seen_until_it_leaves_the_comparison(tmp_path):
    source = (ROOT / 'train_gpt2.py').read_text()
    copy = source.replace("file.flush()\n", "file.flush();\n").replace('max_lr = 6e-4 ', 'max_lr = 3e-5 ')
    for name, text in (('train_gpt2.py', source), ('sixth.py', copy), ('no_script.py', 'MARK = "(=)"\n')):
        (tmp_path / name).write_text(text)
    assert drifted(find_scripts(tmp_path)) == [('writing (=)', 'sixth.py', 'train_gpt2.py')]
    (tmp_path / 'sixth.py').write_text(copy.replace('# ---- writing (=) ----', '# ---- writing --------'))
    assert list(find_scripts(tmp_path)) == ['sixth.py', 'train_gpt2.py']
    assert drifted(find_scripts(tmp_path)) == []
