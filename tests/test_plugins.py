"A detector in a package of its own, installed beside deepfid, works everywhere without a line changed in deepfid"
import json, os, subprocess, sys
from pathlib import Path
import cv2, pytest
from deepfid.testing import tiny_manifest

PYPROJECT = '''[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "colourful"
version = "1"

[project.entry-points."deepfid.detectors"]
colourful = "colourful:Colourful"
'''
MODULE = '''
"Real or fake by the colours of a face alone"
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from deepfid.core import Prediction
from deepfid.experiments.registry import register_table
from deepfid.experiments.runner import Row, Table, within_columns
from deepfid.models.base import DetectorConfig, NetworkDetector, setting

@dataclass(kw_only=True)
class ColourfulConfig(DetectorConfig):
    width:int = setting(8, low=1, integer=True) # channels

class Colourful(NetworkDetector):
    name, config_class, explain_layer = 'colourful', ColourfulConfig, '2'
    presets = dict(tiny=dict(size=64), full=dict(size=64))
    recipes = dict(ours=dict(epochs=1, bs=16, lr=1e-2))
    def build_model(self):
        w = self.config.width
        body = nn.Conv2d(3, w, 3, 2, 1), nn.ReLU(), nn.Conv2d(w, w, 3, 2, 1), nn.ReLU()
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 2))
    def maps(self, output): return output.softmax(1)[:, 1], None
    def to_predictions(self, output): return [Prediction(p) for p in self.maps(output)[0].tolist()]
    def embed(self, x): return self.model[:-1](x)
    def loaders(self, manifest):
        from deepfid.data.loaders import dataloaders
        return dataloaders(manifest, size=self.size, bs=self.config.bs, seed=self.config.seed, device=self.device)
    def learner(self, dls, cbs=None, phase=-1):
        import fastai.callback.progress, fastai.callback.schedule
        from fastai.learner import Learner
        return Learner(dls, self.model, F.cross_entropy, cbs=cbs)

register_table(Table('colours', 'What colours tell', [Row('colourful', Colourful), Row('wider', Colourful, dict(width=16))], within_columns))
'''
# Commands and programs one after the other in one process, which imports torch once: a line of JSON in, a line out
SERVER = '''
import contextlib, io, json, sys, traceback
from deepfid.cli import main
def run(asked):
    try: return exec(asked, {}) if isinstance(asked, str) else main(asked)
    except SystemExit as ended: return ended.code
    except Exception: return traceback.format_exc()
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = run(json.loads(line))
    print(json.dumps([status or 0, out.getvalue(), err.getvalue()]), flush=True)
'''

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The environment of a process in which the package is installed, and a manifest of faces"
    root = tmp_path_factory.mktemp('plugin')
    (root/'source').mkdir()
    (root/'source/pyproject.toml').write_text(PYPROJECT)
    (root/'source/colourful.py').write_text(MODULE)
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--no-build-isolation', '--target', root/'site',
        root/'source'], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    manifest = tiny_manifest((40, 12, 32), 64)
    return root, dict(os.environ, PYTHONPATH=str(root/'site'), MPLBACKEND='agg'), Path(manifest.folder)/'manifest.csv'

@pytest.fixture(scope='module')
def run(installed):
    root, env, _ = installed
    with subprocess.Popen([sys.executable, '-c', SERVER], cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        def command(*args, code=None):
            server.stdin.write(json.dumps(code or [str(a) for a in args])+'\n')
            server.stdin.flush()
            status, out, err = json.loads(server.stdout.readline())
            assert status==0, (status, err[-2000:])
            return out
        yield command

@pytest.fixture(scope='module')
def model(installed, run):
    "The folder of the plug-in's detector, trained by the command line"
    root, _, manifest = installed
    run('train', manifest, '--detector', 'colourful', '--out', root/'model', '--preset', 'tiny')
    assert json.loads((root/'model/detector.json').read_text())['detector']=='colourful'
    return root/'model'

def test_it_is_listed(installed, run):
    root, env, _ = installed
    done = subprocess.run([sys.executable, '-m', 'deepfid.cli', 'list'], cwd=root, env=env, capture_output=True, text=True)
    assert 'colourful' in done.stdout and 'colours' in run('list', 'tables'), done.stderr
    assert 'colourful' in run('train', '--help')

def test_it_scores_and_evaluates(installed, run, model):
    root, _, manifest = installed
    photo = root/'face.png'
    image = tiny_manifest((40, 12, 32), 64).of('test').image(0)
    cv2.imwrite(str(photo), cv2.resize(image, (300, 300))[..., ::-1])
    assert 'AUC' in run('evaluate', model, manifest)
    code = f'import deepfid; from deepfid.core import Face; import cv2; d = deepfid.load({str(model)!r}); print(d.name, len(d.predict([cv2.imread({str(photo)!r})])))'
    assert run(code=code).split()==['colourful', '1']

def test_it_scores_photographs(installed, run, model, data):
    photo = sorted((data/'london/neutral_front').glob('*.jpg'))[0]
    [line] = run('score', photo, '--detector', model, '--json').strip().splitlines()
    assert 'colourful' in line and json.loads(line)['faces']

def test_its_table_and_figure(installed, run, model):
    root, _, manifest = installed
    text = run('table', 'colours', '--manifest', manifest, '--seeds', '2', '--preset', 'tiny', '--out', root/'tables')
    assert 'wider' in text and 'AUC' in text
    run('figure', 'features', '--manifest', manifest, '--detector', model, '--out', root/'features.jpg')
    run('figure', 'attention', '--manifest', manifest, '--detector', model, '--out', root/'attention.jpg')
    assert (root/'features.jpg').stat().st_size>1000 and (root/'attention.jpg').stat().st_size>1000

def test_it_is_exported_and_explored(installed, run, model):
    root = installed[0]
    code = f'''if True:
        import numpy as np, deepfid
        from deepfid.core import Face
        from deepfid.explore.score import ScoreExplorer
        from deepfid.export import export_graph
        from deepfid.testing import tiny_manifest
        d = deepfid.load({str(model)!r})
        face = tiny_manifest((40, 12, 32), 64).of('test').image(0)
        export_graph(d, {str(root/"model.onnx")!r}, format='onnx')
        import onnxruntime
        from deepfid.data.loaders import faces_to_batch
        session = onnxruntime.InferenceSession({str(root/"model.onnx")!r})
        out = session.run(None, {{session.get_inputs()[0].name: faces_to_batch([face], d.size).numpy()}})[0]
        assert abs(float(np.ravel(out)[0])-d.predict([face])[0].fidelity)<1e-4
        explorer = ScoreExplorer(d, dict(face=Face(face)))
        assert 'colourful' in explorer.gauges.value, explorer.gauges.value
        print('done')'''
    assert run(code=code).strip().endswith('done')
