"Reading any image file safely, argument checks, faces, calibration, atomic writes and checked downloads"
import io, os, struct, subprocess, sys
import numpy as np, pytest
from PIL import Image, ImageCms, PngImagePlugin
from deepfid.core import (DataMissingError, DeepfidError, Detector, Face, ImageError, Prediction, WeightsError, check_array, check_choice, check_image, check_number, install_hint,
    data_dir, face_region, five_points, get_preset, platt_scaling, printable, set_seed)
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

@pytest.mark.parametrize('value, rules', [(2.5, dict(integer=True)), (True, {}), (10**400, {}), (-10**400, {}), (float('nan'), {}), ('1', {}), (None, {}), (0, dict(low=0, above=True)), (1., dict(high=1, below=True)), (3, dict(low=4)), (3, dict(high=2))])
def test_check_number_refuses(value, rules):
    with pytest.raises(DeepfidError, match='^lr='): check_number('lr', value, **rules)

def test_checks_return_what_is_good():
    assert check_number('n', np.int64(3), 3, 3, integer=True)==3 and check_number('n', None, optional=True) is None
    assert check_choice('mode', 'a', 'ab')=='a' and check_array('a', [[1], [2]], (None, 1), float).dtype==float
    for shape in ((4, 4), (4, 4, 4), (0, 4, 3)):
        with pytest.raises(ImageError, match='^fake: .*RGB'): check_image('fake', np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match='not str'): check_image('fake', 'a.jpg')

def test_hints_name_what_can_be_installed(tmp_path, monkeypatch):
    from deepfid import core
    assert install_hint('app').startswith("pip install '.[app]' in ") # tests run in a clone
    monkeypatch.setattr(core, 'requires', lambda name: ['torch>=2', 'voila>=0.5; extra == "app"', "accelerate>=1.0; extra == 'multi'"])
    assert install_hint('app', tmp_path)=="pip install 'voila>=0.5'"
    def absent(name): raise core.PackageNotFoundError(name)
    monkeypatch.setattr(core, 'requires', absent)
    assert install_hint('app', tmp_path)=="pip install '.[app]' in a clone of deepfid"

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

# -- colour profiles ----------------------------------------------------------------------------------------------------

# columns: red, green, blue as XYZ under D50
PRIMARIES = dict(srgb=[[.4361, .3851, .1431], [.2225, .7169, .0606], [.0139, .0971, .7141]], p3=[[.5151, .2920, .1571], [.2412, .6922, .0666], [-.0011, .0419, .7841]],
    prophoto=[[.7977, .1352, .0313], [.2880, .7119, .0001], [0, 0, .8249]], adobe=[[.6097, .2053, .1492], [.3111, .6257, .0632], [.0195, .0609, .7446]])

def srgb_decode(v): return np.where(v<=.04045, v/12.92, ((v+.055)/1.055)**2.4)
def srgb_encode(v): return np.where(v<=.0031308, v*12.92, 1.055*np.maximum(v, 1e-9)**(1/2.4)-.055)
CURVES = dict(p3=srgb_decode, srgb=srgb_decode, prophoto=lambda v: v**1.8, adobe=lambda v: v**2.2, linear=lambda v: v, grey=lambda v: v**1.2)

def icc_profile(primaries, curve, space=b'RGB '):
    "An ICC profile of version 2 with a matrix (or, grey, without one) and a curve"
    def fixed(*values): return b''.join(struct.pack('>i', round(v*65536)) for v in values)
    table = np.rint(65535*curve(np.linspace(0, 1, 1024))).astype('>u2').tobytes()
    tags = {b'wtpt': b'XYZ \0\0\0\0'+fixed(.9642, 1, .8249), b'desc': b'desc\0\0\0\0'+struct.pack('>I', 2)+b'x\0'+bytes(80), b'cprt': b'text\0\0\0\0x\0'}
    trc = b'curv\0\0\0\0'+struct.pack('>I', 1024)+table
    if space==b'GRAY': tags[b'kTRC'] = trc
    else:
        for i, c in enumerate('rgb'): tags |= {f'{c}XYZ'.encode(): b'XYZ \0\0\0\0'+fixed(*[row[i] for row in primaries]), f'{c}TRC'.encode(): trc}
    directory, body, start = b'', b'', 128+4+12*len(tags)
    for name, content in tags.items():
        content += bytes(-len(content)%4)
        directory += name+struct.pack('>II', start+len(body), len(content))
        body += content
    head = struct.pack('>I4sI4s4s4s', start+len(body), b'lcms', 0x02400000, b'mntr', space, b'XYZ ')+struct.pack('>6H', 2026, 1, 1, 0, 0, 0)+b'acsp'+bytes(28)
    return head+fixed(.9642, 1, .8249)+bytes(48)+struct.pack('>I', len(tags))+directory+body

