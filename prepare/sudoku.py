"""Sudoku puzzles for pretrain_trm.py: Sudoku-Extreme, csv files of your own, or generated ones of size 4, 6 or 9 that need no download.

    python prepare/sudoku.py                                             downloads Sudoku-Extreme (train: 1,000 of 3.8M puzzles; test: 423k)
    python prepare/sudoku.py --input=train.csv --test_input=test.csv     the same files, or others with the columns question and answer
    python prepare/sudoku.py --generate --size=4 --train_size=10000 --output_dir=data/sudoku4
    python -m prepare.sudoku --help

Each training puzzle is followed by num_aug copies that the symmetries of Sudoku make of it: digits renamed, bands, stacks and the lines
inside them exchanged, the grid mirrored. A cell becomes 1 + its digit, 1 = blank, 0 is padding. The folder is that of the public TRM and HRM code,
see write_puzzles in prepare/maze.py. The public builder is not seeded; this one is.

Generated puzzles have one solution. No training puzzle, copies included, has the solution of a test puzzle; of size 4 and 6 none is a test puzzle in the
clothes of another symmetry either (of size 9 that would be a miracle).

Credit: Sudoku-Extreme is sapientinc/sudoku-extreme on the Hugging Face hub (Wang et al. 2025, arXiv 2506.21734).
"""
import csv
import io
import itertools
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from prepare.fineweb import download_bytes, one_line_errors
from prepare.maze import finish_folder, new_folder, write_puzzles

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/sudoku-extreme-1k-aug-1000'  # folder to write
input = ''                # a csv with the columns question and answer for training; '' = download Sudoku-Extreme
test_input = ''           # the same for the test; '' = download it, or with --input a tenth of that
subsample_size = 1000     # training puzzles of the csv, a random choice; 0 = all
num_aug = -1              # copies of each training puzzle; 0 = none; -1 = 1000, or with --generate none
min_difficulty = 0        # leave out training puzzles with a smaller rating; 0 = none
generate = False          # make puzzles instead of reading them
size = 9                  # of generated puzzles: 4, 6 or 9
train_size = 2000         # generated puzzles for training
test_size = 500           # generated puzzles for the test
seed = 0                  # of the choice, the copies and the generated puzzles; 0 = a seed like any other

given = configure(globals()).typed if __name__ == '__main__' else set()

URL = 'https://huggingface.co/datasets/sapientinc/sudoku-extreme/resolve/main/{}.csv'
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box


# -----------------------------------------------------------------------------
# reading

def table(content, where):
    """Rows (dicts) of a csv with the columns question and answer, one after another."""
    reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), 'utf-8-sig', newline=''))
    try:
        if not {'question', 'answer'} <= set(reader.fieldnames or ()):
            fail(f'{where}: expected a csv with the columns question and answer')
        yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f'{where} line {reader.line_num}: {error}')


def read_csv(content, where, generator=None):
    """(puzzles, solutions) (n, N, N) uint8, 0 = blank. With a generator: subsample_size of those that are difficult enough."""
    chosen = [number for number, row in enumerate(table(content, where)) if not (generator and min_difficulty) or rating(row, where, number) >= min_difficulty]
    if generator and 0 < subsample_size < len(chosen):
        chosen = generator.choice(chosen, subsample_size, replace=False)
    chosen, grids = set(map(int, chosen)), []
    for number, row in enumerate(table(content, where)):
        if number in chosen:
            question, answer = re.sub('[.]', '0', row['question'] or ''), row['answer'] or ''
            N = {N * N: N for N in BOXES}.get(len(question))
            if not N or grids and N != len(grids[0][0]) or not re.fullmatch(f'[0-{N}]{{{N * N}}}', question) or not re.fullmatch(f'[1-{N}]{{{N * N}}}', answer):
                fail(f'{where} line {number + 2}: expected 81 digits (or . for a blank) and 81 digits, or 16 or 36, the same number in all lines')
            pair = np.array([list(map(int, question)), list(map(int, answer))], np.uint8).reshape(2, N, N)
            if not valid(pair[1:])[0] or not ((pair[0] == 0) | (pair[0] == pair[1])).all():
                fail(f'{where} line {number + 2}: its answer is no solution of its question')
            grids.append(pair)
    if not grids:
        fail(f'{where}: no puzzles' + (f' of rating {min_difficulty} or more' if generator and min_difficulty else ''))
    grids = np.array(grids)
    return grids[:, 0], grids[:, 1]


