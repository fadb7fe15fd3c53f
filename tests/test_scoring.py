"Scoring: files of every kind in, one clear line for each bad one, nothing lost or doubled when killed"
import csv, io, itertools, json, os, shutil, signal, subprocess, sys, time
import cv2, numpy as np, pytest
from PIL import Image
import deepfid
from deepfid.inference import scorer as scoring
from deepfid.core import DeepfidError, Detector, ImageError, NoFaceError, Prediction, WeightsError
from deepfid.data.faces import Detection
from deepfid.inference.scorer import ResultsFile, Scorer, ScoredFile, load, prefetch, read_photo, read_results, score, trust_ranges, write_report

POINTS = np.float32([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]])

class Grid:
    "Finds a face in every 120 x 120 block of a picture that is not black"
    def find(self, image):
        at = itertools.product(range(0, image.shape[0]-119, 120), range(0, image.shape[1]-119, 120))
        return [Detection(np.float32([x, y, 110+x/1000, 110]), POINTS+np.float32([x, y]), .9) for y, x in at if image[y:y+120, x:x+120].any()]

class Bright(Detector):
    "Bright faces are real"
    def __init__(self, name='bright', size=64, mask=False):
        self.name, self.config, self.threshold, self.trust, self.mask, self.batches = name, dict(size=size), .5, {}, mask, []
    def predict(self, faces, batch_size=32):
        self.batches.append(len(faces))
        assert all(f.shape==(self.config['size'],)*2+(3,) for f in faces)
        return [Prediction(f.mean()/255, np.full((8, 8), .5) if self.mask else None) for f in faces]

def picture(value, h=120, w=120): return np.full((h, w, 3), value, np.uint8)
def scorer(*detectors, **options): return Scorer(list(detectors) or Bright(), finder=Grid(), **options)
def fidelities(files): return [[round(f.verdicts[0].fidelity, 2) for f in file.faces] for file in files]

@pytest.fixture
def album(tmp_path):
    (tmp_path/'album'/'sub').mkdir(parents=True)
    for i in range(12): cv2.imwrite(str(tmp_path/'album'/('sub' if i%2 else '.')/f'{i:02d}.png'), picture(20*i+5))
    return tmp_path/'album'

# -- detectors by name ----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "An untrained DeepFidelity, saved"
    from deepfid.models.deepfidelity.detector import DeepFidelity
    return DeepFidelity(mapping=None, seed=3).configure('tiny').save(tmp_path_factory.mktemp('scoring')/'model')

def test_bundled_detectors_come_from_the_package_only(saved, tmp_path, monkeypatch):
    package = tmp_path/'package'
    shutil.copytree(saved, package/'deepfidelity')
    monkeypatch.setattr(scoring, 'BUNDLED', package)
    monkeypatch.setattr(scoring.bundled, '__defaults__', (package,))
    with pytest.raises(WeightsError, match='SHA256SUMS.*missing'): load('deepfidelity')
    scoring.seal(package/'deepfidelity')
    shutil.copytree(saved, tmp_path/'deepfidelity')      # a folder of that name where we stand must not count
    (tmp_path/'deepfidelity'/'detector.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    assert load('deepfidelity').config['seed']==3 and list(scoring.detectors_of('all'))==['deepfidelity']
    with pytest.raises(WeightsError, match='names the detector None'): load('./deepfidelity')
    for change in (lambda f: (f/'extra.txt').write_text('x'), lambda f: (f/'network.safetensors').unlink(), lambda f: (f/'detector.json').write_text('{}')):
        shutil.rmtree(package/'deepfidelity')
        shutil.copytree(saved, package/'deepfidelity')
        scoring.seal(package/'deepfidelity')
        change(package/'deepfidelity')
        with pytest.raises(WeightsError, match='is not the file that came with deepfid'): load('deepfidelity')

def test_names_that_are_no_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.bundled, '__defaults__', (tmp_path,))
    with pytest.raises(WeightsError, match='no trained weights'): load('lisiam')
    with pytest.raises(WeightsError, match='deepfidelity, local_similarity, lisiam'): load('deepfake2000')
    with pytest.raises(WeightsError, match='detector.json: no such file'): load(tmp_path)
    monkeypatch.setattr(scoring, 'BUNDLED', tmp_path)
    with pytest.raises(WeightsError, match='^all: '): scoring.detectors_of('all')

