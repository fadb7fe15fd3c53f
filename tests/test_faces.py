"Face detection, alignment, quality flags and crops"
import sys, types
import cv2, numpy as np, pytest
from deepfid.core import DataMissingError, DeepfidError, Face, ImageError, NoFaceError, WeightsError
from deepfid.data.faces import (MAX_NOSE_OFFSET, MIN_SHARPNESS, YUNET_FILE, DlibFaceFinder, FaceDetection, FaceFinder, align_face, alignment_matrix,
    alignment_template, box_distance, crop_face, crop_faces, default_face_finder, face_crop_matrix, face_sharpness, find_face, main_face, nose_offset,
    quality_flags, warp_crop, yunet_path)
from deepfid.data.synth import synthetic_face

def test_a_transformed_template_comes_back():
    for angle, scale in ((0, 1), (.5, 2), (-1, .3)):
        turn = scale*np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = alignment_template(112)@turn.T+[40, -7]
        m = alignment_matrix(points, 112)
        np.testing.assert_allclose(points@m[:, :2].T+m[:, 2], alignment_template(112), atol=2e-3)

def test_align_moves_everything_alike():
    face = synthetic_face(2, size=300)
    a = align_face(face, size=112)
    m = alignment_matrix(face.points, 112)
    np.testing.assert_allclose(a.landmarks, face.landmarks@m[:, :2].T+m[:, 2], atol=1e-3)
    assert a.image.shape==(112, 112, 3) and a.region.shape==(112, 112) and a.identity==face.identity and a.consent
    lips = a.landmarks[48:60].astype(int)
    assert (a.region[lips[:, 1], lips[:, 0]]>.5).all()

def test_shrinking_keeps_positions():
    image = np.zeros((800, 800, 3), np.uint8)
    cv2.circle(image, (400, 240), 16, (255, 255, 255), -1)
    small = warp_crop(image, np.float32([[.125, 0, 0], [0, .125, 0]]), 100)[..., 0].astype(float)
    y, x = (np.indices(small.shape)*small).sum((1, 2))/small.sum()
    assert abs(x-50)<.6 and abs(y-30)<.6

@pytest.mark.parametrize('points', [np.zeros((5, 2)), np.full((5, 2), np.nan), np.zeros((4, 2))])
def test_bad_points(points):
    with pytest.raises(DeepfidError): alignment_matrix(points)

def test_face_without_points():
    with pytest.raises(DeepfidError, match='five points'): align_face(Face(np.zeros((50, 50, 3), np.uint8)))

def test_finds_every_london_face_in_the_sample(data):
    for path in sorted((data/'london'/'smiling_front').glob('*.jpg'))[:8]:
        f = find_face(path)
        assert f.points[0, 0]<f.points[1, 0] and f.points[3, 1]>f.points[0, 1] and not f.consent

def test_bad_images_are_named(data, tmp_path):
    cases = {'empty.jpg': b'', 'text.jpg': b'not an image', 'cut.jpg': (data/'london'/'neutral_front'/'001_03.jpg').read_bytes()[:3000]}
    for name, content in cases.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ImageError, match=name): find_face(tmp_path/name)
    with pytest.raises(ImageError, match='gone.jpg'): find_face(tmp_path/'gone.jpg')
    for name, shape in (('flat.png', (200, 300, 3)), ('dot.png', (1, 1, 3))):
        cv2.imwrite(str(tmp_path/name), np.full(shape, 90, np.uint8))
        with pytest.raises(NoFaceError, match=name): find_face(tmp_path/name)

def test_a_wrong_or_missing_model_is_refused(tmp_path):
    (tmp_path/'m.onnx').write_bytes(b'123')
    with pytest.raises(WeightsError, match='sha256'): FaceFinder(tmp_path/'m.onnx')
    with pytest.raises(DataMissingError, match='no such model'): FaceFinder(tmp_path/'n.onnx')

def test_faces_are_found_without_network_and_data(monkeypatch):
    import pooch
    def offline(*a, **k): raise ConnectionError('no network')
    monkeypatch.setattr(pooch, 'retrieve', offline)
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    assert yunet_path().parent.name=='weights' and (yunet_path().parent/'YUNET_LICENSE').is_file()
    assert FaceFinder().find(np.zeros((50, 50, 3), np.uint8))==[]

def test_a_changed_model_in_the_data_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path))
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/YUNET_FILE).write_bytes(yunet_path().read_bytes())
    assert yunet_path().parent==tmp_path/'models'
    (tmp_path/'models'/YUNET_FILE).write_bytes(b'123')
    with pytest.raises(WeightsError, match='sha256'): yunet_path()

