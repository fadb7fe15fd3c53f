"Finding and aligning faces"
import os, subprocess, sys
import cv2, numpy as np, pytest
from deepfid.core import DataMissingError, DeepfidError, Face, ImageError, NoFaceError, WeightsError
from deepfid.data.faces import FaceFinder, align, crop_matrix, find_face, template, warp, yunet_path
from deepfid.data.synth import draw_face

def test_a_moved_template_comes_back():
    for angle, scale in ((0, 1), (.5, 2), (-1, .3)):
        turn = scale*np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = template(112)@turn.T+[40, -7]
        m = crop_matrix(points, 112)
        np.testing.assert_allclose(points@m[:, :2].T+m[:, 2], template(112), atol=2e-3)

def test_align_moves_everything_alike():
    face = draw_face(2, size=300)
    a = align(face, size=112)
    m = crop_matrix(face.points, 112)
    np.testing.assert_allclose(a.landmarks, face.landmarks@m[:, :2].T+m[:, 2], atol=1e-3)
    assert a.image.shape==(112, 112, 3) and a.region.shape==(112, 112) and a.identity==face.identity and a.consent
    lips = a.landmarks[48:60].astype(int)
    assert (a.region[lips[:, 1], lips[:, 0]]>.5).all()

def test_shrinking_keeps_places():
    image = np.zeros((800, 800, 3), np.uint8)
    cv2.circle(image, (400, 240), 16, (255, 255, 255), -1)
    small = warp(image, np.float32([[.125, 0, 0], [0, .125, 0]]), 100)[..., 0].astype(float)
    y, x = (np.indices(small.shape)*small).sum((1, 2))/small.sum()
    assert abs(x-50)<.6 and abs(y-30)<.6

@pytest.mark.parametrize('points', [np.zeros((5, 2)), np.full((5, 2), np.nan), np.zeros((4, 2))])
def test_bad_points(points):
    with pytest.raises(DeepfidError): crop_matrix(points)

def test_face_without_points():
    with pytest.raises(DeepfidError, match='five points'): align(Face(np.zeros((50, 50, 3), np.uint8)))

def test_finds_every_london_face_in_the_sample(data):
    for path in sorted((data/'london'/'smiling_front').glob('*.jpg'))[:8]:
        f = find_face(path)
        assert f.points[0, 0]<f.points[1, 0] and f.points[3, 1]>f.points[0, 1] and not f.consent

def test_bad_pictures_are_named(data, tmp_path):
    cases = {'empty.jpg': b'', 'text.jpg': b'not a picture', 'cut.jpg': (data/'london'/'neutral_front'/'001_03.jpg').read_bytes()[:3000]}
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

def test_offline_says_what_to_do(tmp_path, monkeypatch):
    import pooch
    def fail(*a, **k): raise ConnectionError('no network')
    monkeypatch.setattr(pooch, 'retrieve', fail)
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='opencv_zoo'): yunet_path()
