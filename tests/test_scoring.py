"Scoring: files of every kind, one clear line for each bad one, nothing lost or doubled in an interrupted run"
import csv, io, itertools, json, os, shutil, signal, subprocess, sys, time
import cv2, numpy as np, pytest
from PIL import Image
import deepfid
from deepfid.core import DataMissingError, DeepfidError, Detector, ImageError, Prediction, WeightsError
from deepfid.data.faces import FaceDetection
from deepfid.inference import hub, scorer as scorer_module
from deepfid.inference.decisions import reliability_sentence, score_warnings, validation_ranges
from deepfid.inference.hub import load, load_detectors, write_checksums
from deepfid.inference.report import write_report
from deepfid.inference.results import ResultsFile, ScoredFile, read_results
from deepfid.inference.scorer import Scorer, prefetch, score

POINTS = np.float32([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]])

class GridFinder:
    "Finds a face in every 120 x 120 block of an image that is not black"
    def find(self, image):
        corners = itertools.product(range(0, image.shape[0]-119, 120), range(0, image.shape[1]-119, 120))
        return [FaceDetection(np.float32([x, y, 110+x/1000, 110]), POINTS+np.float32([x, y]), .9)
            for y, x in corners if image[y:y+120, x:x+120].any()]

class Brightness(Detector):
    "Predicts bright faces to be real"
    def __init__(self, name='brightness', size=64, mask=False):
        self.name, self.size, self.config, self.threshold, self.validated_ranges = name, size, dict(size=size), .5, {}
        self.mask, self.batches = mask, []
    def predict(self, faces, batch_size=32):
        self.batches.append(len(faces))
        assert all(f.shape==(self.size,)*2+(3,) for f in faces)
        return [Prediction(f.mean()/255, np.full((8, 8), .5) if self.mask else None) for f in faces]

def grey(value, h=120, w=120): return np.full((h, w, 3), value, np.uint8)
def make_scorer(*detectors, **options): return Scorer(list(detectors) or Brightness(), finder=GridFinder(), **options)
def score_grid(source, *detectors, **options): return list(make_scorer(*detectors, **options).run(source))
def fidelities(files): return [[round(f.scores[0].fidelity, 2) for f in file.faces] for file in files]

@pytest.fixture
def album(tmp_path):
    (tmp_path/'album'/'sub').mkdir(parents=True)
    for i in range(12): cv2.imwrite(str(tmp_path/'album'/('sub' if i%2 else '.')/f'{i:02d}.png'), grey(20*i+5))
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
    monkeypatch.setattr(hub, 'BUNDLED_DIR', package)
    with pytest.raises(WeightsError, match='SHA256SUMS.*missing'): load('deepfidelity')
    write_checksums(package/'deepfidelity')
    shutil.copytree(saved, tmp_path/'deepfidelity')      # a folder of that name in the working directory must not count
    (tmp_path/'deepfidelity'/'detector.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    assert load('deepfidelity').threshold==.5 and list(load_detectors('all'))==['deepfidelity']
    with pytest.raises(DeepfidError, match="detector.json: detector=None: choose one of 'deepfidelity'"): load('./deepfidelity')
    for change in (lambda f: (f/'extra.txt').write_text('x'), lambda f: (f/'network.safetensors').unlink(), lambda f: (f/'detector.json').write_text('{}')):
        shutil.rmtree(package/'deepfidelity')
        shutil.copytree(saved, package/'deepfidelity')
        write_checksums(package/'deepfidelity')
        change(package/'deepfidelity')
        with pytest.raises(WeightsError, match='is missing or was changed'): load('deepfidelity')

def test_names_that_are_no_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'BUNDLED_DIR', tmp_path/'none')
    with pytest.raises(WeightsError, match='no trained weights'): load('lisiam')
    with pytest.raises(WeightsError, match='deepfidelity, lisiam, local_similarity'): load('deepfake2000')
    with pytest.raises(WeightsError, match='detector.json: no such file'): load(tmp_path)
    with pytest.raises(WeightsError, match='^all: no trained weights'): load_detectors('all')