# -- main face and quality flags -----------------------------------------------------------------------------

def detection(*box): return FaceDetection(np.float32(box), alignment_template(112), .9)

def test_main_face():
    a, b, c = detection(0, 0, 50, 60), detection(100, 0, 70, 80), detection(160, 10, 30, 36)
    assert main_face([a, b, c]) is b and main_face([a, b, c], near=a) is a and main_face([a, b, c], near=c.box) is c

def test_box_distance():
    assert box_distance([5, 5, 20, 30], [5, 5, 20, 30])==0
    assert box_distance([0, 0, 10, 10], [10, 0, 10, 10])==1
    assert box_distance([0, 0, 10, 10], [-5, -5, 20, 20])==pytest.approx(np.log(2))

def test_same_faces_on_a_reduced_copy(data):
    "A copy of 640 pixels shows what the full size shows, and so does one of 320"
    full, reduced, quick = FaceFinder(max_side=10_000), FaceFinder(), FaceFinder(first_side=320)
    for path in sorted((data/'london').glob('*_front/*.jpg'))[::40]+sorted((data/'portraits').glob('*.jpg'))[::80]:
        image = cv2.resize(cv2.imread(str(path))[..., ::-1], None, fx=2, fy=2)
        a, b, c = [f.find(image) for f in (full, reduced, quick)]
        assert len(a)>=1 and len(b)>=1 and len(c)>=1, path.name
        assert box_distance(main_face(a).box, main_face(b).box)<.3 and box_distance(main_face(a).box, main_face(c).box)<.3, path.name

def test_a_second_search_finds_smaller_faces(data):
    "A face too small for `first_side` is found at `max_side`"
    image = cv2.imread(str(data/'portraits'/'p000.jpg'))[..., ::-1]
    page = np.full((2000, 2000, 3), 128, np.uint8)
    page[900:1100, 900:1100] = cv2.resize(image, (200, 200), interpolation=cv2.INTER_AREA)
    assert not FaceFinder(max_side=100).find(page)
    [found] = FaceFinder(first_side=100, max_side=1000).find(page)
    assert 900<found.box[0]<1100

@pytest.mark.parametrize('shape', [(70000, 10), (10, 30000), (3, 5), (10, 640)])
def test_narrow_strips_show_no_face(shape): assert default_face_finder().find(np.zeros((*shape, 3), np.uint8))==[]

def test_quality_flags(data):
    face = find_face(data/'london'/'neutral_front'/'001_03.jpg')
    found = main_face(default_face_finder().find(face.image))
    assert quality_flags(face.image, found)==()
    scale = np.hypot(*alignment_matrix(found.points, 112, 1.)[0, :2])
    assert quality_flags(cv2.GaussianBlur(face.image, (0, 0), 3/scale), found)==('blurred',)
    small = cv2.resize(face.image, None, fx=.08, fy=.08, interpolation=cv2.INTER_AREA)
    assert 'tiny' in quality_flags(small, FaceDetection(found.box*.08, found.points*.08, .9))
    turned = found.points.copy(); turned[2, 0] = turned[1, 0]
    assert quality_flags(face.image, FaceDetection(found.box, turned, .9))==('turned',)

def test_turned_follows_the_yaw():
    offset = {yaw: nose_offset(synthetic_face(3, yaw=yaw, pitch=0., roll=.2).points) for yaw in (0., .1, .2, .5, .6)}
    assert all(offset[y]<MAX_NOSE_OFFSET for y in (0., .1, .2)) and all(offset[y]>MAX_NOSE_OFFSET for y in (.5, .6))

def test_sharpness_falls_with_blur():
    face = synthetic_face(3)
    values = [face_sharpness(cv2.GaussianBlur(face.image, (0, 0), s), face.points) for s in (.3, 1, 2, 4)]
    assert values==sorted(values, reverse=True) and values[-1]<MIN_SHARPNESS

# -- crops --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('align_by', ['similarity', 'box'])
@pytest.mark.parametrize('size', [224, 256, 299])
def test_crop(size, align_by):
    face = synthetic_face(4, size=300)
    x, y = face.points.min(0)
    d = FaceDetection(np.float32([x-40, y-60, 150, 170]), face.points, .8)
    c = crop_face(face.image, d, size, align=align_by)
    m = face_crop_matrix(d, size, align=align_by)
    assert c.image.shape==(size, size, 3) and c.meta['score']==.8 and c.meta['box']==d.box.tolist() and c.meta['flags']==quality_flags(face.image, d)
    np.testing.assert_allclose(c.points, face.points@m[:, :2].T+m[:, 2], atol=1e-3)
    np.testing.assert_array_equal(c.image, warp_crop(face.image, m, size))

