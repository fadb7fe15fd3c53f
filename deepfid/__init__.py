"Deepfake detection: three published detectors, built from their parts"
import warnings

__version__ = "0.2.0"

# Importing fastai makes torch say so of two functions of fastai's; nobody who uses deepfid can do anything about it
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)

# Modules and packages in the order in which they may use each other: imports go from later to earlier only.
IMPORT_ORDER = ('core', 'io', 'parallel', 'plotting', 'data', 'quality', 'models', 'evaluate', 'explain', 'export',
                'inference', 'experiments', 'explore', 'doctor', 'commands', 'cli', 'testing')

_LAZY = {'load': 'inference.hub', 'score': 'inference.scorer', 'score_stream': 'inference.scorer',
         'list_detectors': 'models.registry',
         'list_tables': 'experiments.registry', 'list_figures': 'experiments.registry'}

def __getattr__(name):
    "Import `load`, `score`, `score_stream` and the lists of names when they are asked for"
    if name not in _LAZY: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_LAZY[name]}'), name)

def __dir__()->list[str]: return sorted({*globals(), *_LAZY})