def ramp(): return np.stack(np.meshgrid(*[np.uint8([60, 100, 130, 160])]*3), -1).reshape(8, 8, 3).repeat(4, 0).repeat(4, 1)

def with_profile(image, profile, format='PNG', **options):
    out = io.BytesIO()
    image.save(out, format, icc_profile=profile, **options)
    return read_image(out.getvalue())

@pytest.mark.parametrize('name', ['p3', 'prophoto', 'adobe', 'linear'])
@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'WEBP'])
def test_profiles_are_converted_to_srgb(name, format):
    a = ramp()
    primaries, curve = PRIMARIES.get(name, PRIMARIES['srgb']), CURVES[name]
    linear = curve(a/255)@np.array(primaries).T@np.linalg.inv(PRIMARIES['srgb']).T
    expected = np.rint(255*srgb_encode(np.clip(linear, 0, 1)))
    got = with_profile(Image.fromarray(a), icc_profile(primaries, curve), format, **(dict(lossless=True) if format=='WEBP' else {}))
    assert np.abs(got-expected).max()<=2 and np.abs(got.astype(int)-a).max()>4

class Halves(Detector):
    "Every face is as real as fake"
    calibration = (1., -.5)
    def predict(self, faces, batch_size=32): return [Prediction(.5, None) for _ in faces]

@pytest.mark.parametrize('call, message', [
    (lambda d: d.score(None), 'give a Manifest .*, not NoneType'), (lambda d: d.score([np.zeros((8, 8, 3), np.uint8)]), 'give a Manifest .*, not list'),
    (lambda d: d.score_to_proba(['x']), 'fidelity'), (lambda d: d.score_to_proba([float('nan')]), 'NaN'), (lambda d: d.score_to_proba(None), 'fidelity'),
    (lambda d: d.calibrate_on_scores([.1, .2], [1, 0], ['somebody']), 'labels'), (lambda d: d.calibrate_on_scores([.1, .2, .3], [1, 0]), 'labels')])
def test_doors_of_every_detector_refuse_in_one_line(call, message):
    with pytest.raises(DeepfidError, match=message) as e: call(Halves())
    assert '\n' not in str(e.value)

def test_srgb_profiles_change_nothing():
    a = ramp()
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), icc_profile(PRIMARIES['srgb'], CURVES['srgb'])):
        np.testing.assert_array_equal(with_profile(Image.fromarray(a), profile), a)

@pytest.mark.parametrize('gamma', [1., 1/1.8, 1/2.2, 0, 40])
def test_the_gamma_of_a_png_is_heard(gamma):
    "Without a colour space of its own; as in browsers, that of a usual screen and one that cannot be change nothing"
    a, info = ramp(), PngImagePlugin.PngInfo()
    info.add(b'gAMA', struct.pack('>I', round(1e5*gamma)))
    expected = np.rint(255*srgb_encode((a/255)**(1/gamma))) if gamma in (1., 1/1.8) else a
    assert np.abs(with_profile(Image.fromarray(a), None, pnginfo=info).astype(int)-expected).max()<=1
    info.add(b'sRGB', b'\0')
    np.testing.assert_array_equal(with_profile(Image.fromarray(a), None, pnginfo=info), a)

def with_coding(a, primaries, transfer, **options):
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add(b'cICP', bytes([primaries, transfer, 0, 1]))
    info.add_text('comment', 'before and after')
    Image.fromarray(a).save(file, 'PNG', pnginfo=info, **options)
    return file.getvalue()

def in_hdr(a, transfer):
    "The levels in BT.2020 and PQ or HLG that show sRGB levels with their white at 203 cd/m2 (ITU-R BT.2100, BT.2408)"
    light = (np.where((x := a/255)<=.04045, x/12.92, ((x+.055)/1.055)**2.4)@np.transpose([[.6274, .3293, .0433], [.0691, .9195, .0114], [.0164, .0880, .8956]]))*203
    if transfer==16: return ((.8359375+18.8515625*(y := np.maximum(light/10_000, 0)**.1593017578125))/(1+18.6875*y))**78.84375
    scene = (light/1000)*((light@[.2627, .678, .0593]/1000)[..., None]+1e-12)**(1/1.2-1)
    return np.where(scene<=1/12, np.sqrt(3*np.maximum(scene, 0)), .17883277*np.log(np.maximum(12*scene-.28466892, 1e-9))+.55991073)

