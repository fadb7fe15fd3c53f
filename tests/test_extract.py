"Face extraction: one box for a fake and its source, bad input, interruptions, workers"
import hashlib, os, re, signal, struct, subprocess, sys, time, wave, zlib
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from deepfid.core import DeepfidError
from deepfid.io import read_json, write_json
from deepfid.data import extract
from deepfid.data.datasets import Clip, ffpp, clips_from_folder, read_clips
from deepfid.data.london import london_faces
from deepfid.data.extract import OutputError, clip_folder, extract_faces, extract_dataset, source_folder
from deepfid.data.manifest import Manifest
from deepfid.inference.scorer import score_stream
from deepfid.parallel import map_items
from deepfid.data.video import synthetic_clip, write_video

pytestmark = pytest.mark.usefixtures('data') # where the face detector's model is
SMALL = dict(size=64, frames=4, progress=False)

def contents(out):
    "name -> hash of every file below a folder"
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(out).rglob('*')) if p.is_file()}

def blur_patch(image, box=(60, 90, 60, 100)):
    "An image with a patch of it blurred"
    image, (t, b, l, r) = image.copy(), box
    image[t:b, l:r] = cv2.GaussianBlur(image[t:b, l:r], (0, 0), 5)
    return image

@pytest.fixture(scope='module')
def people():
    "Frames of four synthetic people"
    return [[f.image for f in synthetic_clip(i, 1, fps=10, size=160, seed=i, motion=.4)] for i in range(4)]

@pytest.fixture(scope='module')
def videos(people, tmp_path_factory):
    "A folder of their videos, each with a fake, and all that can be wrong with files"
    root = tmp_path_factory.mktemp('set with é')
    for i, images in enumerate(people):
        for name, frames in ((f'real/p{i}.mp4', images), (f'fake/blur/p{i}.mp4', list(map(blur_patch, images)))):
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            write_video(frames, root/name, fps=10, crf=10)
    real = root/'real'
    (real/'empty.mp4').touch()
    (real/'prose.mp4').write_text('no video at all')
    with wave.open(str(real/'tone.mp4'), 'wb') as f: f.setparams((1, 2, 8000, 0, 'NONE', '')); f.writeframes(bytes(8000))
    (real/'image.mp4').write_bytes(cv2.imencode('.png', london_faces(size=200, margin=1.6)[0].image[..., ::-1])[1].tobytes())
    (real/'video.jpg').write_bytes((real/'p0.mp4').read_bytes())
    (real/'truncated.mp4').write_bytes((data := (real/'p0.mp4').read_bytes())[:len(data)//2])
    (real/'bomb.png').write_bytes(bomb())
    (real/'wall.mp4').write_bytes(write_video([np.full((96, 96, 3), 90, np.uint8)]*6, root/'wall.mp4').read_bytes())
    (real/'line\nbreak é.mp4').write_bytes((real/'p1.mp4').read_bytes())
    (real/'loop').symlink_to(real)
    (real/'self.mp4').symlink_to(real/'self.mp4')
    return root

def bomb():
    "A PNG of a few bytes with 60000x60000 in its header"
    chunk = lambda kind, data: struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))+chunk(b'IDAT', zlib.compress(b'\0'*99))+chunk(b'IEND', b'')

@pytest.fixture(scope='module')
def complete(videos, tmp_path_factory):
    "The same set extracted without interruption by one process"
    out = tmp_path_factory.mktemp('complete')/'out'
    return extract_dataset(videos, out, **SMALL, workers=1)

def test_pairs_share_a_box_and_masks_show_the_change(videos, complete):
    m = Manifest.read(complete['saved'])
    pairs = m.table[m.table['pair']!=''].groupby('pair')
    assert len(pairs)>=10 and all(sorted(g['label'])==[0, 1] for _, g in pairs)
    clip = next(c for c in clips_from_folder(videos) if c.method=='blur' and c.video.endswith('p2.mp4'))
    out = Path(complete['saved']).parent
    notes = [read_json(out/p/'clip.json') for p in (clip_folder(clip), source_folder(clip))]
    assert notes[0]['detections']==notes[1]['detections'] and notes[0]['source']=='p2.mp4'
    fakes = m.table.index[(m.table['label']==0) & (m.table['mask']!='')]
    assert len(fakes) and np.mean([.02<m.mask(i).mean()<.5 for i in fakes])>.9
    assert (m.table.loc[m.table['label']==1, 'mask']=='').all() and not m.table['consent'].any()

