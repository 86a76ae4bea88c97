"""Runs a training script many times in little time: one process imports torch once and forks every run from there.

    launcher = Launcher()
    run = launcher.start('train_gpt2.py', ['--max_steps=4'], cwd=folder, ranks=2)
    time.sleep(0.3); run.kill(signal.SIGKILL)
    codes = run.wait()            # [exit code of rank 0, of rank 1]; -9 = killed by SIGKILL
    run.out, run.err              # what rank 0 printed

The forking process runs no torch operation (its thread pools would not survive the fork), so this file is also a program:
`python harness.py` serves forks over its standard input and output. `prelude` is Python source that a run executes before the
script: a place to break things (a function that returns NaN, an os.replace that kills).
"""
import atexit
import functools
import gc
import hashlib
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# train_gpt2.py on byte tokens: 4 steps in a second.
TINY = ['--data_root=data', '--block_size=16', '--n_layer=2', '--n_head=4', '--n_embd=16', '--batch_size=2', '--total_batch_size=128', '--max_steps=4',
        '--warmup_steps=2', '--max_lr=1e-2', '--val_tokens=256', '--eval_interval=2', '--checkpoint_interval=2', '--generate_interval=4', '--max_new_tokens=8',
        '--log_interval=1']
# Kills the run at the n-th of all operations that its saves consist of, in the middle of it where it has one; n = 0: never.
# The last line that it prints is `operations: open:model_00002.pt.tmp write:model_00002.pt.tmp fsync:...`.
KILL_AT = """
import atexit, builtins, os, signal
operations = []
def tick(kind, path):
    folder, name = os.path.split(path)
    operations.append(kind + ':' + (os.path.basename(folder) + '/' + name if folder.endswith('.tmp') else name))
    if len(operations) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
def before(kind, function):
    def patched(path, *args, **kwargs):
        if isinstance(path, int):
            tick(kind, os.readlink('/proc/self/fd/%d' % path) if os.path.isdir('/proc/self/fd') else '')
        else:
            tick(kind, str(args[0] if args else path))  # what it is renamed to
        return function(path, *args, **kwargs)
    return patched
class File:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half]); self.file.flush()
        tick('write', self.file.name)
        return half + self.file.write(data[half:])
real_open = builtins.open
def patched_open(path, mode='r', *args, **kwargs):
    if str(path).endswith('.tmp') or '.tmp/' in str(path):
        tick('open', path)
        return File(real_open(path, mode, *args, **kwargs))
    return real_open(path, mode, *args, **kwargs)
builtins.open = patched_open
for name in ('fsync', 'replace', 'unlink', 'remove', 'rename'):
    setattr(os, name, before(name, getattr(os, name)))
atexit.register(lambda: print('operations:', *operations))
"""


class Launcher:
    def __init__(self):
        env = dict(os.environ, OMP_NUM_THREADS='1')
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.server.stdout.readline() == 'ready\n'
        self.numbers = itertools.count()

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + '\n')
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, args, cwd, ranks=0, prelude='', env=None, files_limit=0):
        """Start a run; ranks 0 = as plain `python script`, else that many processes as torchrun would start them."""
        run = Run(self, Path(cwd))
        while ranks:  # below what the system hands out, and not where the other test process (pytest-xdist) looks
            port = 20000 + 5000 * (int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:]) % 2) + (os.getpid() + next(self.numbers)) % 5000
            try:
                with socket.socket() as s:
                    s.bind(('127.0.0.1', port))
                break
            except OSError:
                continue
        for rank in range(max(1, ranks)):
            rank_env = dict(env or {})
            if ranks:
                rank_env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            out = Path(cwd) / f'.stdout{next(self.numbers)}'  # one file each: an earlier run's output stays readable
            out.unlink(missing_ok=True)  # wait_for must not read what the run before printed
            run.outs.append(out)
            run.pids.append(self.ask(script=str(ROOT / script), argv=[str(a) for a in args], cwd=str(cwd), env=rank_env, out=str(out),
                                     prelude=prelude, files_limit=files_limit))
        return run

    def run(self, *args, timeout=60, **kwargs):
        run = self.start(*args, **kwargs)
        run.wait(timeout)
        return run

    def close(self):
        self.server.stdin.close()
        self.server.wait(10)


@functools.lru_cache
def the_launcher():
    launcher = Launcher()
    atexit.register(launcher.close)
    return launcher


def prepare(name, *args, cwd, code=0):
    """Run prepare/{name}.py; what it printed, or where another exit code is expected what it complained of."""
    run = the_launcher().run(f'prepare/{name}.py', args, cwd=cwd, timeout=300)
    out, err = run.out, run.err
    assert run.code == code and 'Traceback' not in err, f'{run.code}\n{out}\n{err}'
    for path in (run.outs[0], str(run.outs[0]) + '.err'):  # tests look at what a script leaves behind
        os.unlink(path)
    return err if code else out


