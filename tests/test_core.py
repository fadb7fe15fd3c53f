"Reading any image file safely, argument checks, faces, calibration, atomic writes and checked downloads"
import io, os, subprocess, sys
import numpy as np, pytest
from PIL import Image
from deepfid.core import (DataMissingError, DeepfidError, Detector, Face, ImageError, Prediction, WeightsError, check_array, check_choice, check_image, check_number,
    data_dir, face_region, five_points, get_preset, platt_scaling, set_seed)
from deepfid.io import atomic_folder, fetch_model_file, file_hash, montage, read_image, read_json, write_atomically, write_json

def sample():
    a = np.zeros((40, 60, 3), np.uint8)
    a[:20] = (200, 40, 30)
    a[20:, :30] = (20, 180, 60)
    return a

def save(path, image, **options):
    image.save(path, **options)
    return path

@pytest.mark.parametrize('orientation, turn', [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, 1)), (8, lambda a: np.rot90(a, -1)), (2, lambda a: a[:, ::-1])])
def test_exif_orientation(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path/'a.png', Image.fromarray(np.ascontiguousarray(turn(sample()))), exif=exif)
    np.testing.assert_array_equal(read_image(path), sample())

def test_modes(tmp_path):
    grey = np.uint8(np.indices((30, 40)).sum(0)*3)
    np.testing.assert_array_equal(read_image(save(tmp_path/'g.png', Image.fromarray(grey)))[..., 1], grey)
    np.testing.assert_array_equal(read_image(save(tmp_path/'d.png', Image.fromarray(np.uint16(grey)*257)))[..., 0], grey)
    rgba = np.dstack([sample(), np.zeros((40, 60), np.uint8)])
    assert (read_image(save(tmp_path/'t.png', Image.fromarray(rgba)))==255).all()
    for mode in ('P', 'CMYK', '1', 'LA'):
        path = tmp_path/f'm.{"tif" if mode=="CMYK" else "png"}'
        assert read_image(save(path, Image.fromarray(sample()).convert(mode))).shape==(40, 60, 3)

def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    path = save(tmp_path/'bomb.png', Image.new('1', (12000, 12000)))
    with pytest.raises(ImageError, match='bomb.png.*refused before decoding'): read_image(path)
    with pytest.raises(ImageError, match='max_pixels'): read_image(save(tmp_path/'s.png', Image.fromarray(sample())), max_pixels=100)

@pytest.mark.parametrize('name, content', [('empty.jpg', b''), ('text.jpg', b'hello'), ('gone.jpg', None)])
def test_bad_files_are_named_in_one_line(tmp_path, name, content):
    if content is not None: (tmp_path/name).write_bytes(content)
    with pytest.raises(ImageError, match=name) as e: read_image(tmp_path/name)
    assert '\n' not in str(e.value)

