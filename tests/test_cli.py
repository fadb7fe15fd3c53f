"Commands: help at once, one clear line when something is wrong, nothing half-written"
import json, subprocess, sys
import cv2, numpy as np, pytest
from deepfid.cli import main

def run(capsys, *argv):
    capsys.readouterr()
    try: status = main([str(a) for a in argv])
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err

def test_help_and_version_without_torch():
    code = "import sys; from deepfid.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    import deepfid
    assert done.returncode==0 and done.stdout.strip()==deepfid.__version__

@pytest.mark.parametrize('argv', [['paint'], [], ['demo', '--data', 'moon'], ['score', 'a.jpg']])
def test_wrong_usage_is_status_two(capsys, argv): assert run(capsys, *argv)[0]==2

def one_line(result, *words):
    status, out, err = result
    lines = [l for l in err.splitlines() if l.startswith('deepfid: ')]
    assert status==1 and out=='' and len(lines)==1 and all(w in lines[0] for w in words), result
    assert 'Traceback' not in err

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    from deepfid.testing import tiny_detector
    return tiny_detector(1).save(tmp_path_factory.mktemp('m')/'model')

def test_scores_photographs(capsys, data, model):
    photos = sorted((data/'london'/'smiling_front').glob('*.jpg'))[:2]
    status, out, _ = run(capsys, 'score', '--json', '--model', model, *photos)
    scores = json.loads(out)['scores']
    assert status==0 and [s['image'] for s in scores]==[str(p) for p in photos] and all(np.isfinite(s['fidelity']) for s in scores)

def test_a_photograph_is_cut_as_the_faces_of_a_manifest_are(capsys, data, model, tmp_path):
    from deepfid.core import read_image
    from deepfid.data.faces import align, find_face
    from deepfid.fidelity.learner import DeepFidelity
    photo = sorted((data/'london'/'smiling_front').glob('*.jpg'))[0]
    wide = tmp_path/'wide.png'                       # not square, and the face away from the middle
    cv2.imwrite(str(wide), np.pad(read_image(photo), ((40, 0), (300, 0), (0, 0)), 'edge')[..., ::-1])
    _, out, _ = run(capsys, 'score', '--json', '--model', model, photo, wide)
    got, detector = [r['fidelity'] for r in json.loads(out)['scores']], DeepFidelity.load(model)
    want = detector.predict([align(find_face(photo), detector.config['size'])])[0].fidelity
    assert got[0]==pytest.approx(want, abs=1e-6) and abs(got[1]-want)<.1

def test_maps(capsys, data, model, tmp_path):
    photo = sorted((data/'london'/'smiling_front').glob('*.jpg'))[0]
    status, out, _ = run(capsys, 'maps', '--model', model, photo, '--out', tmp_path/'m.jpg')
    assert status==0 and str(tmp_path/'m.jpg') in out and cv2.imread(str(tmp_path/'m.jpg')).shape[1]>500

def test_module_can_be_started():
    import subprocess, sys
    done = subprocess.run([sys.executable, '-m', 'deepfid.cli', '--version'], capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.strip()

def test_bad_pictures(capsys, data, model, tmp_path):
    cases = {'missing.jpg': None, 'empty.jpg': b'', 'text.jpg': b'hello', 'cut.jpg': (data/'london'/'neutral_front'/'002_03.jpg').read_bytes()[:4000]}
    for name, content in cases.items():
        if content is not None: (tmp_path/name).write_bytes(content)
        one_line(run(capsys, 'score', '--model', model, tmp_path/name), name)
    for name, size in (('grey.png', 300), ('dot.png', 1)):
        cv2.imwrite(str(tmp_path/name), np.full((size, size, 3), 128, np.uint8))
        one_line(run(capsys, 'score', '--model', model, tmp_path/name), name, 'no face')

def test_bad_models(capsys, model, tmp_path):
    import shutil
    one_line(run(capsys, 'score', '--model', tmp_path, 'a.jpg'), 'detector.json')
    shutil.copytree(model, tmp_path/'m')
    (tmp_path/'m'/'network.safetensors').write_bytes(b'x')
    one_line(run(capsys, 'score', '--model', tmp_path/'m', 'a.jpg'), 'network.safetensors', 'sha256')

def test_bad_manifest_leaves_no_model(capsys, tmp_path):
    (tmp_path/'manifest.csv').write_text('path,label,identity,split\na.png,7,x,train\n')
    one_line(run(capsys, 'train', tmp_path/'manifest.csv', '--out', tmp_path/'model'), 'manifest.csv', "label '7'")
    one_line(run(capsys, 'train', tmp_path/'gone.csv', '--out', tmp_path/'model'), 'gone.csv')
    assert not (tmp_path/'model').exists()

def test_real_demo_without_data_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    status, _, err = run(capsys, 'demo', '--data', 'london', '--out', tmp_path/'demo')
    assert status==1 and 'DEEPFID_DATA' in err and not (tmp_path/'demo').exists()

@pytest.mark.parametrize('data_name', ['synthetic', 'portraits'])
def test_a_very_small_demo(capsys, tmp_path, request, data_name):
    if data_name!='synthetic': request.getfixturevalue('data')
    status, out, _ = run(capsys, 'demo', '--data', data_name, '--pairs', 60, '--epochs', 1, '--out', tmp_path/'demo')
    summary = json.loads((tmp_path/'demo'/'summary.json').read_text())
    for key in ('auc', 'auc_low', 'auc_high', 'baseline_auc', 'baseline_auc_low', 'baseline_auc_high', 'per_forger', 'strengths', 'data', 'preset', 'seconds', 'peak_memory_mib'):
        assert key in summary, key
    page = (tmp_path/'demo'/'report.html').read_text()
    assert status==0 and out.splitlines()[-1]==str(tmp_path/'demo'/'report.html') and 'src="http' not in page and '<script' not in page
    if data_name=='portraits': assert 'fakes that fooled it' not in page and 'fakes it caught' not in page and set(summary['per_forger'])=={'selfblend'}
    from deepfid.fidelity.learner import DeepFidelity
    DeepFidelity.load(tmp_path/'demo'/'model')