def test_the_package_gives_load_and_score_without_importing_torch():
    code = 'import sys, deepfid; assert "numpy" not in sys.modules; deepfid.load, deepfid.score; assert "torch" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code]).returncode==0
    assert deepfid.score is score
    with pytest.raises(AttributeError): deepfid.nothing

# -- faces ----------------------------------------------------------------------------------------------------------

def test_photos_arrays_folders_and_lists(album):
    assert fidelities(score(picture(51), Bright(), finder=Grid()))==[[.2]]
    files = score([album, picture(51), [picture(102), str(album/'00.png')]], Bright(), finder=Grid())
    assert [f.kind for f in files]==['photo']*12+['array']*2+['photo']
    assert [f.source for f in files[12:14]]==['array 2', 'array 1']
    assert [f.source for f in files[:12]]==[str(album/f'{i:02d}.png') for i in range(0, 12, 2)]+[str(album/'sub'/f'{i:02d}.png') for i in range(1, 12, 2)]

def test_fifty_faces_largest_first():
    group = np.concatenate([np.concatenate([picture(5*(5*r+c)+5) for c in range(5)], 1) for r in range(10)], 0)
    [file] = score(group, Bright(), finder=Grid())
    assert len(file.faces)==50 and [f.number for f in file.faces]==list(range(1, 51))
    widths = [f.box[2]*f.box[3] for f in file.faces]
    assert widths==sorted(widths, reverse=True)

def test_scores_do_not_depend_on_batches_or_threads(album):
    one = fidelities(score(album, Bright(), finder=Grid(), batch_size=1, workers=1))
    assert one==fidelities(score(album, Bright(), finder=Grid(), batch_size=5, workers=4))==fidelities(score(album, Bright(), finder=Grid()))

def test_several_detectors_each_at_its_own_size():
    [file] = scorer(Bright('a', 64), Bright('a', 96), Bright('b', 112, mask=True)).run(picture(51))
    verdicts = file.faces[0].verdicts
    assert [v.detector for v in verdicts]==['a', 'a#2', 'b'] and set(file.faces[0].pictures)=={'face', 'b'} and verdicts[2].mask.shape==(8, 8)
    assert ScoredFile.from_row(json.loads(json.dumps(file.row()))).faces[0].verdicts[0]==verdicts[0]

def test_faces_are_gathered_into_batches(album):
    detector = Bright()
    list(scorer(detector, batch_size=4).run(album))
    assert detector.batches==[4, 4, 4]

def test_a_stream_holds_only_a_few_files():
    live, most = 0, 0
    def endless():
        nonlocal live, most
        for i in itertools.count(): live, most = live+1, max(most, live+1); yield f'{i}', picture(i%200+5)
    for k, _ in enumerate(scorer(batch_size=8).stream(endless())):
        live -= 1
        if k==300: break
    assert most<40

