"Dataset readers: clips, consent, splits, downloads, and the errors for what is missing"
import contextlib, functools, hashlib, http.server, threading
from collections import defaultdict
import cv2, numpy as np, pandas as pd, pytest
from deepfid.core import ConsentError, DataMissingError, DeepfidError, ManifestError, five_points
from deepfid.io import write_json
from deepfid.data import datasets
from deepfid.data.datasets import celebdf, count_clips, dfd, dfdcp, fetch_dataset, ffpp, clips_from_folder, landmarks68, london, london_info, published_files, portraits, read_deepfakebench, read_clips, read_template, wilddeepfake, write_deepfakebench
from deepfid.io import iter_files
from deepfid.data.faces import find_face
from deepfid.data.forge import forge
from deepfid.data.pairs import build_pairs

def test_errors_for_missing_sets(tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='figshare'): london()
    with pytest.raises(DataMissingError, match='us-house'): portraits(tmp_path)
    (tmp_path/'portraits').mkdir()
    with pytest.raises(DataMissingError, match='436'): portraits(tmp_path)

def test_london_is_whole_and_consenting(data):
    people = london(data)
    assert len(people)==204 and len({s.identity for s in people})==102 and all(s.consent for s in people)
    assert sum(s.landmarks for s in people)==102 and len(london_info(data))==102
    face = people[3].load(160)
    assert face.landmarks.shape==(68, 2) and face.consent and face.image.shape==(160, 160, 3)
    assert people[103].load(160).landmarks is None

def test_landmarks_agree_with_the_detector_and_the_pupils(data):
    for s in london(data)[:6]:
        template = read_template(s.template)
        points = five_points(landmarks68(template))
        eye_distance = np.linalg.norm(points[1]-points[0])
        assert np.abs(template[:2]-points[:2]).max()<.06*eye_distance # the first two points of a template are the pupils
        assert np.abs(find_face(s.path).points-points).max()<.15*eye_distance

def test_portraits_are_only_self_blended(data, tmp_path):
    people = portraits(data)
    assert len(people)==436 and not any(s.consent or s.landmarks for s in people)
    with pytest.raises(ConsentError): forge(people[0].load(160), 'resynth', 0)
    m = build_pairs(people[:20], tmp_path/'set', pairs=(6, 2, 2), workers=1)
    assert set(m.table['method'])=={'real', 'selfblend'} and not m.table['consent'].any()
    with pytest.raises(DeepfidError, match='consent'): build_pairs(people[:20], tmp_path/'other', methods=['swap'], pairs=(6, 2, 2), workers=1)
    assert not (tmp_path/'other').exists()

# -- the public sets, in miniature ----------------------------------------------------------------------------------

def touch(root, *names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).touch()
    return root

def splits_of_people(clips):
    "person -> splits in which they are seen, as themselves or as donors"
    seen = defaultdict(set)
    for c in clips:
        if c.split:
            for person in {c.identity, c.donor}-{''}: seen[person].add(c.split)
    return seen

def official(folder, pairs=((('000', '003'), ('071', '054')), (('720', '672'),), (('953', '974'), ('012', '026')))):
    for name, p in zip(('train', 'val', 'test'), pairs): write_json(folder/f'{name}.json', p)
    return [p for ps in pairs for p in ps]

METHODS = ('Deepfakes', 'Face2Face', 'FaceSwap', 'NeuralTextures', 'FaceShifter')

@pytest.fixture
def ff(tmp_path):
    root = tmp_path/'FaceForensics++'
    for a, b in official(root):
        for c in ('raw', 'c23', 'c40'):
            touch(root, *(f'original_sequences/youtube/{c}/videos/{v}.mp4' for v in (a, b)))
            touch(root, *(f'manipulated_sequences/{m}/{c}/videos/{v}.mp4' for m in METHODS for v in (f'{a}_{b}', f'{b}_{a}')))
        touch(root, *(f'manipulated_sequences/{m}/masks/videos/{v}.mp4' for m in METHODS[:4] for v in (f'{a}_{b}', f'{b}_{a}')))
    return root