class Run:
    def __init__(self, launcher, cwd):
        self.launcher, self.cwd, self.pids, self.outs, self.codes = launcher, cwd, [], [], None

    def kill(self, number, rank=None):
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def wait(self, timeout=60):
        """Exit codes of all ranks; kills what is left after `timeout` seconds and fails."""
        deadline = time.time() + timeout
        self.codes = [self.launcher.ask(wait=pid, timeout=max(0.1, deadline - time.time())) for pid in self.pids]
        if None in self.codes:
            stuck = [i for i, code in enumerate(self.codes) if code is None]
            for i in stuck:
                os.kill(self.pids[i], signal.SIGKILL)
                self.launcher.ask(wait=self.pids[i], timeout=10)
            raise AssertionError(f'ranks {stuck} still ran after {timeout} s\n{self.out}\n{self.err}')
        return self.codes

    def wait_for(self, text, timeout=60):
        """Until rank 0 printed `text`."""
        deadline = time.time() + timeout
        while text not in self.out:
            assert time.time() < deadline, f'{text!r} was not printed\n{self.out}\n{self.err}'
            time.sleep(0.005)

    @property
    def code(self):
        return self.codes[0]

    @property
    def out(self):
        return self.outs[0].read_text() if self.outs[0].exists() else ''

    @property
    def err(self):
        return Path(str(self.outs[0]) + '.err').read_text()

    def ok(self):
        assert set(self.codes) == {0}, f'exit codes {self.codes}\n{self.out}\n{self.err}'
        return self

    def one_line(self, code=2):
        """Every rank ended with `code`; rank 0 said why in one line, without a traceback."""
        assert set(self.codes) == {code}, f'exit codes {self.codes}\n{self.out}\n{self.err}'
        assert len(self.err.strip().splitlines()) == 1, self.err
        return self.err


def losses(run):
    return [float(x) for x in re.findall(r'\| loss ([\d.]+)', run.out)]


# What train_latent_prm.py's checkpoints, which are folders, have in each file; the rest is in training_state.json, with the SHA-256 of these.
PARTS = {'pytorch_model.bin': 'model', 'optimizer.pt': 'optimizer', 'scheduler.pt': ('lr', 'scaler', 'train_loader_state', 'ranks'), 'config.json': 'shape'}


def load(path):
    """All that a checkpoint holds, a file or a folder, as one dict."""
    import torch
    if not os.path.isdir(path):
        return json.loads(Path(path).read_text()) if str(path).endswith('.json') else torch.load(path, weights_only=True, map_location='cpu')
    content = load(Path(path, 'training_state.json'))
    sums = content.pop('sha256')
    for name, keys in PARTS.items():
        assert hashlib.sha256(Path(path, name).read_bytes()).hexdigest() == sums[name], f'{path}: {name}'
        found = load(Path(path, name))
        content.update({key: found[key] for key in keys} if isinstance(keys, tuple) else {keys: found})
    assert load(Path(path, 'scheduler.pt'))['step'] == content['step'] and len(os.listdir(path)) == len(PARTS) + 1
    return content


def store(content, path):
    """Write what load returned, as that kind of checkpoint."""
    import torch
    if 'shape' not in content:
        return torch.save(content, path)
    drop(path)
    os.mkdir(path)
    content, sums = dict(content), {}
    for name, keys in PARTS.items():
        part = {key: content.pop(key) for key in keys} if isinstance(keys, tuple) else content.pop(keys)
        part = dict(part, step=content['step']) if isinstance(keys, tuple) else part
        Path(path, name).write_text(json.dumps(part)) if name.endswith('.json') else torch.save(part, Path(path, name))
        sums[name] = hashlib.sha256(Path(path, name).read_bytes()).hexdigest()
    Path(path, 'training_state.json').write_text(json.dumps(dict(content, sha256=sums)))


def drop(path):
    """Delete a checkpoint, file or folder, if it is there."""
    shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)


def copy(source, target):
    shutil.copytree(source, target) if os.path.isdir(source) else shutil.copy(source, target)


def differences(a, b, ignore=(), where=''):
    """Paths of everything in which two nested checkpoints differ; tensors by torch.equal."""
    import torch
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - set(ignore)
        return [d for k in sorted(keys, key=str) for d in ([f'{where}.{k}'] if k not in a or k not in b else differences(a[k], b[k], ignore, f'{where}.{k}'))]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, ignore, f'{where}[{i}]')]
    return [] if a == b and type(a) is type(b) else [f'{where} ({a!r} / {b!r})']


