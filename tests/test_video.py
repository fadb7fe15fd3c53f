"Frame sampling, face tracks and crops, compression, and one clear line for every bad file"
import os, struct, subprocess, sys
from fractions import Fraction
import av, cv2, numpy as np, pytest
from PIL import Image
from deepfid.core import DeepfidError, Face, NoFaceError
from deepfid.data.faces import FaceDetection
from deepfid.data.forge import forge
from deepfid.data.mask import ssim_mask
from deepfid.data.synth import synthetic_face
from deepfid.data.video import Frame, VideoError, compress_video, track_faces, probe_video, sample_frames, synthetic_clip, write_video

SIZE, N = 96, 60 # height of the frames, and their number in a clip

def numbered(i, size=SIZE):
    "An image that shows its number as 8 bright or dark squares, and a disc that moves"
    image = np.full((size, 2*size, 3), 90, np.uint8)
    for b in range(8): image[4:28, 4+22*b:24+22*b] = 255*(i>>b&1)
    cv2.circle(image, (10+i*3%(2*size-20), 60), 9, (200, 60, 40), -1)
    return image

def number(image): return sum(int(image[16, 14+22*b, 1]>128)<<b for b in range(8))

def encode(path, n=N, codec='libx264', pts=lambda i: i, rotation=0, fmt=None, **options):
    "A numbered clip in any container"
    with av.open(str(path), 'w', format=fmt) as out:
        s = out.add_stream(codec, rate=25, options=options)
        s.width, s.height, s.pix_fmt = 2*SIZE, SIZE, 'yuvj420p' if codec=='mjpeg' else 'yuv420p'
        if rotation: s.set_display_rotation(rotation)
        for i in range(n):
            f = av.VideoFrame.from_ndarray(numbered(i), 'rgb24')
            f.pts, f.time_base = pts(i), Fraction(1, 25)
            out.mux(s.encode(f))
        out.mux(s.encode(None))
    return path

@pytest.fixture(scope='module')
def clip(): return synthetic_clip(3, seconds=.8, size=224, seed=1)

@pytest.fixture(scope='module')
def mp4(tmp_path_factory): return encode(tmp_path_factory.mktemp('v')/'clip.mp4', g='12')

# -- frame sampling ---------------------------------------------------------------------------------------------------

CONTAINERS = {'long.mp4': dict(), 'short.mp4': dict(g='6'), 'still.mp4': dict(g='1'), 'pairs.mp4': dict(g='2', bf='1'), 'open.mp4': {'x264-params': 'open-gop=1:keyint=12'},
    'a.mkv': dict(g='12'), 'a.avi': dict(codec='mpeg4', g='12'), 'b.avi': dict(codec='mjpeg'), 'a.webm': dict(codec='libvpx-vp9', deadline='realtime', **{'cpu-used': '8'}), 'a.ts': dict(g='12'), 'a.mov': dict(g='12')}

@pytest.mark.parametrize('name', CONTAINERS)
def test_sampled_frames_in_any_container(tmp_path, name):
    path = encode(tmp_path/name, **CONTAINERS[name])
    assert probe_video(path).frames==N
    for n in (1, 7, None):
        frames = list(sample_frames(path, n))
        expected = np.rint(np.linspace(0, N-1, n)).astype(int).tolist() if n else list(range(N))
        assert [f.index for f in frames]==expected and [number(f.image) for f in frames]==expected
        np.testing.assert_allclose([f.time for f in frames], np.array(expected)/25, atol=2e-3)

def test_sampled_frames_equal_those_of_a_full_decode(mp4):
    with av.open(str(mp4)) as c: full = [f.to_ndarray(format='rgb24') for f in c.decode(video=0)]
    for f in sample_frames(mp4, 17): np.testing.assert_array_equal(f.image, full[f.index])

def test_more_frames_than_there_are(mp4):
    assert [f.index for f in sample_frames(mp4, 500)]==list(range(N))
    assert len(list(sample_frames(mp4, 500, by='time')))==N

def test_few_frames_are_decoded(tmp_path, monkeypatch):
    "Where key frames are frequent, most packets are never decoded"
    decoded = []
    class Counting: # the packet type is immutable; so the container is made to hand out counting packets
        def __init__(self, p): self.p = p
        def __getattr__(self, name): return getattr(self.p, name)
        def decode(self): decoded.append(1); return self.p.decode()
    import deepfid.data.video as V
    run = V._decode_run
    class Container:
        def __init__(self, c): self.c = c
        def seek(self, *a, **k): return self.c.seek(*a, **k)
        def demux(self, s): return (Counting(p) for p in self.c.demux(s))
    monkeypatch.setattr(V, '_decode_run', lambda c, *a: run(c if isinstance(c, Container) else Container(c), *a))
    assert len(list(sample_frames(encode(tmp_path/'clip.mp4', 90, g='12'), 3)))==3 and len(decoded)<45