def test_prefetch_passes_errors_on_and_keeps_order():
    assert list(prefetch(lambda x: time.sleep(.01*(x%3)) or x, range(20), 4))==list(range(20))
    with pytest.raises(ZeroDivisionError): list(prefetch(lambda x: 1//(3-x), range(9), 2))

# -- videos ---------------------------------------------------------------------------------------------------------

def test_a_video_is_the_mean_of_its_frames(tmp_path):
    from deepfid.data.video import write_video
    write_video([picture(20+20*i, 128, 256) for i in range(10)], tmp_path/'clip.mp4')
    [file] = score(tmp_path/'clip.mp4', Bright(), finder=Grid(), frames=5)
    assert file.kind=='video' and len(file.faces)==2 and not file.error
    for face in file.faces:
        [v] = face.verdicts
        assert len(v.frames)==len(face.times)==5 and v.frames==sorted(v.frames) and v.fidelity==pytest.approx(np.mean(v.frames))

def test_videos_that_are_none(tmp_path):
    (tmp_path/'text.mp4').write_text('hello')
    (tmp_path/'empty.mp4').write_bytes(b'')
    files = score([tmp_path/n for n in ('text.mp4', 'empty.mp4', 'gone.mp4')], Bright(), finder=Grid())
    for file, word in zip(files, ('no video', 'empty', 'no such file')): assert word in file.error and file.source in file.error and '\n' not in file.error

# -- bad input ------------------------------------------------------------------------------------------------------

def heavy(path): # 200 megapixels
    import struct, zlib
    chunk = lambda kind, data: struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 20000, 10000, 8, 2, 0, 0, 0))+chunk(b'IDAT', b'')+chunk(b'IEND', b''))

def animate(path): Image.fromarray(picture(51)).save(path, save_all=True, append_images=[Image.fromarray(picture(v)) for v in (90, 130)])

BAD = {'text.jpg': lambda p: p.write_text('hello'), 'empty.jpg': lambda p: p.write_bytes(b''), 'heavy.png': heavy, 'paper.pdf.png': lambda p: p.write_bytes(b'%PDF-1.4'),
       'phone.heic': lambda p: p.write_bytes(b'\0\0\0\x18ftypheic'+bytes(60)), 'loop.jpg': lambda p: p.symlink_to(p), 'black.png': lambda p: cv2.imwrite(str(p), picture(0))}
SAYS = {'text.jpg': 'not a picture', 'empty.jpg': 'empty', 'heavy.png': 'refused before decoding', 'paper.pdf.png': 'PDF', 'phone.heic': 'HEIC', 'loop.jpg': 'link', 'black.png': 'no face'}

@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_one_clear_line_and_the_rest_goes_on(album, name, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None) # as where the plug-in for HEIC is not installed
    BAD[name](album/name)
    files = {f.source: f for f in score(album, Bright(), finder=Grid())}
    bad = files.pop(str(album/name))
    assert SAYS[name] in bad.error and name in bad.error and '\n' not in bad.error and not bad.faces
    assert len(files)==12 and all(f.faces and not f.error for f in files.values())

@pytest.mark.parametrize('ending', ['gif', 'webp', 'png'])
def test_of_an_animation_the_first_frame_is_scored(tmp_path, ending):
    animate(tmp_path/f'm.{ending}')
    [file] = score(tmp_path/f'm.{ending}', Bright(), finder=Grid())
    assert len(file.faces)==1 and abs(file.faces[0].verdicts[0].fidelity-.2)<.02 and '3 frames, of which the first' in file.note

def test_folders(tmp_path, album):
    (tmp_path/'none').mkdir()
    with pytest.raises(ImageError, match='holds no photographs'): score(tmp_path/'none', Bright(), finder=Grid())
    (album/'again').symlink_to(album)
    (album/'.hidden.png').write_bytes(b'x')
    (album/'notes.txt').write_text('x')
    assert len(score(album, Bright(), finder=Grid()))==12

def test_wrong_arrays_and_sources():
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        [file] = score(bad, Bright(), finder=Grid())
        assert 'uint8 (H,W,3)' in file.error
    with pytest.raises(DeepfidError, match='not int'): score(7, Bright(), finder=Grid())

def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DeepfidError, match='cannot be written'): write_report(tmp_path/'file'/'r.html', [])
    with pytest.raises(DeepfidError, match='cannot be written'): ResultsFile(tmp_path/'file'/'r.jsonl', {})

# -- trust ----------------------------------------------------------------------------------------------------------

