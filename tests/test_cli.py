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

@pytest.mark.parametrize('argv', [['paint'], [], ['demo', '--data', 'moon'], ['score'], ['train', 'm.csv', '--out', 'x', '--detector', 'y']])
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

def faces_of(out): return [json.loads(line)['faces'] for line in out.splitlines()]

def test_scores_photographs(capsys, data, model, tmp_path):
    photos = sorted((data/'london'/'smiling_front').glob('*.jpg'))[:2]
    status, out, _ = run(capsys, 'score', '--json', '--model', model, *photos)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status==0 and [r['source'] for r in rows]==[str(p) for p in photos]
    assert all(len(r['faces'])==1 and np.isfinite(r['faces'][0]['verdicts'][0]['fidelity']) and not r['error'] for r in rows)
    status, out, _ = run(capsys, 'score', '--model', model, *photos, '--report', tmp_path/'r.html', '--csv', tmp_path/'r.csv')
    assert status==0 and [line.split()[1] in ('real', 'fake') for line in out.splitlines()]==[True, True]
    assert (tmp_path/'r.html').read_text().count('class="card"')==2 and len((tmp_path/'r.csv').read_text().splitlines())==3

def test_a_photograph_is_cut_as_the_faces_of_a_manifest_are(capsys, data, model, tmp_path):
    from deepfid.core import read_image
    from deepfid.data.faces import align, find_face
    from deepfid.models.deepfidelity.detector import DeepFidelity
    photo = sorted((data/'london'/'smiling_front').glob('*.jpg'))[0]
    wide = tmp_path/'wide.png'                       # not square, and the face away from the middle
    cv2.imwrite(str(wide), np.pad(read_image(photo), ((40, 0), (300, 0), (0, 0)), 'edge')[..., ::-1])
    _, out, _ = run(capsys, 'score', '--json', '--model', model, photo, wide)
    got, detector = [faces[0]['verdicts'][0]['fidelity'] for faces in faces_of(out)], DeepFidelity.load(model)
    want = detector.predict([align(find_face(photo), detector.config['size'])])[0].fidelity
    assert got[0]==pytest.approx(want, abs=1e-6) and abs(got[1]-want)<.1

def test_a_folder_goes_on_after_a_bad_file(capsys, data, model, tmp_path):
    photo = sorted((data/'london'/'smiling_front').glob('*.jpg'))[0]
    (tmp_path/'a.jpg').write_text('no')
    (tmp_path/'b.jpg').symlink_to(photo)
    status, out, err = run(capsys, 'score', '--model', model, tmp_path)
    assert status==1 and 'b.jpg' in out and len(out.splitlines())==1 and len([l for l in err.splitlines() if l.startswith('deepfid: ')])==1

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

def test_outputs_that_cannot_be_written_are_refused_at_once(capsys, model, tmp_path):
    (tmp_path/'file').write_text('')
    for option in ('--report', '--csv', '--results'):
        one_line(run(capsys, 'score', '--model', model, 'a.jpg', option, tmp_path/'file'/'x'), 'cannot be written')
    one_line(run(capsys, 'score', '--model', model, 'a.jpg', '--report', tmp_path), 'cannot be written', 'folder')
    (tmp_path/'none').mkdir()
    one_line(run(capsys, 'score', '--model', model, tmp_path/'none'), 'holds no photographs')
    one_line(run(capsys, 'score', '--detector', 'deepfake2000', 'a.jpg'), 'deepfake2000', 'lisiam')

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
    from deepfid.models.deepfidelity.detector import DeepFidelity
    DeepFidelity.load(tmp_path/'demo'/'model')

@pytest.mark.parametrize('verb', ['demo', 'score', 'faces', 'synth', 'forge', 'train', 'evaluate', 'table', 'figure', 'maps', 'explore', 'notebooks', 'doctor'])
def test_every_verb_helps_with_an_example(capsys, verb):
    status, out, _ = run(capsys, verb, '--help')
    assert status==0 and f'deepfid {verb}' in out.split('example')[1] and '--json' in out

