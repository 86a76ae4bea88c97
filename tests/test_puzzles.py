"""prepare/maze.py, prepare/sudoku.py, prepare/arc.py, the folders that they write, and the voting on ARC.

    python tests/test_puzzles.py data/arc1concept-aug-1000 kaggle/combined/arc-agi 8    a folder of ARC turned back into the tasks that it was made of, and voted on
"""
import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

from harness import ROOT, make_puzzle_data, prepare  # noqa: E402

import trm  # noqa: E402

SHARED = ROOT.parent / 'shared' / 'data'
GOALS = ('inputs', 'labels', 'puzzle_identifiers', 'puzzle_indices', 'group_indices')


def module(name):
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', ROOT / f'prepare/{name}.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


maze, sudoku, arc = (module(name) for name in ('maze', 'sudoku', 'arc'))


def arrays(folder, split):
    return {name: np.load(folder / split / f'all__{name}.npy') for name in GOALS}, json.loads((folder / split / 'dataset.json').read_text())


def write_csv(path, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([('source', 'question', 'answer', 'rating'), *rows])
    return path


def same_folder(a, b):
    names = sorted(str(path.relative_to(a)) for path in a.rglob('*') if path.is_file())
    return names == sorted(str(path.relative_to(b)) for path in b.rglob('*') if path.is_file()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names)


# ---- symmetries
def test_every_dihedral_image_has_its_way_back():
    grid = np.arange(15, dtype=np.uint8).reshape(3, 5)
    images = [maze.dihedral(grid, k) for k in range(8)]
    assert len({(image.shape, image.tobytes()) for image in images}) == 8
    for k, image in enumerate(images):
        assert np.array_equal(maze.dihedral(image, maze.INVERSE[k]), grid)
        assert np.array_equal(trm.arc_undone(f'x|||t{k}|||0123456789', image % 10)[1], grid % 10)
    assert np.array_equal(images[1], [[4, 9, 14], [3, 8, 13], [2, 7, 12], [1, 6, 11], [0, 5, 10]]) and np.array_equal(images[6], grid.T)
    assert images[7].tolist() == [[14, 9, 4], [13, 8, 3], [12, 7, 2], [11, 6, 1], [10, 5, 0]]
    stack = np.stack([grid, grid + 1])
    assert all(np.array_equal(maze.dihedral(stack, k)[1], image + 1) for k, image in enumerate(images))


# ---- mazes
def test_generated_mazes(tmp_path):
    args = ('--generate', '--size=7', '--train_size=60', '--test_size=20', '--min_path=6')
    out = prepare('maze', *args, '--output_dir=a', cwd=tmp_path)
    assert 'train: 60 mazes of 7 x 7' in out
    prepare('maze', *args, '--output_dir=b', cwd=tmp_path)
    assert same_folder(tmp_path / 'a', tmp_path / 'b')
    prepare('maze', *args, '--output_dir=b', '--seed=1', cwd=tmp_path)
    assert not same_folder(tmp_path / 'a', tmp_path / 'b')
    seen = set()
    for split, count in (('train', 60), ('test', 20)):
        found, facts = arrays(tmp_path / 'a', split)
        assert facts['vocab_size'] == 6 and facts['seq_len'] == 49 and facts['total_groups'] == count == len(found['inputs'])
        for question, answer in zip(found['inputs'].reshape(-1, 7, 7), found['labels'].reshape(-1, 7, 7), strict=True):
            seen.add(question.tobytes())
            assert (question == 3).sum() == (question == 4).sum() == 1 and set(question.flat) <= {1, 2, 3, 4}
            assert np.array_equal(np.where(answer == 5, 2, answer), question)
            start, goal = (tuple(np.argwhere(question == k)[0]) for k in (3, 4))
            far, ways = maze.distances(question != 1, start)
            assert far[goal] == (answer == 5).sum() + 1 >= 6 and ways[goal] == 1
            assert maze.distances((answer == 5) | (answer == 3) | (answer == 4), start)[0][goal] == far[goal]  # and it is connected
    assert len(seen) == 80


def test_mazes_that_cannot_be_made(tmp_path):
    assert '--min_path' in prepare('maze', '--generate', '--size=3', '--min_path=9', '--output_dir=a', cwd=tmp_path, code=2)
    assert not (tmp_path / 'a').exists()


def test_mazes_of_a_csv_with_all_their_images(tmp_path):
    rows = [('x', 'S #  #G  ', 'So# o#Go ', 1), ('x', 'S  ## G  ', 'Soo##oG  ', 1)]
    path = write_csv(tmp_path / 'in.csv', rows)
    test = write_csv(tmp_path / 'test.csv', [('x', ' S  ##G  ', ' So ##Goo'.replace('Goo', 'G o'), 1), ('x', 'SG  ##   ', 'SG  ##   ', 1)])
    prepare('maze', f'--input={path}', f'--test_input={test}', '--aug', '--output_dir=a', cwd=tmp_path)
    found, facts = arrays(tmp_path / 'a', 'train')
    assert found['inputs'].shape == (16, 9) and found['group_indices'].tolist() == [0, 8, 16] and facts['total_puzzles'] == 16
    first = np.array(['# SGo'.index(cell) + 1 for cell in rows[0][1]]).reshape(3, 3)
    for k in range(8):
        assert np.array_equal(maze.dihedral(found['inputs'][k].reshape(3, 3), maze.INVERSE[k]), first)
    assert arrays(tmp_path / 'a', 'test')[0]['inputs'].shape == (2, 9)


@pytest.mark.parametrize('rows, told', [
    ([('x', 'S G#', 'SoG#', 1), ('x', 'S G', 'SoG', 1)], 'line 3'), ([('x', 'S?G#', 'SoG#', 1)], 'line 2'), ([('x', 'S G#', 'SoGo', 1)], 'another maze'),
    ([('x', 'S G##', 'SoG##', 1)], 'square'), ([], 'expected a csv')])
def test_csv_files_that_hold_no_mazes(tmp_path, rows, told):
    path = write_csv(tmp_path / 'in.csv', rows)
    assert told in prepare('maze', f'--input={path}', f'--test_input={path}', '--output_dir=a', cwd=tmp_path, code=2)
    assert not (tmp_path / 'a').exists()


def test_a_byte_order_mark_of_a_csv_is_dropped(tmp_path):
    solution = sudoku.new_solution(9, np.random.default_rng(0))
    digits = ''.join(map(str, solution.flat))
    for name, question, answer in (('maze', 'S G#', 'SoG#'), ('sudoku', '.' + digits[1:], digits)):
        for split in ('train', 'test'):
            cells = (question, answer) if split == 'train' else (question[::-1], answer[::-1])
            (tmp_path / f'{split}.csv').write_bytes(b'\xef\xbb\xbfquestion,answer\n%b,%b\n' % tuple(cell.encode() for cell in cells))
        prepare(name, '--input=train.csv', '--test_input=test.csv', f'--output_dir={name}', cwd=tmp_path)
        assert arrays(tmp_path / name, 'test')[0]['inputs'].shape == (1, len(question))


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'mine').write_text('x')
    assert 'choose another' in prepare('maze', '--generate', '--size=5', '--train_size=5', '--test_size=5', '--output_dir=a', cwd=tmp_path, code=2)
    assert (tmp_path / 'a' / 'mine').read_text() == 'x'


