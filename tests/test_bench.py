"""tests/bench.py runs and prints its tables; what it measures is for people to look at."""
import os
import re
import subprocess
import sys

from bench import LINE, NO_EVALUATION, RANDOM_BATCHES, laptop_runs, replaced
from harness import ROOT


def test_bench_prints_a_table(tmp_path):
    command = [sys.executable, ROOT / 'tests/bench.py', '--cases', 'quickstart', '--rounds=1', '--steps=2', '--no-compile']
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, TMPDIR=str(tmp_path)), timeout=120)
    assert run.returncode == 0, run.stderr
    row = re.search(r'\| ours \| \d+ \(\d+ to \d+, 2 steps\) \| [\d,]+ \| (\d+)% \| ([\d,]+) MB \|', run.stdout)
    assert 'quickstart: 4 layers, width 128, 320 ids, 16 x 128 tokens a step' in run.stdout and 0 < int(row[1]) < 150 and int(row[2]) > 100
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith('torchinductor')]


def test_what_the_table_of_all_scripts_runs(launcher, tmp_path):
    runs = laptop_runs(tmp_path)
    for script, (_, args) in runs.items():
        folder = '--output_dir' if script == 'train_latent_prm.py' else '--log_dir'
        run = launcher.run(script, [*args, '--device=cpu', f'{folder}=run_{script}', '--max_steps=2'], cwd=tmp_path).ok()
        assert len(re.findall(LINE, run.out)) == 2, run.out
    assert sorted(runs) == sorted(path.name for path in ROOT.glob('*_*.py') if not path.name.endswith('_old.py'))


def test_what_is_replaced_in_our_own_code_is_there():
    for name, changes in (('finetune_dolly.py', NO_EVALUATION), ('model.py', RANDOM_BATCHES)):
        replaced((ROOT / name).read_text(), changes)


def test_bench_names_unknown_cases(tmp_path):
    run = subprocess.run([sys.executable, ROOT / 'tests/bench.py', '--cases=x'], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'quickstart' in run.stderr
