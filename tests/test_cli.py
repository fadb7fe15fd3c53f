"Command line: help at once, one clear line when something is wrong, nothing half-written"
import json, os, shutil, subprocess, sys
from importlib.util import find_spec
import cv2, numpy as np, pytest
import deepfid
from deepfid.inference.hub import list_bundled
from deepfid.cli import COMMANDS, main
from deepfid.io import read_image

def run(capsys, *argv):
    capsys.readouterr()
    try: status = main([str(a) for a in argv])
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err

def error_lines(err): return [line for line in err.splitlines() if line.startswith('deepfid: ')]

def one_line(result, *words):
    status, out, err = result
    lines = error_lines(err)
    assert status==1 and out=='' and len(lines)==1 and all(w in lines[0] for w in words), result
    assert 'Traceback' not in err

def wrong_usage(result, *words):
    status, out, err = result
    assert status==2 and out=='' and all(w in err.splitlines()[-1] for w in words), result

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An untrained DeepFidelity, saved"
    from deepfid.models.deepfidelity.detector import DeepFidelity
    return DeepFidelity(mapping=None, seed=3).configure('tiny').save(tmp_path_factory.mktemp('m')/'model')

@pytest.fixture(scope='module')
def photos(data): return sorted((data/'london'/'smiling_front').glob('*.jpg'))

# -- help and cheap errors ------------------------------------------------------------------------------------------

def process(code):
    "Run Python code; (output, processor seconds: other work on the machine hardly changes them)"
    before = os.times()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode==0, done.stderr
    return done.stdout, after.children_user+after.children_system-before.children_user-before.children_system

def test_help_and_cheap_errors_are_quick():
    code = '''if True:
        import sys
        from deepfid.cli import main
        for argv in {argvs}:
            try: status = main(argv)
            except SystemExit as e: status = e.code
            print(status)
        print([m for m in {heavy} if m in sys.modules])'''
    out, seconds = process(code.format(argvs=[['--help'], ['--version'], ['paint']], heavy=['numpy', 'torch']))
    assert deepfid.__version__ in out and out.endswith('2\n[]\n') and seconds<.6
    wrong = [['score', 'gone.jpg'], ['score', 'a.jpg', '--detector', 'deepfake2000'], ['train', 'gone.csv', '--out', 'm'],
        ['evaluate', 'deepfidelity', 'gone.csv'], ['evaluate', 'deepfake2000', 'm.csv'], ['maps', 'gone.jpg', '--detector', 'deepfidelity'],
        ['table', 'chess', '--manifest', 'synthetic'], ['figure', 'chess'], ['faces', 'gone', '--out', 'm'], ['forge', 'gone', '--out', 'm']]
    out, seconds = process(code.format(argvs=wrong, heavy=['torch', 'pandas', 'fastai', 'timm', 'matplotlib']))
    assert out.split()==['1', '1', '1', '1', '1', '1', '2', '2', '1', '1', '[]'] and seconds<2