def test_help_takes_less_than_half_a_second():
    import os
    def seconds(): # of processor time, which other work on the machine hardly changes
        before = os.times()
        subprocess.run([sys.executable, '-m', 'deepfid.cli', '--help'], capture_output=True)
        after = os.times()
        return after.children_user+after.children_system-before.children_user-before.children_system
    assert min(seconds() for _ in range(5))<.5

def test_a_reader_that_goes_away_is_no_error(tmp_path):
    done = subprocess.run(f'{sys.executable} -c "import sys; from deepfid.cli import main; sys.exit(main([\'doctor\', \'--json\']))" | head -c 1', shell=True, capture_output=True, text=True)
    assert 'Traceback' not in done.stderr and done.stdout=='{'

def test_synth_draws_the_same_faces(capsys, tmp_path):
    for name in 'ab': assert run(capsys, 'synth', '--out', tmp_path/name, '--n', 2, '--size', 64, '--seed', 5)[0]==0
    assert [p.read_bytes() for p in sorted((tmp_path/'a').iterdir())]==[p.read_bytes() for p in sorted((tmp_path/'b').iterdir())]
    one_line(run(capsys, 'synth', '--out', tmp_path/'a'), 'is there already')
    one_line(run(capsys, 'synth', '--out', tmp_path/'c', '--size', 8), '32 to')

def test_forge_only_blends_a_face_with_itself(capsys, data, tmp_path):
    from deepfid.data.manifest import Manifest
    for i, photo in enumerate(sorted((data/'london'/'smiling_front').glob('*.jpg'))[:4]): (tmp_path/f'{i}.jpg').symlink_to(photo)
    (tmp_path/'bad.jpg').write_text('no')
    status, out, err = run(capsys, 'forge', tmp_path, '--out', tmp_path/'out', '--size', 112, '--json')
    manifest = Manifest.read(json.loads(out)['saved'])
    assert status==1 and 'bad.jpg' in err and set(manifest.table['method'])=={'real', 'selfblend'} and len(manifest)==8 and not manifest.table['consent'].any()
    assert set(manifest.table['split'])=={'train', 'valid', 'test'}
    status, out, _ = run(capsys, 'forge', tmp_path/'0.jpg', '--out', tmp_path/'one', '--size', 112)
    assert status==0 and len(Manifest.read(tmp_path/'one'/'manifest.csv'))==2
    status, out, err = run(capsys, 'forge', tmp_path/'bad.jpg', '--out', tmp_path/'two')
    assert status==1 and 'nothing could be forged' in err and 'Traceback' not in err

def test_train_and_evaluate(capsys, tmp_path):
    from deepfid.testing import tiny_manifest
    csv = tiny_manifest((40, 20, 20)).save()
    status, out, _ = run(capsys, 'train', csv, '--out', tmp_path/'m', '--preset', 'tiny', '--epochs', 1, '--json')
    assert status==0 and json.loads(out)['saved']==str(tmp_path/'m')
    from deepfid.inference.scorer import load
    assert set(load(tmp_path/'m').trust)=={'score_range', 'quality_range'}
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'method', '--by', 'identity', '--json')
    result = json.loads(out)
    assert status==0 and result['auc_low']<=result['auc']<=result['auc_high'] and result['n_fake']==20
    assert set(result['by'])=={'forger', 'method', 'identity'} and result['left_out'] and not result['by']['method']
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv)
    assert status==0 and 'AUC by forger' in out
    one_line(run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'hat'), "'hat'")

def test_notebooks_and_explorers(capsys, tmp_path):
    status, out, _ = run(capsys, 'notebooks', tmp_path/'lessons', '--json')
    assert status==0 and (tmp_path/'lessons'/'first_look.ipynb').is_file() and len(json.loads(out)['files'])==len(list((tmp_path/'lessons').iterdir()))
    one_line(run(capsys, 'notebooks', tmp_path/'lessons'), 'is there already')
    one_line(run(capsys, 'explore', 'chess'), 'chess')
    from importlib.util import find_spec
    if find_spec('voila') is None: one_line(run(capsys, 'explore'), 'Voila', 'jupyter lab')

