"""Column addition for finetune_addition.py (and pretrain_trm.py): grids of four rows, made here, no download.

    python prepare/addition.py                                          10,000 sums of 1 to 10 digits to train, 1,000 to test
    python prepare/addition.py --max_digits=2 --output_dir=data/addition2
    python prepare/addition.py --trace                                  digit by digit: from each state of the grid to the next one
    python -m prepare.addition --help

The rows are both numbers, the carries and the sum, right-aligned in max_digits + 1 columns. The question has the first two, the answer all four; a carry is a 1
above the column that it is added to, as on paper:

      9 5 7        9 5 7
        8 6  ->      8 6
      . . .      1 1 1 .
    . . . .      1 0 4 3

Tokens are those of ARC, so that a model of ARC maps them one to one: 0 padding, 1 blank, digit d = d + 2; 12 in all. All problems share one identifier, 0.

Both numbers have independent lengths. A share of the problems, carry_share, is made to carry far: from a random column, or the first, a carry runs through a
random number of columns, or all, that carry only because of it. Training and test share no pair of numbers, in whatever order.

With --trace a training problem is a puzzle of several examples: every state of the grid, digits filled in from the right, and as its answer the next one; the
finished grid answers itself, which says that it is finished. The test stays whole: finetune_addition.py feeds a model its own answers there.

The folder is that of the public TRM code, see write_puzzles in prepare/maze.py.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from prepare.fineweb import one_line_errors
from prepare.maze import finish_folder, new_folder, write_puzzles
from trm import add_columns, addition_tokens

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/addition'  # folder to write
train_size = 10000   # training problems; fewer if there are no more
test_size = 1000     # test problems
min_digits = 1       # of each number
max_digits = 10      # of each number
columns = -1         # of the grid, at least max_digits + 1; -1 = so many; more leave room for longer numbers
num_aug = 0          # copies of each training problem, b + a for a + b: there is one; 0 = none
carry_share = 0.5    # of the problems are made to carry far; 0 = none
trace = False        # train on the steps from one digit to the next
seed = 0             # of the problems; 0 = a seed like any other

if __name__ == '__main__':
    configure(globals())


def numbers(n, generator):
    """(n, columns) digits of random numbers, right-aligned, -1 in front; every length is as likely."""
    digits = generator.integers(0, 10, (n, columns), dtype=np.int8)
    length = generator.integers(min_digits, max_digits + 1, n)
    first = columns - length
    digits[np.arange(n), first] = np.where(length == 1, digits[np.arange(n), first], generator.integers(1, 10, n))  # no leading zero but in 0
    digits[np.arange(columns) < first[:, None]] = -1
    return digits


def carry_far(a, b, generator):
    """Change digits of a and b, in place, so that in each pair a carry arises in one column and runs on through some, or all, that follow it."""
    n, place = len(a), columns - 1 - np.arange(columns)  # of a column: 0 = units
    lengths = [(digits >= 0).sum(1) for digits in (a, b)]
    begin = generator.integers(0, np.minimum(*lengths)) * (generator.random(n) < 0.5)
    room = np.maximum(*lengths) - begin
    count = np.where(generator.random(n) < 0.5, room, generator.integers(1, room + 1))
    for j in range(columns):
        both, leading = (a[:, j] >= 0) & (b[:, j] >= 0), np.logical_or(*((place[j] == length - 1) & (length > 1) for length in lengths))
        runs = (place[j] > begin) & (place[j] < begin + count)
        low = leading.astype(int)  # no digit may become a leading zero
        here = generator.integers(low, 10 - low)  # of a; b has the rest of 9
        for digits, new in ((a, here), (b, 9 - here)):
            digits[:, j] = np.where(runs & (digits[:, j] >= 0), np.where(both, new, 9), digits[:, j])
        arises = both & (place[j] == begin)
        top = generator.integers(1, 10, n)
        a[:, j] = np.where(arises, top, a[:, j])
        b[:, j] = np.where(arises, generator.integers(10 - top, 10), b[:, j])


def problems(count, generator):
    """(a, b) (n, columns) digits of up to `count` pairs, no pair twice, in whatever order of the two."""
    found, known, n, idle = [], set(), 0, 0
    while n < count and idle < 20:  # 20 batches without a new pair: there are no more
        size = min(max(4096, count - n), 2 ** 18)
        a, b = numbers(size, generator), numbers(size, generator)
        far = generator.random(size) < carry_share
        a_far, b_far = a[far], b[far]
        carry_far(a_far, b_far, generator)
        a[far], b[far] = a_far, b_far
        kept = []
        for i in range(size):
            first, second = a[i].tobytes(), b[i].tobytes()
            pair = min(first, second) + max(first, second)
            if pair not in known and n + len(kept) < count:
                known.add(pair)
                kept.append(i)
        found.append((a[kept], b[kept]))
        n, idle = n + len(kept), 0 if kept else idle + 1
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def states(a, b, carries, total):
    """The grids (n + 1, 4 * columns) of one problem: nothing filled in, the units, ..., all n digits of the sum."""
    grids = [addition_tokens(a, b, np.zeros_like(carries), np.full_like(total, -1))]
    for j in range(1, (total >= 0).sum() + 1):  # the digit of a column, and the carry to the next one
        done = np.arange(columns) >= columns - j
        carried = np.arange(columns) >= columns - j - 1
        grids.append(addition_tokens(a, b, carries & carried, np.where(done, total, -1)))
    return np.concatenate(grids)


def main():
    global columns
    if not 1 <= min_digits <= max_digits:
        fail(f'--min_digits={min_digits} --max_digits={max_digits}: expected 1 <= min_digits <= max_digits')
    if num_aug > 1:
        fail(f'--num_aug={num_aug}: a + b has one other order, so 0 or 1')
    if carry_share > 1:
        fail(f'--carry_share={carry_share}: expected a share, 0 to 1')
    columns = max_digits + 1 if columns < 0 else columns
    if not max_digits < columns <= 1000:
        fail(f'--columns={columns}: the sum of two numbers of {max_digits} digits needs {max_digits + 1}, and 1,000 are the most')
    generator = np.random.default_rng(seed)
    a, b = problems(train_size + test_size, generator)
    order = generator.permutation(len(a))  # the common ones were found first: short numbers must be in both
    if len(a) < train_size + test_size:
        print0(f'only {len(a):,} different pairs of {min_digits} to {max_digits} digits were found')
    if len(a) <= test_size:
        fail('nothing is left to train on: a smaller --test_size leaves more')
    splits = {split: (a[some], b[some]) for split, some in (('test', order[:test_size]), ('train', order[test_size:]))}
    folder = new_folder(output_dir)
    for split, (a, b) in splits.items():
        n = len(a)
        copies = 1 + (num_aug if split == 'train' else 0)
        a, b = (np.stack(pair[:copies], 1).reshape(n * copies, columns) for pair in ((a, b), (b, a)))
        carries, total, longest = add_columns(a, b)
        if trace and split == 'train':
            grids = [states(*(array[i:i + 1] for array in (a, b, carries, total))) for i in range(len(a))]
            chunks = ((grid, np.concatenate((grid[1:], grid[-1:]))) for grid in grids)
            sizes = [len(grid) for grid in grids]
        else:
            question = addition_tokens(a, b, np.zeros_like(carries), np.full_like(total, -1))
            chunks, sizes = [(question, addition_tokens(a, b, carries, total))], np.ones(len(a), int)
        write_puzzles(folder, split, chunks, np.zeros(len(a)), np.cumsum([0, *sizes]), np.arange(n + 1) * copies, 12, 1)
        steps = f', {np.sum(sizes) / len(a):.2f} examples each' * (trace and split == 'train')
        print0(f'{split}: {n:,} problems{", and each as b + a" * (copies - 1)}{steps}; longest carry {longest.mean():.2f} columns on average, '
               f'{longest.max()} at most')
    finish_folder(folder, output_dir, ['<blank>'], dict(task='addition', columns=columns, min_digits=min_digits, max_digits=max_digits, num_aug=num_aug,
                                                        carry_share=carry_share, trace=trace, seed=seed))
    print0(f'wrote {output_dir}')


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