def test_the_colours_that_a_png_codes_are_heard():
    "A cICP chunk counts before an ICC profile; P3 of a telephone comes out as with its profile, HDR with its white in place"
    a, p3 = ramp(), icc_profile(PRIMARIES['p3'], CURVES['p3'])
    expected = with_profile(Image.fromarray(a), p3).astype(int)
    assert np.abs(expected-a).max()>4 and np.abs(read_image(with_coding(a, 12, 13))-expected).max()<=1
    np.testing.assert_array_equal(read_image(with_coding(a, 1, 13, icc_profile=p3)), a)
    linear = np.rint(255*srgb_encode(a/255))
    assert np.abs(read_image(with_coding(a, 1, 8))-linear).max()<=1
    for transfer in (16, 18):
        levels = np.rint(255*in_hdr(a, transfer)).astype(np.uint8)
        error = np.abs(read_image(with_coding(levels, 9, transfer)).astype(int)-a)
        assert error.mean()<3 and np.abs(levels.astype(int)-a).mean()>9, error.mean() # 8 bits of HDR are coarse
    for coding in ((12, 99), (250, 13)): np.testing.assert_array_equal(read_image(with_coding(a, *coding)), a)
    cut = with_coding(a, 12, 13)
    for n in range(30, 90): # in and around the chunk
        with pytest.raises(ImageError): read_image(cut[:n])

def test_the_colours_that_an_avif_codes_are_heard():
    from PIL import features
    if not features.check('avif'): pytest.skip('a Pillow without AVIF')
    a, file = ramp(), io.BytesIO()
    Image.fromarray(a).save(file, 'AVIF', quality=100, subsampling='4:4:4')
    data = file.getvalue()
    at = data.index(b'colrnclx')+8
    plain, wide = (read_image(data[:at]+struct.pack('>HH', *coding)+data[at+4:]) for coding in ((1, 13), (12, 13)))
    expected = read_image(with_coding(plain, 12, 13)).astype(int)
    assert np.abs(wide-expected).max()<=1 and np.abs(wide.astype(int)-plain).max()>4

def test_grey_transparent_palette_and_cmyk_images_with_profiles():
    a, grey = ramp(), icc_profile(None, CURVES['grey'], b'GRAY')
    p3, expected = icc_profile(PRIMARIES['p3'], CURVES['p3']), None
    seen = with_profile(Image.fromarray(a[..., 0]), grey)
    expected = np.rint(255*srgb_encode(CURVES['grey'](a[..., 0]/255)))
    assert np.abs(seen-expected[..., None]).max()<=2
    seen = with_profile(Image.fromarray(a[..., 0].astype(np.uint16)*257), grey) # 16 bits
    assert np.abs(seen-expected[..., None]).max()<=2
    expected = with_profile(Image.fromarray(a), p3)
    rgba = np.dstack([a, np.full(a.shape[:2], 255, np.uint8)])
    rgba[:8, ..., 3] = 0
    seen = with_profile(Image.fromarray(rgba), p3)
    assert (seen[:8]==255).all() and np.abs(seen[8:].astype(int)-expected[8:]).max()<=1
    palette = Image.fromarray(a).quantize(64)
    assert np.abs(with_profile(palette, p3).astype(int)-with_profile(palette.convert('RGB'), p3)).max()<=1
    # of another mode, or broken: as if there were none
    for image, profile in ((Image.fromarray(a), grey), (Image.fromarray(a).convert('CMYK'), p3), (Image.fromarray(a), p3[:200]), (Image.fromarray(a), b'no profile')):
        with_tiff = with_profile(image, profile, 'TIFF')
        out = io.BytesIO()
        image.save(out, 'TIFF')
        np.testing.assert_array_equal(with_tiff, read_image(out.getvalue()))

def test_a_profile_is_applied_before_the_image_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    p3, a = icc_profile(PRIMARIES['p3'], CURVES['p3']), ramp()[:16]
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(a, 1))).save(out, 'PNG', icc_profile=p3, exif=exif)
    np.testing.assert_array_equal(read_image(out.getvalue()), with_profile(Image.fromarray(a), p3))

