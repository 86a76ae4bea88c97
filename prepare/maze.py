"""Mazes for pretrain_trm.py: Maze-Hard, csv files of your own, or generated ones of any size that need no download.

    python prepare/maze.py                                          downloads Maze-Hard (1,000 mazes of 30 x 30 to train, 1,000 to test)
    python prepare/maze.py --input=train.csv --test_input=test.csv  the same files, or others with the columns question and answer
    python prepare/maze.py --generate --size=9 --train_size=10000 --output_dir=data/maze9
    python -m prepare.maze --help

A maze is a line of characters, row by row: `#` wall, blank free, S start, G goal; the answer has `o` on the cells of a shortest path. A cell becomes
1 to 5 in this order, 0 is padding. The paper trains with the 8 rotations and mirror images of each maze, its published command without: --aug adds them.
Generated mazes have one shortest path, so that "right" and "equal to the answer" are the same; in Maze-Hard there may be several.

The folder is that of the public TRM and HRM code, see write_puzzles.

Credit: Maze-Hard is sapientinc/maze-30x30-hard-1k on the Hugging Face hub (Wang et al. 2025, arXiv 2506.21734).
"""
import csv
import hashlib
import io
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from prepare.fineweb import download_bytes, one_line_errors, write_json

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/maze-30x30-hard-1k'  # folder to write
input = ''         # a csv with the columns question and answer for training; '' = download Maze-Hard
test_input = ''    # the same for the test; '' = download it, or with --input a tenth of that
subsample_size = 0  # training mazes, a random choice; 0 = all
aug = False        # train on the 8 rotations and mirror images of each maze
generate = False   # make mazes instead of reading them
size = 9           # rows and columns of generated mazes
min_path = 0       # steps of the shortest path of a generated maze, at least; 0 = size
train_size = 10000  # generated mazes for training
test_size = 1000   # generated mazes for the test
seed = 0           # of the choice and of the generated mazes

given = configure(globals()).typed if __name__ == '__main__' else set()

URL = 'https://huggingface.co/datasets/sapientinc/maze-30x30-hard-1k/resolve/main/{}.csv'
CELLS = '# SGo'


# -----------------------------------------------------------------------------
# the folder

def dihedral(grid, k):
    """One of the 8 images of a grid (..., rows, columns): rotated by k quarters to the left, k < 4; mirrored left to right, upside down, at the
    diagonal, at the other one."""
    if k < 4:
        return np.rot90(grid, k, (-2, -1))
    return [grid[..., ::-1], grid[..., ::-1, :], grid.swapaxes(-1, -2), np.rot90(grid[..., ::-1, :], 1, (-2, -1))][k - 4]


INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)  # dihedral(dihedral(grid, k), INVERSE[k]) is the grid


def new_folder(output_dir):
    """The folder in which everything is built; finish_folder gives it its name. A folder that is none of ours is not replaced."""
    final = Path(output_dir)
    folder = final.with_name(final.name + '.tmp')
    ours = (final / 'manifest.json').exists() and (final / 'train/dataset.json').exists()
    if final.is_symlink() or final.exists() and not final.is_dir() or final.is_dir() and any(final.iterdir()) and not ours:
        fail(f'{final} holds something else: choose another --output_dir')
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def finish_folder(folder, output_dir, identifiers, manifest):
    """identifiers.json, then manifest.json with the sha256 of every file, then the name; everything is on the disk before."""
    write_json(folder / 'identifiers.json', identifiers)
    files = {}
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            while part := file.read(1 << 20):
                digest.update(part)
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = digest.hexdigest()
    write_json(folder / 'manifest.json', dict(manifest, files=files))
    final = Path(output_dir)
    if final.exists():
        shutil.rmtree(final)
    os.replace(folder, final)