def test_a_folder_with_a_slash_a_link_or_other_data(tmp_path):
    args = ('--generate', '--size=5', '--train_size=5', '--test_size=5')
    for _ in range(2):  # made, and made anew
        prepare('maze', *args, '--output_dir=out/a/', cwd=tmp_path)
    assert arrays(tmp_path / 'out/a', 'train')[0]['inputs'].shape == (5, 25) and os.listdir(tmp_path / 'out') == ['a']
    (tmp_path / 'link').symlink_to('out/a')
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards/manifest.json').write_text('{}')  # of another script of prepare/
    for name in ('link', 'shards'):
        assert 'choose another' in prepare('maze', *args, f'--output_dir={name}', cwd=tmp_path, code=2)
    assert os.listdir(tmp_path / 'shards') == ['manifest.json']


@pytest.mark.parametrize('name, args, told', [
    ('maze', ['--generate', '--input=x.csv'], '--input'), ('maze', ['--size=5'], '--size'), ('sudoku', ['--generate', '--subsample_size=5'], '--subsample_size'),
    ('sudoku', ['--test_size=5'], '--test_size'), ('sudoku', ['--generate', '--size=5'], '4, 6 or 9')])
def test_nothing_typed_is_without_effect(tmp_path, name, args, told):
    assert told in prepare(name, *args, '--output_dir=a', cwd=tmp_path, code=2)