def test_bad_files_cost_a_line_each(videos, complete):
    log = pd.read_csv(complete['log'])
    why = log[log['frame'].isna()].groupby('video')['reason'].first()
    for name, text in {'empty.mp4': 'empty', 'prose.mp4': 'no video in a known format', 'tone.mp4': 'no video stream',
                      'bomb.png': 'max_pixels', 'self.mp4': 'no such file'}.items(): assert text in why[name] and '\n' not in why[name]
    assert set(log[log['video']=='wall.mp4']['reason'])=={'no face found', 'without a face, in all 4 frames that were looked at'} and log[log['video']=='truncated.mp4']['reason'].str.contains('cannot be decoded').all()
    table = Manifest.read(complete['saved']).table
    assert complete['status']==3 and complete['failed']>=7 and {'line\nbreak é.mp4', 'video.jpg'}<=set(table['video'])
    assert table['path'].str.fullmatch(r'[\w./-]+', flags=re.ASCII).all()

def test_killed_and_resumed_with_workers_is_the_same(videos, complete, tmp_path):
    "A job that is killed takes its workers with it, and its next run writes what one process would have written"
    out, job = tmp_path/'out', tmp_path/'job.py'
    job.write_text(f"from deepfid.data.extract import *\nif __name__=='__main__': extract_dataset({str(videos)!r}, {str(out)!r}, size=64, frames=4, workers=2, progress=False)")
    process = subprocess.Popen([sys.executable, job])
    while len(done := list(out.glob('faces/*/*/[!.]*/*.png')))<8: time.sleep(.01); assert process.poll() is None
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    alive = lambda: [w for w in workers if Path(f'/proc/{w}/stat').exists() and ') Z' not in Path(f'/proc/{w}/stat').read_text()]
    end = time.time()+10
    while alive() and time.time()<end: time.sleep(.05)
    assert not alive() and (len(workers)>=2 or not children.exists())
    stamps = {p.parent: (p.parent/'clip.json').stat().st_mtime_ns for p in done}
    assert not (out/'manifest.csv').exists()
    (next(iter(stamps)).parent/'.tmp-of-the-dead').mkdir()
    extract_faces(clips_from_folder(videos), out, **SMALL, workers=2)
    assert contents(out)==contents(Path(complete['saved']).parent)
    assert all((p/'clip.json').stat().st_mtime_ns==t for p, t in stamps.items())

def test_a_full_disk_stops_the_job_and_leaves_nothing_half_written(videos, complete, tmp_path, monkeypatch):
    out, count, write = tmp_path/'out', [0], Path.write_bytes
    def full(self, data):
        count[0] += 1
        if count[0]>20: raise OSError(28, 'No space left on device')
        return write(self, data)
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OutputError, match='No space left on device.*run the same command again'): extract_faces(clips_from_folder(videos), out, **SMALL, workers=1)
    monkeypatch.undo()
    assert not list(out.rglob('.tmp-*')) and not (out/'manifest.csv').exists()
    extract_faces(clips_from_folder(videos), out, **SMALL, workers=1)
    assert contents(out)==contents(Path(complete['saved']).parent)

def test_an_unreadable_folder_is_one_line(videos, tmp_path, monkeypatch):
    shut, real = str(videos/'real'/'shut'), os.listdir
    def listdir(path='.'):
        if str(path)==shut: raise PermissionError(13, 'Permission denied', shut)
        return real(path)
    (videos/'real'/'shut').mkdir()
    monkeypatch.setattr(os, 'listdir', listdir)
    try:
        clips = [c for c in clips_from_folder(videos) if c.video in ('shut', 'p0.mp4')]
        extract_faces(clips, tmp_path/'out', **SMALL, workers=1)
    finally: (videos/'real'/'shut').rmdir()
    log = pd.read_csv(tmp_path/'out'/'skipped.csv')
    assert log[log['video']=='shut']['reason'].tolist()==['this folder cannot be listed; make it readable']

def test_settings_may_not_change_and_leaks_are_refused_first(videos, complete, tmp_path):
    with pytest.raises(DeepfidError, match='other settings'): extract_faces(clips_from_folder(videos), Path(complete['saved']).parent, size=65, progress=False)
    with pytest.raises(DeepfidError, match="identity 'ann'"): extract_faces([Clip('a', 1, 'ann', 'train', 'x'), Clip('b', 1, 'ann', 'test', 'y')], tmp_path/'o')
    with pytest.raises(DeepfidError, match='video` of its own'): extract_faces([Clip('a', 1, 'ann', 'train', 'x')]*2, tmp_path/'o')
    with pytest.raises(DeepfidError, match='engine='): extract_faces([Clip('a', 1, 'ann', 'train', 'x')], tmp_path/'o', engine='steam')
    with pytest.raises(DeepfidError, match='no face in 1 video'): extract_faces([Clip(str(tmp_path/'no.mp4'), 1, 'ann', 'train', 'x')], tmp_path/'o', progress=False)