def test_variable_frame_rate(tmp_path):
    path = encode(tmp_path/'vfr.mp4', 40, pts=lambda i: i if i<25 else 25+5*(i-25))
    info = probe_video(path)
    assert info.frames==40 and info.fps<15
    by_time, by_index = [list(sample_frames(path, 9, by)) for by in ('time', 'index')]
    assert all(number(f.image)==f.index for f in by_time+by_index)
    assert sum(f.time<1 for f in by_index)>sum(f.time<1 for f in by_time)
    wanted = np.linspace(0, by_time[-1].time, 9)
    assert all(f.time<=t+1e-6 and t-f.time<.21 for f, t in zip(by_time, wanted))

@pytest.mark.parametrize('angle, turned', [(90, 90), (-90, 90), (180, 0)])
def test_rotation(tmp_path, angle, turned):
    path = encode(tmp_path/'r.mp4', 5, rotation=angle, crf='5')
    info, frame = probe_video(path), next(sample_frames(path, 1))
    assert (info.width, info.height)==((SIZE, 2*SIZE) if turned else (2*SIZE, SIZE)) and info.rotation==(-angle)%360
    assert frame.image.shape[:2]==(info.height, info.width)
    back = np.rot90(frame.image, -angle//90)
    assert np.abs(back.astype(int)-numbered(0)).mean()<4

def test_no_sound_needed_and_sound_ignored(tmp_path):
    with av.open(str(tmp_path/'talk.mp4'), 'w') as out:
        a, v = out.add_stream('aac', rate=16000), out.add_stream('libx264', rate=25)
        v.width, v.height = 2*SIZE, SIZE
        for i in range(20): out.mux(v.encode(av.VideoFrame.from_ndarray(numbered(i), 'rgb24')))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 12800), np.float32), 'fltp', 'mono'); sound.rate = 16000
        out.mux(a.encode(sound)); out.mux(a.encode(None)); out.mux(v.encode(None))
    assert [number(f.image) for f in sample_frames(tmp_path/'talk.mp4', None)]==list(range(20))

def test_bad_arguments(mp4):
    with pytest.raises(DeepfidError, match='by='): list(sample_frames(mp4, 3, by='luck'))
    with pytest.raises(DeepfidError, match='n=0'): list(sample_frames(mp4, 0))

# -- bad files ------------------------------------------------------------------------------------------------------

def refuses(path, match, **kw):
    for what in (lambda: probe_video(path, **kw), lambda: list(sample_frames(path, 5, **kw)), lambda: compress_video(path, f'{path}.out.mp4', 23, **kw)):
        with pytest.raises(VideoError, match=match) as e: what()
        assert '\n' not in str(e.value) and os.path.basename(str(path)).split('\n')[0] in str(e.value)
    assert not os.path.exists(f'{path}.out.mp4')

def test_files_that_are_no_videos(tmp_path, mp4):
    for name, content, match in (('empty.mp4', b'', 'empty'), ('text.mp4', b'words '*500, 'no video'), ('half.mp4', mp4.read_bytes()[:3000], 'no video'),
                                 ('list.m3u8', b'#EXTM3U\n#EXTINF:1,\nclip.mp4\n', 'no video'), ('list.mp4', b'ffconcat version 1.0\nfile clip.mp4\n', 'no video')):
        (tmp_path/name).write_bytes(content)
        refuses(tmp_path/name, match)
    Image.fromarray(numbered(3)).save(tmp_path/'p.png')
    os.rename(tmp_path/'p.png', tmp_path/'p.mp4')
    refuses(tmp_path/'p.mp4', r'image \(PNG\)')
    refuses(tmp_path/'gone.mp4', 'no such file')
    refuses(tmp_path, 'folder')
    os.mkfifo(tmp_path/'pipe.mp4')
    refuses(tmp_path/'pipe.mp4', 'regular file')

def test_sound_only(tmp_path):
    with av.open(str(tmp_path/'s.mp4'), 'w') as out:
        s = out.add_stream('aac', rate=16000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), 'fltp', 'mono'); f.rate = 16000
        out.mux(s.encode(f)); out.mux(s.encode(None))
    refuses(tmp_path/'s.mp4', 'no video stream; it holds audio')