@pytest.mark.parametrize('compression', ['raw', 'c23', 'c40'])
def test_ffpp(ff, compression):
    clips = ffpp(ff.parent, compression)
    assert len(clips)==10+5*10 and all(f'/{compression}/videos/' in c.path for c in clips)
    assert {c.video: c.split for c in clips if c.label}['720']=='valid'
    assert all(len(s)==1 for s in splits_of_people(clips).values()) # the official splits are closed under pairs
    fake = next(c for c in clips if (c.method, c.video)==('NeuralTextures', '012_026'))
    assert (fake.identity, fake.donor, fake.source, fake.split, fake.label, fake.dataset) == ('012', '026', '012', 'test', 0, f'ffpp-{compression}')
    assert fake.mask.endswith('NeuralTextures/masks/videos/012_026.mp4') and not any(c.mask for c in clips if c.method in ('real', 'FaceShifter'))
    assert count_clips(clips, 'ffpp').loc['FaceSwap'].tolist()==[1000, 10, 0]
    assert {c.method for c in ffpp(ff, compression, ['FaceSwap'])}=={'real', 'FaceSwap'} and not any(c.consent for c in clips)

def test_ffpp_errors(ff):
    with pytest.raises(DeepfidError, match="compression='c99'"): ffpp(ff, 'c99')
    official(ff, ((('000', '003'),), (('003', '672'),), ()))
    with pytest.raises(ManifestError, match="'003' is in train and valid"): ffpp(ff)
    (ff/'train.json').unlink()
    with pytest.raises(DataMissingError, match='dataset/splits'): ffpp(ff)
    with pytest.raises(DataMissingError, match='form at github.com/ondyari'): ffpp(ff/'nowhere')

def test_dfd(tmp_path):
    touch(tmp_path, 'original_sequences/actors/c23/videos/01__exit_phone_room.mp4', 'original_sequences/actors/c23/videos/02__exit_phone_room.mp4',
          'manipulated_sequences/DeepFakeDetection/c23/videos/01_02__exit_phone_room__YVGY8LOK.mp4', 'manipulated_sequences/DeepFakeDetection/c23/videos/03_02__kitchen_pan__1ABCDEFG.mp4')
    clips = dfd(tmp_path)
    assert [c.source for c in clips]==['', '', '01__exit_phone_room', ''] and {c.split for c in clips}=={'test'} and clips[2].donor=='02'

@pytest.mark.parametrize('version', [1, 2])
def test_celebdf(tmp_path, version):
    root = touch(tmp_path/f'Celeb-DF-v{version}', 'Celeb-real/id0_0000.mp4', 'Celeb-real/id1_0003.mp4', 'Celeb-real/id5_0001.mp4', 'YouTube-real/00170.mp4', 'YouTube-real/00001.mp4',
                 'Celeb-synthesis/id0_id1_0000.mp4', 'Celeb-synthesis/id5_id6_0001.mp4', 'Celeb-synthesis/id7_id0_0009.mp4')
    tests = root/'List_of_testing_videos.txt'
    tests.write_text('1 YouTube-real/00170.mp4\r\n0 Celeb-synthesis/id0_id1_0000.mp4\r\n\n')
    clips = {c.video: c for c in celebdf(tmp_path, version)}
    assert {k for k, c in clips.items() if c.split=='test'}=={'00170', 'id0_id1_0000'} and clips['00170'].label==1
    assert {k for k, c in clips.items() if not c.split}=={'id0_0000', 'id1_0003', 'id7_id0_0009'} # they show people of the test list
    assert clips['id5_id6_0001'].source=='id5_0001' and clips['id0_id1_0000'].donor=='id1' and clips['id7_id0_0009'].source==''
    assert all(len(s)==1 for s in splits_of_people(clips.values()).values())
    loose = celebdf(tmp_path, version, strict=False)
    assert all(c.split for c in loose) and len({c.identity for c in loose})==len(loose)
    assert count_clips(list(clips.values()), f'celebdf-v{version}').loc['real'].tolist()==[408 if version==1 else 890, 5, 2]
    tests.write_text('0 YouTube-real/00170.mp4\n')
    with pytest.raises(ManifestError, match='1 is real and 0 is fake'): celebdf(tmp_path, version)
    tests.unlink()
    with pytest.raises(DataMissingError, match='List_of_testing'): celebdf(tmp_path, version)