def test_a_score_or_quality_outside_validation_says_so():
    detector = Bright()
    detector.trust = dict(score_range=[.3, .8], quality_range=[-1000, 0])
    low, fine = [f.faces[0].verdicts[0] for f in score([picture(51), picture(127)], detector, finder=Grid())]
    assert low.doubts and 'below everything seen in validation (0.30 to 0.80)' in low.trust
    detector.trust['quality_range'] = [-2., -1.]
    assert 'poor' in score(picture(127), detector, finder=Grid())[0].faces[0].verdicts[0].trust
    detector.trust = {}
    assert 'unknown' in scoring.trust_sentence([], {})
    assert 'not a proof' in scoring.trust_sentence([], dict(score_range=[0, 1], quality_range=[-9, 0]))
    assert any('either' in d for d in scoring.doubts_about(.5, -5, {}, (8, -4))) and not scoring.doubts_about(.95, -5, {}, (8, -4))

def test_trust_ranges_hold_every_validation_face():
    from deepfid.testing import tiny_manifest
    manifest, detector = tiny_manifest((12, 8, 4)), Bright(size=112)
    ranges, valid = trust_ranges(detector, manifest), manifest.of('valid')
    scores = [p.fidelity for p in detector.predict([valid.image(i) for i in range(len(valid))])]
    assert ranges['score_range']==[min(scores), max(scores)] and ranges['quality_range'][0]<ranges['quality_range'][1]<=0

# -- results that survive -------------------------------------------------------------------------------------------