def rating(row, where, number):
    if not re.fullmatch(r'\d+', row.get('rating') or ''):
        fail(f'{where} line {number + 2}: no rating, so --min_difficulty cannot be used')
    return int(row['rating'])


# -----------------------------------------------------------------------------
# puzzles

def valid(grids):
    """Which of the full grids (n, N, N) hold every digit once in each row, column and box."""
    n, N, _ = grids.shape
    r, c = BOXES[N]
    boxes = grids.reshape(n, N // r, r, N // c, c).swapaxes(2, 3).reshape(n, N, N)
    return np.all([(np.sort(view, 2) == np.arange(1, N + 1)).all((1, 2)) for view in (grids, grids.swapaxes(1, 2), boxes)], 0)


def shuffled(puzzle, solution, generator):
    """The same puzzle in other clothes: digits renamed, mirrored or not (if the boxes are square), bands, stacks and the lines in them exchanged."""
    N = len(puzzle)
    r, c = BOXES[N]
    digits = np.concatenate(([0], generator.permutation(N) + 1)).astype(np.uint8)
    rows = np.concatenate([band * r + generator.permutation(r) for band in generator.permutation(N // r)])
    columns = np.concatenate([stack * c + generator.permutation(c) for stack in generator.permutation(N // c)])
    flip = r == c and generator.random() < 0.5
    return tuple(digits[(grid.T if flip else grid)[rows][:, columns]] for grid in (puzzle, solution))


def solve(cells, N, most, order=None):
    """Up to `most` solutions, lists of N * N digits, of a puzzle (a list, 0 = blank): always the cell with the fewest candidates next.
    order: digits in the order in which they are tried."""
    r, c = BOXES[N]
    line = [(i // N, i % N, i // N // r * r + i % N // c) for i in range(N * N)]  # row, column and box of a cell
    rows, columns, boxes = [0] * N, [0] * N, [0] * N  # digits in use, as bits
    cells, blanks, found = list(cells), [], []
    for i, digit in enumerate(cells):
        if not digit:
            blanks.append(i)
            continue
        row, column, box = line[i]
        if (rows[row] | columns[column] | boxes[box]) >> digit & 1:
            return []
        rows[row] |= 1 << digit
        columns[column] |= 1 << digit
        boxes[box] |= 1 << digit

    def search():
        if not blanks:
            found.append(list(cells))
            return len(found) == most
        best, used, most_used = 0, 0, -1
        for k, i in enumerate(blanks):
            row, column, box = line[i]
            taken = rows[row] | columns[column] | boxes[box]
            if (count := bin(taken).count('1')) > most_used:
                best, used, most_used = k, taken, count
                if count >= N - 1:
                    break  # one candidate, or none
        i = blanks.pop(best)
        row, column, box = line[i]
        for digit in order or range(1, N + 1):
            bit = 1 << digit
            if not used & bit:
                cells[i] = digit
                rows[row], columns[column], boxes[box] = rows[row] | bit, columns[column] | bit, boxes[box] | bit
                if search():
                    return True
                rows[row], columns[column], boxes[box] = rows[row] ^ bit, columns[column] ^ bit, boxes[box] ^ bit
        cells[i] = 0
        blanks.insert(best, i)
        return False

    search()
    return found


@lru_cache
def symmetries(N):
    """The cells that each exchange of bands, stacks and lines, mirrored or not, puts in the place of cells 0, 1, ...: (number of them, N * N)."""
    def orders(parts, length):
        for bands in itertools.permutations(range(parts)):
            for inside in itertools.product(itertools.permutations(range(length)), repeat=parts):
                yield [band * length + i for band, order in zip(bands, inside, strict=True) for i in order]
    r, c = BOXES[N]
    cells = np.arange(N * N).reshape(N, N)
    grids = [grid[rows][:, columns].ravel() for grid in ([cells, cells.T] if r == c else [cells])
             for rows in orders(N // r, r) for columns in orders(N // c, c)]
    return np.array(grids)


def essence(puzzle):
    """Equal for two puzzles of size 4 or 6 exactly if a symmetry makes one of the other: the first, as bytes, of all its images, digits named
    in the order in which they appear. Size 9 has too many: the puzzle itself."""
    N = len(puzzle)
    if N == 9:
        return puzzle.tobytes()
    images = puzzle.ravel()[symmetries(N)]
    first = np.stack([np.where((images == digit).any(1), (images == digit).argmax(1), N * N) for digit in range(1, N + 1)], 1)  # (images, N)
    names = np.zeros((len(images), N + 1), np.uint8)
    np.put_along_axis(names[:, 1:], first.argsort(1, kind='stable'), np.arange(1, N + 1, dtype=np.uint8)[None], 1)
    return min(map(bytes, np.take_along_axis(names, images, 1)))


def new_puzzle(solution, generator):
    """A puzzle (N, N) with this one solution: clues go in a random order while it stays the only one, then up to N come back."""
    N, cells = len(solution), solution.ravel().tolist()
    answer = list(cells)
    for i in generator.permutation(N * N):
        digit, cells[i] = cells[i], 0
        if len(solve(cells, N, 2)) > 1:
            cells[i] = digit
    blanks = [i for i in range(N * N) if not cells[i]]
    for i in generator.choice(blanks, generator.integers(min(N, len(blanks)) + 1), replace=False):
        cells[i] = answer[i]
    return np.array(cells, np.uint8).reshape(N, N)


def new_solution(N, generator):
    """A random full grid: a random first row and column block, filled up in a random order of digits, then shuffled."""
    cells = [0] * (N * N)
    cells[:N] = (generator.permutation(N) + 1).tolist()
    grid = np.array(solve(cells, N, 1, (generator.permutation(N) + 1).tolist())[0], np.uint8).reshape(N, N)
    return shuffled(grid, grid, generator)[1]


def make(N):
    """{'train': (puzzles, solutions), 'test': ...}, the test first: its solutions, and its puzzles' symmetric images, are no training material."""
    generator, splits = np.random.default_rng(seed), {}
    pool = None
    if N == 4:  # there are 288 solutions: a fifth for the test
        pool = np.array(solve([0] * 16, 4, -1), np.uint8).reshape(-1, 4, 4)
        pool = dict(zip(('test', 'train'), np.split(pool[generator.permutation(len(pool))], [len(pool) // 5]), strict=True))
    essences, solutions = set(), set()  # of the test
    for split, count in (('test', test_size), ('train', train_size)):
        seen, pairs, tries = set(), [], 0
        with tqdm(total=count, disable=None, desc=f'{split} puzzles') as bar:
            while len(pairs) < count:
                solution = pool[split][generator.integers(len(pool[split]))] if pool else new_solution(N, generator)
                puzzle, tries = new_puzzle(solution, generator), tries + 1
                if puzzle.tobytes() not in seen and (split == 'test' or solution.tobytes() not in solutions and essence(puzzle) not in essences):
                    seen.add(puzzle.tobytes())
                    pairs.append((puzzle, solution))
                    bar.update(1)
                elif tries > 100 * count + 1000:
                    fail(f'{tries:,} tries gave {len(pairs)} different {split} puzzles of size {N}: ask for fewer')
        splits[split] = tuple(np.array(grids) for grids in zip(*pairs, strict=True))
        if split == 'test':
            essences, solutions = {essence(p) for p, _ in pairs}, {s.tobytes() for s in (pool['test'] if pool else splits['test'][1])}
    return splits, solutions


# -----------------------------------------------------------------------------

def with_copies(puzzles, solutions, copies, forbidden, generator):
    """Yield (inputs, labels) (1 + copies, N * N) for each puzzle, itself first; a copy whose solution is in `forbidden` is drawn anew."""
    for puzzle, solution in zip(tqdm(puzzles, disable=None, desc='copies'), solutions, strict=True):
        pairs = [(puzzle, solution)]
        while len(pairs) <= copies:
            pair = shuffled(puzzle, solution, generator)
            if pair[1].tobytes() not in forbidden:
                pairs.append(pair)
        yield tuple((np.array(grids) + 1).astype(np.uint8).reshape(len(pairs), -1) for grids in zip(*pairs, strict=True))


def main():
    reading, making = {'input', 'test_input', 'subsample_size', 'min_difficulty'}, {'size', 'train_size', 'test_size'}
    for name in sorted(given & (reading if generate else making)):  # nothing that was typed may be without effect
        fail(f'--{name} ' + ('reads files: it does not go with --generate' if generate else 'is for --generate'))
    copies = num_aug if num_aug >= 0 else 0 if generate else 1000
    generator, forbidden = np.random.default_rng([seed, 1]), set()
    if generate:
        if size not in BOXES:
            fail(f'--size={size}: expected 4, 6 or 9')
        splits, forbidden = make(size)
        source = f'generated, size {size}'
    else:
        for path in (input, test_input):
            if path and not os.path.isfile(path):
                fail(f'--input: {path} ' + ('is a folder: name the file in it' if os.path.isdir(path) else 'does not exist'))
        source = input or URL.format('train')
        splits = {'train': read_csv(Path(input).read_bytes() if input else download_bytes(source), source, generator)}
        if input and not test_input:
            order = generator.permutation(len(splits['train'][0]))
            cut = len(order) // 10
            if not cut:
                fail(f'{input}: {len(order)} puzzles are too few to hold out a tenth: name others with --test_input')
            splits = {split: tuple(grids[part] for grids in splits['train']) for split, part in (('train', order[cut:]), ('test', order[:cut]))}
        else:
            where = test_input or URL.format('test')
            splits['test'] = read_csv(Path(test_input).read_bytes() if test_input else download_bytes(where), where)
        if splits['train'][0].shape[1:] != splits['test'][0].shape[1:]:
            fail('training and test puzzles differ in size')
        known = {puzzle.tobytes() for puzzle in splits['train'][0]}
        both = sum(puzzle.tobytes() in known for puzzle in splits['test'][0])
        if both:
            fail(f'{both} test puzzles are training puzzles too (the first: {[p.tobytes() in known for p in splits["test"][0]].index(True) + 1})')
        if splits['test'][0].shape[1] < 9:  # so few that copies of training puzzles meet those of the test
            forbidden = {solution.tobytes() for solution in splits['test'][1]}
            kept = [i for i, solution in enumerate(splits['train'][1]) if solution.tobytes() not in forbidden]
            if not kept:
                fail(f'{source}: every training puzzle has the solution of a test puzzle')
            splits['train'] = tuple(grids[kept] for grids in splits['train'])
    folder = new_folder(output_dir)
    for split, (puzzles, solutions) in splits.items():
        more = copies if split == 'train' else 0
        n, N = len(puzzles), puzzles.shape[1]
        write_puzzles(folder, split, with_copies(puzzles, solutions, more, forbidden, generator), np.zeros(n * (1 + more)), np.arange(n * (1 + more) + 1),
                      np.arange(n + 1) * (1 + more), N + 2, 1)
        print0(f'{split}: {n:,} puzzles of {N} x {N}, {(puzzles > 0).sum((1, 2)).mean():.1f} clues on average' + (f', {more:,} copies of each' if more else ''))
    finish_folder(folder, output_dir, ['<blank>'], dict(source=re.sub('.*/', '', source), seed=seed, num_aug=copies))
    print0(f'wrote {output_dir}')


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
