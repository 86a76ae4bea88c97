"""ARC-AGI-1, ARC-AGI-2 and ConceptARC as puzzles for pretrain_trm.py, each with up to num_aug copies in other colours and orientations.

    python prepare/arc.py                                                  ARC-AGI-1 with ConceptARC
    python prepare/arc.py --subsets training2 evaluation2 concept --test_set_name evaluation2 --output_dir data/arc2concept-aug-1000
    python -m prepare.arc --help

Reads {prefix}_{subset}_challenges.json and {prefix}_{subset}_solutions.json, Kaggle's layout, which is also that of kaggle/combined/ in
https://github.com/SamsungSAILMontreal/TinyRecursiveModels: 400 tasks in training and evaluation, 1,000 in training2, 120 in evaluation2, 160 in concept.

A task's demonstrations are training examples, those of the test set too: its own vector, which all its examples share, is what the model learns about
it. The test inputs of test_set_name are the test split, all other test pairs are training examples. A copy has an identifier of its own,
`task|||t3|||0132456789`: turned by dihedral transform 3 (see prepare/maze.py), colour i renamed to the i-th digit; 0, black, stays.

A grid is put into 30 x 30 cells: 0 padding, 1 end (a row below it and a column to its right), colour + 2. In training both grids of an
example are moved by the same random distance, but for one example of each copy; in the test never.

Beside the folder of the public TRM and HRM code (see write_puzzles in prepare/maze.py): test_puzzles.json, the tasks of the test set with their answers.
"""
import hashlib
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from prepare.fineweb import one_line_errors, parsed, write_json
from prepare.maze import dihedral, finish_folder, new_folder, write_puzzles

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/arc1concept-aug-1000'           # folder to write
input_file_prefix = 'kaggle/combined/arc-agi'      # files are {prefix}_{subset}_challenges.json and {prefix}_{subset}_solutions.json
subsets = ['training', 'evaluation', 'concept']    # those to read
test_set_name = 'evaluation'                       # the subset whose test inputs are the test
num_aug = 1000                                     # copies of each task, at most; 0 = none
seed = 42                                          # of copies and positions; 0 = a seed like any other

if __name__ == '__main__':
    configure(globals(), aliases={'input': 'input_file_prefix'})

SIDE = 30
SEPARATOR = '|||'
TRIES = 5  # times num_aug: a task of few colours and much symmetry has fewer different copies


def grid_of(cells, where):
    """A grid (rows, columns) uint8 of the colours 0 to 9."""
    ok = isinstance(cells, list) and 1 <= len(cells) <= SIDE and all(isinstance(row, list) and len(row) == len(cells[0]) for row in cells)
    if not ok or not 1 <= len(cells[0]) <= SIDE or any(type(cell) is not int or not 0 <= cell <= 9 for row in cells for cell in row):
        fail(f'{where}: expected a grid of at most {SIDE} x {SIDE} whole numbers from 0 to 9')
    return np.array(cells, np.uint8)


def read_subset(subset):
    """{task: {'train': [(input, output), ...], 'test': [...]}} of grids, and whether the answers are known."""
    challenges, solutions = (Path(f'{input_file_prefix}_{subset}_{kind}.json') for kind in ('challenges', 'solutions'))
    if not challenges.is_file():
        fail(f'{challenges} does not exist: --input_file_prefix names the files in front of _{subset}_challenges.json (see --help for where to get them)')
    tasks = parsed(challenges.read_bytes(), challenges)
    answers = parsed(solutions.read_bytes(), solutions) if solutions.is_file() else None
    if answers is None:
        print0(f'WARNING: {solutions} does not exist: the answers of its test are taken to be one black cell')
    if not isinstance(tasks, dict) or not tasks or answers is not None and not isinstance(answers, dict):
        fail(f'{challenges}: expected an object of tasks')
    found = {}
    for name, task in tasks.items():
        where = f'{challenges}: task {name}'
        if SEPARATOR in name or not isinstance(task, dict) or not all(isinstance(task.get(kind), list) and task[kind] for kind in ('train', 'test')):
            fail(f'{where}: expected lists of pairs, train and test')
        outputs = answers.get(name) if answers is not None else [pair.get('output', [[0]]) if isinstance(pair, dict) else 0 for pair in task['test']]
        if not isinstance(outputs, list) or len(outputs) != len(task['test']):
            fail(f'{solutions}: task {name} has {len(task["test"])} tests, expected as many answers')
        if not all(isinstance(pair, dict) and 'input' in pair for kind in ('train', 'test') for pair in task[kind]):
            fail(f'{where}: expected pairs of input and output')
        found[name] = dict(train=[(grid_of(pair['input'], where), grid_of(pair.get('output'), where)) for pair in task['train']],
                           test=[(grid_of(pair['input'], where), grid_of(output, f'{solutions}: task {name}'))
                                 for pair, output in zip(task['test'], outputs, strict=True)])
    return found


def transformed(grid, turn, colours):
    return dihedral(colours[grid], turn)


def fingerprint(pairs, turn, colours):
    """Equal for two copies of a task exactly if they hold the same pairs, in whatever order."""
    parts = []
    for pair in pairs:
        for grid in pair:
            image = transformed(grid, turn, colours)
            parts.append(bytes(image.shape) + image.tobytes())
    return hashlib.sha256(b''.join(sorted(a + b for a, b in zip(parts[::2], parts[1::2], strict=True)))).digest()