def test_wilddeepfake_and_dfdcp(tmp_path):
    touch(tmp_path/'deepfake_in_the_wild', *(f'{p}/{a}/{p[:4]}/{s}/{f}.png' for p in ('real_train', 'real_test', 'fake_train', 'fake_test') for a in (0, 1) for s in (4, 17) for f in (3, 20)))
    clips = wilddeepfake(tmp_path)
    assert len(clips)==16 and {c.kind for c in clips}=={'crops'} and all(len(s)==1 for s in splits_of_people(clips).values())
    assert count_clips(clips, 'wilddeepfake').to_numpy().tolist()==[[3805, 8, 0], [3509, 8, 0]]
    entries = {'original_videos/1003254/1003254_A_001.mp4': dict(label='real', set='train', augmentations=[]), 'method_A/1003254/1003254_A/1255229_1003254_A_001.mp4': dict(label='fake', set='train'),
            'original_videos/1255229/1255229_C_002.mp4': dict(label='real', set='test'), 'method_B/9/9_A/8_9_A_001.mp4': dict(label='fake', set='test')}
    touch(tmp_path/'dfdc_preview_set', *list(entries)[:3])
    write_json(tmp_path/'dfdc_preview_set'/'dataset.json', entries)
    a, b, c = dfdcp(tmp_path)
    assert (b.identity, b.donor, b.source, b.label) == ('1003254', '1255229', '1003254_A_001', 0) and [a.split, b.split, c.split]==['train', '', 'test']
    assert count_clips([a, b, c], 'dfdcp').loc['fake'].tolist()==[4119, 1, 1]

def test_folder(tmp_path):
    touch(tmp_path, *(f'real/p{i}.mp4' for i in range(12)), 'real/ann lee/é 1.JPG', 'fake/swap/p3.avi', 'fake/ann lee/é 1.png', 'fake/stranger.webm', 'fake/notes.txt', 'real/.hidden.mp4')
    clips = clips_from_folder(tmp_path)
    by = {(c.method, c.video): c for c in clips}
    assert len(clips)==16 and by['swap', 'swap/p3.avi'].source=='p3.mp4' and by['fake', 'ann lee/é 1.png'].source=='ann lee/é 1.JPG' and by['fake', 'stranger.webm'].source==''
    assert by['real', 'ann lee/é 1.JPG'].kind=='photo' and by['real', 'p0.mp4'].kind=='video' and {c.split for c in clips}=={'train', 'valid', 'test'}
    assert all(len(s)==1 for s in splits_of_people(clips).values()) and clips_from_folder(tmp_path)==clips and not any(c.consent for c in clips)
    touch(tmp_path/'s', 'train/real/a.jpg', 'val/real/b.jpg', 'test/fake/c.jpg', 'test/real/a.jpg')
    assert {c.video: c.split for c in clips_from_folder(tmp_path/'s')}=={'train/a.jpg': '', 'valid/b.jpg': 'valid', 'test/c.jpg': 'test', 'test/a.jpg': 'test'}
    with pytest.raises(DataMissingError, match="'real' or 'fake'"): clips_from_folder(tmp_path/'s'/'train'/'real')

def test_listing_files_ends_with_cyclic_links(tmp_path):
    touch(tmp_path, 'a/x.mp4', 'b/y.MP4')
    (tmp_path/'a'/'up').symlink_to(tmp_path)
    (tmp_path/'c.mp4').symlink_to(tmp_path/'c.mp4')
    (tmp_path/'d').symlink_to(tmp_path/'d')
    assert [p.name for p in iter_files(tmp_path)]==['x.mp4', 'y.MP4', 'c.mp4'] and list(iter_files(tmp_path/'none'))==[]

def test_read_by_name(data):
    clips = read_clips('portraits', data)
    assert len(clips)==436 and {c.kind for c in clips}=={'photo'} and not any(c.consent for c in clips) and {c.split for c in clips}=={'train', 'valid', 'test'}
    assert all(c.consent for c in read_clips('london', data))
    with pytest.raises(DeepfidError, match="dataset='x'"): read_clips('x')

# -- DeepfakeBench's lists ------------------------------------------------------------------------------------------