def test_truncated_and_folder(tmp_path):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(out, 'JPEG')
    (tmp_path/'cut.jpg').write_bytes(out.getvalue()[:len(out.getvalue())//2])
    with pytest.raises(ImageError, match='cut.jpg'): read_image(tmp_path/'cut.jpg')
    with pytest.raises(ImageError, match='folder'): read_image(tmp_path)

@pytest.mark.parametrize('source', ['path', 'bytes', 'file'])
def test_pdf_and_heic_files(tmp_path, source, monkeypatch):
    def read(path):
        with open(path, 'rb') as f: return read_image({'path': path, 'bytes': path.read_bytes(), 'file': f}[source], name=path.name)
    (tmp_path/'paper.jpg').write_bytes(b'%PDF-1.7 ...')
    with pytest.raises(ImageError, match='^paper.jpg: is a PDF'): read(tmp_path/'paper.jpg')
    heif = pytest.importorskip('pillow_heif')
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.fromarray(np.ascontiguousarray(np.rot90(sample(), 1)))
    heif.from_pillow(rotated).save(tmp_path/'phone.heic', quality=100, chroma=444, exif=exif.tobytes())
    seen = read(tmp_path/'phone.heic')
    assert seen.shape==sample().shape and np.abs(seen.astype(int)-sample())[5:15, 5:25].max()<12
    (tmp_path/'cut.heic').write_bytes((tmp_path/'phone.heic').read_bytes()[:200])
    with pytest.raises(ImageError, match='cut.heic: is'): read(tmp_path/'cut.heic')
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    with pytest.raises(ImageError, match='phone.heic: is a HEIC photograph.*pip install pillow-heif'): read(tmp_path/'phone.heic')

def test_large_heic_is_refused_before_decoding(tmp_path):
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(Image.fromarray(sample())).save(tmp_path/'a.heic')
    with pytest.raises(ImageError, match='a.heic.*max_pixels'): read_image(tmp_path/'a.heic', max_pixels=100)

def test_face_checks_its_shapes():
    image = sample()
    with pytest.raises(DeepfidError, match='landmarks'): Face(image, landmarks=np.zeros((5, 2)))
    with pytest.raises(DeepfidError, match='NaN'): Face(image, points=np.full((5, 2), np.nan))
    with pytest.raises(DeepfidError, match='uint8'): Face(image/255)
    with pytest.raises(DeepfidError, match='no landmarks'): face_region(Face(image))
    landmarks = np.random.default_rng(0).uniform(5, 35, (68, 2))
    np.testing.assert_allclose(Face(image, landmarks=landmarks).points, five_points(landmarks), atol=1e-5)

def test_platt_recovers_a_logistic_curve():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 2, 20000)
    slope, offset = platt_scaling(x, rng.random(len(x))<1/(1+np.exp(-(5*x-2))))
    assert abs(slope-5)<.3 and abs(offset+2)<.2

def test_detector_must_be_calibrated():
    class Constant(Detector):
        name = 'constant'
        def predict(self, faces, batch_size=32): return [Prediction(.3) for _ in faces]
    with pytest.raises(DeepfidError, match='not calibrated'): Constant().predict_proba([0])
    with pytest.raises(NotImplementedError): Constant().save('x')

@pytest.mark.parametrize('value, rules', [(2.5, dict(integer=True)), (True, {}), (float('nan'), {}), ('1', {}), (None, {}), (0, dict(low=0, above=True)), (1., dict(high=1, below=True)), (3, dict(low=4)), (3, dict(high=2))])
def test_check_number_refuses(value, rules):
    with pytest.raises(DeepfidError, match='^lr='): check_number('lr', value, **rules)

def test_checks_return_what_is_good():
    assert check_number('n', np.int64(3), 3, 3, integer=True)==3 and check_number('n', None, optional=True) is None
    assert check_choice('mode', 'a', 'ab')=='a' and check_array('a', [[1], [2]], (None, 1), float).dtype==float
    for shape in ((4, 4), (4, 4, 4), (0, 4, 3)):
        with pytest.raises(ImageError, match='^fake: .*RGB'): check_image('fake', np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match='not str'): check_image('fake', 'a.jpg')

def test_killed_while_writing_leaves_nothing(tmp_path):
    code = ("import os, sys\nfrom deepfid.io import atomic_folder\n"
            "with atomic_folder(sys.argv[1], 'saved detector') as f:\n    open(os.path.join(f, 'a'), 'w').write('half'); os._exit(9)")
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path/'m')]).returncode==9
    assert not (tmp_path/'m').exists()
    with pytest.raises(ZeroDivisionError): write_atomically(tmp_path/'b', lambda p: 1/0)
    assert not (tmp_path/'b').exists()

def test_presets_seeds_json_and_data_dir(tmp_path, monkeypatch):
    with pytest.raises(DeepfidError, match='tiny'): get_preset('big')
    with pytest.raises(DeepfidError, match='seed'): set_seed('x')
    assert read_json(write_json(tmp_path/'a.json', dict(a=np.float64('nan'), b=np.arange(2))))==dict(a=None, b=[0, 1])
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path/'none'))
    with pytest.raises(DataMissingError, match='none'): data_dir()
    with pytest.raises(DeepfidError, match='at least one'): montage([])

def test_model_files_are_found_by_checksum(tmp_path, monkeypatch):
    import pooch
    def offline(*a, **k): raise ConnectionError('no network')
    monkeypatch.setattr(pooch, 'retrieve', offline)
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path))
    with pytest.raises(DataMissingError, match='download it from https://x.org/m.bin'): fetch_model_file('m.bin', '0'*64, 'https://x.org/m.bin')
    path = write_atomically(tmp_path/'models'/'m.bin', b'123')
    assert fetch_model_file('m.bin', file_hash(path), '')==path
    with pytest.raises(WeightsError, match='sha256 differs'): fetch_model_file('m.bin', '0'*64, '')
    with pytest.raises(DataMissingError, match='no such model file'): fetch_model_file('m.bin', '0'*64, '', tmp_path/'none')