def copies_of(task, generator):
    """[(turn, colours (10,))], the task as it is first."""
    pairs, same = task['train'] + task['test'], np.arange(10, dtype=np.uint8)
    chosen, seen = [(0, same)], {fingerprint(pairs, 0, same)}
    for _ in range(TRIES * num_aug):
        if len(chosen) > num_aug:
            break
        turn, colours = int(generator.integers(8)), np.concatenate(([0], 1 + generator.permutation(9))).astype(np.uint8)
        print_of = fingerprint(pairs, turn, colours)
        if print_of not in seen:
            seen.add(print_of)
            chosen.append((turn, colours))
    return chosen


def placed(pair, row, column):
    """Both grids as (900,) tokens, their first cells at (row, column)."""
    cells = np.zeros((2, SIDE, SIDE), np.uint8)
    for board, grid in zip(cells, pair, strict=True):
        bottom, right = row + grid.shape[0], column + grid.shape[1]
        board[row:bottom, column:right] = grid + 2
        board[bottom:bottom + 1, column:right] = 1  # nothing, where the grid touches the border
        board[row:bottom, right:right + 1] = 1
    return cells.reshape(2, -1)


def examples(tasks, kinds, moved):
    """Yield (inputs, labels) of each copy of each task. tasks: [(task, copies)]; kinds: of a task's pairs; moved: to random places, all but one."""
    generator = np.random.default_rng([seed, 1])
    for task, copies in tqdm(tasks, disable=None, desc='test' if not moved else 'train'):
        for turn, colours in copies:
            pairs = [tuple(transformed(grid, turn, colours) for grid in pair) for kind in kinds[id(task)] for pair in task[kind]]
            still, boards = generator.integers(len(pairs)), []
            for i, pair in enumerate(pairs):
                room = SIDE - np.max([grid.shape for grid in pair], 0)
                boards.append(placed(pair, *(generator.integers(room + 1) if moved and i != still else (0, 0))))
            yield tuple(np.stack(boards, 1))


def main():
    if test_set_name not in subsets:
        fail(f'--test_set_name={test_set_name} is none of --subsets {" ".join(subsets)}')
    if len(set(subsets)) < len(subsets):
        fail(f'--subsets {" ".join(subsets)}: one of them twice')
    generator, tasks, tests = np.random.default_rng(seed), [], {}
    for subset in subsets:
        found = read_subset(subset)
        if again := found.keys() & tests.keys():
            print0(f'WARNING: {len(again)} tasks of {subset} are in the test set too, e.g. {min(again)}: the model is trained on their answers')
        for name in generator.permutation(list(found)):
            tasks.append((str(name), subset, found[str(name)]))
        tests.update(found if subset == test_set_name else {})
    copies = [(task, copies_of(task, generator)) for _, _, task in tqdm(tasks, disable=None, desc='copies')]
    kinds = {id(task): ('train',) if subset == test_set_name else ('train', 'test') for _, subset, task in tasks}

    identifiers, numbers = ['<blank>'], {}  # tasks of one name in two subsets are one puzzle to the model
    ids = []  # of the copies of each task
    for (name, _, _), (_, chosen) in zip(tasks, copies, strict=True):
        names = [name, *(SEPARATOR.join((name, f't{turn}', ''.join(map(str, colours)))) for turn, colours in chosen[1:])]
        for one in names:
            if one not in numbers:
                numbers[one] = len(identifiers)
                identifiers.append(one)
        ids.append([numbers[one] for one in names])

    folder = new_folder(output_dir)
    for split in ('train', 'test'):
        rows = [i for i, (_, subset, _) in enumerate(tasks) if split == 'train' or subset == test_set_name]
        kept = [copies[i] for i in rows]
        of = kinds if split == 'train' else {id(task): ('test',) for task, _ in kept}
        counts = [sum(len(task[kind]) for kind in of[id(task)]) for task, _ in kept]
        puzzle_indices = np.cumsum([0, *np.repeat(counts, [len(chosen) for _, chosen in kept])])
        write_puzzles(folder, split, examples(kept, of, split == 'train'), [one for i in rows for one in ids[i]], puzzle_indices,
                      np.cumsum([0, *(len(chosen) for _, chosen in kept)]), 12, len(identifiers))
        print0(f'{split}: {len(kept):,} tasks, {len(puzzle_indices) - 1:,} with their copies, {puzzle_indices[-1]:,} examples')
    write_json(folder / 'test_puzzles.json', {name: {kind: [dict(input=a.tolist(), output=b.tolist()) for a, b in pairs] for kind, pairs in task.items()}
                                              for name, task in tests.items()})
    finish_folder(folder, output_dir, identifiers, dict(source=re.sub('.*/', '', input_file_prefix), subsets=subsets, test_set_name=test_set_name,
                                                        num_aug=num_aug, seed=seed))
    few = sum(len(chosen) <= num_aug for _, chosen in copies)
    print0(f'wrote {output_dir}: {len(identifiers):,} identifiers; {few} tasks have fewer than {num_aug} different copies')


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