@pytest.mark.parametrize('seconds', [0, .05, .15, .3]) # after `main` has begun: before, Python itself is interrupted
def test_an_interruption_is_one_line_from_the_beginning(seconds):
    "Also while the options are looked up and libraries are imported"
    code = ("import sys, deepfid.cli as c; run = c._run; c._run = lambda argv: (print('up', flush=True), run(argv))[1]; "
        "sys.exit(c.main(['table', 'ablation', '--manifest', 'synthetic', '--out', sys.argv[1]]))")
    import signal, tempfile, time
    with tempfile.TemporaryDirectory() as tmp:
        p = subprocess.Popen([sys.executable, '-c', code, tmp], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(seconds)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    assert (p.returncode, err)==(130, 'deepfid: interrupted\n')

def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        status, out, _ = run(capsys, command, '--help')
        assert status==0 and f'deepfid {command}' in out.split('example')[1] and '--json' in out, command
    for command, names in dict(table=deepfid.list_tables(), figure=deepfid.list_figures(), train=list_bundled(), score=list_bundled()).items():
        text = ''.join(run(capsys, command, '--help')[1].split()) # names are broken over lines at hyphens
        assert names and all(n in text for n in names), command

@pytest.mark.parametrize('argv', [['paint'], [], ['demo', '--data', 'moon'], ['score'], ['train', 'm.csv', '--out', 'x', '--detector', 'y'],
    ['synth', '--out', 'x', '--size', '8'], ['score', 'a.jpg', '--frames', '0'], ['table', 'chess', '--manifest', 'm.csv'], ['figure', 'chess'],
    ['table', 'ablation', '--manifest', 'm.csv', '--set', 'lr']])
def test_wrong_usage_is_status_two(capsys, argv): assert run(capsys, *argv)[0]==2

@pytest.mark.parametrize('argv', [('faces', 'x', '--out', 'y', '--margin', v) for v in ('0', 'nan', '-1', 'inf', '1e9')]
    +[(c, *a, f'--seed={v}') for c, a in (('synth', ('--out', 'x')), ('forge', ('x', '--out', 'y')), ('demo', ()), ('train', ('x', '--out', 'y')))
      for v in ('-1', '1.5', str(2**32), 'nan')]
    +[('demo', '--pairs', '-3'), ('score', 'a.jpg', '--threshold', 'nan'), ('score', 'a.jpg', '--threshold', '1.5'), ('score', 'a.jpg', '--workers', '0')])
def test_numbers_out_of_range(capsys, argv): wrong_usage(run(capsys, *argv), 'is not a')

def test_every_number_states_its_range():
    "In --help; a number that is only converted, by int or float, has none"
    import re
    from deepfid.cli import build_parser
    for name in COMMANDS:
        parser = build_parser(name)._subparsers._group_actions[0].choices[name]
        for action in parser._actions:
            assert action.type not in (int, float), (name, action.dest)
            if getattr(action.type, '__name__', '')=='convert': assert re.search(r'from \d|\d to \d', action.help), (name, action.dest, action.help)

def test_images_are_written_in_the_format_of_their_name(capsys, photos, model, tmp_path):
    from PIL import Image
    one_line(run(capsys, 'maps', photos[0], '--model', model, '--out', tmp_path/'x.txt'), 'x.txt', '.png')
    one_line(run(capsys, 'figure', 'robustness' if 'robustness' in deepfid.list_figures() else next(iter(deepfid.list_figures())), '--out', tmp_path/'x.txt'), '.svg')
    assert not list(tmp_path.iterdir())
    for _ in range(2): # the second replaces the first
        assert run(capsys, 'maps', photos[0], '--model', model, '--out', tmp_path/'x.png')[0]==0
    assert Image.open(tmp_path/'x.png').format=='PNG'

def test_ranges_are_stated(capsys):
    wrong_usage(run(capsys, 'synth', '--out', 'x', '--size', '8'), 'from 32 to 1024')
    wrong_usage(run(capsys, 'faces', 'x', '--out', 'y', '--margin', '9'), 'from 0.5 to 4')

def test_list(capsys):
    status, out, _ = run(capsys, 'list', '--json')
    assert status==0 and json.loads(out)==dict(detectors=deepfid.list_detectors(), tables=deepfid.list_tables(), figures=deepfid.list_figures())
    assert run(capsys, 'list', 'detectors')[1].split()==deepfid.list_detectors()

# -- score ----------------------------------------------------------------------------------------------------------

def faces_of(out): return [json.loads(line)['faces'] for line in out.splitlines()]

def test_scores_photographs(capsys, photos, model, tmp_path):
    status, out, _ = run(capsys, 'score', '--json', '--model', model, *photos[:2])
    rows = [json.loads(line) for line in out.splitlines()]
    assert status==0 and [r['source'] for r in rows]==[str(p) for p in photos[:2]]
    assert all(len(r['faces'])==1 and np.isfinite(r['faces'][0]['scores'][0]['fidelity']) and not r['error'] for r in rows)
    status, out, _ = run(capsys, 'score', '--model', model, *photos[:2], '--report', tmp_path/'r.html', '--csv', tmp_path/'r.csv')
    lines = out.splitlines()
    assert status==0 and len(lines)==5 and 'is wrong was not measured' in lines[4]
    for line, why, photo in zip(lines[:4:2], lines[1:4:2], photos):
        assert line.split()[1] in ('real', 'fake') and str(photo) in line and '(threshold 0.500)' in line and 'How far this score can be relied on' in why
    assert (tmp_path/'r.html').read_text().count('class="card"')==2 and len((tmp_path/'r.csv').read_text().splitlines())==3

def test_a_photograph_is_cropped_like_the_faces_of_a_manifest(capsys, photos, model, tmp_path):
    from deepfid.data.faces import align_face, find_face
    from deepfid.models.deepfidelity.detector import DeepFidelity
    wide = tmp_path/'wide.png'                       # not square, and the face away from the middle
    cv2.imwrite(str(wide), np.pad(read_image(photos[0]), ((40, 0), (300, 0), (0, 0)), 'edge')[..., ::-1])
    _, out, _ = run(capsys, 'score', '--json', '--model', model, photos[0], wide)
    got, detector = [faces[0]['scores'][0]['fidelity'] for faces in faces_of(out)], DeepFidelity.load(model)
    expected = detector.predict([align_face(find_face(photos[0]), detector.size)])[0].fidelity
    assert got[0]==pytest.approx(expected, abs=1e-6) and abs(got[1]-expected)<.1

def test_a_folder_continues_after_a_bad_file(capsys, photos, model, tmp_path):
    (tmp_path/'a.jpg').write_text('no')
    (tmp_path/'b.jpg').symlink_to(photos[0])
    status, out, err = run(capsys, 'score', '--model', model, tmp_path, tmp_path/'gone.jpg')
    assert status==1 and 'b.jpg' in out and len(out.splitlines())==3 and len(error_lines(err))==2

def test_error_rates_of_bundled_detectors_are_printed(capsys, photos):
    from deepfid.inference.hub import find_detector, measured_accuracy
    status, out, _ = run(capsys, 'score', photos[0], '--detector', 'all')
    for name, line in zip(list_bundled(), out.splitlines()[-3:]):
        value, low, high = measured_accuracy(find_detector(name))['london']
        assert line.startswith(f'{name} was wrong for') and f'{100*(1-value):.0f} % of london faces ({100*(1-high):.0f} to {100*(1-low):.0f})' in line

def test_options_of_score(capsys, photos, model, tmp_path, monkeypatch):
    for i, photo in enumerate(photos[:2]): shutil.copy(photo, tmp_path/f'{i}.jpg')
    (tmp_path/'0.jpg').rename(tmp_path/'0.jfif')
    (tmp_path/'notes.txt').write_text('no')
    status, out, err = run(capsys, 'score', tmp_path, '--model', model, '--explain', tmp_path/'why', '--threshold', '.01', '--device', 'cpu')
    assert status==0 and out.count('(threshold 0.010)')==2 and out.count('  real  ')==2 and '1 file that is neither image nor video was passed over' in err
    assert [p.name[2:10]!='' and p.name.endswith('-face1-deepfidelity.jpg') for p in sorted((tmp_path/'why').iterdir())]==[True]*2
    status, out, _ = run(capsys, 'score', tmp_path/'*.j*', '--model', model, '--json')    # a pattern that the shell left
    assert status==0 and [os.path.basename(json.loads(line)['source']) for line in out.splitlines()]==['0.jfif', '1.jpg']
    expected = json.loads(out.splitlines()[0])['faces']
    class Stdin: buffer = open(tmp_path/'0.jfif', 'rb')
    monkeypatch.setattr(sys, 'stdin', Stdin)
    status, out, _ = run(capsys, 'score', '-', '--model', model, '--json')
    got = json.loads(out)
    assert status==0 and got['source']=='standard input' and got['faces']==expected
    one_line(run(capsys, 'score', photos[0], '--model', model, '--device', 'abacus'), 'no such device')
    one_line(run(capsys, 'score', tmp_path/'none*.jpg', '--model', model), 'none*.jpg')
    sideways = tmp_path/'side.png'
    cv2.imwrite(str(sideways), np.rot90(read_image(photos[0]))[..., ::-1])
    status, out, err = run(capsys, 'score', sideways, '--model', model, '--rotate', 'auto')
    assert status==0 and 'side.png: was turned by 90 degrees clockwise' in err

def test_bad_images(capsys, data, model, tmp_path):
    cases = {'empty.jpg': b'', 'text.jpg': b'hello', 'cut.jpg': (data/'london'/'neutral_front'/'002_03.jpg').read_bytes()[:4000]}
    for name, content in cases.items(): (tmp_path/name).write_bytes(content)
    for name, size in (('grey.png', 300), ('dot.png', 1)): cv2.imwrite(str(tmp_path/name), np.full((size, size, 3), 128, np.uint8))
    status, out, err = run(capsys, 'score', '--model', model, *[tmp_path/n for n in (*cases, 'grey.png', 'dot.png')])
    lines = error_lines(err)
    assert status==1 and not out and len(lines)==5 and all(name in line for name, line in zip((*cases, 'grey.png', 'dot.png'), lines))
    assert all('no face' in line for line in lines[3:]) and 'Traceback' not in err
    one_line(run(capsys, 'score', '--model', model, tmp_path/'missing.jpg'), 'missing.jpg', 'no such file')

def test_bad_detectors(capsys, model, tmp_path):
    one_line(run(capsys, 'score', '--detector', 'deepfake2000', 'a.jpg'), 'deepfake2000', 'lisiam')
    (tmp_path/'empty').mkdir()
    one_line(run(capsys, 'score', '--model', tmp_path/'empty', 'a.jpg'), 'detector.json')
    shutil.copytree(model, tmp_path/'m')
    (tmp_path/'m'/'network.safetensors').write_bytes(b'x')
    one_line(run(capsys, 'score', '--model', tmp_path/'m', tmp_path), 'network.safetensors', 'sha256')

# -- outputs --------------------------------------------------------------------------------------------------------

def test_outputs_that_cannot_be_written_are_refused_at_once(capsys, model, tmp_path):
    (tmp_path/'file').write_text('')
    for option in ('--report', '--csv', '--results'):
        one_line(run(capsys, 'score', '--model', model, 'a.jpg', option, tmp_path/'file'/'x'), 'cannot be written')
    one_line(run(capsys, 'score', '--model', model, 'a.jpg', '--report', tmp_path), 'cannot be written', 'folder')
    for argv in (['demo'], ['table', 'similarity-intra', '--manifest', 'synthetic'], ['train', 'no.csv']):
        one_line(run(capsys, *argv, '--out', tmp_path/'file'/'out'), 'cannot be written')
    (tmp_path/'none').mkdir()
    one_line(run(capsys, 'score', '--model', model, tmp_path/'none'), 'contains no images')

def test_outputs_never_replace_what_exists(capsys, tmp_path):
    photo, other = tmp_path/'a.jpg', tmp_path/'b.png'
    for p in (photo, other): p.write_bytes(b'mine')
    one_line(run(capsys, 'score', photo, '--csv', photo), 'is named as an input')
    one_line(run(capsys, 'score', photo, '--csv', other), 'does not end in .csv')
    one_line(run(capsys, 'score', photo, '--results', tmp_path/'r.jsonl', '--csv', tmp_path/'r.jsonl'), 'is named as an input or output')
    one_line(run(capsys, 'maps', photo, '--model', 'deepfidelity', '--out', photo), 'is named as an input')
    one_line(run(capsys, 'maps', photo, '--model', 'local_similarity', '--out', tmp_path/'m.jpg'), 'deepfidelity')
    assert photo.read_bytes()==other.read_bytes()==b'mine' and sorted(p.name for p in tmp_path.iterdir())==['a.jpg', 'b.png']

def test_errors_of_the_machine_are_one_line(capsys, monkeypatch, tmp_path):
    def full(args): raise OSError(28, 'No space left on device', str(tmp_path/'x'))
    monkeypatch.setitem(COMMANDS, 'doctor', COMMANDS['doctor']._replace(run=full))
    one_line(run(capsys, 'doctor'), 'No space left', str(tmp_path/'x'))

def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(f'{sys.executable} -m deepfid.cli list --json | head -c 1', shell=True, capture_output=True, text=True)
    assert 'Traceback' not in done.stderr and done.stdout=='{'

# -- the other commands ---------------------------------------------------------------------------------------------

def test_maps(capsys, photos, model, tmp_path):
    status, out, _ = run(capsys, 'maps', '--model', model, photos[0], '--out', tmp_path/'m.jpg')
    assert status==0 and str(tmp_path/'m.jpg') in out and cv2.imread(str(tmp_path/'m.jpg')).shape[1]>500

def test_bad_manifest_leaves_no_model(capsys, tmp_path):
    (tmp_path/'manifest.csv').write_text('path,label,identity,split\na.png,7,x,train\n')
    one_line(run(capsys, 'train', tmp_path/'manifest.csv', '--out', tmp_path/'model'), 'manifest.csv', "label '7'")
    one_line(run(capsys, 'train', tmp_path/'gone.csv', '--out', tmp_path/'model'), 'gone.csv')
    assert not (tmp_path/'model').exists()

def test_demo_on_real_faces_without_data(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    status, _, err = run(capsys, 'demo', '--data', 'london', '--out', tmp_path/'demo')
    assert status==1 and 'DEEPFID_DATA' in err and not (tmp_path/'demo').exists()

@pytest.mark.parametrize('data_name', ['synthetic', 'portraits'])
def test_a_very_small_demo(capsys, tmp_path, request, data_name):
    if data_name!='synthetic': request.getfixturevalue('data')
    status, out, _ = run(capsys, 'demo', '--data', data_name, '--pairs', 60, '--epochs', 1, '--out', tmp_path/'demo')
    summary = json.loads((tmp_path/'demo'/'summary.json').read_text())
    page = (tmp_path/'demo'/'report.html').read_text()
    assert status==0 and out.splitlines()[-1]==str(tmp_path/'demo'/'report.html') and 'src="http' not in page and '<script' not in page
    for key in ('auc', 'auc_low', 'auc_high', 'baseline_auc', 'data', 'preset', 'seconds'): assert key in summary, key
    if data_name=='portraits': assert 'fakes with the lowest fidelity' not in page and 'fakes taken for real' not in page
    from deepfid.models.deepfidelity.detector import DeepFidelity
    DeepFidelity.load(tmp_path/'demo'/'model')

def test_synth_gives_the_same_faces(capsys, tmp_path):
    for name in 'ab': assert run(capsys, 'synth', '--out', tmp_path/name, '--n', 2, '--size', 64, '--seed', 5)[0]==0
    assert [p.read_bytes() for p in sorted((tmp_path/'a').iterdir())]==[p.read_bytes() for p in sorted((tmp_path/'b').iterdir())]
    one_line(run(capsys, 'synth', '--out', tmp_path/'a'), 'exists already')

def test_forge_only_blends_a_face_with_itself(capsys, photos, tmp_path):
    from deepfid.data.manifest import Manifest
    for i, photo in enumerate(photos[:4]): (tmp_path/f'{i}.jpg').symlink_to(photo)
    (tmp_path/'bad.jpg').write_text('no')
    status, out, err = run(capsys, 'forge', tmp_path, '--out', tmp_path/'out', '--size', 112, '--json')
    manifest = Manifest.read(json.loads(out)['saved'])
    assert status==1 and 'bad.jpg' in err and set(manifest.table['method'])=={'real', 'selfblend'} and len(manifest)==8 and not manifest.table['consent'].any()
    assert set(manifest.table['split'])=={'train', 'valid', 'test'}
    status, out, _ = run(capsys, 'forge', tmp_path/'0.jpg', '--out', tmp_path/'one', '--size', 112)
    assert status==0 and len(Manifest.read(tmp_path/'one'/'manifest.csv'))==2
    status, out, err = run(capsys, 'forge', tmp_path/'bad.jpg', '--out', tmp_path/'two')
    assert status==1 and 'no face could be forged' in err and 'Traceback' not in err and not list((tmp_path/'two').iterdir())

def test_train_and_evaluate(capsys, tmp_path):
    from deepfid.inference.hub import load
    from deepfid.testing import tiny_manifest
    csv = tiny_manifest((40, 20, 20)).save()
    status, out, _ = run(capsys, 'train', csv, '--out', tmp_path/'m', '--preset', 'tiny', '--epochs', 1, '--json')
    assert status==0 and json.loads(out)['saved']==str(tmp_path/'m')
    assert set(load(tmp_path/'m').validated_ranges)=={'score_range', 'quality_range'}
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'dataset', '--by', 'identity', '--json')
    result = json.loads(out)
    assert status==0 and result['auc_low']<=result['auc']<=result['auc_high'] and result['n_fake']==20
    assert set(result['by'])=={'method', 'dataset', 'identity'} and len(result['by']['dataset'])==1
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'pair')
    assert status==0 and 'AUC by method' in out and 'positive class: fake' in out
    one_line(run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'hat'), "'hat'")

