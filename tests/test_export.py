"Detectors as one graph: torch.export and ONNX files, with and without masks"
from pathlib import Path
import numpy as np, pytest, torch

from deepfid.core import DeepfidError
from deepfid.data.loaders import faces_to_batch
from deepfid.export import export_graph
from deepfid.models.deepfidelity.detector import DeepFidelity
from deepfid.models.deepfidelity.fused import fidelity_graph, randomize_norm_stats
from deepfid.models.deepfidelity.regressor import FidelityRegressor
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer

SMALL = dict(depths=(2,1,1,1), dims=(16,16,32,32), head_dim=16)

@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode(): yield

@pytest.fixture(scope='module')
def faces(): return [np.random.default_rng(i).integers(0, 256, (80,80,3), dtype=np.uint8) for i in range(5)]

@pytest.fixture(params=['svr', 'head', 'fidelity', 'crop'])
def detector(request, faces):
    "Detectors with small random networks, one for each way to a score"
    with torch.inference_mode(False):
        kw = dict(svr={}, head=dict(mapping=None), fidelity=dict(target='fidelity', regression='head'), crop=dict(pool='mean+max', crop=.875))[request.param]
        d = DeepFidelity(device='cpu', size=64, **kw).configure('tiny')
        d.model = randomize_norm_stats(SSAAFormer(**SMALL, num_classes=d.model.num_classes))
        if request.param in ('svr','crop'): d.regressor = FidelityRegressor(scale=True, C=10.).fit(d.features(faces), np.linspace(.1, .9, 5))
        return d

def scores(d, faces): return np.array([p.fidelity for p in d.predict(faces)])
def batch(d, faces): return faces_to_batch(faces, d.size)

def test_graph_equals_predict(detector, faces):
    want = scores(detector, faces)
    assert want.std()>1e-3 and np.abs(fidelity_graph(detector)(batch(detector, faces)).numpy()-want).max()<1e-4

@pytest.mark.parametrize('detector', ['svr', 'crop'], indirect=True)
def test_torch_file(detector, faces, tmp_path):
    path = export_graph(detector, tmp_path/'new'/'g.pt2')
    program = torch.export.load(path).module()
    for n in (1,2,5): assert np.abs(program(batch(detector, faces[:n])).numpy()-scores(detector, faces)[:n]).max()<1e-4
    assert [p.name for p in path.parent.iterdir()]==['g.pt2']

@pytest.mark.parametrize('detector', ['svr'], indirect=True)
def test_onnx_file(detector, faces, tmp_path):
    for m in ('onnx','onnxscript'): pytest.importorskip(m)
    runtime = pytest.importorskip('onnxruntime')
    path = export_graph(detector, tmp_path/'g.onnx', 'onnx')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for n in (1,2,5): assert np.abs(session.run(None, dict(image=batch(detector, faces[:n]).numpy()))[0]-scores(detector, faces)[:n]).max()<1e-4
    assert [p.name for p in tmp_path.iterdir()]==['g.onnx']

@pytest.mark.parametrize('detector', ['svr'], indirect=True)
def test_fixed_batch_size(detector, faces, tmp_path):
    program = torch.export.load(export_graph(detector, tmp_path/'g.pt2', batch=3)).module()
    assert np.abs(program(batch(detector, faces[:3])).numpy()-scores(detector, faces)[:3]).max()<1e-4
    with pytest.raises((RuntimeError, AssertionError)): program(batch(detector, faces[:2]))