def test_cmyk_images_are_printed_by_their_profile():
    ramp8, lab = bytes(range(256)), []
    for inks in np.ndindex(2, 2, 2, 2): # cyan, magenta, yellow, black of this press: all neutral but the magenta
        lightness = 255*(1-.3*sum(inks[i] for i in (0, 2)))*(1-inks[3])
        lab += [int(lightness), 128+60*inks[1], 128]
    lut = b'mft1\0\0\0\0'+bytes([4, 3, 2, 0])+b''.join(struct.pack('>i', 65536*(i%4==0)) for i in range(9))+ramp8*4+bytes(lab)+ramp8*3
    tags = {b'A2B0': lut+bytes(-len(lut)%4), b'desc': b'desc\0\0\0\0'+struct.pack('>I', 2)+b'x\0'+bytes(82), b'wtpt': b'XYZ \0\0\0\0'+struct.pack('>3i', 63190, 65536, 54061)}
    directory, body, start = b'', b'', 128+4+12*len(tags)
    for name, data in tags.items():
        directory += name+struct.pack('>II', start+len(body), len(data))
        body += data
    head = struct.pack('>I4sI4s4s4s', start+len(body), b'lcms', 0x02400000, b'prtr', b'CMYK', b'Lab ')+struct.pack('>6H', 2026, 1, 1, 0, 0, 0)+b'acsp'+bytes(28)
    profile = head+struct.pack('>3i', 63190, 65536, 54061)+bytes(48)+struct.pack('>I', len(tags))+directory+body
    cyan = Image.fromarray(np.full((16, 16, 4), (255, 0, 0, 0), np.uint8), 'CMYK')
    r, g, b = with_profile(cyan, profile, 'TIFF')[8, 8].astype(int)
    assert max(r, g, b)-min(r, g, b)<12 and 150<g<185    # L* 70 is grey 171
    r, g, b = with_profile(Image.fromarray(np.full((16, 16, 4), (0, 255, 0, 0), np.uint8), 'CMYK'), profile, 'JPEG', quality=95)[8, 8].astype(int)
    assert r>g+40 and b>g+20

# -- mutated images -----------------------------------------------------------------------------------------------------

def seed_images():
    "Small images of every format and of many modes"
    a, exif = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8), Image.Exif()
    exif[0x0112], exif[0x010e] = 6, 'a description'
    image, p3 = Image.fromarray(a), icc_profile(PRIMARIES['p3'], CURVES['p3'])
    grey, deep = image.convert('L'), Image.fromarray(np.uint16(a[..., 0])*257)
    cases = [(image, 'JPEG', dict(exif=exif, icc_profile=p3)), (image, 'JPEG', dict(progressive=True)), (image.convert('CMYK'), 'JPEG', {}), (grey, 'JPEG', dict(icc_profile=p3)),
        (image, 'PNG', dict(exif=exif, icc_profile=p3)), (image.convert('RGBA'), 'PNG', {}), (image.quantize(16), 'PNG', dict(transparency=3)), (deep, 'PNG', {}), (image.convert('1'), 'PNG', {}),
        (image, 'WEBP', dict(exif=exif, icc_profile=p3)), (image, 'WEBP', dict(lossless=True)), (image, 'BMP', {}), (image.quantize(16), 'BMP', {}),
        (image, 'GIF', dict(save_all=True, append_images=[image.rotate(90)])), (image, 'PPM', {}), (deep, 'PPM', {}), (image, 'JPEG2000', {}), (image, 'AVIF', {}),
        *[(image, 'TIFF', dict(compression=c, icc_profile=p3)) for c in (None, 'tiff_lzw', 'jpeg', 'packbits')], (deep, 'TIFF', {}), (grey.convert('F'), 'TIFF', {})]
    out = []
    for im, format, options in cases:
        data = io.BytesIO()
        im.save(data, format, **options)
        out.append((format, data.getvalue()))
    try: import pillow_heif
    except ImportError: return out
    data = io.BytesIO()
    pillow_heif.from_pillow(image).save(data, exif=exif.tobytes())
    return [*out, ('HEIF', data.getvalue())]