def test_each_clip_without_faces_has_its_cause_and_all_clips_are_counted(videos, complete, people, tmp_path):
    log = pd.read_csv(complete['log'])
    cause = log.dropna(subset='cause').set_index('video')['cause']
    assert cause.index.is_unique and log.dropna(subset='cause')['frame'].isna().all()
    assert cause['wall.mp4']=='without a face' and {cause[n] for n in ('empty.mp4', 'prose.mp4', 'bomb.png', 'tone.mp4')}=={'cannot be read'}
    assert complete['causes']==cause.value_counts().to_dict() and complete['failed']==len(cause)
    n = len(clips_from_folder(videos))
    assert complete['clips']==n and f"{n} clips found: {complete['faces']} faces of {n-len(cause)}; no face of {len(cause)} ({complete['causes']['cannot be read']} cannot be read, 1 a copy of a face in another split, 1 without a face)" in complete['text']
    root = tmp_path/'FaceForensics++'
    for part, pairs in (('train', [['000', '003']]), ('val', [['001', '002']]), ('test', [])): write_json(root/f'{part}.json', pairs)
    for i in (0, 7): (p := root/f'original_sequences/youtube/c23/videos/00{i}.mp4').parent.mkdir(parents=True, exist_ok=True); write_video(people[0], p, fps=10)
    result = extract_dataset(tmp_path, tmp_path/'out', 'ffpp', **SMALL, workers=1)
    assert result['causes']=={'in no split': 1} and result['status']==0 and result['clips']==2
    assert pd.read_csv(result['log'])['reason'].tolist()==['in no split: no split file names 007']

def test_reasons_fall_under_their_causes():
    from deepfid.data.extract import skip_cause
    for reasons, cause in ((['no face found']*3+['the face is tiny'], 'without a face'), (['the face is tiny'], 'face too small'), (['in no split: no split file names 1'], 'in no split'),
        (['too short: there is no frame in it'], 'too short'), (['is empty (0 bytes)'], 'cannot be read')): assert skip_cause(reasons)==cause

def test_faces_without_labels_are_cut_for_scoring_only(people, tmp_path):
    album = tmp_path/'album'
    (album/'summer').mkdir(parents=True)
    write_video(people[0], album/'clip.mp4', fps=10)
    cv2.imwrite(str(album/'summer'/'1.png'), cv2.copyMakeBorder(people[1][0], *4*(60,), cv2.BORDER_REPLICATE)[..., ::-1])
    (album/'broken.jpg').write_text('no image')
    result = extract_dataset(album, tmp_path/'out', frames=3, workers=1, progress=False)
    table = pd.read_csv(result['saved'])
    assert Path(result['saved']).name=='faces.csv' and list(table)==['path', 'video', 'frame', 'flags', 'dataset'] and not (tmp_path/'out'/'manifest.csv').exists()
    assert table['video'].tolist()==['clip.mp4']*3+['summer/1.png'] and result['status']==3 and result['causes']=={'cannot be read': 1}
    assert 'cut for scoring; nothing can be trained' in result['text'] and result['text'].splitlines()[-1]==f"next: deepfid score {result['saved']}"
    with pytest.raises(DeepfidError, match="no column 'label'"): Manifest.read(result['saved'])
    files = list(score_stream(Path(result['saved']), frames=1))
    assert [f.path for f in files]==[str(tmp_path/'out'/p) for p in table['path']] and all(len(f.faces)==1 for f in files)
    direct = next(iter(score_stream(album/'summer'/'1.png'))).faces[0].scores[0].fidelity
    assert abs(files[-1].faces[0].scores[0].fidelity-direct)<.1
    before = contents(tmp_path/'out')
    extract_dataset(album, tmp_path/'out', frames=3, workers=1, progress=False)
    assert contents(tmp_path/'out')==before
    for _ in range(2): # into a folder below the source: what the first run wrote is no source of the second
        again = extract_dataset(album, album/'faces', frames=3, workers=1, progress=False)
        assert (again['clips'], again['faces'])==(result['clips'], result['faces'])
    notes = next((album/'faces').rglob('clip.mp4/clip.json'))
    for text in ('[1]', '{}', '{"rows": 3}', '{"rows": [{"path": 3}]}'): # changed by hand: one line, and left as it is
        notes.write_text(text)
        with pytest.raises(DeepfidError, match='clip.mp4: holds clip.json, which was changed'): extract_dataset(album, album/'faces', frames=3, workers=1, progress=False)
    assert notes.read_text()==text
    (tmp_path/'out'/'faces.csv').write_text('notes of mine')
    with pytest.raises(DeepfidError, match='faces.csv: was changed since deepfid wrote it'): extract_dataset(album, tmp_path/'out', frames=3, workers=1, progress=False)
    assert (tmp_path/'out'/'faces.csv').read_text()=='notes of mine'