@pytest.mark.parametrize('detector', ['head'], indirect=True)
def test_what_cannot_be_written(detector, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('x')
    for match,args in {"'torch', 'onnx'": (tmp_path/'g', 'tflite'), 'batch=0': (tmp_path/'g', 'torch', 0), 'cannot be written': (tmp_path/'file'/'g.pt2',)}.items():
        with pytest.raises(DeepfidError, match=match) as e: export_graph(detector, *args)
        assert '\n' not in str(e.value)
    with pytest.raises(DeepfidError, match='not trained'): export_graph(DeepFidelity(), tmp_path/'g.pt2')
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(DeepfidError, match='pip install onnx onnxscript'): export_graph(detector, tmp_path/'g', 'onnx')
    assert [p.name for p in tmp_path.iterdir()]==['file']

def localizer(name):
    from deepfid.models.local_similarity.detector import LocalSimilarity
    if name=='lite0': return LocalSimilarity(backbone='efficientnet_lite0', size=64, pretrained=False).configure('tiny', 'finetune')
    if name=='no masks': return LocalSimilarity(use_llsm=False, use_flm=False, size=64, pretrained=False).configure('tiny')
    from deepfid.inference.hub import load
    return load(name)

def run_exported(path, format, x):
    if format=='torch':
        with torch.inference_mode(): return [o.numpy() for o in torch.export.load(path).module()(x)]
    session = pytest.importorskip('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    return session.run(None, dict(image=x.numpy()))

@pytest.mark.parametrize('name, format', [('local_similarity', 'onnx'), ('lite0', 'onnx'), ('lisiam', 'torch'), ('no masks', 'torch')])
def test_masks_are_exported_with_the_score(name, format, faces, tmp_path):
    if format=='onnx': [pytest.importorskip(m) for m in ('onnx', 'onnxscript')]
    d = localizer(name)
    predictions, path = d.predict(faces[:3]), export_graph(d, tmp_path/'g', format)
    outputs = run_exported(path, format, batch(d, faces[:3]))
    assert len(outputs)==(1 if name=='no masks' else 2) and np.abs(outputs[0]-[p.fidelity for p in predictions]).max()<1e-4
    if name!='no masks': assert np.abs(outputs[1]-np.stack([p.mask for p in predictions])).max()<1e-4
    if name=='local_similarity': assert predictions[0].similarity is not None and d.model.llsm is not None # export changes nothing

# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def photograph(data): return sorted((data/'london'/'smiling_front').glob('*.jpg'))[1]

@pytest.fixture(scope='module', params=['similarity', 'box'])
def saved(request, tmp_path_factory):
    "A small trained detector for each crop rule; its card is a line"
    from deepfid.testing import tiny_manifest
    detector = DeepFidelity(epochs=1, size=64, mapping=None, crop_align=request.param, crop_margin=1.5, device='cpu')
    with torch.inference_mode(False): detector.fit(tiny_manifest((40, 20, 20)), 'tiny')
    folder = detector.save(tmp_path_factory.mktemp('saved')/'m')
    (folder/'MODEL_CARD.md').write_text('# A card')
    return folder

def export(capsys, *argv):
    from deepfid.cli import main
    capsys.readouterr()
    status = main(['export', *map(str, argv)])
    return status, *capsys.readouterr()

@pytest.mark.parametrize('format, packages', [('onnx', ('onnx', 'onnxscript', 'onnxruntime')), ('torch', ()), ('openvino', ('openvino',))])
def test_the_printed_program_runs_as_printed(format, packages, saved, photograph, capsys, tmp_path, monkeypatch):
    "What the command prints, saved as a file and run on a photograph, decides as `deepfid.score` does"
    import subprocess, sys, deepfid
    for p in packages: pytest.importorskip(p)
    if format!='onnx' and saved.name and 'box' in str(DeepFidelity.load(saved).crop_rule): pytest.skip('one format shows the other crop rule')
    monkeypatch.chdir(tmp_path)
    status, out, err = export(capsys, saved, '--format', format)
    assert status==0 and err=='' and 'import deepfid' not in out
    (tmp_path/'run.py').write_text(out)
    done = subprocess.run([sys.executable, 'run.py', str(photograph)], capture_output=True, text=True, cwd=tmp_path)
    fidelity, _, decision = done.stdout.strip().partition(' ')
    [want] = deepfid.score(photograph, saved)[0].faces[0].scores
    assert done.returncode==0 and float(fidelity)==pytest.approx(want.fidelity, abs=1e-3) and decision==want.decision and not done.stderr, done.stderr

def test_the_printed_program_reads_what_deepfid_reads(saved, photograph, capsys, tmp_path, monkeypatch):
    "How a photograph is read is the same text in every format, and for every crop rule"
    import subprocess, sys, cv2, deepfid
    if 'box' in str(DeepFidelity.load(saved).crop_rule): pytest.skip('one crop rule shows it')
    from PIL import Image, PngImagePlugin
    from test_core import CURVES, PRIMARIES, icc_profile
    for p in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(p)
    monkeypatch.chdir(tmp_path)
    Path('run.py').write_text(export(capsys, saved, '--format', 'onnx')[1])
    def run(name): return subprocess.run([sys.executable, 'run.py', name], capture_output=True, text=True)
    image = Image.open(photograph).convert('RGBA')
    image.putalpha(Image.linear_gradient('L').resize(image.size).point(lambda v: 255-v//6)) # colours of another space, and partly transparent
    image.save('p3.png', icc_profile=icc_profile(PRIMARIES['p3'], CURVES['p3']))
    plain, gamma, coded = Image.open(photograph).convert('RGB'), PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    gamma.add(b'gAMA', (100_000).to_bytes(4, 'big')) # light as it is: far from sRGB
    plain.save('gamma.png', pnginfo=gamma)
    plain.save('broken.jpg', quality=95, icc_profile=b'no profile')
    plain.convert('L').save('grey.png')
    for name in ('p3.png', 'gamma.png', 'broken.jpg', 'grey.png'):
        done = run(name)
        [want] = deepfid.score(tmp_path/name, saved)[0].faces[0].scores
        assert done.returncode==0 and float(done.stdout.split()[0])==pytest.approx(want.fidelity, abs=4e-3), (name, done.stderr)
    Image.fromarray(np.zeros((64, 64), np.uint16)).save('deep.png')
    coded.add(b'cICP', bytes([9, 16, 0, 1]))
    plain.save('hdr.png', pnginfo=coded)
    cv2.imwrite('blank.png', np.full((200, 200, 3), 128, np.uint8))
    refused = {'deep.png': 'give a photograph with 8 bits a channel and colours in sRGB', 'blank.png': 'no face found',
        'hdr.png': 'give a photograph with 8 bits a channel and colours in sRGB', 'nowhere.jpg': 'give a photograph that Pillow can read'}
    for name, line in refused.items():
        done = run(name)
        assert done.returncode==1 and done.stderr.strip()==line

def test_a_file_says_what_it_is(saved, capsys, tmp_path):
    import hashlib, json
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    status, out, _ = export(capsys, saved, '--format', 'onnx', '--out', tmp_path/'m.onnx', '--licence', 'CC BY 4.0', '--json')
    model, detector = onnx.load(tmp_path/'m.onnx'), DeepFidelity.load(saved)
    about = {p.key: p.value for p in model.metadata_props}
    assert status==0 and about['licence']=='CC BY 4.0' and about['card_sha256']==hashlib.sha256(b'# A card').hexdigest()
    assert (about['detector'], about['crop_align'], json.loads(about['crop_margin']), json.loads(about['size']))==('deepfidelity', detector.crop_rule[0], 1.5, 64)
    assert json.loads(about['threshold'])==detector.threshold and json.loads(about['calibration'])==list(detector.calibration) and about['positive_class']=='fake'
    for value in (*model.graph.input, *model.graph.output): assert value.type.tensor_type.shape.dim[0].dim_param=='batch'
    assert json.loads(out)['metadata']['licence']=='CC BY 4.0'

def test_bundled_detectors_export_with_their_licence():
    from deepfid.export import export_metadata
    from deepfid.inference.hub import find_detector, load
    card = find_detector('lisiam')/'MODEL_CARD.md'
    about = export_metadata(load('lisiam', 'cpu'), card, 'Apache-2.0')
    assert len(about['card_sha256'])==64 and about['licence']=='Apache-2.0' and np.shape(about['template'])==(5, 2) and len(about['calibration'])==2

def test_export_says_what_is_missing(capsys, tmp_path, monkeypatch):
    import sys
    from deepfid.cli import build_parser
    from deepfid.export import EXPORT_FORMATS
    parser = build_parser('export')._subparsers._group_actions[0].choices['export']
    assert set(next(a for a in parser._actions if a.dest=='format').choices)==set(EXPORT_FORMATS)
    monkeypatch.chdir(tmp_path)
    for format, package in (('openvino', 'openvino'), ('onnx', 'onnxscript')):
        monkeypatch.setitem(sys.modules, package, None)
        status, out, err = export(capsys, 'deepfidelity', '--format', format)
        assert (status, out)==(1, '') and len(err.splitlines())==1 and f'needs {package}: pip install' in err
    (tmp_path/'file').write_text('')
    for argv, words in ((['gone', '--format', 'torch'], 'gone'), (['deepfidelity', '--format', 'torch', '--out', 'x.onnx'], '.pt2'),
            (['deepfidelity', '--format', 'torch', '--out', 'file/x.pt2'], 'cannot be written')):
        status, out, err = export(capsys, *argv)
        assert (status, out)==(1, '') and len(err.splitlines())==1 and words in err
    assert [p.name for p in tmp_path.iterdir()]==['file']

def test_no_name_or_licence_adds_a_line_to_the_printed_program(tmp_path):
    "What follows a newline in them is text, not Python, in any encoding"
    from deepfid.export import runtime_snippet
    odd = 'b\nprint(1)\n\xfc.onnx'
    snippet = runtime_snippet(odd, 'onnx')
    assert ascii(odd) in snippet and snippet.isascii() and len(snippet.splitlines())==len(runtime_snippet('b.onnx', 'onnx').splitlines())