def test_box_crop_is_a_square_of_one_point_three_times_the_longer_side():
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    np.testing.assert_array_equal(crop_face(noise, detection(60, 70, 100, 80), 130, align='box').image, noise[45:175, 45:175])
    with pytest.raises(DeepfidError, match='oval'): crop_face(noise, detection(60, 70, 100, 80), align='oval')

def test_crop_faces_keeps_the_order_and_names_what_fails(data, tmp_path):
    good = sorted((data/'portraits').glob('*.jpg'))[:7]
    (tmp_path/'text.jpg').write_bytes(b'no image')
    cv2.imwrite(str(tmp_path/'nobody é.png'), np.full((200, 200, 3), 90, np.uint8))
    paths = [good[0], tmp_path/'text.jpg', *good[1:], tmp_path/'nobody é.png', tmp_path/'gone.jpg']
    runs = [list(crop_faces(iter(paths), 112, workers=w)) for w in (1, 2, 3)]
    for run in runs:
        assert [p for p, _ in run]==paths
        assert [type(f) for _, f in run]==[Face if p in good else NoFaceError if 'nobody' in p.name else ImageError for p in paths]
        assert all(p.name in str(f) for p, f in run if not isinstance(f, Face))
    for (_, a), (_, b) in zip(runs[0], runs[2]):
        if isinstance(a, Face): np.testing.assert_array_equal(a.image, b.image)

def test_crop_faces_reads_ahead_only_a_little(data):
    read = []
    def paths():
        for i in range(100): read.append(i); yield data/'portraits'/'p000.jpg'
    crops = crop_faces(paths(), 64, workers=2)
    for _ in range(5): next(crops)
    assert len(read)<=5+2*2
    crops.close()

def test_crop_faces_stops_when_there_is_no_model(data, tmp_path):
    with pytest.raises(DataMissingError): list(crop_faces([data/'portraits'/'p000.jpg'], finder=lambda: FaceFinder(tmp_path/'n.onnx')))

# -- dlib -----------------------------------------------------------------------------------------------------------

def test_dlib_missing_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'dlib', None)
    with pytest.raises(DataMissingError, match='pip install dlib'): DlibFaceFinder(tmp_path/'m.dat')

def test_dlib_finder_has_the_same_interface(monkeypatch, tmp_path):
    "With a stand-in for dlib: boxes, five of its 68 points, surest first"
    face = synthetic_face(2)
    class Rect:
        def left(self): return 10
        def top(self): return 20
        def width(self): return 100
        def height(self): return 90
    class Shape:
        def parts(self): return [types.SimpleNamespace(x=x, y=y) for x, y in face.landmarks]
    fake = types.SimpleNamespace(get_frontal_face_detector=lambda: types.SimpleNamespace(run=lambda image, up, low: ([Rect(), Rect()], [.2, 1.4], [0, 0])),
                                 shape_predictor=lambda path: lambda image, rect: Shape())
    monkeypatch.setitem(sys.modules, 'dlib', fake)
    with pytest.raises(DataMissingError, match='dlib-models'): DlibFaceFinder(tmp_path/'m.dat')
    (tmp_path/'m.dat').write_bytes(b'x')
    found = DlibFaceFinder(tmp_path/'m.dat').find(face.image)
    assert [d.score for d in found]==[1.4, .2] and found[0].box.tolist()==[10, 20, 100, 90]
    np.testing.assert_allclose(found[0].points, face.points, atol=1e-3)

NOT_IMAGES = dict(grey=np.zeros((90, 90), np.uint8), float=np.zeros((90, 90, 3)), empty=np.zeros((0, 0, 3), np.uint8), rgba=np.zeros((90, 90, 4), np.uint8), path='face.jpg', flat=np.zeros(90, np.uint8))

@pytest.mark.parametrize('kind', NOT_IMAGES)
def test_every_public_door_refuses_what_is_no_rgb_image(kind):
    image, detection = NOT_IMAGES[kind], FaceDetection(np.float32([10, 10, 60, 60]), alignment_template(90), .9)
    doors = [default_face_finder().find, lambda a: face_sharpness(a, detection.points), lambda a: quality_flags(a, detection), lambda a: crop_face(a, detection, 48)]
    if kind!='path': doors.append(find_face)
    for door in doors:
        with pytest.raises(ImageError, match='image: give an RGB image as a uint8 array'): door(image)