# What may differ between a run in one piece and one in many: times, the length of a log with other times, how it was launched.
VOLATILE = ('seconds', 'log_bytes', 'given', 'config')


def clean_log(path):
    """log.txt without the start block (lines that begin with #) and without the timing columns."""
    lines = [line for line in Path(path).read_text().splitlines() if not line.startswith('# ')]
    return [re.sub(r' \| (dt|tok/s|mfu|eta|samples/s) [^|]*?(?= \||$)', '', line) for line in lines]


def write_shard(path, tokens):
    """llm.c's .bin: 256 int32 of header, then uint16 tokens."""
    import numpy as np
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens).astype('<u2').tobytes())


def make_text_data(folder, tokens=2000, vocab_size=257, train_shards=2, seed=0):
    """A folder of byte-token shards with something to learn in them."""
    import numpy as np
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(train_shards + 1):
        text = rng.choice([3, 5, 7, 250], size=tokens + 37 * i, p=[0.5, 0.3, 0.1, 0.1])
        write_shard(folder / f'x_{"train" if i else "val"}_{i:06d}.bin', text)
    (folder / 'manifest.json').write_text(json.dumps(dict(tokenizer='bytes', vocab_size=vocab_size, eot=vocab_size - 1)))
    return folder


def make_rows_data(folder, rows=100, seed=0, longest=14, eot=256):
    """A folder of prompts and responses in byte tokens, as prepare/dolly.py writes them: a response repeats its prompt's letter."""
    import numpy as np
    rng, categories = np.random.default_rng(seed), ['closed_qa', 'information_extraction', 'open_qa']
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (('x_val_000000.npz', max(4, rows // 10)), ('x_train_000001.npz', rows // 2), ('x_train_000002.npz', rows - rows // 2)):
        prompt, response = rng.integers(2, longest, n), rng.integers(2, longest, n)
        letters = rng.choice([65, 66, 67], n)
        tokens = [t for p, r, letter in zip(prompt, response, letters, strict=True) for t in [eot, *[letter] * (p - 1), *[letter + 32] * (r - 1), eot]]
        np.savez(folder / name, tokens=np.array(tokens, np.uint16), prompt=prompt.astype(np.int32), response=response.astype(np.int32),
                 category=(np.arange(n) % 3).astype(np.uint8))
    (folder / 'manifest.json').write_text(json.dumps(dict(tokenizer='bytes' if eot == 256 else 'gpt2', vocab_size=eot + 1, eot=eot, categories=categories)))
    return folder


def make_puzzle_data(folder, groups=4, cells=9, vocab_size=5, tests=6, seed=0):
    """A folder of puzzles as the scripts in prepare/ write them: two puzzles a group, of one and of three examples, each with an identifier of its own; in
    an answer every cell is the next token, but for one that does not count."""
    import numpy as np
    rng = np.random.default_rng(seed)
    for split, G in (('train', groups), ('test', tests)):
        sizes = np.tile([1, 3], G) if split == 'train' else np.ones(G, int)
        N, P = sizes.sum(), len(sizes)
        inputs = rng.integers(1, vocab_size, (N, cells)).astype(np.uint8)
        labels = (inputs % (vocab_size - 1) + 1).astype(np.uint8)
        labels[:, 0] = 0
        arrays = dict(inputs=inputs, labels=labels, puzzle_identifiers=1 + np.arange(P) % (2 * groups), puzzle_indices=np.cumsum([0, *sizes]),
                      group_indices=np.arange(G + 1) * (P // G))
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(folder / split / f'all__{name}.npy', array if array.ndim == 2 else array.astype(np.int32))
        (folder / split / 'dataset.json').write_text(json.dumps(dict(
            pad_id=0, ignore_label_id=0, blank_identifier_id=0, vocab_size=vocab_size, seq_len=cells, num_puzzle_identifiers=1 + 2 * groups, total_groups=G,
            mean_puzzle_examples=N / P, total_puzzles=P, sets=['all'])))
    (folder / 'identifiers.json').write_text(json.dumps(['<blank>', *map(str, range(2 * groups))]))
    return folder


def make_addition_data(folder, problems=100, tests=6, columns=3, seed=0):
    """A folder of sums as prepare/addition.py writes them, written out anew: numbers below 100, one puzzle and one group a problem."""
    import numpy as np
    rng = np.random.default_rng(seed)
    for split, n in (('train', problems), ('test', tests)):
        grids = []
        for a, b in rng.integers(0, 100, (n, 2)).tolist():
            carries = ''.join('1' if a % 10 ** j + b % 10 ** j >= 10 ** j else ' ' for j in range(columns - 1, 0, -1)) + ' '
            rows = [[1 if c == ' ' else int(c) + 2 for c in text.rjust(columns)] for text in (str(a), str(b), carries, str(a + b))]
            grids.append((rows[0] + rows[1] + [1] * 2 * columns, sum(rows, [])))
        inputs, labels = np.array(grids, np.uint8).swapaxes(0, 1)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, array in dict(inputs=inputs, labels=labels, puzzle_identifiers=np.zeros(n), puzzle_indices=np.arange(n + 1), group_indices=np.arange(n + 1)).items():
            np.save(folder / split / f'all__{name}.npy', array if array.ndim == 2 else array.astype(np.int32))
        (folder / split / 'dataset.json').write_text(json.dumps(dict(
            pad_id=0, ignore_label_id=0, blank_identifier_id=0, vocab_size=12, seq_len=4 * columns, num_puzzle_identifiers=1, total_groups=n,
            mean_puzzle_examples=1.0, total_puzzles=n, sets=['all'])))
    (folder / 'identifiers.json').write_text('["<blank>"]')
    return folder


def make_qwen(folder, hidden_size=16, layers=1, vocab_size=64, seed=0):
    """A folder with a random Qwen3 in the published format."""
    import torch

    from model import Qwen3, Qwen3Config, write_whole
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size, hidden_size, 2 * hidden_size, layers, 2, 1, 8, 512, 1e-6, 1e6, True)
    write_whole(str(folder), Qwen3(config).files())
    torch.set_rng_state(rng_state)
    return folder


def make_paths(folder, questions=20, paths=4, hidden_size=16, seed=0, files=2, signal=2.0, longest=6, ids=True):
    """A folder of paths as prepare/latent_prm.py writes them: a path is right if its latents lean to one direction. The first number of a path's first
    latent tells it from all others."""
    import torch
    folder.mkdir(parents=True, exist_ok=True)
    generator, number = torch.Generator().manual_seed(seed), 0
    direction = torch.randn(hidden_size, generator=generator)
    for f in range(files):
        stored = []
        for q in range(f * questions // files, (f + 1) * questions // files):
            found = []
            for p in range(paths):
                number += 1
                steps = int(torch.randint(1, longest + 1, (), generator=generator))
                right = bool(torch.rand((), generator=generator) < 0.5)
                latents = torch.randn(steps, 1, hidden_size, generator=generator) + signal * (2 * right - 1) * direction / direction.norm()
                latents[0, 0, 0] = number / 64  # exact in bfloat16, too, up to 256
                found.append(dict(path_id=p, agent_name='solver', agent_idx=0, parent_path_id=None, child_path_ids=[], latent_history=latents, num_latent_steps=steps,
                                  prm_score=float(right), is_correct=right, answer=str(q if right else -p), text='', score=0.0))
            stored.append(dict(question_id=f'q_{q}', question=f'What is {q} plus nothing?', gold_answer=str(q), final_answer='', is_correct=False, paths=found,
                               question_ids=torch.randint(0, 64, (3 + q % 4,), generator=generator)))
            if not ids:
                del stored[-1]['question_ids']
        torch.save(dict(batch_name='x', model='x', hidden_size=hidden_size, num_questions=len(stored), questions=stored), folder / f'x_{f:05d}.pt')
    return folder


def serve_run(request):
    """The script, in the child; ends the process as the interpreter would, but without taking torch apart (half a second)."""
    code = 0
    try:
        exec(compile(request['prelude'], 'prelude', 'exec'), {})
        runpy.run_path(request['script'], run_name='__main__')
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads; then what atexit holds
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def serve():
    import concurrent.futures  # noqa: F401  what a run would import first, imported once
    import unittest.mock  # noqa: F401

    import numpy  # noqa: F401
    import tiktoken  # noqa: F401
    import torch  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer imports it
    import torch.nn.parallel  # noqa: F401
    random.seed()
    gc.collect()
    gc.freeze()  # no collection in a child touches, and so copies, what all of them share
    print('ready', flush=True)
    while request := sys.stdin.readline():
        request = json.loads(request)
        if 'wait' in request:
            deadline, code = time.time() + request['timeout'], None
            while code is None:
                pid, status = os.waitpid(request['wait'], os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if pid else None
                if code is None and time.time() > deadline:
                    break
                time.sleep(0 if code is not None else 0.002)
            print(json.dumps(code), flush=True)
            continue
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        for descriptor, path in ((0, os.devnull), (1, request['out']), (2, request['out'] + '.err')):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.chdir(request['cwd'])
        os.environ.update(request['env'])
        sys.argv = [request['script'], *request['argv']]
        sys.path[0] = os.path.dirname(request['script'])
        if request['files_limit']:
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (request['files_limit'],) * 2)
        serve_run(request)


if __name__ == '__main__':
    serve()