def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path/'gone'))
    status, out, _ = run(capsys, 'doctor', '--json')
    found = {f['name']: f for f in json.loads(out)['findings']}
    assert status==1 and found['DEEPFID_DATA']['state']=='missing' and found['torch']['state']=='ok' and found['CPU']['state']=='ok'
    monkeypatch.delenv('DEEPFID_DATA')
    assert 'PACKAGES' in run(capsys, 'doctor')[1]

def test_faces_of_a_folder(capsys, data, tmp_path):
    for kind, photos in (('real', (0, 1)), ('fake', (2, 3))):
        (tmp_path/'set'/kind).mkdir(parents=True)
        for i in photos: (tmp_path/'set'/kind/f'{i}.jpg').write_bytes(sorted((data/'london'/'smiling_front').glob('*.jpg'))[i].read_bytes())
    status, out, _ = run(capsys, 'faces', tmp_path/'set', '--out', tmp_path/'out', '--size', 112, '--workers', 1, '--json')
    assert status==0 and json.loads(out)['faces']==4
    one_line(run(capsys, 'faces', tmp_path/'set', '--out', tmp_path/'out', '--compression', 'c40'), '--compression')
    one_line(run(capsys, 'faces', tmp_path, '--out', tmp_path/'none'), 'real')

def test_a_table_says_what_it_needs_before_it_draws_a_face(capsys, tmp_path):
    one_line(run(capsys, 'table', 'lisiam-cross', '--manifest', 'synthetic', '--out', tmp_path/'out'), 'needs 2 manifests')
    assert not (tmp_path/'out').exists()

def test_outputs_never_cost_what_is_there(capsys, tmp_path):
    photo, other = tmp_path/'a.jpg', tmp_path/'b.png'
    for p in (photo, other): p.write_bytes(b'mine')
    one_line(run(capsys, 'score', photo, '--csv', photo), 'to be read as well as written')
    one_line(run(capsys, 'score', photo, '--csv', other), 'is there already')
    one_line(run(capsys, 'score', photo, '--results', tmp_path/'r.jsonl', '--csv', tmp_path/'r.jsonl'), 'two outputs')
    one_line(run(capsys, 'maps', photo, '--model', 'deepfidelity', '--out', photo), 'to be read as well as written')
    one_line(run(capsys, 'maps', photo, '--model', 'local_similarity', '--out', tmp_path/'m.jpg'), 'of a DeepFidelity')
    assert photo.read_bytes()==other.read_bytes()==b'mine' and sorted(p.name for p in tmp_path.iterdir())==['a.jpg', 'b.png']

@pytest.mark.parametrize('argv', [['demo'], ['table', 'similarity-intra', '--manifest', 'synthetic'], ['train', 'no.csv']])
def test_a_folder_that_cannot_be_written_is_noticed_first(capsys, tmp_path, argv):
    (tmp_path/'file').write_text('x')
    one_line(run(capsys, *argv, '--out', tmp_path/'file'/'out'), 'is a file')

def test_trouble_of_the_machine_is_one_line(capsys, monkeypatch, tmp_path):
    from deepfid import commands
    def full(args): raise OSError(28, 'No space left on device', str(tmp_path/'x'))
    monkeypatch.setattr(commands, 'doctor', full)
    one_line(run(capsys, 'doctor'), 'No space left', str(tmp_path/'x'))

def test_forge_leaves_nothing_behind_where_nothing_was_forged(capsys, tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'bad.jpg').write_bytes(b'no picture')
    status, _, err = run(capsys, 'forge', tmp_path/'photos', '--out', tmp_path/'out')
    assert status==1 and 'nothing could be forged' in err and not list((tmp_path/'out').iterdir())
