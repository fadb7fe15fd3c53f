__version__ = "0.1.0"

def __getattr__(name):
    "`deepfid.load` and `deepfid.score`, imported when they are asked for"
    if name not in ('load', 'score'): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .inference import scorer
    return getattr(scorer, name)
