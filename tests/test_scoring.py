"Scoring: files of every kind, one clear line for each bad one, nothing lost or doubled in an interrupted run"
import csv, io, itertools, json, os, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from fractions import Fraction
import cv2, numpy as np, pytest
from PIL import Image
import deepfid
from deepfid.core import DataMissingError, DeepfidError, Detector, Prediction, WeightsError
from deepfid.data.faces import FaceDetection, face_crop_matrix, warp_crop
from deepfid.inference import hub, scorer as scorer_module
from deepfid.inference.decisions import BLIND_SPOT, DECISIONS, calibrated_rule, reliability_sentence, score_warnings, validation_ranges
from deepfid.inference.hub import load, load_detectors, write_checksums
from deepfid.inference.report import write_report
from deepfid.inference.results import ResultsFile, ScoredFile, read_results
from deepfid.inference.scorer import Scorer, prefetch, score, score_stream

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

@pytest.fixture(scope='module')
def trained():
    "A DeepFidelity after one epoch on a few faces"
    from deepfid.models.deepfidelity.detector import DeepFidelity
    from deepfid.testing import tiny_manifest
    return DeepFidelity(epochs=1).fit(tiny_manifest((40, 20, 20)), 'tiny')

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
        with pytest.raises(WeightsError, match='is missing, new or changed'): load('deepfidelity')

def test_a_copy_of_a_bundled_detector_is_checked_too(tmp_path):
    "By its checksums where it has them, and for settings that are gone, which would not be those it was trained with"
    def change(edit):
        about = json.loads((tmp_path/'copy'/'detector.json').read_text())
        edit(about)
        (tmp_path/'copy'/'detector.json').write_text(json.dumps(about))
    shutil.copytree(hub.BUNDLED_DIR/'lisiam', tmp_path/'copy')
    assert load(tmp_path/'copy').size==load('lisiam').size
    change(lambda about: about['config'].pop('size'))
    with pytest.raises(WeightsError, match='changed .* copy the folder again'): load(tmp_path/'copy')
    (tmp_path/'copy'/'SHA256SUMS').unlink()
    with pytest.raises(WeightsError, match="has no setting 'size'"): load(tmp_path/'copy')
    change(lambda about: about['config'].update(size=224))
    change(lambda about: about.update(threshold=1e20))
    with pytest.raises(WeightsError, match='threshold=1e.20 is not what'): load(tmp_path/'copy')

def test_scores_of_other_weights_are_not_given_back(tmp_path):
    "Two detectors of one name, with the same thresholds: a results file knows them by the digests of their files"
    from deepfid.models.deepfidelity.detector import DeepFidelity
    for seed in (1, 2): DeepFidelity(mapping=None, seed=seed).configure('tiny').save(tmp_path/f'd{seed}')
    settings = []
    for seed in (1, 1, 2):
        shutil.rmtree(tmp_path/'det', ignore_errors=True)
        shutil.copytree(tmp_path/f'd{seed}', tmp_path/'det')
        settings.append(Scorer(str(tmp_path/'det')).settings())
    assert settings[0]==settings[1]!=settings[2]

def test_a_file_that_only_begins_like_results_is_left_alone(tmp_path):
    for text in ('{"deepfid": "my thesis in one line"}', '{"deepfid": {"detector":"lisiam"},"settings":{"a":1}}', '{"deepfid": "0.2.0", "notes": 1}\n', '{"deepf'):
        (tmp_path/'t.json').write_text(text)
        if text=='{"deepf': ResultsFile(tmp_path/'t.json', dict(frames=3)).__exit__(None, None, None); continue # what a killed run leaves
        with pytest.raises(DeepfidError, match='is no results file'): ResultsFile(tmp_path/'t.json', dict(frames=3))
        assert (tmp_path/'t.json').read_text()==text

def test_a_last_row_without_its_end_of_line_is_kept(tmp_path):
    with ResultsFile(tmp_path/'r.jsonl', dict(frames=3)) as kept:
        for i in (1, 2): kept.append(ScoredFile(f'{i}.jpg', error=f'{i}.jpg: no face', sha256=str(i)*64))
    whole = (tmp_path/'r.jsonl').read_bytes()
    for cut, rows in ((1, 2), (9, 1)):
        (tmp_path/'r.jsonl').write_bytes(whole[:-cut])
        with ResultsFile(tmp_path/'r.jsonl', dict(frames=3)) as kept: assert [f'{i}'*64 in kept for i in (1, 2)]==[True, rows==2]
        assert len([*read_results(tmp_path/'r.jsonl')])==rows and (tmp_path/'r.jsonl').read_bytes().endswith(b'\n')

def test_names_that_are_no_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'BUNDLED_DIR', tmp_path/'none')
    with pytest.raises(WeightsError, match='no trained weights'): load('lisiam')
    with pytest.raises(WeightsError, match='deepfidelity, lisiam, local_similarity'): load('deepfake2000')
    with pytest.raises(WeightsError, match='detector.json: no such file'): load(tmp_path)
    with pytest.raises(WeightsError, match='^all: no trained weights'): load_detectors('all')

