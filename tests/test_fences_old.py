"""The scripts are one house: the same banners in the same order, and the blocks marked (=) identical to the byte.

    python tests/test_fences_old.py                       show what differs
    python tests/test_fences_old.py --fix finetune_dolly.py   copy that script's blocks into the others
"""
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ('finetune_dolly.py', 'pretrain_trm.py', 'finetune_addition.py', 'train_latent_prm.py') if (ROOT / name).exists()]
BANNERS = ['settings', 'command line', 'run folder', 'stored run (=)', 'derived', 'distributed (=)', 'precision and seed (=)', 'data', 'model', 'optimizer',
           'checkpoint (=)', 'resume (=)', 'compile and wrap (=)', 'learning rate (=)', 'evaluation', 'training loop', 'finish']
LONGEST = 650  # today's have 600 at most: there is room for what you add


def sections(source):
    """{banner: text from its line up to the next banner}"""
    parts = re.split(r'^(# ---- .*? -+\n)', source, flags=re.MULTILINE)
    return {re.match(r'# ---- (.*?) -+\n', head)[1]: head + body for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def difference(name, first, source, model_source):
    """Unified diff of the blocks marked (=), '' if there is none."""
    ours, model = sections(source), sections(model_source)
    return ''.join(line for banner in model if banner.endswith('(=)') and ours.get(banner) != model[banner]
                   for line in difflib.unified_diff(model[banner].splitlines(True), ours.get(banner, '').splitlines(True), first, name))


def fixed(source, model_source):
    """`source` with the blocks marked (=) of `model_source`."""
    for banner, text in sections(model_source).items():
        if banner.endswith('(=)') and banner in sections(source):
            source = source.replace(sections(source)[banner], text)
    return source


def test_banners_stand_in_order():
    for name in SCRIPTS:
        assert list(sections((ROOT / name).read_text())) == BANNERS, name


def test_blocks_are_identical():
    first, *others = SCRIPTS
    for name in others:
        differs = difference(name, first, (ROOT / name).read_text(), (ROOT / first).read_text())
        assert not differs, f'{differs}\nrepair with: python tests/test_fences_old.py --fix {first}'


def test_scripts_can_be_read_in_one_sitting():
    for name in SCRIPTS:
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= LONGEST, f'{name} has {lines} lines, more than {LONGEST}: what has its own maths can go into model.py or trm.py'


def test_a_drifted_copy_is_seen_and_repaired():
    source = (ROOT / 'finetune_dolly.py').read_text()
    copy = source.replace("max_lr = 6e-5 ", "max_lr = 3e-5 ").replace('told = stop.number', 'told = 15')
    assert copy != source and '+    told = 15' in difference('copy', 'original', copy, source)
    repaired = fixed(copy, source)
    assert not difference('copy', 'original', repaired, source) and 'max_lr = 3e-5 ' in repaired


if __name__ == '__main__':
    chosen, drifted = sys.argv[2] if sys.argv[1:2] == ['--fix'] else SCRIPTS[0], 0
    for name in SCRIPTS:
        path = ROOT / name
        differs = difference(name, chosen, path.read_text(), (ROOT / chosen).read_text())
        print(differs, end='')
        if differs and sys.argv[1:2] == ['--fix']:
            path.write_text(fixed(path.read_text(), (ROOT / chosen).read_text()))
            print(f'{name}: its blocks (=) are now those of {chosen} (the lines with - above)')
        else:
            drifted += differs != ''
    sys.exit(f'{drifted} scripts differ from {chosen} in blocks (=)' if drifted else 0)