def mutate(data, rng):
    "Change some bytes, most of them near the beginning, where the headers are; or cut, repeat or remove a part"
    data = bytearray(data)
    for _ in range(rng.integers(1, 8)):
        n = len(data)
        i = int(rng.integers(0, max(1, min(n, 200 if rng.random()<.6 else n))))
        kind, k = rng.integers(0, 6), int(rng.integers(1, 24))
        if kind==0 and n: data[min(i, n-1)] = rng.integers(0, 256)
        elif kind==1: data[i:i+4] = bytes(rng.choice([0, 255, 127, 128, 1], 4).astype(np.uint8))
        elif kind==2: del data[i:i+k]
        elif kind==3: data[i:i] = data[i:i+k]
        elif kind==4 and rng.random()<.2: del data[int(rng.integers(0, n+1)):]
        elif n: data[min(i, n-1)] ^= 1<<int(rng.integers(0, 8))
    return bytes(data)

def fuzz(n, seed):
    "Read mutated images: (number read, number refused); anything but an `ImageError` escapes"
    rng, seeds, read = np.random.default_rng(seed), seed_images(), 0
    for i in range(n):
        data = mutate(seeds[i%len(seeds)][1], rng)
        try: a = read_image(data, max_pixels=4_000_000, name=f'{seed}-{i}')
        except ImageError as e: assert str(e).startswith(f'{seed}-{i}: ') and '\n' not in str(e)
        else:
            assert a.dtype==np.uint8 and a.ndim==3 and a.shape[2]==3 and a.size
            read += 1
    return read, n-read

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('n, seed', [(2000, 0), pytest.param(10_000, 1, marks=pytest.mark.slow)])
def test_mutated_images_give_an_image_or_one_line(n, seed):
    read, refused = fuzz(n, seed)
    assert read>n//20 and refused>n//20