@pytest.mark.parametrize('detector', ['deepfidelity', 'lisiam', 'local_similarity', str(Path(__file__).parent/'golden'/'detectors'/'deepfidelity')])
def test_score_imports_nothing_heavy(tmp_path, detector):
    """`import deepfid` imports nothing; a score imports PyTorch, but no training, table or plot library, and none of
    timm and of what timm imports (a compiler among it)"""
    cv2.imwrite(str(tmp_path/'photo.png'), grey(100, 64, 64))
    code = f'''if True:
        import sys, deepfid
        assert "numpy" not in sys.modules
        deepfid.load, deepfid.score
        assert "torch" not in sys.modules
        import numpy as np
        from deepfid.core import Face
        from deepfid.data.faces import FaceDetection, face_crop_matrix, warp_crop
        class Finder:
            def find(self, image): return [FaceDetection(np.float32([8, 8, 48, 48]), np.float32({POINTS.tolist()})/2, .9)]
        [file] = deepfid.score({str(tmp_path/'photo.png')!r}, {detector!r}, finder=Finder())
        assert file.faces[0].scores
        heavy = 'fastai pandas matplotlib scipy sklearn IPython torchvision timm torch._dynamo torch._inductor sympy'
        print([m for m in heavy.split() if m in sys.modules])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip()=='[]', done.stdout+done.stderr
    assert deepfid.score is score
    with pytest.raises(AttributeError): getattr(deepfid, 'nothing') # noqa: B009

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

def test_each_face_is_cropped_by_the_rule_of_its_detector():
    class Recorder(Brightness):
        def predict(self, faces, batch_size=32):
            self.seen = list(faces)
            return super().predict(faces, batch_size)
    plain, box, twin = (Recorder(n, 64) for n in 'abc') # of a plug-in that says nothing the faces are as they always were
    box.crop_rule, twin.crop_rule = ('box', 1.), ('box', 1.)
    image = np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8)
    scorer = make_scorer(plain, box, twin)
    _, [crop] = scorer.read_file(('x', image))
    assert set(crop.crops)=={(64, 'similarity', 1.3), (64, 'box', 1.), (112, 'similarity', 1.3)} # one crop for both of them
    list(scorer.run(image))
    [detection] = GridFinder().find(image)
    for d, (align, margin) in ((plain, ('similarity', 1.3)), (box, ('box', 1.)), (twin, ('box', 1.))):
        assert np.array_equal(d.seen[0], warp_crop(image, face_crop_matrix(detection, 64, margin, align), 64))
    assert not np.array_equal(plain.seen[0], box.seen[0])

def test_a_detector_keeps_the_crop_rule_of_its_faces(saved, tmp_path):
    from deepfid.models.deepfidelity.detector import DeepFidelity
    from deepfid.testing import tiny_manifest
    assert load(saved).crop_rule==('symmetric', 1.3)
    about = json.loads((saved/'detector.json').read_text())
    for key in ('crop_align', 'crop_margin'): del about['config'][key] # as detectors of earlier versions are
    shutil.copytree(saved, tmp_path/'old')
    (tmp_path/'old'/'detector.json').write_text(json.dumps({k: v for k, v in about.items() if k!='version'}))
    assert load(tmp_path/'old').crop_rule==('similarity', 1.3)
    own = DeepFidelity(mapping=None, crop_align='box', crop_margin=1.5).configure('tiny')
    assert own.crop_rule==('box', 1.5)==load(own.save(tmp_path/'own')).crop_rule
    manifest = tiny_manifest((12, 8, 4))
    manifest = type(manifest)(manifest.table, tmp_path, 'these faces')
    (tmp_path/'crop_config.json').write_text('{"align": "box", "margin": 1.4}')
    adopted = DeepFidelity(mapping=None).configure('tiny')
    adopted.adopt_crop_rule(manifest)
    assert adopted.crop_rule==('box', 1.4)==(adopted.config.crop_align, adopted.config.crop_margin)
    with pytest.warns(UserWarning, match="these faces: its faces were cropped by .'box', 1.4., and this detector is told"): own.adopt_crop_rule(manifest)
    assert own.crop_rule==('box', 1.5)

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

def test_a_video_is_the_mean_of_its_frames(tmp_path, monkeypatch):
    monkeypatch.setattr('deepfid.quality.serfiq.embed_faces', lambda image, found: np.ones((len(found), 2))) # grey squares are no people
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

def test_two_people_who_change_sides_in_a_video_are_two_faces(tmp_path):
    "The scorer tells people from each other by the packaged embedder; by position alone it would mix them"
    from deepfid.data.faces import FaceFinder
    from deepfid.data.video import synthetic_clip, write_video
    people, frames = [synthetic_clip(p, .32, size=160, seed=s, glasses=False) for p, s in ((3, 1), (5, 6))], []
    for i in range(8):
        image = np.tile(np.linspace(60, 180, 480)[None, :, None], (240, 1, 3)).astype(np.uint8)
        for k, x in ((0, 40), (1, 240)) if i<4 else ((0, 240), (1, 40)): image[40:200, x:x+160] = people[k][i].image
        frames.append(image)
    scorer = Scorer(Brightness(), finder=FaceFinder(), frames=8)
    crops = scorer.read_video(ScoredFile('v', 'video'), write_video(frames, tmp_path/'v.mp4'))
    sides = {tuple(bool(box[0]>190) for box, *_ in c.detections) for c in crops}
    assert sides=={(False,)*4+(True,)*4, (True,)*4+(False,)*4}

def test_a_bad_file_is_one_clear_line_and_the_rest_is_scored(album, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None) # as where the plug-in for HEIC is not installed
    for name, (make, _) in BAD.items(): make(album/name)
    files = {f.source: f for f in score_grid([album, album/'gone.mp4'])}
    for name, (_, expected) in (BAD|{'gone.mp4': (None, 'no such file')}).items():
        bad = files.pop(str(album/name))
        assert expected in bad.error and name in bad.error and '\n' not in bad.error and not bad.faces, name
    assert len(files)==12 and all(f.faces and not f.error for f in files.values())

def test_a_pipe_is_never_waited_for(album):
    for name in ('a.jpg', 'b.mp4', 'c.csv'): os.mkfifo(album/name)
    scored = []
    thread = threading.Thread(target=lambda: scored.extend(score_grid(album)), daemon=True)
    thread.start()
    thread.join(300)
    found = {os.path.basename(f.source): f.error for f in scored}
    assert len(found)==14 and all('is not a regular file' in found[n] for n in ('a.jpg', 'b.mp4'))

@pytest.mark.parametrize('text, encoding', [('file\na.png\n', 'utf-8'), ('', 'utf-8'), ('path;x\na.png;1\n', 'utf-8'), ('path\ncaf\xe9.png\n', 'latin-1'), ('path\n', 'utf-8'),
    ('path\na.png\n', 'utf-16')])
def test_a_table_without_images_says_what_a_table_needs(tmp_path, text, encoding):
    cv2.imwrite(str(tmp_path/'a.png'), grey(45))
    (tmp_path/'t.csv').write_text(text, encoding=encoding)
    bad, good = score_grid([tmp_path/'t.csv', tmp_path/'a.png'])
    assert bad.error.startswith(f"{tmp_path/'t.csv'}: ") and good.faces # what is wrong with each is in the tests of the command line

def test_tables_as_spreadsheets_write_them(tmp_path):
    cv2.imwrite(str(tmp_path/'é.png'), grey(45))
    (tmp_path/'t.csv').write_text('path,x\r\né.png,1\r\nno\0such.png,2\r\n', encoding='utf-8-sig')
    good, bad = score_grid(tmp_path/'t.csv')
    assert good.faces and not good.error and 'cannot be scored' in bad.error

@pytest.mark.parametrize('error', [TypeError('x'), IndexError(), EOFError('end\nof file'), MemoryError(), ZeroDivisionError()])
def test_whatever_a_file_raises_becomes_its_line(album, error, tmp_path):
    "In the face finder (as a decoder would) and in the detector"
    class Picky(GridFinder):
        def find(self, image):
            if image.mean()==45: raise error
            return super().find(image)
    class Choosy(Brightness):
        def predict(self, faces, batch_size=32):
            if any(f.mean()==65 for f in faces): raise error
            return super().predict(faces, batch_size)
    files = {os.path.basename(f.source): f for f in deepfid.score_stream(album, Choosy(), finder=Picky(), results=tmp_path/'r.jsonl')}
    for name in ('02.png', '03.png'):
        bad = files.pop(name)
        assert name in bad.error and '\n' not in bad.error and not bad.faces
    assert len(files)==10 and all(f.faces[0].scores[0].fidelity and not f.error for f in files.values())

def test_files_are_yielded_as_they_are_done(album):
    detector = Brightness()
    stream = deepfid.score_stream(album, detector, finder=GridFinder(), batch_size=2)
    next(stream)
    assert len(detector.batches)==1
    class Interrupted(GridFinder):
        def find(self, image): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): list(deepfid.score_stream(album, Brightness(), finder=Interrupted()))

def test_folders_are_listed_by_content(tmp_path, album):
    from deepfid.data.video import write_video
    from deepfid.inference.scorer import iter_sources
    for name in ('a.jfif', 'b.jpe', 'c', 'd.JPG.part'): Image.fromarray(grey(51)).save(album/name, 'JPEG')
    write_video(np.random.default_rng(0).integers(60, 200, (25, 120, 120, 3), np.uint8), tmp_path/'v.mp4')
    import av
    from av.video.frame import PictureType
    for name, form in (('v.3gp', 'mp4'), ('v.ts', 'mpegts'), ('v.mts', 'mpegts'), ('v.bin', 'matroska'), ('v.flv2', 'flv'), ('v.vob', 'mpeg')):
        with av.open(str(tmp_path/'v.mp4')) as i, av.open(str(album/name), 'w', format=form) as o:
            stream = o.add_stream('mpeg1video' if form=='mpeg' else 'libx264', rate=25)
            stream.width, stream.height, stream.pix_fmt = 120, 120, 'yuv420p'
            for k, frame in enumerate(i.decode(video=0)):
                frame.pts, frame.time_base, frame.pict_type = k, Fraction(1, 25), PictureType.NONE
                o.mux(stream.encode(frame))
            o.mux(stream.encode(None))
    for name, content in (('notes.txt', b'hello'), ('x.ts', b'const x = 1'), ('table.csv', b'a,b'), ('P3.md', b'P3 is a format'), ('BMW.txt', b'BMW'), ('none', b'')):
        (album/name).write_bytes(content)
    os.mkfifo(album/'pipe')
    passed = []
    found = [os.path.basename(n) for n, _ in iter_sources(album, passed.append) if not n.endswith('.png')]
    assert sorted(found)==['a.jfif', 'b.jpe', 'c', 'd.JPG.part', 'v.3gp', 'v.bin', 'v.flv2', 'v.mts', 'v.ts', 'v.vob']
    assert len(passed)==7
    files = {os.path.basename(f.source): f for f in score_grid(album, frames=2)}
    assert all(files[n].kind=='video' and files[n].faces for n in ('v.3gp', 'v.ts', 'v.mts', 'v.bin', 'v.vob')), str([(n, f.error, f.kind, len(f.faces)) for n, f in files.items() if n.startswith('v')])
    assert files['a.jfif'].kind=='image' and files['a.jfif'].faces

@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'avif', 'tiff'])
def test_of_an_animation_the_first_frame_is_scored(tmp_path, suffix):
    frames = [Image.fromarray(grey(v)) for v in (51, 90, 130)]
    frames[0].save(tmp_path/f'm.{suffix}', save_all=True, append_images=frames[1:])
    [file] = score_grid(tmp_path/f'm.{suffix}')
    assert len(file.faces)==1 and abs(file.faces[0].scores[0].fidelity-.2)<.02 and f"3 {'pages' if suffix=='tiff' else 'frames'}, of which only the first" in file.note

@pytest.mark.parametrize('name', ['=HYPERLINK(1)', '+1-2', '-a', '@sum', '\tx'])
def test_no_cell_of_a_table_is_a_formula(tmp_path, name):
    "A name that a spreadsheet would compute has an apostrophe before it, in every table, and comes back without it"
    import pandas as pd
    from deepfid.data.manifest import Manifest, csv_text, read_manifest_csv
    from deepfid.inference.results import write_csv
    write_csv(tmp_path/'scores.csv', [ScoredFile(name, 'image', error=f'{name}: no face found')])
    [row] = csv.DictReader((tmp_path/'scores.csv').open(newline=''))
    assert row['source']==f"'{name}" and row['error'].startswith(f"'{name}")
    cv2.imwrite(str(tmp_path/'0.png'), grey(9))
    table = pd.DataFrame([dict(path=f'{name}.png', label=1, identity=name, split='test', video=f'{name}.mp4')])
    (tmp_path/'0.png').rename(tmp_path/f'{name}.png')
    written = Manifest(table, tmp_path).save()
    [row] = csv.DictReader(written.open(newline=''))
    assert all(row[c].startswith(f"'{name}") for c in ('path', 'identity', 'video')) and (row['frame'], row['seed'])==('-1', '-1')
    back = Manifest.read(written).table.iloc[0]
    assert (back['path'], back['identity'], back['video'])==(f'{name}.png', name, f'{name}.mp4')
    assert csv_text(read_manifest_csv(written))==written.read_text() # as deepfid quality writes it
    assert [f.path for f in score_grid(written)]==[str(tmp_path/f'{name}.png')]

def test_folders(tmp_path, album):
    (tmp_path/'none').mkdir()
    good, empty = score_grid([album/'00.png', tmp_path/'none'])
    assert good.faces and not good.error and 'none: contains no images' in empty.error
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

def test_error_rates_cannot_be_chosen_without_validation_scores(tmp_path):
    folder = shutil.copytree(Path(__file__).parent/'golden'/'detectors'/'deepfidelity', tmp_path/'d')
    assert not load(folder).validation_scores # of version 0.1
    with pytest.raises(DeepfidError, match='keeps no scores of validation faces'): load(folder, false_alarms=.01)

def test_what_file_managers_leave_in_a_folder_is_no_change(tmp_path):
    folder = shutil.copytree(hub.BUNDLED_DIR/'lisiam', tmp_path/'d')
    for name in ('.DS_Store', 'Thumbs.db', 'desktop.ini'): (folder/name).write_bytes(b'x')
    hub.verify_checksums(folder)
    (folder/'more.json').write_bytes(b'{}')
    with pytest.raises(WeightsError, match='more.json: is missing, new or changed'): hub.verify_checksums(folder)

def test_warnings_outside_the_validation_ranges():
    detector = Brightness()
    detector.validated_ranges = dict(score_range=[.3, .8], quality_range=[-1000, 0])
    low, inside = [f.faces[0].scores[0] for f in score_grid([grey(51), grey(127)], detector)]
    assert low.warnings and 'below everything seen in validation (0.30 to 0.80)' in low.reliability
    assert inside.warnings==['the face is blurred'] and 'not a proof' in reliability_sentence([], detector.validated_ranges)
    detector.validated_ranges['quality_range'] = [-2., -1.]
    assert 'quality is lower' in score_grid(grey(127), detector)[0].faces[0].scores[0].reliability
    assert 'unknown' in reliability_sentence([], {})
    assert any('two thresholds' in w for w in score_warnings(.5, -5, {}, calibrated_rule((8, -4)))) and not score_warnings(.95, -5, {}, calibrated_rule((8, -4)))

def test_validation_ranges_hold_every_validation_face():
    from deepfid.testing import tiny_manifest
    manifest, detector = tiny_manifest((12, 8, 4)), Brightness(size=112)
    ranges, valid = validation_ranges(detector, manifest), manifest.of('valid')
    scores = [p.fidelity for p in detector.predict([valid.image(i) for i in range(len(valid))])]
    assert ranges['score_range']==[min(scores), max(scores)] and ranges['quality_range'][0]<ranges['quality_range'][1]<=0

# -- decisions ------------------------------------------------------------------------------------------------------

def calibrated(real, fake, name='brightness', mask=False):
    "A detector with scores of validation"
    detector = Brightness(name, mask=mask)
    detector.calibrate_on_scores([*real, *fake], [1]*len(real)+[0]*len(fake))
    return detector

REAL_SCORES, FAKE_SCORES = np.linspace(.4, .9, 99), np.linspace(.1, .6, 99)

def test_three_decisions_by_two_thresholds(tmp_path):
    detector = calibrated(REAL_SCORES, FAKE_SCORES)
    scorer = make_scorer(detector)
    rule = scorer.rules['brightness']
    assert rule.low==pytest.approx(REAL_SCORES[4], abs=1e-5) and rule.high==pytest.approx(FAKE_SCORES[-20], abs=1e-5) # ranks 5 and 20 of 100
    assert rule.false_alarms==4/99 and rule.misses==19/99 and .8<rule.coverage<.85
    scores = [f.faces[0].scores[0] for f in scorer.run([grey(60), grey(118), grey(200)])]
    assert [s.decision for s in scores]==[DECISIONS[0], DECISIONS[2], DECISIONS[1]]==['manipulated', 'undecided', 'no manipulation found']
    assert scores[0].probability>.9>.1>scores[2].probability and 'between the two thresholds' in scores[1].reliability
    assert all('4 % of real faces manipulated (false alarms)' in s.error_rates and '19 % of fakes like those of its training (misses)' in s.error_rates for s in scores)
    strict, loose = (make_scorer(detector, **o).rules['brightness'] for o in (dict(false_alarms=.01, misses=.02), dict(false_alarms=.3, misses=.3)))
    assert strict.low<rule.low<loose.low==loose.high and strict.high>rule.high and strict.coverage<rule.coverage<loose.coverage==1
    [one] = score_grid(grey(118), detector, threshold=.4)
    assert one.faces[0].scores[0].decision=='no manipulation found' and one.faces[0].scores[0].ends==(.4, .4)
    results = tmp_path/'r.jsonl' # scores by other rates are not continued
    list(make_scorer(detector).run(grey(60), results))
    with pytest.raises(DeepfidError, match='other detectors or settings'): list(make_scorer(detector, misses=.02).run(grey(60), results))

def test_rates_that_validation_is_too_small_for_are_named():
    detector = calibrated(np.linspace(.7, .9, 9), np.linspace(.1, .4, 30))
    [file] = score_grid(grey(20), detector)
    assert 'The false alarm rate is kept to 10 %, not to 5 %: validation has 9 people with real faces' in file.faces[0].scores[0].error_rates
    [close] = score_grid(grey(20), calibrated(np.linspace(.7, .9, 18), np.linspace(.1, .4, 30)))
    assert 'is kept to 5.26 %, not to 5 %' in close.faces[0].scores[0].error_rates
    with pytest.raises(DeepfidError, match='frames: give the options to the Scorer itself'): list(score_stream(grey(20), make_scorer(detector), frames=8))
    with pytest.raises(DeepfidError, match='brightness: keeps no scores of validation faces, so that error rates cannot be chosen'): make_scorer(misses=.1)
    with pytest.raises(DeepfidError, match='misses=1.5: give a number above 0 below 1'): make_scorer(detector, misses=1.5)

def test_test_rates_hold_only_for_their_own_thresholds():
    detector = calibrated(REAL_SCORES, FAKE_SCORES)
    detector.measured_rates = dict(false_alarms=.07, misses=.33)
    def rates(**options): return score_grid(grey(20), detector, **options)[0].faces[0].scores[0]
    assert 'not trained on, it called 7 % ' in rates().error_rates and (rates().false_alarms, rates().misses)==(.07, .33)
    for changed in (dict(misses=.19), dict(threshold=.5)):
        assert rates(**changed).error_rates.startswith('In validation') and rates(**changed).false_alarms!=.07

def test_a_saved_detector_keeps_its_scores_of_validation(tmp_path, trained):
    from deepfid.models.deepfidelity.detector import DeepFidelity
    detector = trained
    people = set(detector.validation_scores)
    assert people=={'real', 'fake'} and all(v==sorted(v) and len(v)>1 for v in detector.validation_scores.values())
    detector.save(tmp_path/'m')
    again = load(tmp_path/'m', misses=.3)
    assert again.validation_scores==detector.validation_scores and (again.false_alarms, again.misses)==(.05, .3)
    assert DeepFidelity.load(tmp_path/'m').misses==.2
    about = json.loads((tmp_path/'m'/'detector.json').read_text())
    for key, wrong in dict(validation_scores=[{'real': [], 'fake': [1]}, {'real': [1]}, [1]], decision_rates=[[0, .2], [.1], 'x']).items():
        for value in wrong:
            (tmp_path/'m'/'detector.json').write_text(json.dumps(about|{key: value}))
            with pytest.raises(WeightsError, match=f'detector.json: {key}='): load(tmp_path/'m')
    for key in ('validation_scores', 'decision_rates'): about.pop(key)
    (tmp_path/'m'/'detector.json').write_text(json.dumps(about))
    assert load(tmp_path/'m').validation_scores is None # as detectors of earlier versions

def test_every_output_says_what_is_wrong_how_often_and_what_is_never_seen(tmp_path):
    from deepfid.inference.results import write_csv
    files = score([grey(60), grey(200)], calibrated(REAL_SCORES, FAKE_SCORES), finder=GridFinder(), report=tmp_path/'r.html')
    page, rows = (tmp_path/'r.html').read_text(), [f.to_dict() for f in files]
    write_csv(tmp_path/'r.csv', files)
    table = list(csv.DictReader(open(tmp_path/'r.csv')))
    assert BLIND_SPOT in page and all(r['limits']==BLIND_SPOT for r in rows) and page.count('(false alarms)')==2
    for row, line, decision in zip(rows, table, ('manipulated', 'no manipulation found')):
        [s] = row['faces'][0]['scores']
        assert s['decision']==line['decision']==decision and f': {decision}</b>' in page and 'prediction' not in s
        for key in ('false_alarms', 'misses', 'probability', 'low', 'high'): assert 0<=s[key]==float(line[key])<=1
        assert '(false alarms)' in s['error_rates']==line['error_rates']
    assert not any(word in page for word in ('predicted real', 'predicted fake', ': real<', ': fake<'))

def test_of_a_video_the_share_of_flagged_frames_is_stated(tmp_path, monkeypatch):
    monkeypatch.setattr('deepfid.quality.serfiq.embed_faces', lambda image, found: np.ones((len(found), 2))) # grey squares are no people
    from deepfid.data.video import write_video
    write_video([grey(v, 128, 128) for v in (40, 60, 80, 200, 210)], tmp_path/'clip.mp4')
    [file] = score(tmp_path/'clip.mp4', calibrated(REAL_SCORES, FAKE_SCORES), finder=GridFinder(), frames=5, report=tmp_path/'r.html')
    [s] = file.faces[0].scores
    assert s.flagged_frames==.6 and '60 % of 5 frames flagged' in (tmp_path/'r.html').read_text() and '<svg' in (tmp_path/'r.html').read_text()
    assert 0<file.faces[0].conditions['bits_per_pixel']<5

def test_warnings_of_what_was_never_in_validation(tmp_path):
    detector = calibrated(REAL_SCORES, FAKE_SCORES)
    detector.validated_ranges = dict(size_range=[115, 300], pose_range=[0, .1], jpeg_range=[50, 95])
    noise = np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path/'x.jpg', quality=20)
    Image.fromarray(np.concatenate([noise, noise], 1)).save(tmp_path/'two.jpg', quality=80)
    class Turned(GridFinder):
        def find(self, image): return [FaceDetection(d.box, d.points+np.float32([[0, 0]]*2+[[7, 0]]+[[0, 0]]*2), .9) for d in super().find(image)]
    one, two = (f.faces[0] for f in Scorer(detector, finder=Turned()).run([tmp_path/'x.jpg', tmp_path/'two.jpg']))
    for text in ('smaller than any in validation (face size 110', 'turned further', 'compressed more than any in validation (jpeg quality 20; seen were 50 to 95'):
        assert text in one.scores[0].reliability, text
    assert one.flags==[] and two.flags==['several'] and 'one of several faces' in two.scores[0].reliability and 'compressed more' not in two.scores[0].reliability

def test_an_insensitive_detector_is_left_out_of_all(saved, tmp_path, monkeypatch, capsys):
    from deepfid.cli import main
    for name in ('deepfidelity', 'lisiam'): shutil.copytree(saved, tmp_path/'package'/name)
    record = tmp_path/'package'/'lisiam'/'record.json'
    monkeypatch.setattr(hub, 'BUNDLED_DIR', tmp_path/'package')
    def write(**sensitivity):
        record.write_text(json.dumps(dict(metrics={}, sensitivity=sensitivity)))
        for name in ('deepfidelity', 'lisiam'): write_checksums(tmp_path/'package'/name)
    write(spread=.02, noise=.01)
    assert hub.list_offered()==(['deepfidelity', 'lisiam'], [])
    write(spread=.01, noise=.02)
    with pytest.warns(UserWarning, match='lisiam is left out: on test faces its score varies less'): assert list(load_detectors('all'))==['deepfidelity']
    cv2.imwrite(str(tmp_path/'black.png'), grey(0))
    assert main(['score', str(tmp_path/'black.png'), '--detector', 'all'])==1 and 'deepfid: lisiam is left out' in capsys.readouterr().err
    record.write_text('{"sensitivity": {"spread": "x"}}')
    with pytest.raises(WeightsError, match='sensitivity is not a spread and a noise'): hub.list_offered()

# -- resumable results ----------------------------------------------------------------------------------------------

def test_an_incomplete_line_is_cut_off_wherever_it_ends(tmp_path, album):
    whole = tmp_path/'whole.jsonl'
    assert len(list(make_scorer().run([album, album/'00.png', album], whole)))==25 # but each source once in the file
    content = whole.read_bytes()
    assert len(list(read_results(whole)))==12
    for end in (0, 5, len(content.split(b'\n')[0]), len(content)//3, len(content)-1):
        part = tmp_path/f'{end}.jsonl'
        part.write_bytes(content[:end])
        list(make_scorer().run(album, part))
        assert sorted(f.source for f in read_results(part))==sorted(f.source for f in read_results(whole)), end

def sources(path): return [f.source for f in read_results(path)]

def test_results_are_known_by_content_not_by_name(tmp_path, monkeypatch):
    results, run = tmp_path/'r.jsonl', lambda source: score(source, Brightness(), results, finder=GridFinder())
    assert fidelities(run([grey(51)]))==[[.2]] and fidelities(run([grey(102)]))==[[.4]] # both are called 'array 1'
    assert fidelities(run([grey(51, 240)]))==[[.2, .2]]          # other shape
    for name, value in (('a', 51), ('b', 204)):
        (tmp_path/name).mkdir()
        cv2.imwrite(str(tmp_path/name/'x.png'), grey(value))
        monkeypatch.chdir(tmp_path/name)
        assert fidelities(run('x.png'))==[[value/255]]           # the same relative name, from two folders
    cv2.imwrite('x.png', grey(102))
    assert fidelities(run('x.png'))==[[.4]]                      # was replaced
    detector = Brightness()
    shutil.copy('x.png', 'copy.png')
    [copy] = score('copy.png', detector, results, finder=GridFinder())
    assert copy.source=='copy.png' and fidelities([copy])==[[.4]] and not detector.batches # a copy is not scored again
    assert sorted(sources(results))==['array 1']*3+['copy.png', 'x.png', 'x.png']

def test_a_file_that_failed_is_tried_again_when_it_changed(tmp_path):
    results, run = tmp_path/'r.jsonl', lambda: score([tmp_path/'x.png', tmp_path/'y.png'], Brightness(), results, finder=GridFinder())
    (tmp_path/'x.png').write_text('no')
    for _ in range(2): assert [bool(f.error) for f in run()]==[True, True] # y.png does not exist
    assert len(sources(results))==2 and results.read_bytes().count(b'\n')==3
    for name in 'xy': cv2.imwrite(str(tmp_path/f'{name}.png'), grey(51))
    assert fidelities(run())==[[.2], [.2]] and len(sources(results))==2 and not any(f.error for f in read_results(results))

def test_results_of_an_earlier_version_are_read_but_not_continued(tmp_path):
    row = dict(source='array 1', kind='array', faces=[], error='', note='')
    (tmp_path/'r.jsonl').write_text(json.dumps(dict(deepfid='0.2.0', settings=make_scorer().settings()))+'\n'+json.dumps(row)+'\n')
    assert sources(tmp_path/'r.jsonl')==['array 1']
    with pytest.raises(DeepfidError, match='knew files by their names only; name another file'): score(grey(51), make_scorer(), tmp_path/'r.jsonl')

def test_processes_on_one_results_file_neither_lose_nor_double(tmp_path, album):
    code = f'''if True:
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_scoring import *
        for k in range(4): list(make_scorer(batch_size=1).run([{str(album)!r}, [grey(10*i+k) for i in range(5)]], {str(tmp_path/'r.jsonl')!r}))'''
    running = [subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for p in running: assert not p.communicate(timeout=120)[1]
    rows = list(read_results(tmp_path/'r.jsonl'))
    assert len(rows)==len({(f.source, f.sha256) for f in rows})==12+20 and (tmp_path/'r.jsonl').read_bytes().count(b'\n')==33

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
    for n, stop in ((2, signal.SIGINT), (33, signal.SIGKILL)): # lines besides the header; the first photograph is a bad one
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

def test_tiles_count_what_they_state_for_each_detector(tmp_path):
    class Dark(Brightness):
        def predict(self, faces, batch_size=32): return [Prediction(.1, np.eye(8)) for f in faces]
    score([grey(200), grey(60), grey(0)], [Brightness('a'), Dark('b')], finder=GridFinder(), report=tmp_path/'r.html')
    page = (tmp_path/'r.html').read_text()
    for number, text in ((2, 'faces in 3 files'), (1, 'of 3 files not scored'), (1, 'of 2 faces called manipulated by a<'), (2, 'of 2 faces called manipulated by b<'), (0, 'of 2 faces left undecided by b<'),
        (2, 'of 2 scores of a not')): assert f'<b>{number}</b><span>{text}' in page, text
    assert page.count('class="legend"')==1 and 'b: mask' in page

def test_a_portrait_on_its_side_is_turned(data):
    from deepfid.io import read_image
    photo = sorted((data/'london'/'neutral_front').glob('*.jpg'))[0]
    image, detector = read_image(photo), Brightness()
    turns = [np.ascontiguousarray(np.rot90(image, k)) for k in range(4)]
    files = list(Scorer(detector, rotate='auto').run(turns))
    assert len({round(f.faces[0].scores[0].fidelity, 6) for f in files})==1 and not files[0].note
    assert [f.note.split(' degrees')[0] for f in files[1:]]==[f'was turned by {a}' for a in (90, 180, 270)]
    as_they_are = list(Scorer(detector).run(turns))
    assert len({round(f.faces[0].scores[0].fidelity, 6) for f in as_they_are if f.faces})>1 # the fault
    assert not any(f.note for f in as_they_are) and as_they_are[0].faces[0].flags==[] and as_they_are[2].faces[0].flags==['upside_down']
    assert 'upside down (--rotate auto' in as_they_are[2].faces[0].scores[0].reliability

def test_a_threshold_and_an_explanation(tmp_path, trained):
    [file] = score(grey(51), Brightness(), finder=GridFinder(), threshold=.1)
    assert file.faces[0].scores[0].decision=='no manipulation found' and file.faces[0].scores[0].threshold==.1
    noise = np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8)
    [file] = score(noise, trained, finder=GridFinder(), explain=True)
    assert set(file.faces[0].images)=={'face', 'deepfidelity: Grad-CAM'}

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
    def full(data): raise OSError(28, 'No space left on device')
    with pytest.raises(DeepfidError, match='No space left.*resumes from here'):
        with ResultsFile(tmp_path/'r.jsonl', {}) as kept:
            kept._write = full
            kept.append(ScoredFile('a'))

@pytest.mark.parametrize('wrong', [dict(workers=0), dict(frames=-1), dict(batch_size=1.5)])
def test_numbers_of_a_scorer(wrong):
    with pytest.raises(DeepfidError, match='whole number from 1'): Scorer(Brightness(), **wrong)

# -- tampered files -------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 3.5, 1e9, 10**400, float('nan'), '', 'x', '../x', [], {}, [1], [[1]], [None, None], {'a': 1}]

def mutate(value, rng):
    "The text of a JSON value in which one thing is changed: a value, a key, a level, a character"
    value, places = json.loads(json.dumps(value)), []
    def visit(v):
        for k in list(v) if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else (): places.append((v, k)); visit(v[k])
    visit(value)
    v, k = rng.choice(places)
    how = rng.choice(['set', 'set', 'set', 'delete', 'wrap', 'whole', 'text', 'deep'])
    if how=='set': v[k] = rng.choice(VALUES)
    elif how=='delete': del v[k]
    elif how=='wrap': v[k] = [[v[k]]]
    elif how=='whole': value = rng.choice(VALUES)
    text = json.dumps(value)
    if how=='text':
        i = rng.randrange(len(text))
        text = text[:i]+rng.choice('{}[],:"0x\\\0')+text[i+1:]
    return '['*100_000+text if how=='deep' else text

def attempt(f, *args):
    "True if it succeeds, False if it is refused in one line"
    try: f(*args)
    except DeepfidError as e:
        assert '\n' not in str(e)
        return False
    return True

def n_mutations(request, usual): return 1000 if request.config.getoption('--slow') else usual

@pytest.mark.parametrize('name, file', [('DeepFidelity', 'detector.json'), ('DeepFidelity', 'regressor/regressor.json'),
    ('LiSiam', 'detector.json'), ('LocalSimilarity', 'detector.json')])
def test_tampered_detectors_are_refused_in_one_line(request, tmp_path, name, file):
    from deepfid.models.deepfidelity.detector import DeepFidelity
    from deepfid.models.lisiam.detector import LiSiam
    from deepfid.models.local_similarity.detector import LocalSimilarity
    cls, rng = dict(DeepFidelity=DeepFidelity, LiSiam=LiSiam, LocalSimilarity=LocalSimilarity)[name], random.Random(name+file)
    detector = request.getfixturevalue('trained') if cls is DeepFidelity else cls(size=64).configure('tiny')
    detector.history = detector.history[:1]
    path = detector.save(tmp_path/'m')/file
    about, refused, crop = json.loads(path.read_text()), 0, grey(90)
    def use():
        [file] = score(crop, load(tmp_path/'m'), finder=GridFinder())
        assert file.faces or file.error
    for threshold in (None, '0.5', [.5], float('inf')):
        if file=='detector.json':
            path.write_text(json.dumps(about|dict(threshold=threshold)))
            with pytest.raises(WeightsError, match='detector.json: threshold='): load(tmp_path/'m')
    for _ in range(n := n_mutations(request, 100)):
        path.write_text(mutate(about, rng))
        refused += not attempt(use)
    assert n/4<refused<n

def test_tampered_results_are_refused_in_one_line(request, tmp_path):
    from deepfid.inference.results import write_csv
    rng, path = random.Random(3), tmp_path/'r.jsonl'
    list(make_scorer(Brightness('b', mask=True)).run([grey(51), grey(0)], path))
    whole, refused = path.read_text().splitlines(), 0
    def use():
        list(make_scorer(Brightness('b', mask=True)).run([grey(51), grey(102)], path))
        write_csv(tmp_path/'r.csv', read_results(path))
        write_report(tmp_path/'r.html', read_results(path))
    for _ in range(n := n_mutations(request, 300)):
        lines, i = list(whole), rng.randrange(len(whole))
        lines[i] = mutate(json.loads(lines[i]), rng)
        path.write_text('\n'.join(lines)+'\n')
        refused += not attempt(use)
    assert n/4<refused<n

def test_tampered_checksums_and_training_states_are_refused_in_one_line(request, tmp_path):
    from deepfid.models.callbacks import read_checkpoint
    rng, n = random.Random(5), n_mutations(request, 300)
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'detector.json').write_text('{}')
    sums, config = write_checksums(tmp_path/'m'), dict(seed=0, size=112, bands=[[0, .4], [.6, 1]], faces='abc', epochs=None)
    whole = sums.read_bytes()
    for _ in range(n):
        i = rng.randrange(len(whole))
        sums.write_bytes(rng.choice([whole[:i], whole[:i]+bytes([rng.randrange(256)])+whole[i+1:], whole+b'\n', whole[:i]+b'\n'+whole[i:]]))
        attempt(hub.verify_checksums, tmp_path/'m')
    (tmp_path/'training.pt').write_bytes(b'no')
    for _ in range(n):
        (tmp_path/'training.json').write_text(mutate(config, rng))
        assert not attempt(read_checkpoint, tmp_path/'training.pt', config)

def test_rates_of_photographs_beside_a_video_say_so():
    from deepfid.inference.decisions import DecisionRule, error_rates_sentence
    known, unknown = DecisionRule(.3, .6, .05, .2), DecisionRule(.5, .5)
    said = 'single photographs'
    assert said in error_rates_sentence(known, video=True) and said not in error_rates_sentence(known)
    assert said in error_rates_sentence(known, dict(london=.1), video=True) and said not in error_rates_sentence(unknown, video=True)