def test_a_torn_line_is_cut_off_wherever_it_was_torn(tmp_path, album):
    whole = tmp_path/'whole.jsonl'
    list(scorer().run(album, whole))
    content = whole.read_bytes()
    for cut in (0, 5, len(content.split(b'\n')[0]), len(content)//3, len(content)-1):
        part = tmp_path/f'{cut}.jsonl'
        part.write_bytes(content[:cut])
        list(scorer().run(album, part))
        assert sorted(f.source for f in read_results(part))==sorted(f.source for f in read_results(whole)), cut

def test_results_of_something_else_are_left_alone(tmp_path, album):
    for text in ('my only copy', '{"a": 1}\n', 'line\n'):
        (tmp_path/'notes').write_text(text)
        with pytest.raises(DeepfidError, match='no results file'): list(scorer().run(album, tmp_path/'notes'))
        assert (tmp_path/'notes').read_text()==text
    list(scorer().run(album, tmp_path/'r.jsonl'))
    with pytest.raises(DeepfidError, match='other detectors or settings'): list(scorer(Bright('other')).run(album, tmp_path/'r.jsonl'))

def test_a_source_named_twice_is_done_once(tmp_path, album):
    assert len(list(scorer().run([album, album/'00.png', album], tmp_path/'r.jsonl')))==12

def run_cli(*argv, **options):
    return subprocess.Popen([sys.executable, '-m', 'deepfid.cli', *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ|dict(OMP_NUM_THREADS='1'), **options)

def wait_for_lines(path, n, process, seconds=90):
    end = time.time()+seconds
    while time.time()<end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b'\n')>n: return
        time.sleep(.02)
    raise AssertionError(f'{process.poll()} {process.communicate()}')

@pytest.fixture(scope='module')
def many(data, tmp_path_factory):
    "A folder of 100 photographs, two of them bad"
    folder = tmp_path_factory.mktemp('many')
    photos = sorted((data/'london'/'neutral_front').glob('*.jpg'))
    for i in range(100): (folder/f'{i:03d}.jpg').symlink_to(photos[i%len(photos)]) if i%50 else (folder/f'{i:03d}.jpg').write_text('no')
    return folder

def test_killed_runs_lose_and_double_nothing(many, saved, tmp_path):
    results = tmp_path/'run.jsonl'
    for n in (1, 33, 60):
        p = run_cli('score', many, '--model', saved, '--results', results)
        wait_for_lines(results, n, p)
        p.send_signal(signal.SIGKILL)
        p.communicate()
        kept = results.read_bytes()
    p = run_cli('score', many, '--model', saved, '--results', results, '--csv', tmp_path/'run.csv')
    out, err = p.communicate(timeout=120)
    assert p.returncode==1 and 'Traceback' not in err
    sources = [f.source for f in read_results(results)]
    assert sorted(sources)==sorted(str(many/f'{i:03d}.jpg') for i in range(100))
    assert results.read_bytes().startswith(kept[:kept.rindex(b'\n')+1])
    rows = list(csv.DictReader(io.StringIO((tmp_path/'run.csv').read_text())))
    assert {r['source'] for r in rows}==set(sources) and sum(bool(r['error']) for r in rows)==2

def test_ctrl_c_keeps_what_is_done(many, saved, tmp_path):
    results = tmp_path/'run.jsonl'
    p = run_cli('score', many, '--model', saved, '--results', results, '--report', tmp_path/'r.html')
    wait_for_lines(results, 1, p)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode==130 and 'Traceback' not in err and 'interrupted' in err
    done = [f.source for f in read_results(results)]
    assert 1<=len(done)<100 and len(set(done))==len(done) and 'class="card"' in (tmp_path/'r.html').read_text()

def test_memory_does_not_grow_with_the_number_of_files(data, saved, many):
    code = f'''if True:
        import resource, sys, itertools
        from deepfid.inference.scorer import Scorer, items_of
        scorer, peak = Scorer({str(saved)!r}), []
        for k, _ in enumerate(scorer.stream(itertools.chain.from_iterable(itertools.repeat(list(items_of({str(many)!r})), 4)))):
            if k in (100, 390): peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
        print(peak[1]-peak[0])'''
    grown = float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1')).stdout)
    assert grown<40, f'{grown} MiB'

# -- reports --------------------------------------------------------------------------------------------------------

def test_a_report_stands_alone_and_escapes_names(tmp_path, album):
    (album/'<script>alert(1)<').mkdir()
    shutil.copy(album/'00.png', album/'<script>alert(1)<'/'x.png')
    (album/'<b>.jpg').write_text('no')
    score(album, [Bright(), Bright('b', mask=True)], finder=Grid(), report=tmp_path/'r.html')
    page = (tmp_path/'r.html').read_text()
    assert '<script' not in page and '<b>.jpg' not in page and 'src="http' not in page and page.count('class="card"')==13 and 'not a picture' in page
    assert page.index('00.png')<page.index('10.png')

def test_a_long_report_shows_the_most_suspicious_and_says_so(tmp_path):
    write_report(tmp_path/'r.html', scorer().stream((f'{i}.png', picture(i)) for i in range(30, 0, -1)), most=5)
    page = (tmp_path/'r.html').read_text()
    assert page.count('class="card"')==5 and '(5 of 30)' in page and all(f'<b>{i}.png</b>' in page for i in range(1, 6))

def test_without_a_finder_nothing_is_counted_as_done(saved, tmp_path, monkeypatch):
    from deepfid.inference import scorer as scoring
    from deepfid.core import DataMissingError
    def gone(): raise DataMissingError('no finder')
    monkeypatch.setattr(scoring, 'FaceFinder', gone)
    for i in range(3): cv2.imwrite(str(tmp_path/f'{i}.jpg'), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(DataMissingError): list(Scorer(saved).run(tmp_path, tmp_path/'r.jsonl'))
    assert not list(read_results(tmp_path/'r.jsonl'))

def test_a_full_disk_is_one_line(tmp_path):
    class Full:
        def write(self, data): raise OSError(28, 'No space left on device')
        close = flush = lambda self: None
    with pytest.raises(DeepfidError, match='No space left.*goes on from here'):
        with ResultsFile(tmp_path/'r.jsonl', {}) as kept:
            kept.file.close()
            kept.file = Full()
            kept.add(ScoredFile('a'))

@pytest.mark.parametrize('wrong', [dict(workers=0), dict(frames=-1), dict(batch_size=1.5)])
def test_numbers_of_a_scorer(saved, wrong):
    with pytest.raises(DeepfidError, match='whole number from 1'): Scorer(saved, **wrong)