def test_notebooks_and_explorers(capsys, tmp_path):
    status, out, _ = run(capsys, 'notebooks', tmp_path/'lessons', '--json')
    assert status==0 and (tmp_path/'lessons'/'first_look.ipynb').is_file() and len(json.loads(out)['files'])==len(list((tmp_path/'lessons').iterdir()))
    one_line(run(capsys, 'notebooks', tmp_path/'lessons'), 'exists already')
    one_line(run(capsys, 'explore', 'chess'), 'chess')
    if find_spec('voila') is None: one_line(run(capsys, 'explore'), 'Voila', 'jupyter lab')

def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path/'gone'))
    status, out, _ = run(capsys, 'doctor', '--json')
    found = {f['name']: f for f in json.loads(out)['findings']}
    assert status==1 and found['DEEPFID_DATA']['state']=='missing' and found['torch']['state']=='ok' and found['CPU']['state']=='ok'
    monkeypatch.delenv('DEEPFID_DATA')
    assert 'PACKAGES' in run(capsys, 'doctor')[1]

def test_faces_of_a_folder(capsys, photos, tmp_path):
    for kind, numbers in (('real', (0, 1)), ('fake', (2, 3))):
        (tmp_path/'set'/kind).mkdir(parents=True)
        for i in numbers: (tmp_path/'set'/kind/f'{i}.jpg').write_bytes(photos[i].read_bytes())
    status, out, _ = run(capsys, 'faces', tmp_path/'set', '--out', tmp_path/'out', '--size', 112, '--workers', 1, '--json')
    assert status==0 and json.loads(out)['faces']==4
    one_line(run(capsys, 'faces', tmp_path/'set', '--out', tmp_path/'out', '--compression', 'c40'), '--compression')
    one_line(run(capsys, 'faces', tmp_path, '--out', tmp_path/'none'), 'real')

def test_a_table_states_what_it_needs_before_it_generates_a_face(capsys, tmp_path):
    one_line(run(capsys, 'table', 'lisiam-cross', '--manifest', 'synthetic', '--out', tmp_path/'out'), 'needs 2 manifests')
    assert not (tmp_path/'out').exists()
