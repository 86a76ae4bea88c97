"""Fixtures that all tests share: the forking launcher, once a session, and the numbers of the long forms of the tests."""
import os
import sys
from pathlib import Path

import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: runs of two ranks share two cores
os.environ['TORCH_CPP_LOG_LEVEL'] = 'ERROR'  # where no name service answers, gloo warns that it does not know its own name
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

from harness import TINY, make_text_data, the_launcher  # noqa: E402


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=5, help='kill -9 so many times per script on one rank (50 for the long form)')
    parser.addoption('--fuzz', type=int, default=100, help='inputs to each fuzz test (2000 for the long form)')


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Which tests keep together on one of pytest-xdist's workers: those of a file or, in the reliability tests, of a script, for they share finished runs.

    The short form of test_reliability_old.py, whose blocks are the same text in all scripts (test_fences.py). Marked `fenced`: two scripts stand for all four,
    one whose checkpoint is a file and one whose is a folder; `once`, where that does not matter: the first alone. Marked `slots`, of what trm.py does for both
    recursive scripts: pretrain_trm.py stands for both. Marked `long`: float32 where float64, which is stricter, is tested too, that is in all but train_latent_prm.py. --kills=50 runs everything."""
    if config.getoption('--kills') < 50:
        stand_in = dict(fenced=('finetune_dolly', 'train_latent_prm'), once=('finetune_dolly',), slots=('finetune_dolly', 'pretrain_trm', 'train_latent_prm'), long=('train_latent_prm',))
        left_out = {item for item in items for mark, cases in stand_in.items() if item.get_closest_marker(mark) and item.callspec.params['case'] not in cases}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.callspec.params['case'] if 'case' in getattr(item, 'fixturenames', ()) else item.path.name))


@pytest.fixture
def kills(request):
    return request.config.getoption('--kills')


@pytest.fixture
def fuzz(request):
    return request.config.getoption('--fuzz')


@pytest.fixture(scope='session')
def launcher():
    return the_launcher()


@pytest.fixture
def go(launcher, tmp_path):
    """go('--max_steps=2', ...) runs the tiny training in a folder of its own."""
    make_text_data(tmp_path / 'data')

    def go(*args, base=TINY, **kwargs):
        return launcher.run('train_gpt2.py', [*base, *args], cwd=tmp_path, **kwargs)
    return go