def test_deepfakebench_in_and_out(tmp_path):
    png = cv2.imencode('.png', np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    def video(name, *frames, masks=()):
        for n in (*(f'f/{name}/{f}.png' for f in frames), *(f'm/{name}/{f}.png' for f in masks)):
            touch(tmp_path, n)
            (tmp_path/n).write_bytes(png)
        return dict(label='x', frames=[f'f\\{name}\\{f}.png'.replace('/', '\\') for f in frames], masks=[f'm/{name}/{f}.png' for f in masks])
    content = {'FF-DF': {'FF-real': dict(train={'c23': {'000': video('r/000', '010', '000')}, 'c40': {}}, val={'c23': {}}, test={'c23': {'001': video('r/001', '000')}}),
                      'FF-DF': dict(train={'c23': {'000_003': video('d/000_003', '000', '010', masks=['010'])}}, val={}, test={})}}
    m = read_deepfakebench(write_json(tmp_path/'FF-DF.json', content))
    assert m.table['path'].tolist()==['f/r/001/000.png', 'f/r/000/000.png', 'f/r/000/010.png', 'f/d/000_003/000.png', 'f/d/000_003/010.png']
    last = m.table.iloc[-1]
    assert (last['method'], last['mask'], last['identity'], last['donor'], last['frame'], last['split']) == ('Deepfakes', 'm/d/000_003/010.png', '000', '003', 10, 'train')
    again = read_deepfakebench(write_deepfakebench(m, tmp_path/'out.json'), compression='c23')
    same = ['label', 'identity', 'donor', 'split', 'method', 'video', 'frame']
    assert sorted(map(tuple, again.table[same].to_numpy()))==sorted(map(tuple, m.table[same].to_numpy()))

def test_deepfakebench_lists_test_videos_in_training_too(tmp_path):
    touch(tmp_path, 'a.png', 'b.png')
    entry = lambda f: dict(label='', frames=[f])
    content = {'Celeb-DF-v2': {'CelebDFv2_real': dict(train={'id0_0000': entry('a.png'), 'id1_0000': entry('b.png')}, val={'id0_0000': entry('a.png')}, test={'id0_0000': entry('a.png')})}}
    assert read_deepfakebench(write_json(tmp_path/'x.json', content)).table['split'].tolist()==['test', 'train']

# -- downloads ------------------------------------------------------------------------------------------------

class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.server.requested.append(self.path); super().do_GET()

@contextlib.contextmanager
def served(root):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(RecordingHandler, directory=str(root)))
    server.requested = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', server.requested
    finally: server.shutdown(); server.server_close()

def test_fetching(tmp_path, monkeypatch, capsys):
    base = tmp_path/'web'/datasets.REPOSITORIES['portraits']
    table = pd.DataFrame([dict(file=f'portraits/p{i}.jpg', path=f'x/{i}.jpg', bytes=1, sha256=hashlib.sha256(bytes([i])).hexdigest()) for i in range(5)])
    for i in range(5):
        touch(base, f'x/{i}.jpg')
        (base/f'x/{i}.jpg').write_bytes(bytes([i]))
    monkeypatch.setattr(datasets, 'published_files', lambda name: table)
    with served(tmp_path/'web') as (url, requested):
        get = lambda: fetch_dataset('portraits', tmp_path/'mine', url, progress=False)
        assert sorted(p.name for p in get().iterdir())==[f'p{i}.jpg' for i in range(5)] and 'public domain' in capsys.readouterr().out
        (tmp_path/'mine/portraits/p3.jpg').unlink()
        requested.clear(); get()
        assert len(requested)==1 # only what is missing
        (tmp_path/'mine/portraits/p3.jpg').write_bytes(b'my own')
        with pytest.raises(DataMissingError, match='left alone'): get()
        assert (tmp_path/'mine/portraits/p3.jpg').read_bytes()==b'my own'
        (tmp_path/'mine/portraits/p3.jpg').unlink(); (base/'x/3.jpg').write_bytes(b'corrupted')
        with pytest.raises(DataMissingError, match='by hand'): get()
        assert not (tmp_path/'mine/portraits/p3.jpg').exists()
    with pytest.raises(DataMissingError, match='without a network.*us-house') as e: fetch_dataset('portraits', tmp_path/'other', url, progress=False)
    assert '\n' not in str(e.value)

def test_published_files(monkeypatch):
    assert {n: len(published_files(n)) for n in ('london', 'portraits')}==dict(london=306, portraits=436)
    assert published_files('london')['file'].str.endswith('.tem').sum()==102
    with pytest.raises(DataMissingError, match='given out by its owners'): fetch_dataset('ffpp')
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='where to put'): fetch_dataset('london')

def test_portraits_on_disk_are_the_published_files(data):
    for row in published_files('portraits').iloc[::50].itertuples(): assert hashlib.sha256((data/row.file).read_bytes()).hexdigest()==row.sha256