def test_score_imports_nothing_heavy(tmp_path):
    "`import deepfid` imports nothing; a score imports PyTorch, but no training, table, plot or compiler library"
    cv2.imwrite(str(tmp_path/'photo.png'), grey(100, 64, 64))
    code = f'''if True:
        import sys, deepfid
        assert "numpy" not in sys.modules
        deepfid.load, deepfid.score
        assert "torch" not in sys.modules
        import numpy as np
        from deepfid.core import Face
        from deepfid.data.faces import FaceDetection
        class Finder:
            def find(self, image): return [FaceDetection(np.float32([8, 8, 48, 48]), np.float32({POINTS.tolist()})/2, .9)]
        [file] = deepfid.score({str(tmp_path/'photo.png')!r}, finder=Finder())
        assert file.faces[0].scores[0].detector=='deepfidelity'
        heavy = 'fastai pandas matplotlib scipy sklearn IPython torchvision timm torch._dynamo torch._inductor sympy'
        print([m for m in heavy.split() if m in sys.modules])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip()=='[]', done.stdout+done.stderr
    assert deepfid.score is score
    with pytest.raises(AttributeError): deepfid.nothing

# -- faces ----------------------------------------------------------------------------------------------------------

def test_images_arrays_folders_and_lists(album):
    assert fidelities(score(grey(51), Brightness(), finder=GridFinder()))==[[.2]]
    files = score_grid([album, grey(51), [grey(102), str(album/'01.png')], str(album/'00.png')])
    assert [f.kind for f in files]==['image']*12+['array']*2+['image']*2 and 'no such file' in files[14].error
    assert [f.source for f in files[12:14]]==['array 2', 'array 1']
    assert [f.source for f in files[:12]]==[str(album/f'{i:02d}.png') for i in range(0, 12, 2)]+[str(album/'sub'/f'{i:02d}.png') for i in range(1, 12, 2)]

def test_fifty_faces_largest_first():
    group = np.concatenate([np.concatenate([grey(5*(5*r+c)+5) for c in range(5)], 1) for r in range(10)], 0)
    [file] = score_grid(group)
    assert len(file.faces)==50 and [f.number for f in file.faces]==list(range(1, 51))
    areas = [f.box[2]*f.box[3] for f in file.faces]
    assert areas==sorted(areas, reverse=True)

def test_scores_do_not_depend_on_batches_or_threads(album):
    detector = Brightness()
    expected = fidelities(score_grid(album, batch_size=1, workers=1))
    assert expected==fidelities(score_grid(album, detector, batch_size=4, workers=4))==fidelities(score_grid(album))
    assert detector.batches==[4, 4, 4] # faces of several files share a batch

def test_several_detectors_each_at_its_own_size():
    [file] = score_grid(grey(51), Brightness('a', 64), Brightness('a', 96), Brightness('b', 112, mask=True))
    scores = file.faces[0].scores
    assert [s.detector for s in scores]==['a', 'a#2', 'b'] and set(file.faces[0].images)=={'face', 'b'} and scores[2].mask.shape==(8, 8)
    assert ScoredFile.from_dict(json.loads(json.dumps(file.to_dict()))).faces[0].scores[0]==scores[0]

def test_a_stream_holds_only_a_few_files():
    live, most = 0, 0
    def endless():
        nonlocal live, most
        for i in itertools.count(): live, most = live+1, max(most, live+1); yield f'{i}', grey(i%200+5)
    for k, _ in enumerate(make_scorer(batch_size=8).stream(endless())):
        live -= 1
        if k==150: break
    assert most<40

def test_prefetch_raises_errors_and_keeps_order():
    assert list(prefetch(lambda x: time.sleep(.01*(x%3)) or x, range(20), 4))==list(range(20))
    with pytest.raises(ZeroDivisionError): list(prefetch(lambda x: 1//(3-x), range(9), 2))

# -- videos ---------------------------------------------------------------------------------------------------------

def test_a_video_is_the_mean_of_its_frames(tmp_path):
    from deepfid.data.video import write_video
    write_video([grey(20+20*i, 128, 256) for i in range(10)], tmp_path/'clip.mp4')
    [file] = score_grid(tmp_path/'clip.mp4', frames=5)
    assert file.kind=='video' and len(file.faces)==2 and not file.error
    for face in file.faces:
        [s] = face.scores
        assert len(s.frame_fidelities)==len(face.times)==5 and s.frame_fidelities==sorted(s.frame_fidelities)
        assert s.fidelity==pytest.approx(np.mean(s.frame_fidelities))

# -- bad input ------------------------------------------------------------------------------------------------------

def heavy(path): # 200 megapixels
    import struct, zlib
    chunk = lambda kind, data: struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 20000, 10000, 8, 2, 0, 0, 0))+chunk(b'IDAT', b'')+chunk(b'IEND', b''))

BAD = { # name -> (how it is made, what its error says)
    'text.jpg': (lambda p: p.write_text('hello'), 'not a'), 'empty.jpg': (lambda p: p.write_bytes(b''), 'empty'),
    'heavy.png': (heavy, 'refused before decoding'), 'paper.pdf.png': (lambda p: p.write_bytes(b'%PDF-1.4'), 'PDF'),
    'phone.heic': (lambda p: p.write_bytes(b'\0\0\0\x18ftypheic'+bytes(60)), 'HEIC'),
    'loop.jpg': (lambda p: p.symlink_to(p), 'link'), 'black.png': (lambda p: cv2.imwrite(str(p), grey(0)), 'no face'),
    'text.mp4': (lambda p: p.write_text('hello'), 'no video'), 'empty.mp4': (lambda p: p.write_bytes(b''), 'empty')}

def test_a_bad_file_is_one_clear_line_and_the_rest_is_scored(album, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None) # as where the plug-in for HEIC is not installed
    for name, (make, _) in BAD.items(): make(album/name)
    files = {f.source: f for f in score_grid([album, album/'gone.mp4'])}
    for name, (_, expected) in (BAD|{'gone.mp4': (None, 'no such file')}).items():
        bad = files.pop(str(album/name))
        assert expected in bad.error and name in bad.error and '\n' not in bad.error and not bad.faces, name
    assert len(files)==12 and all(f.faces and not f.error for f in files.values())

@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png'])
def test_of_an_animation_the_first_frame_is_scored(tmp_path, suffix):
    frames = [Image.fromarray(grey(v)) for v in (51, 90, 130)]
    frames[0].save(tmp_path/f'm.{suffix}', save_all=True, append_images=frames[1:])
    [file] = score_grid(tmp_path/f'm.{suffix}')
    assert len(file.faces)==1 and abs(file.faces[0].scores[0].fidelity-.2)<.02 and '3 frames, of which the first' in file.note

def test_folders(tmp_path, album):
    (tmp_path/'none').mkdir()
    with pytest.raises(ImageError, match='contains no images'): score_grid(tmp_path/'none')
    (album/'again').symlink_to(album)
    (album/'.hidden.png').write_bytes(b'x')
    (album/'notes.txt').write_text('x')
    assert len(score_grid(album))==12

def test_wrong_arrays_and_sources():
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        [file] = score_grid(bad)
        assert 'uint8' in file.error and '(H,W,3)' in file.error
    with pytest.raises(DeepfidError, match='not int'): score_grid(7)

def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DeepfidError, match='cannot be written'): write_report(tmp_path/'file'/'r.html', [])
    with pytest.raises(DeepfidError, match='cannot be written'): ResultsFile(tmp_path/'file'/'r.jsonl', {})

# -- warnings -------------------------------------------------------------------------------------------------------

def test_warnings_outside_the_validation_ranges():
    detector = Brightness()
    detector.validated_ranges = dict(score_range=[.3, .8], quality_range=[-1000, 0])
    low, inside = [f.faces[0].scores[0] for f in score_grid([grey(51), grey(127)], detector)]
    assert low.warnings and 'below everything seen in validation (0.30 to 0.80)' in low.reliability
    assert inside.warnings==['the face is blurred'] and 'not a proof' in reliability_sentence([], detector.validated_ranges)
    detector.validated_ranges['quality_range'] = [-2., -1.]
    assert 'quality is lower' in score_grid(grey(127), detector)[0].faces[0].scores[0].reliability
    assert 'unknown' in reliability_sentence([], {})
    assert any('either' in w for w in score_warnings(.5, -5, {}, (8, -4))) and not score_warnings(.95, -5, {}, (8, -4))

def test_validation_ranges_hold_every_validation_face():
    from deepfid.testing import tiny_manifest
    manifest, detector = tiny_manifest((12, 8, 4)), Brightness(size=112)
    ranges, valid = validation_ranges(detector, manifest), manifest.of('valid')
    scores = [p.fidelity for p in detector.predict([valid.image(i) for i in range(len(valid))])]
    assert ranges['score_range']==[min(scores), max(scores)] and ranges['quality_range'][0]<ranges['quality_range'][1]<=0

# -- resumable results ----------------------------------------------------------------------------------------------

def test_an_incomplete_line_is_cut_off_wherever_it_ends(tmp_path, album):
    whole = tmp_path/'whole.jsonl'
    list(make_scorer().run([album, album/'00.png', album], whole)) # each source once
    content = whole.read_bytes()
    assert len(list(read_results(whole)))==12
    for end in (0, 5, len(content.split(b'\n')[0]), len(content)//3, len(content)-1):
        part = tmp_path/f'{end}.jsonl'
        part.write_bytes(content[:end])
        list(make_scorer().run(album, part))
        assert sorted(f.source for f in read_results(part))==sorted(f.source for f in read_results(whole)), end

def test_results_of_something_else_are_left_alone(tmp_path):
    for text in ('my only copy', '{"a": 1}\n', 'line\n'):
        (tmp_path/'notes').write_text(text)
        with pytest.raises(DeepfidError, match='no results file'): list(make_scorer().run(grey(51), tmp_path/'notes'))
        assert (tmp_path/'notes').read_text()==text
    list(make_scorer().run(grey(51), tmp_path/'r.jsonl'))
    with pytest.raises(DeepfidError, match='other detectors or settings'): list(make_scorer(Brightness('other')).run(grey(51), tmp_path/'r.jsonl'))

def run_cli(*argv):
    return subprocess.Popen([sys.executable, '-m', 'deepfid.cli', *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ|dict(OMP_NUM_THREADS='1'))

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

def test_killed_and_interrupted_runs_lose_and_double_nothing(many, saved, tmp_path):
    results = tmp_path/'run.jsonl'
    for n, stop in ((1, signal.SIGINT), (33, signal.SIGKILL)):
        p = run_cli('score', many, '--model', saved, '--results', results, '--report', tmp_path/'r.html')
        wait_for_lines(results, n, p)
        p.send_signal(stop)
        _, err = p.communicate(timeout=60)
        if stop==signal.SIGINT:
            assert p.returncode==130 and 'Traceback' not in err and 'interrupted' in err
            finished = [f.source for f in read_results(results)]
            assert 1<=len(finished)<100 and len(set(finished))==len(finished) and 'class="card"' in (tmp_path/'r.html').read_text()
        kept = results.read_bytes()
    p = run_cli('score', many, '--model', saved, '--results', results, '--csv', tmp_path/'run.csv')
    _, err = p.communicate(timeout=120)
    assert p.returncode==1 and 'Traceback' not in err
    sources = [f.source for f in read_results(results)]
    assert sorted(sources)==sorted(str(many/f'{i:03d}.jpg') for i in range(100))
    assert results.read_bytes().startswith(kept[:kept.rindex(b'\n')+1])
    rows = list(csv.DictReader(io.StringIO((tmp_path/'run.csv').read_text())))
    assert {r['source'] for r in rows}==set(sources) and sum(bool(r['error']) for r in rows)==2

def test_memory_does_not_grow_with_the_number_of_files(saved, many):
    code = f'''if True:
        import resource, itertools
        from deepfid.inference.scorer import Scorer, iter_sources
        scorer, peak = Scorer({str(saved)!r}), []
        for k, _ in enumerate(scorer.stream(itertools.chain.from_iterable(itertools.repeat(list(iter_sources({str(many)!r})), 2)))):
            if k in (60, 150): peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
        print(peak[1]-peak[0])'''
    grown = float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1')).stdout)
    assert grown<40, f'{grown} MiB'

# -- reports --------------------------------------------------------------------------------------------------------

def test_a_report_stands_alone_and_escapes_names(tmp_path, album):
    (album/'<script>alert(1)<').mkdir()
    shutil.copy(album/'00.png', album/'<script>alert(1)<'/'x.png')
    (album/'<b>.jpg').write_text('no')
    score(album, [Brightness(), Brightness('b', mask=True)], finder=GridFinder(), report=tmp_path/'r.html')
    page = (tmp_path/'r.html').read_text()
    assert '<script' not in page and '<b>.jpg' not in page and 'src="http' not in page and page.count('class="card"')==13 and '.jpg: is not a' in page
    assert page.index('00.png')<page.index('10.png')

def test_a_long_report_shows_the_most_suspicious_and_states_how_many(tmp_path):
    write_report(tmp_path/'r.html', make_scorer().stream((f'{i}.png', grey(i)) for i in range(30, 0, -1)), max_faces=5)
    page = (tmp_path/'r.html').read_text()
    assert page.count('class="card"')==5 and '(5 of 30)' in page and all(f'<b>{i}.png</b>' in page for i in range(1, 6))

def test_without_a_face_finder_nothing_counts_as_finished(saved, tmp_path, monkeypatch):
    def missing(): raise DataMissingError('no finder')
    monkeypatch.setattr(scorer_module, 'FaceFinder', missing)
    for i in range(3): cv2.imwrite(str(tmp_path/f'{i}.jpg'), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(DataMissingError): list(Scorer(saved).run(tmp_path, tmp_path/'r.jsonl'))
    assert not list(read_results(tmp_path/'r.jsonl'))

def test_a_full_disk_is_one_line(tmp_path):
    class Full:
        def write(self, data): raise OSError(28, 'No space left on device')
        close = flush = lambda self: None
    with pytest.raises(DeepfidError, match='No space left.*resumes from here'):
        with ResultsFile(tmp_path/'r.jsonl', {}) as kept:
            kept._file.close()
            kept._file = Full()
            kept.append(ScoredFile('a'))

@pytest.mark.parametrize('wrong', [dict(workers=0), dict(frames=-1), dict(batch_size=1.5)])
def test_numbers_of_a_scorer(wrong):
    with pytest.raises(DeepfidError, match='whole number from 1'): Scorer(Brightness(), **wrong)