def test_no_permission(tmp_path, mp4):
    secret = tmp_path/'secret.mp4'
    secret.write_bytes(mp4.read_bytes()); secret.chmod(0)
    if os.geteuid(): return refuses(secret, 'permission')
    code = f'''if True:
        import os
        from deepfid.data.video import VideoError, probe_video
        os.chmod({str(tmp_path)!r}, 0o755); os.setuid(65534)
        try: probe_video({secret.name!r})
        except VideoError as e: print(e)'''
    for p in (tmp_path, tmp_path.parent, tmp_path.parent.parent): os.chmod(p, 0o755)
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)})
    assert 'permission denied' in out.stdout, out.stderr

def test_absurd_sizes(tmp_path, mp4):
    refuses(mp4, 'refused before decoding', max_pixels=2000)
    path = encode(tmp_path/'bomb.avi', 3, codec='mjpeg')
    content = path.read_bytes()
    small, huge = struct.pack('>HH', SIZE, 2*SIZE), struct.pack('>HH', 60000, 60000) # in each JPEG's own header
    assert content.count(small)>=3
    content = content.replace(small, huge).replace(struct.pack('<II', 2*SIZE, SIZE), struct.pack('<II', 60000, 60000))
    path.write_bytes(content)
    with pytest.raises(VideoError) as e: list(sample_frames(path, 3))
    assert 'bomb.avi' in str(e.value)

def test_truncated_files_are_reported_and_give_what_they_hold(tmp_path):
    for name, kw in (('c.mp4', dict(movflags='+faststart')), ('c.mkv', {}), ('c.avi', dict(codec='mpeg4'))):
        options = kw.pop('movflags', None)
        whole = encode(tmp_path/f'whole-{name}', 120, **kw)
        if options: whole = write_video([numbered(i) for i in range(120)], whole)
        (tmp_path/name).write_bytes(whole.read_bytes()[:int(.6*whole.stat().st_size)])
        problems, got = [], []
        for f in sample_frames(tmp_path/name, 20, on_error=problems.append): got.append(f)
        assert 'ends after' in str(problems[0]) and got and all(number(f.image)==round(25*f.time) for f in got), name
        with pytest.raises(VideoError, match='ends after'): list(sample_frames(tmp_path/name, 20))
        with pytest.raises(VideoError, match='ends after'): compress_video(tmp_path/name, tmp_path/'x.mp4', 23)
        assert probe_video(tmp_path/name).truncated

@pytest.mark.parametrize('number_of_packet', [0, 37, N-1])
def test_corrupt_frames_are_named_and_the_rest_is_good(mp4, tmp_path, number_of_packet):
    with av.open(str(mp4)) as c: packets = [p for p in c.demux(video=0) if p.size]
    p = packets[number_of_packet]
    content = bytearray(mp4.read_bytes())
    content[p.pos:p.pos+p.size] = b'\xff'*p.size
    corrupt = tmp_path/'corrupt.mp4'
    corrupt.write_bytes(content)
    problems = []
    frames = list(sample_frames(corrupt, None, on_error=problems.append))
    lost = [int(str(e).split('frame ')[1].split()[0]) for e in problems]
    assert sorted([f.index for f in frames]+lost)==list(range(N)) and 1<=len(lost)<=12
    with av.open(str(mp4)) as c: full = [f.to_ndarray(format='rgb24') for f in c.decode(video=0)]
    for f in frames: np.testing.assert_array_equal(f.image, full[f.index])
    good = []
    with pytest.raises(VideoError, match='corrupt.mp4'):
        for f in sample_frames(corrupt, None): good.append(f.index)
    assert good==[f.index for f in frames]
    with pytest.raises(VideoError, match='nothing was written'): compress_video(corrupt, tmp_path/'out.mp4', 23)
    assert sorted(os.listdir(tmp_path))==['corrupt.mp4']

@pytest.mark.parametrize('name', ['with space.mp4', 'Ünïcödé né.mp4', 'two\nlines.mp4', '-dash.mp4', 'a:b%03d.mp4', "quo'te.mp4"])
def test_odd_names(tmp_path, mp4, name):
    path = tmp_path/name
    path.write_bytes(mp4.read_bytes())
    assert probe_video(path).frames==N and len(list(sample_frames(path, 4)))==4
    assert probe_video(compress_video(path, tmp_path/f'c{name}', 40)).frames==N
    path.write_bytes(b'')
    with pytest.raises(VideoError) as e: probe_video(path)
    assert '\n' not in str(e.value)