def test_a_folder_that_was_meant_to_have_labels_is_not_taken_for_one_without(tmp_path):
    (tmp_path/'set'/'Fakes').mkdir(parents=True)
    with pytest.raises(DeepfidError, match="'Fakes'; labelled clips.* rename"): extract_dataset(tmp_path/'set', tmp_path/'out')
    (tmp_path/'set'/'Fakes').rename(tmp_path/'set'/'fake')
    with pytest.raises(DeepfidError, match='set: has .* give this folder'): extract_dataset(tmp_path, tmp_path/'out')
    (tmp_path/'none').mkdir()
    with pytest.raises(DeepfidError, match='no photograph or video'): extract_dataset(tmp_path/'none', tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_a_repaired_file_is_extracted(people, tmp_path):
    (tmp_path/'set'/'real').mkdir(parents=True)
    write_video(people[0], tmp_path/'set'/'real'/'a.mp4', fps=10)
    (tmp_path/'set'/'real'/'b.mp4').touch()
    assert extract_dataset(tmp_path/'set', tmp_path/'out', **SMALL, workers=1)['failed']==1
    write_video(people[1], tmp_path/'set'/'real'/'b.mp4', fps=10)
    assert extract_dataset(tmp_path/'set', tmp_path/'out', **SMALL, workers=1)['status']==0

def test_released_masks_are_cropped_with_the_fake(people, tmp_path):
    "FaceForensics++ in miniature, one fake shorter than its source, masks as videos"
    root, white = tmp_path/'FaceForensics++', np.zeros((160, 160, 3), np.uint8)
    white[60:90, 60:100] = 255
    for n, s in (('train', ['000', '003']), ('val', ['001', '002']), ('test', ['004', '005'])): write_json(root/f'{n}.json', [s])
    for i in (0, 3):
        (root/'original_sequences/youtube/c23/videos').mkdir(parents=True, exist_ok=True)
        write_video(people[i], root/f'original_sequences/youtube/c23/videos/00{i}.mp4', fps=10)
    base = root/'manipulated_sequences/Deepfakes'
    for d in ('c23', 'masks'): (base/d/'videos').mkdir(parents=True)
    write_video(list(map(blur_patch, people[0]))[:7], base/'c23/videos/000_003.mp4', fps=10)
    write_video([white]*7, base/'masks/videos/000_003.mp4', fps=10)
    m = extract_faces(ffpp(tmp_path), tmp_path/'out', **SMALL, workers=1)
    fakes = m.table.index[m.table['label']==0]
    assert m.table['frame'][fakes].tolist()==[0, 3, 6] # the source's frames, not the fake's own
    for i in fakes:
        assert set(np.unique(m.mask(i)))<={0, 1} and .03<m.mask(i).mean()<.4
    log = pd.read_csv(tmp_path/'out'/'skipped.csv')
    assert 'the source has this frame, this clip has not' in set(log['reason']) and len(m.where(label=0, donor='003'))==3

def test_a_fake_of_another_size_gets_its_own_box(people, tmp_path):
    (tmp_path/'set'/'fake').mkdir(parents=True); (tmp_path/'set'/'real').mkdir()
    write_video(people[0], tmp_path/'set/real/a.mp4', fps=10)
    write_video([cv2.resize(i, (120, 120)) for i in people[0]], tmp_path/'set/fake/a.mp4', fps=10)
    m = extract_faces(clips_from_folder(tmp_path/'set'), tmp_path/'out', size=64, frames=4, drop=(), workers=1, progress=False)
    assert (m.table['pair']=='').all() and (m.table['mask']=='').all() and set(m.table['label'])=={0, 1}
    stamp = (p := next((tmp_path/'out').glob('faces/*/fake/*/clip.json'))).stat().st_mtime_ns
    extract_faces(clips_from_folder(tmp_path/'set'), tmp_path/'out', size=64, frames=4, drop=(), workers=1, progress=False)
    assert p.stat().st_mtime_ns==stamp

def test_folders_of_crops_and_photographs(people, tmp_path):
    for k, part in enumerate(('real_train', 'real_test', 'fake_train', 'fake_test')):
        for f in (2, 10, 9): (p := tmp_path/'deepfake_in_the_wild'/part/'0'/'x'/'7'/f'{f}.png').parent.mkdir(parents=True, exist_ok=True); cv2.imwrite(str(p), people[k][min(f, 9)][..., ::-1])
    (tmp_path/'deepfake_in_the_wild/real_test/0/x/7/9.png').write_bytes(b'')
    m = extract_faces(read_clips('wilddeepfake', tmp_path), tmp_path/'wild', **SMALL, workers=1)
    assert m.table[m.table['split']=='train']['frame'].tolist()==[2, 9, 10]*2 and len(m)==11 and (m.table['mask']=='').all()
    assert 'empty' in pd.read_csv(tmp_path/'wild'/'skipped.csv')['reason'][0]
    for i, images in enumerate(people[:3]):
        for name, image in ((f'real/{i}.png', images[0]), (f'fake/{i}.jpg', blur_patch(images[0]))):
            (p := tmp_path/'photos'/name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(p), image[..., ::-1])
    m = extract_faces(clips_from_folder(tmp_path/'photos'), tmp_path/'crops', **SMALL, workers=1)
    assert len(m)==6 and (m.table['pair']!='').all() and (m.table['mask']!='').sum()==3

def test_faces_that_are_in_two_splits_are_left_out_of_training(people, tmp_path):
    for name, image in (('train/real/ann.png', 0), ('train/real/bob.png', 1), ('train/fake/swap/ann_bob.png', 2), ('test/real/carl.png', 0), ('test/real/dora.png', 3), ('test/real/dora/2.png', 3)):
        (p := tmp_path/'set'/name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(p), people[image][0][..., ::-1])
    result = extract_dataset(tmp_path/'set', tmp_path/'out', **SMALL, workers=1)
    table, log = Manifest.read(result['saved']).table, pd.read_csv(result['log'])
    assert set(table['video'])=={'train/bob.png', 'train/swap/ann_bob.png', 'test/carl.png', 'test/dora.png', 'test/dora/2.png'}
    assert log['video'].tolist()==['train/ann.png'] and 'in the test split' in log['reason'][0]
    assert "fakes named TARGET_DONOR: 1, such as 'train/swap/ann_bob.png', which is 'ann' with the face of 'bob'" in result['text'] and 'same split: 1' in result['text']

def test_frames_are_decoded_again_where_memory_is_short(videos, complete, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, 'FRAME_MEMORY_BYTES', 0)
    extract_faces(clips_from_folder(videos), tmp_path/'out', **SMALL, workers=1)
    assert contents(tmp_path/'out')==contents(Path(complete['saved']).parent)

def test_a_replaced_source_is_cropped_again_with_its_fakes(people, tmp_path):
    for name in ('real', 'fake'): (tmp_path/'set'/name).mkdir(parents=True)
    write_video(people[0], tmp_path/'set/real/a.mp4', fps=10)
    write_video(list(map(blur_patch, people[0])), tmp_path/'set/fake/a.mp4', fps=10)
    run = lambda: extract_faces(clips_from_folder(tmp_path/'set'), tmp_path/'out', **SMALL, workers=1)
    run(); first = contents(tmp_path/'out')
    write_video([np.roll(i, 9, 1) for i in people[0]], tmp_path/'set/real/a.mp4', fps=10, crf=20)
    run(); second = contents(tmp_path/'out')
    assert all(first[n]!=second[n] for n in first if n.endswith('.png') and 'mask' not in n)
    next((tmp_path/'out').glob('faces/*/fake/*/000000.png')).unlink() # a lost file is made again
    run()
    assert contents(tmp_path/'out')==second

def test_a_killed_worker_stops_the_job():
    with pytest.raises(DeepfidError, match='a worker process was killed'): list(map_items(os._exit, [3, 4], 2))

def test_ray_writes_the_same(videos, complete, tmp_path):
    ray = pytest.importorskip('ray')
    try: extract_faces(clips_from_folder(videos), tmp_path/'out', **SMALL, workers=2, engine='ray')
    finally: ray.shutdown()
    assert contents(tmp_path/'out')==contents(Path(complete['saved']).parent)