IDENTITY = np.float32([[1, 0, 0], [0, 1, 0]])
@pytest.mark.parametrize('call, message', [
    (lambda a: FaceFinder(threshold='a'), 'threshold'), (lambda a: FaceFinder(threshold=float('nan')), 'threshold'), (lambda a: FaceFinder(threshold=7.), 'threshold'),
    (lambda a: FaceFinder(max_side=0), 'max_side'), (lambda a: FaceFinder(max_side=float('nan')), 'max_side'), (lambda a: FaceFinder(first_side='a'), 'first_side'),
    (lambda a: warp_crop(a, IDENTITY, -1), 'size'), (lambda a: warp_crop(a, IDENTITY, 2.5), 'size'), (lambda a: warp_crop(a, 0*IDENTITY, 8), 'scale of the matrix'),
    (lambda a: main_face([]), 'detections'), (lambda a: nose_offset(np.zeros((2, 2))), 'points'), (lambda a: box_distance([1, 2, 3, float('nan')], [1, 2, 3, 4]), 'box'),
    (lambda a: next(crop_faces([], workers=-1)), 'workers'), (lambda a: align_face(Face(a)), 'five points')])
def test_wrong_arguments_are_one_line(call, message):
    with pytest.raises(DeepfidError, match=message): call(synthetic_face(1, size=64).image)

def test_one_path_is_no_list_of_letters(tmp_path):
    [(path, error)] = crop_faces(tmp_path/'none.jpg', workers=1)
    assert path==tmp_path/'none.jpg' and isinstance(error, DeepfidError)

@pytest.mark.parametrize('size, margin', [(0, 1.3), (-5, 1.3), (10**6, 1.3), (112.5, 1.3), (112, 0), (112, -1), (112, float('nan')), (112, float('inf')), (112, 1e9)])
def test_crops_have_a_sensible_size_and_margin(size, margin):
    image, detection = synthetic_face(1, size=112).image, FaceDetection(np.float32([10, 10, 60, 60]), alignment_template(112), .9)
    for align in ('similarity', 'box'):
        with pytest.raises(DeepfidError, match='^size=|^margin='): crop_face(image, detection, size, margin, align)
    with pytest.raises(DeepfidError, match='^size=|^margin='): alignment_template(size, margin)

@pytest.mark.parametrize('image', [np.zeros((0, 4, 3), np.uint8), np.full((4, 4), np.nan), np.zeros(5), np.array([['a']])])
def test_warping_refuses_what_is_no_image(image):
    with pytest.raises(DeepfidError, match='image'): warp_crop(image, np.float32([[1, 0, 0], [0, 1, 0]]), 8)

# -- the axis of the face --
@pytest.mark.parametrize('size', [64, 112, 160, 224, 250, 299])
@pytest.mark.parametrize('margin', [1., 1.3, 1.6])
def test_symmetric_crops_have_the_axis_of_the_face_where_an_image_is_mirrored(size, margin):
    template = alignment_template(size, margin, 'symmetric')
    mirrored = (template*[-1, 1]+[size-1, 0])[[1, 0, 2, 4, 3]] # as `image[:, ::-1]` does
    np.testing.assert_allclose(mirrored, template, atol=.05)
    # the same scale and height as the template of face recognition, half a pixel aside
    assert np.abs(template-alignment_template(size, margin)).max()<1.1*size/112
    points = template@np.array([[.8, .6], [-.6, .8]])*1.7+[30, 5]
    m = alignment_matrix(points, size, margin, 'symmetric')
    np.testing.assert_allclose(points@m[:, :2].T+m[:, 2], template, atol=1e-3)

def test_mirrored_photograph_has_the_mirrored_symmetric_crop():
    image = np.random.default_rng(0).integers(0, 255, (200, 240, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    points = np.array([[90., 80], [150, 84], [121, 110], [98, 140], [146, 142]])
    flipped = (points*[-1, 1]+[239, 0])[[1, 0, 2, 4, 3]]
    def crop(im, p): return warp_crop(im, face_crop_matrix(types.SimpleNamespace(points=p), 112, 1.3, 'symmetric'), 112)
    a, b = crop(image, points), crop(image[:, ::-1].copy(), flipped)
    assert np.abs(a[:, ::-1].astype(int)-b).max()<=4

def test_saved_detectors_keep_their_crop_rule():
    assert alignment_template(112, 1.3)[:, 0].tolist()==pytest.approx([42.377, 69.485, 56.023, 44.885, 67.331], abs=1e-3)