def test_mazes_without_a_test_file_hold_out_a_tenth(tmp_path):
    prepare('maze', '--generate', '--size=5', '--train_size=30', '--test_size=5', '--output_dir=a', cwd=tmp_path)
    found, _ = arrays(tmp_path / 'a', 'train')
    rows = [('x', *(''.join('?# SGo'[t] for t in found[name][i]) for name in ('inputs', 'labels')), 1) for i in range(30)]
    path = write_csv(tmp_path / 'in.csv', rows)
    prepare('maze', f'--input={path}', '--output_dir=b', cwd=tmp_path)
    train, test = (arrays(tmp_path / 'b', split)[0]['inputs'] for split in ('train', 'test'))
    assert len(train) == 27 and len(test) == 3
    assert {row.tobytes() for row in train} | {row.tobytes() for row in test} == {row.tobytes() for row in found['inputs']}
    assert 'training mazes too' in prepare('maze', f'--input={path}', f'--test_input={path}', '--output_dir=b', cwd=tmp_path, code=2)


def test_copies_of_small_sudoku_of_a_csv_do_not_meet_the_test(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        solution = sudoku.new_solution(4, rng)
        rows.append(('x', ''.join(map(str, sudoku.new_puzzle(solution, rng).flat)), ''.join(map(str, solution.flat)), 1))
    path = write_csv(tmp_path / 'in.csv', list(dict.fromkeys(rows)))
    prepare('sudoku', f'--input={path}', '--num_aug=50', '--output_dir=a', cwd=tmp_path)
    train, test = ({row.tobytes() for row in arrays(tmp_path / 'a', split)[0]['labels']} for split in ('train', 'test'))
    assert test and not train & test


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real data are not here')
def test_maze_hard(tmp_path):
    prepare('maze', *(f'--{name}={SHARED}/maze/maze-30x30-hard-1k_{split}.csv' for name, split in (('input', 'train'), ('test_input', 'test'))),
            '--output_dir=a', cwd=tmp_path)
    for split in ('train', 'test'):
        found, facts = arrays(tmp_path / 'a', split)
        with open(SHARED / f'maze/maze-30x30-hard-1k_{split}.csv', newline='') as file:
            rows = list(csv.DictReader(file))
        code = {letter: i for i, letter in enumerate('# SGo', 1)}
        for name, column in (('inputs', 'question'), ('labels', 'answer')):
            expected = np.array([[code[cell] for cell in row[column]] for row in rows], np.uint8)
            assert found[name].dtype == np.uint8 and np.array_equal(found[name], expected)
        assert all(found[name].dtype == np.int32 for name in GOALS[2:]) and found['puzzle_identifiers'].tolist() == [0] * 1000
        assert found['puzzle_indices'].tolist() == found['group_indices'].tolist() == list(range(1001))
        assert facts == dict(pad_id=0, ignore_label_id=0, blank_identifier_id=0, vocab_size=6, seq_len=900, num_puzzle_identifiers=1, total_groups=1000,
                             mean_puzzle_examples=1, total_puzzles=1000, sets=['all'])
    assert json.loads((tmp_path / 'a/identifiers.json').read_text()) == ['<blank>']


# ---- Sudoku
@pytest.mark.parametrize('size, train, test', [(4, 250, 60), (6, 6, 3), (9, 2, 2)])
def test_generated_sudoku(tmp_path, size, train, test):
    args = ('--generate', f'--size={size}', f'--train_size={train}', f'--test_size={test}', '--num_aug=3')
    for out in ('a', 'b'):
        prepare('sudoku', *args, f'--output_dir={out}', cwd=tmp_path)
    assert same_folder(tmp_path / 'a', tmp_path / 'b')
    solutions, essences = {}, {}
    for split, count in (('train', train * 4), ('test', test)):
        found, facts = arrays(tmp_path / 'a', split)
        assert (facts['vocab_size'], facts['seq_len'], len(found['inputs'])) == (size + 2, size * size, count)
        puzzles, answers = (found[name].reshape(-1, size, size) - 1 for name in ('inputs', 'labels'))
        assert sudoku.valid(answers).all() and ((puzzles == 0) | (puzzles == answers)).all()
        for puzzle, answer in zip(puzzles[:8], answers, strict=False):
            assert sudoku.solve(puzzle.ravel().tolist(), size, 2) == [answer.ravel().tolist()]
        solutions[split] = {answer.tobytes() for answer in answers}
        essences[split] = {sudoku.essence(puzzle) for puzzle in puzzles}
    assert not solutions['train'] & solutions['test'] and not essences['train'] & essences['test']
    assert arrays(tmp_path / 'a', 'train')[0]['group_indices'].tolist() == list(range(0, 4 * train + 1, 4))


@pytest.mark.parametrize('size', [4, 6])
def test_the_essence_of_a_sudoku_is_that_of_its_copies(size):
    rng = np.random.default_rng(0)
    puzzles = []
    for _ in range(8):
        solution = sudoku.new_solution(size, rng)
        puzzle = sudoku.new_puzzle(solution, rng)
        copies = [sudoku.shuffled(puzzle, solution, rng) for _ in range(6)]
        assert {sudoku.essence(copy) for copy, _ in copies} == {sudoku.essence(puzzle)}
        assert all(sudoku.valid(answer[None])[0] and sudoku.solve(copy.ravel().tolist(), size, 2) == [answer.ravel().tolist()] for copy, answer in copies)
        puzzles.append(puzzle)
        other = puzzle.copy()
        other[tuple(np.argwhere(puzzle > 0)[0])] = 0  # a clue less is another puzzle
        assert sudoku.essence(other) != sudoku.essence(puzzle)
    assert len({sudoku.essence(puzzle) for puzzle in puzzles}) > 4


def test_sudoku_of_a_csv(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        solution = sudoku.new_solution(9, rng)
        puzzle = np.where(rng.random((9, 9)) < 0.5, solution, 0)
        rows.append(('x', ''.join('.' if c == 0 else str(c) for c in puzzle.flat), ''.join(map(str, solution.flat)), i))
    path = write_csv(tmp_path / 'in.csv', rows)
    out = prepare('sudoku', f'--input={path}', '--subsample_size=20', '--min_difficulty=5', '--num_aug=4', '--output_dir=a', cwd=tmp_path)
    found, facts = arrays(tmp_path / 'a', 'train')
    assert found['inputs'].shape == (18 * 5, 81) and facts['total_groups'] == 18 and facts['mean_puzzle_examples'] == 1 and '4 copies' in out
    originals = {''.join('.' if c == 1 else str(c - 1) for c in row) for row in found['inputs'][::5]}
    assert originals < {row[1] for row in rows[5:]} and len(originals) == 18
    assert arrays(tmp_path / 'a', 'test')[0]['inputs'].shape == (2, 81)
    test = write_csv(tmp_path / 'test.csv', rows[:3])
    assert 'training puzzles too' in prepare('sudoku', f'--input={path}', f'--test_input={test}', '--output_dir=b', cwd=tmp_path, code=2)


@pytest.mark.parametrize('row, told', [(('x', '.' * 81, '1' * 81, 1), 'no solution'), (('x', '.' * 80, '1' * 81, 1), 'line 2'), (('x', '', '', ''), 'line 2')])
def test_csv_files_that_hold_no_sudoku(tmp_path, row, told):
    path = write_csv(tmp_path / 'in.csv', [row])
    assert told in prepare('sudoku', f'--input={path}', '--output_dir=a', cwd=tmp_path, code=2)
    assert not (tmp_path / 'a').exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real data are not here')
def test_sudoku_extreme(tmp_path):
    out = prepare('sudoku', f'--input={SHARED}/sudoku/sudoku_extreme_1k_train.csv', f'--test_input={SHARED}/sudoku/top1465.csv', '--num_aug=20', '--output_dir=a',
                  cwd=tmp_path)
    found, facts = arrays(tmp_path / 'a', 'train')
    assert 'train: 1,000 puzzles of 9 x 9' in out and found['inputs'].shape == (21000, 81) and facts['vocab_size'] == 11 and facts['total_groups'] == 1000
    with open(SHARED / 'sudoku/sudoku_extreme_1k_train.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert np.array_equal(found['inputs'][::21], [[1 + '.123456789'.index(c) for c in row['question']] for row in rows])
    assert np.array_equal(found['labels'][::21], [[1 + int(c) for c in row['answer']] for row in rows])
    puzzles, answers = (found[name].reshape(-1, 9, 9) - 1 for name in ('inputs', 'labels'))
    assert sudoku.valid(answers).all() and ((puzzles == 0) | (puzzles == answers)).all() and len(np.unique(found['inputs'], axis=0)) == 21000
    assert (np.sort((puzzles > 0).sum((1, 2)).reshape(1000, 21)) == (puzzles[::21] > 0).sum((1, 2))[:, None]).all()


# ---- ARC
def write_arc(folder, rng, names=('training', 'evaluation'), tasks=4):
    for subset in names:
        challenges, solutions = {}, {}
        for i in range(tasks):
            def grid(large=i == 0):
                return rng.integers(0, 10, (30, 30) if large else rng.integers(1, 31, 2)).tolist()
            name = f'{subset[0]}{i}'
            challenges[name] = dict(train=[dict(input=grid(), output=grid()) for _ in range(3)], test=[dict(input=grid()) for _ in range(1 + i % 2)])
            solutions[name] = [grid() for _ in range(1 + i % 2)]
        (folder / f'arc_{subset}_challenges.json').write_text(json.dumps(challenges))
        (folder / f'arc_{subset}_solutions.json').write_text(json.dumps(solutions))


def arc_tasks(prefix, subsets):
    """{name: task with all its answers} of Kaggle's files."""
    tasks = {}
    for subset in subsets:
        challenges, answers = (json.loads(Path(f'{prefix}_{subset}_{kind}.json').read_text()) for kind in ('challenges', 'solutions'))
        for name, task in challenges.items():
            tasks[name] = dict(train=task['train'], test=[dict(pair, output=answer) for pair, answer in zip(task['test'], answers[name], strict=True)])
    return tasks


def pairs_of(task, split, to_test):
    """What a copy of this task must hold in train or test, [(input, output)]; to_test: it is of the test set."""
    pairs = (task['train'] if split == 'train' else []) + (task['test'] if (split == 'test') == to_test else [])
    return [(pair['input'], pair['output']) for pair in pairs]


def undone_puzzles(folder, split, every=1):
    """(task, [(input, output)], numbers of those that were not where they are in the task) of each every-th puzzle, turned back."""
    found = {name: np.load(folder / split / f'all__{name}.npy', mmap_mode='r') for name in GOALS}
    identifiers = json.loads((folder / 'identifiers.json').read_text())
    for p in range(0, len(found['puzzle_identifiers']), every):
        pairs, moved = [], []
        for i in range(*found['puzzle_indices'][p:p + 2]):
            boards = [found[name][i].reshape(30, 30) for name in ('inputs', 'labels')]
            corner = [np.argwhere(board >= 2).min(0) for board in boards]  # as one rectangle has moved, so has the other
            assert np.array_equal(*corner)
            grids = []
            for board in boards:
                part, back = board[corner[0][0]:, corner[0][1]:], np.zeros((30, 30), np.uint8)
                back[:part.shape[0], :part.shape[1]] = part
                name, grid = trm.arc_undone(identifiers[found['puzzle_identifiers'][p]], trm.arc_grid(back.ravel()))
                grids.append(grid.tolist())
            moved += [len(pairs)] * bool(corner[0].any())
            pairs.append(tuple(grids))
        yield name, pairs, moved


def test_arc(tmp_path):
    write_arc(tmp_path, np.random.default_rng(0))
    args = ('--input_file_prefix=arc', '--subsets', 'training', 'evaluation', '--test_set_name=evaluation', '--num_aug=6')
    for out in ('a', 'b'):
        prepare('arc', *args, '--output_dir', out, cwd=tmp_path)
    assert same_folder(tmp_path / 'a', tmp_path / 'b')
    tasks = arc_tasks(tmp_path / 'arc', ('training', 'evaluation'))
    assert json.loads((tmp_path / 'a/test_puzzles.json').read_text()) == {name: task for name, task in tasks.items() if name[0] == 'e'}
    for split in ('train', 'test'):
        found, facts = arrays(tmp_path / 'a', split)
        undone = list(undone_puzzles(tmp_path / 'a', split))
        assert facts['vocab_size'] == 12 and facts['seq_len'] == 900 and facts['num_puzzle_identifiers'] == 1 + 8 * 7
        assert facts['total_groups'] == (8 if split == 'train' else 4) and (np.diff(found['group_indices']) == 7).all()
        for name, task in tasks.items():
            expected = pairs_of(task, split, name[0] == 'e')
            assert [pairs for n, pairs, _ in undone if n == name] == [expected] * 7 * bool(expected), name
        assert any(moved for *_, moved in undone) == (split == 'train')
        assert all(len(moved) < len(pairs) for _, pairs, moved in undone)  # one of each is where it was
    train, test = (arrays(tmp_path / 'a', split)[0]['puzzle_identifiers'] for split in ('train', 'test'))
    assert set(test) < set(train) and len(set(train)) == 56  # a task's test has the identifiers of its demonstrations


def test_arc_with_few_different_copies(tmp_path):
    one = dict(train=[dict(input=[[0]], output=[[1]])], test=[dict(input=[[0]])])
    (tmp_path / 'arc_x_challenges.json').write_text(json.dumps(dict(t=one)))
    (tmp_path / 'arc_x_solutions.json').write_text(json.dumps(dict(t=[[[2]]])))
    out = prepare('arc', '--input_file_prefix=arc', '--subsets', 'x', '--test_set_name=x', '--num_aug=200', '--output_dir=a', cwd=tmp_path)
    found, _ = arrays(tmp_path / 'a', 'train')
    assert len(found['inputs']) == 9 * 8 / 2 and '1 tasks have fewer' in out  # 1 and 2 become two colours; which is which makes no other set of pairs


@pytest.mark.parametrize('change, told', [
    (lambda c, s: c['t0']['train'][0].update(input=[[10]]), '0 to 9'), (lambda c, s: c['t0']['train'][0].update(output=[[1, 2], [3]]), 'grid'),
    (lambda c, s: c['t0']['train'][0].update(output=[[1] * 31]), 'grid'), (lambda c, s: s.pop('t1'), 'task t1'), (lambda c, s: s['t1'].append([[1]]), 'task t1'),
    (lambda c, s: c.update({'a|||b': c['t0']}), 'a|||b'), (lambda c, s: c['t0'].update(train=[]), 'task t0'), (lambda c, s: c['t2'].update(test=3), 'task t2'),
    (lambda c, s: c['t0']['train'].append(7), 'task t0'), (lambda c, s: c.clear(), 'object of tasks')], ids=range(10))
def test_arc_files_that_are_wrong(tmp_path, change, told):
    write_arc(tmp_path, np.random.default_rng(0), ['training'])
    files = [tmp_path / f'arc_training_{kind}.json' for kind in ('challenges', 'solutions')]
    contents = [json.loads(file.read_text()) for file in files]
    change(*contents)
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    err = prepare('arc', '--input_file_prefix=arc', '--subsets', 'training', '--test_set_name=training', '--num_aug=1', '--output_dir=a', cwd=tmp_path, code=2)
    assert told in err and len(err.strip().splitlines()) == 1 and not (tmp_path / 'a').exists()


def one_wrong(cells):
    """These cells with another colour in the first that has one."""
    cells = cells.copy()
    first = np.flatnonzero(cells >= 2)[0]
    cells[first] = 2 + (cells[first] - 1) % 10
    return cells


def votes_of(folder, answer):
    """The votes if the model's answer to each test example were answer(label cells)."""
    found, _ = arrays(folder, 'test')
    identifiers, votes = json.loads((folder / 'identifiers.json').read_text()), {}
    puzzles = np.repeat(np.arange(len(found['puzzle_identifiers'])), np.diff(found['puzzle_indices']))
    for i, p in enumerate(puzzles):
        trm.arc_vote(votes, identifiers[found['puzzle_identifiers'][p]], found['inputs'][i], answer(found['labels'][i]), 0.0)
    return votes


def test_arc_votes(tmp_path):
    write_arc(tmp_path, np.random.default_rng(0))
    prepare('arc', '--input_file_prefix=arc', '--subsets', 'training', 'evaluation', '--num_aug=5', '--output_dir=a', cwd=tmp_path)
    tasks = json.loads((tmp_path / 'a/test_puzzles.json').read_text())
    result, submission = trm.arc_result(votes_of(tmp_path / 'a', lambda cells: cells), tasks)
    assert set(result.values()) == {1.0}
    assert {name: [pair['attempt_1'] for pair in pairs] for name, pairs in submission.items()} == {
        name: [pair['output'] for pair in task['test']] for name, task in tasks.items()}
    assert set(trm.arc_result(votes_of(tmp_path / 'a', one_wrong), tasks)[0].values()) == {0.0}


def test_arc_votes_are_counted_then_weighed():
    task = {'t': dict(test=[dict(input=[[1]], output=[[5]])])}
    key = trm.grid_key(np.array([[1]]))

    def result(**answers):
        votes = {('t', key): {trm.grid_key(np.array([[int(colour[1:])]])): list(vote) for colour, vote in answers.items()}}
        return [trm.arc_result(votes, task)[0][f'pass@{k}'] for k in (1, 2)]
    assert result(c5=(2, 0.2), c6=(1, 0.9)) == [1, 1] and result(c5=(1, 0.9), c6=(2, 0.2)) == [0, 1]
    assert result(c5=(2, 1.9), c6=(2, 0.2)) == [1, 1] and result(c5=(2, 0.1), c6=(2, 0.2), c7=(2, 0.3)) == [0, 0]
    assert trm.arc_result({}, task)[1] == {'t': [dict(attempt_1=[[0]], attempt_2=[[0]])]}


def test_arc_grids_are_the_largest_rectangle_of_colours():
    board = np.zeros((30, 30), int)
    board[:3, :4] = 7
    assert trm.arc_grid(board.ravel()).tolist() == [[5] * 4] * 3
    board[2, 1:4] = 1  # the end sign inside: two rows of four are larger than three of one
    assert trm.arc_grid(board.ravel()).shape == (2, 4)
    assert trm.arc_grid(np.zeros(900, int)).shape == (0, 0) and trm.arc_grid(np.full(900, 11)).shape == (30, 30)


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real data are not here')
def test_arc_agi_1_with_concept_arc(tmp_path):
    prepare('arc', f'--input_file_prefix={SHARED}/arc/arc-agi', '--num_aug=2', '--output_dir=a', cwd=tmp_path)
    train, test = (arrays(tmp_path / 'a', split) for split in ('train', 'test'))
    assert train[1]['total_groups'] == 960 and test[1]['total_groups'] == 400 and len(test[0]['inputs']) == 419 * 3
    unaugmented = np.diff(train[0]['puzzle_indices'])[train[0]['group_indices'][:-1]]
    assert unaugmented.mean() * 960 == unaugmented.sum() and len(train[0]['inputs']) == 3 * unaugmented.sum()
    assert (unaugmented.sum() + 419) / (960 + 400) < 4.154 < unaugmented.sum() / 960  # the published mean counts both
    assert set(trm.arc_result(votes_of(tmp_path / 'a', lambda cells: cells), json.loads((tmp_path / 'a/test_puzzles.json').read_text()))[0].values()) == {1.0}


# ---- reading
def test_what_is_written_is_read(tmp_path):
    make_puzzle_data(tmp_path / 'a')
    make_puzzle_data(tmp_path / 'b', groups=3, seed=1)
    data = trm.open_puzzles([tmp_path / 'a', tmp_path / 'b'], 'train')
    assert (data.examples, data.num_puzzle_identifiers, data.seq_len, data.vocab_size) == (28, 9 + 7, 9, 5)
    assert data.puzzle_indices.tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28] and data.group_indices.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    inputs, labels, identifiers = data.rows([27, 0, 16, 15])
    assert identifiers.tolist() == [9 + 6, 1, 9 + 1, 8]
    a, b = (arrays(tmp_path / name, 'train')[0] for name in 'ab')
    assert np.array_equal(inputs, [b['inputs'][11], a['inputs'][0], b['inputs'][0], a['inputs'][15]]) and np.array_equal(labels[0], b['labels'][11])
    make_puzzle_data(tmp_path / 'c', cells=16)
    with pytest.raises(ValueError, match='16 cells'):
        trm.open_puzzles([tmp_path / 'a', tmp_path / 'c'], 'train')


def change_array(name, change):
    def damage(folder):
        path = folder / f'train/all__{name}.npy'
        np.save(path, change(np.load(path)))
    return damage


def put(index, value):
    def change(array):
        array[index] = value
        return array
    return change


def change_json(**values):
    def damage(folder):
        path = folder / 'train/dataset.json'
        path.write_text(json.dumps(dict(json.loads(path.read_text()), **values)))
    return damage


DAMAGE = {
    'token beyond the vocabulary': (change_array('inputs', put((3, 2), 5)), 'all__inputs.npy: token 5 in row 3, cell 2'),
    'label beyond the vocabulary': (change_array('labels', put((15, 8), 255)), 'token 255 in row 15'),
    'negative tokens': (change_array('inputs', lambda a: -a.astype(np.int16)), 'token -'),
    'identifier beyond the table': (change_array('puzzle_identifiers', put(2, 9)), '9 at 2'),
    'negative identifier': (change_array('puzzle_identifiers', put(2, -1)), '-1 at 2'),
    'offsets that do not end at N': (change_array('puzzle_indices', put(-1, 15)), 'from 0 to 16'),
    'offsets beyond N': (change_array('group_indices', put(-1, 9)), 'from 0 to 8'),
    'offsets that fall': (change_array('puzzle_indices', put(3, 1)), 'rise'),
    'offsets that begin elsewhere': (change_array('group_indices', put(0, 1)), 'rise'),
    'one puzzle too few': (change_array('puzzle_identifiers', lambda a: a[:-1]), 'all__group_indices'),
    'truncated': (lambda folder: os.truncate(folder / 'train/all__inputs.npy', 150), 'all__inputs.npy cannot be read'),
    'cut in the header': (lambda folder: os.truncate(folder / 'train/all__labels.npy', 20), 'all__labels.npy cannot be read'),
    'empty': (lambda folder: (folder / 'train/all__labels.npy').write_bytes(b''), 'all__labels.npy cannot be read'),
    'objects': (lambda folder: np.save(folder / 'train/all__inputs.npy', np.array([[{}]], object), allow_pickle=True), 'cannot be read'),
    'fractions': (change_array('inputs', lambda a: a.astype(np.float32)), 'float32'),
    'one dimension': (change_array('inputs', np.ravel), '1 dimensions'),
    'another length': (change_array('inputs', lambda a: a[:, :8]), 'seq_len 9'),
    'fewer labels': (change_array('labels', lambda a: a[:8]), 'the inputs have'),
    'missing': (lambda folder: (folder / 'train/all__group_indices.npy').unlink(), 'all__group_indices.npy'),
    'no json': (lambda folder: (folder / 'train/dataset.json').write_text('{'), 'dataset.json'),
    'json of a list': (lambda folder: (folder / 'train/dataset.json').write_text('[]'), 'dataset.json'),
    'no vocabulary': (change_json(vocab_size=0), 'vocab_size'),
    'a vocabulary of text': (change_json(vocab_size='5'), 'vocab_size'),
    'other padding': (change_json(ignore_label_id=3), 'ignore_label_id'),
    'several sets': (change_json(sets=['a', 'b']), 'sets'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_folders_are_named(tmp_path, kind):
    make_puzzle_data(tmp_path / 'a')
    damage, told = DAMAGE[kind]
    damage(tmp_path / 'a')
    with pytest.raises(ValueError) as error:
        trm.open_puzzles([tmp_path / 'a'], 'train')
    assert told in str(error.value) and str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_random_damage_is_named_or_harmless(tmp_path, fuzz):
    rng = np.random.default_rng(0)
    make_puzzle_data(tmp_path / 'a')
    files = sorted((tmp_path / 'a/train').iterdir())
    refused = 0
    for _ in range(fuzz):
        file = files[rng.integers(len(files))]
        before = file.read_bytes()
        data = bytearray(before)
        if rng.random() < 0.3:
            data = data[:rng.integers(len(data))]
        else:
            for i in rng.integers(len(data), size=rng.integers(1, 4)):
                data[i] = rng.integers(256)
        file.write_bytes(bytes(data))
        try:
            found = trm.open_puzzles([tmp_path / 'a'], 'train')
            inputs, labels, identifiers = found.rows(np.arange(found.examples))
            assert inputs.max() < found.vocab_size and labels.max() < found.vocab_size and 0 <= identifiers.min() <= identifiers.max() < found.num_puzzle_identifiers
        except ValueError:
            refused += 1
        file.write_bytes(before)
    assert refused > fuzz // 4


def test_pictures():
    plain = trm.drawn([1, 2, 1, 3], [1, 2, 3, 3], [1, 2, 3, 3], 6)
    assert plain == ['# ', '\033[1mS\033[0mS'] and '\033[41m' in trm.drawn([1, 2, 1, 3], [1, 2, 4, 3], [1, 2, 3, 3], 6)[1]
    assert trm.drawn([1, 2, 5, 3], [1, 2, 5, 3], [1, 2, 5, 3], 7) == ['. 1 ', '4 2 ']
    cells = np.full(900, 0)
    cells[:2] = 2, 3
    lines = trm.drawn(cells, cells, np.where(np.arange(900) == 1, 5, cells), 12)
    assert len(lines) == 1 and '48;5;16m  ' in lines[0] and '><' in lines[0]
    assert trm.drawn([1, 2, 3], [1, 2, 3], [1, 2, 3], 6) == ['1 2 3']


if __name__ == '__main__':
    folder, prefix, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tasks, to_test = arc_tasks(prefix, arc.subsets), json.loads((folder / 'test_puzzles.json').read_text())
    for split, step in dict(train=every, test=1).items():
        puzzles = examples = wrong = 0
        for name, pairs, _ in undone_puzzles(folder, split, step):
            puzzles, examples, wrong = puzzles + 1, examples + len(pairs), wrong + (pairs != pairs_of(tasks[name], split, name in to_test))
        print(f'{split}: {examples:,} examples of {puzzles:,} puzzles turned back, {wrong:,} puzzles differ from their task', flush=True)
    for what, answer in dict(right=lambda cells: cells, wrong=one_wrong).items():
        print(f'all answers {what}:', *(f'{name} {share:.1%}' for name, share in trm.arc_result(votes_of(folder, answer), to_test)[0].items()), flush=True)