def write_puzzles(folder, split, chunks, identifiers, puzzle_indices, group_indices, vocab_size, num_puzzle_identifiers):
    """{folder}/{split}/: all__inputs.npy and all__labels.npy (N, S) uint8, 0 = padding and in a label also "does not count"; all__puzzle_identifiers.npy (P,)
    int32, a number for each puzzle; all__puzzle_indices.npy (P + 1,), puzzle p owns the examples [p], ..., [p + 1] - 1;
    all__group_indices.npy (G + 1,), group g owns the puzzles in the same way; dataset.json.

    chunks yields (inputs, labels) (n, S), N rows in all: they may be more than the memory holds. AssertionError if things do not fit together."""
    identifiers, puzzle_indices, group_indices = (np.asarray(numbers, np.int32) for numbers in (identifiers, puzzle_indices, group_indices))
    N, P, G = int(puzzle_indices[-1]), len(identifiers), len(group_indices) - 1
    assert puzzle_indices[0] == group_indices[0] == 0 and group_indices[-1] == P == len(puzzle_indices) - 1
    assert (np.diff(puzzle_indices) > 0).all() and (np.diff(group_indices) > 0).all() and 0 <= identifiers.min() <= identifiers.max() < num_puzzle_identifiers
    (folder / split).mkdir(exist_ok=True)
    done, S = 0, 0
    with open(folder / split / 'all__inputs.npy', 'wb') as inputs_file, open(folder / split / 'all__labels.npy', 'wb') as labels_file:
        for arrays in chunks:
            S = S or arrays[0].shape[1]
            for file, array in zip((inputs_file, labels_file), arrays, strict=True):
                assert array.shape == (len(arrays[0]), S) and array.dtype == np.uint8 and array.max() < vocab_size
                if not done:
                    np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=(N, S)))
                file.write(array.tobytes())
            done += len(arrays[0])
    assert done == N
    for name, numbers in dict(puzzle_identifiers=identifiers, puzzle_indices=puzzle_indices, group_indices=group_indices).items():
        np.save(folder / split / f'all__{name}.npy', numbers)
    write_json(folder / split / 'dataset.json', dict(
        pad_id=0, ignore_label_id=0, blank_identifier_id=0, vocab_size=vocab_size, seq_len=S, num_puzzle_identifiers=num_puzzle_identifiers,
        total_groups=G, mean_puzzle_examples=N / P, total_puzzles=P, sets=['all']))


# -----------------------------------------------------------------------------
# mazes

def read_csv(content, where):
    """(questions, answers) (n, rows, columns) uint8 of a csv."""
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode('utf-8-sig'), newline='')))
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f'{where}: {error}')
    if not rows or not {'question', 'answer'} <= rows[0].keys():
        fail(f'{where}: expected a csv with the columns question and answer')
    length = len(rows[0]['question'] or '')
    side = math.isqrt(length)
    grids = []
    for number, row in enumerate(rows, 2):
        for name in ('question', 'answer'):
            text = row[name] or ''
            if len(text) != length or side * side != length or not length or set(text) - set(CELLS):
                fail(f'{where} line {number}: its {name} is no square of the {length} characters {CELLS!r} of the first')
        if row['answer'].replace('o', ' ') != row['question'].replace('o', ' '):
            fail(f'{where} line {number}: its answer is that of another maze')
        grids.append([[CELLS.index(cell) + 1 for cell in row[name]] for name in ('question', 'answer')])
    grids = np.array(grids, np.uint8).reshape(len(rows), 2, side, side)
    return grids[:, 0], grids[:, 1]


def distances(free, start):
    """(steps from `start` to each cell (n, n), -1 = unreachable; number of shortest ways there)."""
    n = len(free)
    far, ways = np.full((n, n), -1), np.zeros((n, n), np.int64)
    far[start], ways[start], edge, step = 0, 1, [start], 0
    while edge:
        step, new = step + 1, []
        for r, c in edge:
            for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if 0 <= cell[0] < n and 0 <= cell[1] < n and free[cell]:
                    if far[cell] < 0:
                        far[cell] = step
                        new.append(cell)
                    if far[cell] == step:
                        ways[cell] += ways[r, c]
        edge = new
    return far, ways