# -- writing --------------------------------------------------------------------------------------------------------

def test_written_frames_come_back(tmp_path, clip):
    path = write_video(clip, tmp_path/'c.mp4', crf=0)
    back = list(sample_frames(path, None))
    assert len(back)==len(clip) and max(np.abs(b.image.astype(int)-f.image).mean() for b, f in zip(back, clip))<3
    assert write_video(clip, tmp_path/'d.mp4', crf=0).read_bytes()==path.read_bytes()

def test_odd_sizes_keep_their_pixels(tmp_path):
    images = [np.full((101, 133, 3), 40+i, np.uint8) for i in range(4)]
    [*frames] = sample_frames(write_video(images, tmp_path/'odd.mp4'), None)
    assert frames[0].image.shape==(101, 133, 3)

def test_nothing_half_written(tmp_path, clip):
    def breaks():
        yield from clip[:5]
        raise KeyboardInterrupt
    path = write_video(clip[:3], tmp_path/'v.mp4')
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt): write_video(breaks(), path)
    with pytest.raises(VideoError, match='no images'): write_video([], path)
    with pytest.raises(VideoError, match='image 1'): write_video([clip[0].image, clip[1].image[:100]], path)
    with pytest.raises(DeepfidError, match='crf'): write_video(clip[:2], path, crf=99)
    assert path.read_bytes()==before and os.listdir(tmp_path)==['v.mp4']

def test_compression_keeps_frames_and_times(tmp_path):
    path = encode(tmp_path/'vfr.mp4', 40, pts=lambda i: i if i<25 else 25+5*(i-25), crf='0')
    sizes = []
    for crf in (0, 23, 40):
        out = compress_video(path, tmp_path/f'{crf}.mp4', crf)
        frames = list(sample_frames(out, None))
        assert [number(f.image) for f in frames]==list(range(40))
        np.testing.assert_allclose([f.time for f in frames], [f.time for f in sample_frames(path, None)], atol=1e-3)
        sizes.append(out.stat().st_size)
    assert sizes[0]>sizes[1]>sizes[2]
    upright = compress_video(encode(tmp_path/'r.mp4', 5, rotation=90), tmp_path/'u.mp4', 23)
    assert (probe_video(upright).width, probe_video(upright).height, probe_video(upright).rotation)==(SIZE, 2*SIZE, 0)

# -- synthetic clips -------------------------------------------------------------------------------------------------

def test_synthetic_clips(clip):
    again = synthetic_clip(3, seconds=.2, size=224, seed=1)
    assert len(clip)==20 and len(again)==5 and (clip[0].image==again[0].image).all()
    assert len({f.identity for f in clip})==1 and [f.meta['index'] for f in clip]==list(range(20))
    steps = np.linalg.norm(np.diff([f.points.mean(0) for f in clip], axis=0), axis=1)
    assert 0<steps.max()<8 and np.ptp([f.meta['yaw'] for f in clip])>.1
    still = synthetic_clip(3, seconds=.1, size=96, motion=0)
    assert all((f.image==still[0].image).all() for f in still)

# -- tracks ---------------------------------------------------------------------------------------------------------

class FixedFinder:
    "A face finder that returns given boxes, frame by frame"
    def __init__(self, boxes): self.boxes, self.k = boxes, -1
    def find(self, image):
        self.k += 1
        return [FaceDetection(np.float32(b), np.float32([[b[0]+b[2]*x, b[1]+b[3]*y] for x, y in ((.3, .4), (.7, .4), (.5, .6), (.35, .8), (.65, .8))]), .9) for b in self.boxes[self.k]]

def track_boxes(boxes, **kw): return track_faces([Frame(i, i/25, np.zeros((200, 300, 3), np.uint8)) for i in range(len(boxes))], FixedFinder(boxes), **kw)

def test_two_faces_that_come_in_any_order_keep_their_tracks():
    a, b = [[20+i, 50, 60, 70] for i in range(30)], [[180-i, 55, 62, 72] for i in range(30)]
    tracks = track_boxes([[x, y] if i%3 else [y, x] for i, (x, y) in enumerate(zip(a, b))])
    assert len(tracks)==2 and all(len(t)==30 for t in tracks)
    assert all(abs(np.diff(t.boxes[:, 0])).max()<3 for t in tracks)

