"What the tests share: real faces where they are at hand, and the flags `slow` and `cuda`"
import os
from pathlib import Path
import pytest

os.environ.setdefault('MPLBACKEND', 'agg')

# These files take longest: they begin first, so that no worker is left alone with one of them at the end
LONG_FILES = [f'test_{name}.py' for name in ('cli', 'deepfidelity', 'scoring', 'siamese', 'video', 'house', 'browser', 'plugins', 'extract',
    'mask_detectors', 'lite0', 'export', 'controls', 'blending')]

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run what takes minutes')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow')
    config.addinivalue_line('markers', 'cuda: needs a GPU; skipped where there is none')

def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if item.get_closest_marker('slow') and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='takes minutes: --slow'))
        if item.get_closest_marker('cuda'):
            import torch
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='no GPU'))

def _folder(variable):
    "The folder that an environment variable names, or skip the test"
    path = os.environ.get(variable)
    if not path: pytest.skip(f'{variable} is not set')
    return Path(path)

@pytest.fixture(scope='session')
def repo():
    "Root of the checkout"
    return Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def timm():
    "The library: importing it takes two seconds, which only tests that need it pay"
    import timm
    return timm

@pytest.fixture(scope='session')
def Callback():
    "fastai's, likewise"
    from fastai.callback.core import Callback
    return Callback

@pytest.fixture(scope='session')
def data():
    "Folder of real faces: DEEPFID_DATA"
    return _folder('DEEPFID_DATA')

@pytest.fixture(scope='session')
def reference():
    "Folder of values that published code computes: DEEPFID_REFERENCE"
    return _folder('DEEPFID_REFERENCE')