def made(generator, n, shortest):
    """(maze, answer) (n, n) uint8: 30 to 50% walls, one shortest path of at least so many steps; None if this try gave none."""
    free = generator.random((n, n)) >= generator.uniform(0.3, 0.5)
    cells = np.argwhere(free)
    if len(cells) < 2:
        return None
    start = tuple(cells[generator.integers(len(cells))])
    far, ways = distances(free, start)
    goals = np.argwhere((far >= shortest) & (ways == 1))
    if not len(goals):
        return None
    goal = tuple(goals[generator.integers(len(goals))])
    question = np.where(free, 2, 1).astype(np.uint8)
    question[start], question[goal] = 3, 4
    answer, cell = question.copy(), goal
    while far[cell] > 1:  # back along the only way
        r, c = cell
        cell = next(x for x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
                    if 0 <= x[0] < n and 0 <= x[1] < n and far[x] == far[r, c] - 1)
        answer[cell] = 5
    return question, answer


def make(n, count):
    """`count` different mazes."""
    generator, seen, mazes, tries = np.random.default_rng(seed), set(), [], 0
    with tqdm(total=count, disable=None, desc='mazes') as bar:
        while len(mazes) < count:
            tries += 1
            maze = made(generator, n, min_path or n)
            if maze is not None and maze[0].tobytes() not in seen:
                seen.add(maze[0].tobytes())
                mazes.append(maze)
                bar.update(1)
            elif tries > 1000 and len(mazes) < tries / 1000:
                fail(f'{tries:,} tries gave {len(mazes)} mazes of size {n} with a path of {min_path or n} steps: ask for less (--min_path)')
    return np.array([q for q, _ in mazes]), np.array([a for _, a in mazes])


def main():
    reading, making = {'input', 'test_input', 'subsample_size'}, {'size', 'min_path', 'train_size', 'test_size'}
    for name in sorted(given & (reading if generate else making)):  # nothing that was typed may be without effect
        fail(f'--{name} ' + ('reads files: it does not go with --generate' if generate else 'is for --generate'))
    if generate:
        questions, answers = make(size, train_size + test_size)
        splits = {'train': (questions[:train_size], answers[:train_size]), 'test': (questions[train_size:], answers[train_size:])}
        source = f'generated, {size} x {size}'
    else:
        splits = {}
        for split, path in (('train', input), ('test', test_input)):
            if split == 'test' and input and not path:
                order = np.random.default_rng([seed, 1]).permutation(len(splits['train'][0]))
                cut = len(order) // 10
                if not cut:
                    fail(f'{input}: {len(order)} mazes are too few to hold out a tenth: name others with --test_input')
                splits = {part: tuple(grids[chosen] for grids in splits['train']) for part, chosen in (('train', order[cut:]), ('test', order[:cut]))}
                break
            if path and not os.path.isfile(path):
                fail(f'--input: {path} does not exist')
            splits[split] = read_csv(Path(path).read_bytes() if path else download_bytes(URL.format(split)), path or URL.format(split))
        source = input or URL
    known = {maze.tobytes() for maze in splits['train'][0]}
    if both := [i for i, maze in enumerate(splits['test'][0], 1) if maze.tobytes() in known]:
        fail(f'{len(both)} test mazes are training mazes too, the first is number {both[0]}')
    if len({grids.shape[1:] for pair in splits.values() for grids in pair}) > 1:
        fail('training and test mazes differ in size')
    if 0 < subsample_size < len(splits['train'][0]):
        chosen = np.random.default_rng(seed).choice(len(splits['train'][0]), subsample_size, replace=False)
        splits['train'] = tuple(grids[chosen] for grids in splits['train'])
    folder = new_folder(output_dir)
    for split, pair in splits.items():
        copies = 8 if aug and split == 'train' else 1
        inputs, labels = (np.stack([dihedral(grids, k) for k in range(copies)], 1).reshape(len(grids) * copies, -1) for grids in pair)
        n = len(inputs)
        write_puzzles(folder, split, [(inputs, labels)], np.zeros(n), np.arange(n + 1), np.arange(0, n + 1, copies), len(CELLS) + 1, 1)
        print0(f'{split}: {n:,} mazes of {pair[0].shape[1]} x {pair[0].shape[2]}, paths of {(pair[1] == 5).sum((1, 2)).mean() + 1:.1f} steps on average')
    finish_folder(folder, output_dir, ['<blank>'], dict(source=re.sub('.*/', '', source), seed=seed, aug=aug))
    print0(f'wrote {output_dir}')


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