def test_the_main_face_comes_first():
    tracks = track_boxes([[[10, 10, 20, 20], [100, 60, 80, 90]] if i>5 else [[10, 10, 20, 20]] for i in range(20)])
    assert tracks[0].boxes[0, 2]>70 and tracks[0].index[0]==6 and 3 not in tracks[0] and 3 in tracks[1]

def test_a_short_absence_is_bridged_and_a_long_one_is_not():
    seen = [[[40+2*i, 50, 60, 70]] for i in range(30)]
    short = track_boxes([[] if 10<=i<14 else s for i, s in enumerate(seen)], sigma=0)
    assert len(short)==1 and short[0].at(12).score==0
    np.testing.assert_allclose(short[0].at(12).box, [64, 50, 60, 70], atol=.01)
    long = track_boxes([[] if 8<=i<20 else s for i, s in enumerate(seen)])
    assert sorted(len(t) for t in long)==[8, 10]
    with pytest.raises(NoFaceError, match='frame 12'): long[0].at(12)

def test_no_face_no_track():
    assert track_boxes([[], [], []])==[] and track_boxes([])==[]

def test_smoothing_calms_and_does_not_lag():
    rng, n = np.random.default_rng(0), 60
    path = 40+1.5*np.arange(n)
    [track] = track_boxes([[[x+e, 50, 60, 70]] for x, e in zip(path, rng.normal(0, 1, n))])
    assert np.abs(np.diff(track.boxes[:, 0], 2)).mean()<.1 and np.abs(track.boxes[:, 0]-path).max()<1.5
    assert np.abs((track.boxes[:, 0]-path)[[0, -1]]).max()<1.5

def test_frames_far_apart_are_not_smeared():
    frames = [Frame(50*i, 2.*i, np.zeros((200, 300, 3), np.uint8)) for i in range(5)]
    boxes = [[[40+10*i*i%37, 50, 60, 70]] for i in range(5)]
    [track] = track_faces(frames, FixedFinder(boxes))
    np.testing.assert_allclose(track.boxes[:, 0], [b[0][0] for b in boxes], atol=.05)
    assert 100 in track and 1 not in track

@pytest.fixture(scope='module')
def pair(data, clip):
    "A clip, its fake, and the tracks of both"
    donor = synthetic_face(77, 224, 5, yaw=0., pitch=0., roll=0.)
    real = [Frame(i, i/25, f.image) for i, f in enumerate(clip)]
    fake = [Frame(i, i/25, forge(f, 'swap', 1, donor).fake) for i, f in enumerate(clip)]
    return real, fake, track_faces(real), track_faces(fake)

def test_a_synthetic_face_is_tracked(pair, clip):
    [track, *_] = pair[2]
    assert len(track)==len(clip) and (track.scores>0).mean()>.9
    off = np.array([np.linalg.norm(track.at(i).points.mean(0)-clip[i].points.mean(0)) for i in track.index])
    assert off.max()<12

def test_one_box_for_a_fake_and_its_source(pair, clip):
    real, fake, [track, *_], [own, *_] = pair
    def marked(other, i):
        outside = track.crop(np.repeat(cv2.dilate(np.uint8(255*clip[i].region), np.ones((15, 15)))[..., None], 3, 2), i, 160).image[..., 0]<3
        return ssim_mask(track.crop(real[i], size=160).image, other.crop(fake[i], size=160).image)[outside].mean()
    one_box, own_boxes = [np.mean([marked(t, i) for i in (0, 10)]) for t in (track, own)]
    assert one_box<.01<.05<own_boxes
    a, b = track.crop(real[7]), track.crop(fake[7].image, 7)
    assert a.meta['box']==b.meta['box'] and a.image.shape==(224, 224, 3) and a.meta['index']==7
    np.testing.assert_array_equal(a.points, b.points)
    assert track.crop(real[7], size=299, align='box').image.shape==(299, 299, 3)

def test_crop_needs_a_frame_number(pair):
    real, _, [track, *_], _ = pair
    with pytest.raises(DeepfidError, match='number of the frame'): track.crop(real[0].image)
    with pytest.raises(NoFaceError, match='frame 999'): track.crop(real[0].image, 999)

def test_from_file_to_crops(tmp_path, clip, data):
    path = write_video(clip, tmp_path/'c.mp4', crf=10)
    frames = list(sample_frames(path, 8))
    [track, *_] = track_faces(frames)
    faces = [track.crop(f) for f in frames if f.index in track]
    assert len(faces)==8 and all(isinstance(f, Face) for f in faces)