def test_broken_tiff_files_print_nothing_themselves():
    "Neither libtiff's lines nor PIL's warnings: what is wrong is the error of the file"
    code = '''if True:
        import io, random
        from PIL import Image
        from deepfid.core import ImageError
        from deepfid.io import read_image
        rng, refused = random.Random(1), 0
        for compression in ('tiff_adobe_deflate', 'tiff_lzw', 'group4'):
            out, image = io.BytesIO(), Image.linear_gradient('L')
            image.convert('1' if compression=='group4' else 'RGB').save(out, 'TIFF', compression=compression)
            for _ in range(60):
                data = bytearray(out.getvalue())
                for _ in range(10): data[rng.randrange(len(data))] = rng.randrange(256)
                try: read_image(bytes(data))
                except ImageError: refused += 1
        print(refused)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==0 and int(done.stdout)>20 and done.stderr=='', done

# -- permissions, names, text as numbers --------------------------------------------------------------------------------

def test_files_have_the_permissions_of_any_new_file(tmp_path):
    from safetensors.numpy import save_file
    from deepfid.io import InlineImage, save_safetensors
    (tmp_path/'new').touch()
    expected = (tmp_path/'new').stat().st_mode
    save_safetensors(tmp_path/'weights', dict(a=np.zeros(3)))
    write_atomically(tmp_path/'private', lambda path: save_file(dict(a=np.zeros(3)), path)) # 0600, left to itself
    InlineImage(sample()).save(tmp_path/'image.jpg')
    with atomic_folder(tmp_path/'folder', 'set of faces') as f: (f/'a').touch()
    assert {p.stat().st_mode for p in tmp_path.rglob('*') if p.is_file()}=={expected}
    (tmp_path/'weights').chmod(0o640)
    write_atomically(tmp_path/'weights', b'replaced')
    assert (tmp_path/'weights').stat().st_mode&0o777==0o640

def test_names_are_printable(tmp_path):
    assert printable('a\n\x1b[31m\udcff\u202e\x85.jpg')==r'a\n\x1b[31m\udcff\u202e\x85.jpg' and printable('名前 é\u3000👩\u200d👧.jpg')=='名前 é\u3000👩\u200d👧.jpg'
    error = str(DeepfidError('a\n\x1b[31mred\udcff.jpg: no such file'))
    assert error=='a \\x1b[31mred\\udcff.jpg: no such file'
    name = os.fsdecode(b'caf\xe9 \x1b.jpg')
    (tmp_path/name).write_bytes(b'x')
    with pytest.raises(ImageError, match=r'caf\\udce9 \\x1b.jpg: is not an image'): read_image(tmp_path/name)
    path = write_json(tmp_path/'a.json', {name: name})
    assert read_json(path)=={name: name} and path.read_bytes().isascii()

@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_commands_print_any_name_to_any_terminal(tmp_path, encoding):
    names = [os.fsdecode(b'caf\xe9.jpg'), 'a\nb.jpg', 'esc\x1b[31m.jpg', '名前.jpg', '\u202egpj.exe.jpg']
    for name in names: (tmp_path/name).write_bytes(b'no image')
    for command in (['forge', tmp_path, '--out', tmp_path/'out'], ['score', tmp_path/'gone名\x1b\n\udcff.jpg'], ['train', tmp_path/'名\x1b', '--out', tmp_path/'m']):
        done = subprocess.run([sys.executable, '-m', 'deepfid.cli', *map(str, command)], capture_output=True, env=os.environ|dict(PYTHONIOENCODING=encoding))
        lines = done.stderr.decode(encoding).splitlines()
        assert done.returncode==1 and all(line.startswith('deepfid: ') for line in lines) and '\x1b' not in ''.join(lines), done.stderr
        assert len(lines)==(len(names)+1 if command[0]=='forge' else 1)

def test_text_is_no_number():
    for value in (['.5', '1'], np.array(['1', '2']), [1, '2'], np.array([1, '2'], object)):
        with pytest.raises(DeepfidError, match='^scores: give numbers'): check_array('scores', value, (None,), float)
    assert check_array('scores', np.array([1, 2.5], object), (None,), float).dtype==float

def test_scores_and_faces_are_checked_where_they_enter():
    from deepfid.inference.hub import load
    detector = load('lisiam', 'cpu')
    with pytest.raises(DeepfidError, match='scores'): detector.calibrate_on_scores(['a', 'b'], [0, 1])
    for ask in (detector.predict, detector.predict_proba):
        with pytest.raises(DeepfidError, match='faces'): ask(None)
    from deepfid.evaluate.metrics import boundary_f1
    assert boundary_f1(np.zeros((0, 0)), np.zeros((0, 0)))==1
    for bad in (-np.ones((8, 8)), np.ones((2, 8, 8))):
        with pytest.raises(DeepfidError, match='predicted mask'): boundary_f1(bad, np.ones(bad.shape))

def test_devices_are_named_or_given():
    import torch
    from deepfid.core import supports_bf16
    assert supports_bf16('cpu') == supports_bf16(torch.device('cpu')) and supports_bf16('meta') is False

def test_people_without_a_name_are_people_of_their_own():
    from deepfid.core import Detector
    class Named(Detector):
        def fit(self, manifest): return self
        def predict(self, faces, batch_size=32): return []
    scores, labels = [.9, .8, .2, .1], [1, 1, 0, 0]
    kept = lambda people: Named().calibrate_on_scores(scores, labels, people).validation_scores
    assert kept(['']*4) == kept([None]*4) == kept(None) == dict(real=[.8, .9], fake=[.1, .2])
    assert kept(list('aabb')) == dict(real=[.9], fake=[.2]) # the first of each person

def test_a_folder_that_may_not_be_entered_is_the_cause(tmp_path, monkeypatch):
    from deepfid.core import DataMissingError, data_dir
    from deepfid.io import missing_file_problem, read_image
    (tmp_path/'closed').mkdir()
    real = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: 'closed' not in str(path) and real(path, mode))
    assert missing_file_problem(tmp_path/'closed'/'a.jpg') == f'the folder {tmp_path}/closed may not be entered (permission denied)'
    assert missing_file_problem(tmp_path/'a.jpg') == 'no such file; check the path'
    with pytest.raises(DeepfidError, match='may not be listed'): read_image(tmp_path/'closed')
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path/'closed'))
    with pytest.raises(DataMissingError, match='may not be listed'): data_dir()

@pytest.mark.parametrize('mask', [None, [0, 1], np.zeros(5), np.zeros((8, 9, 3)), np.zeros((0, 0)), np.full((8, 9), 255, np.uint8), np.full((8, 9), np.inf)])
def test_what_is_no_mask_is_refused(mask):
    from deepfid.evaluate.metrics import mask_f1, mask_iou, score_face_mask
    with pytest.raises(DeepfidError): score_face_mask(mask, np.ones((8, 9)))
    if np.size(mask): # two empty masks agree
        for measure in (mask_iou, mask_f1):
            with pytest.raises(DeepfidError): measure(mask, np.ones((8, 9)) if mask is None else mask)
