"The London faces in the package: count, landmarks, split, credit, offline, repeatable"
import json, os, subprocess, sys
import numpy as np, pytest
from deepfid.core import DeepfidError, WeightsError, five_points
from deepfid.data.faces import FaceFinder, main_face
from deepfid.data.london import (LONDON_CREDIT, LONDON_MARGIN, LONDON_SHA256, add_london_credit,
    fit_mean_shape, london_faces, london_mean_shape, london_path, london_people, london_split, read_london_archive)
from deepfid.io import file_hash

@pytest.fixture(scope='module')
def faces(): return london_faces()

def eye_distance(points): return np.linalg.norm(points[1]-points[0])

def test_both_expressions_of_all_people(faces):
    assert len(faces)==204 and len({(f.identity, f.meta['expression']) for f in faces})==204 and len({f.identity for f in faces})==102
    for f in faces:
        assert f.image.shape==(256, 256, 3) and f.image.dtype==np.uint8 and f.consent and f.source=='london' and f.identity.startswith('london-')
        assert f.meta['gender'] in ('female', 'male') and f.meta['ethnicity'] and f.meta['age'] in (None, *range(18, 60))
        assert (f.meta['landmarks']=='annotated')==(f.meta['expression']=='neutral')
    assert sum(f.meta['age'] is None for f in faces)==4

def test_landmarks_are_where_a_detector_sees_eyes(faces):
    finder, distances = FaceFinder(), []
    for f in faces[::5]:
        assert 2<f.landmarks.min() and f.landmarks.max()<254
        found, got = main_face(finder.find(f.image)), five_points(f.landmarks)
        distances.append(np.linalg.norm(found.points[:2]-got[:2], axis=1)/eye_distance(got)) # one detection is off by some 5 %
        assert abs(LONDON_MARGIN*max(found.box[2:])/256-1)<.15 and np.abs(found.box[:2]+found.box[2:]/2-128).max()<12
    assert np.max(distances)<.2 and np.mean(distances)<.07

def test_jaw_and_hairline_are_inside(faces):
    for f in faces:
        eyes, chin = f.points[:2].mean(0), f.landmarks[8]
        assert eyes[1]>.9*(chin[1]-eyes[1]) and chin[1]<246 # a forehead is lower than the rest of the face

def test_narrower_crops_keep_landmarks_on_the_face(faces):
    wide, narrow = faces[0], london_faces(128, 1.2, 'neutral')[0]
    np.testing.assert_allclose((narrow.landmarks-64)*2*1.2/LONDON_MARGIN, wide.landmarks-128, atol=1e-2)
    assert narrow.image.shape==(128, 128, 3)
    tight = FaceFinder().find(narrow.image)[0]
    assert np.linalg.norm(tight.points[:2]-narrow.points[:2], axis=1).max()<.15*eye_distance(narrow.points)

def test_mean_shape_follows_five_points():
    shape = london_mean_shape()
    points = np.array([[30., 40], [70, 42], [50, 60], [35, 80], [66, 81]])
    turned = points@np.array([[0, 1.5], [-1.5, 0]])+7
    expected = fit_mean_shape(points)@np.array([[0, 1.5], [-1.5, 0]])+7
    np.testing.assert_allclose(fit_mean_shape(turned), expected, atol=1e-3)
    assert shape.shape==(68, 2) and np.abs(five_points(fit_mean_shape(points))-points).max()<10

def test_split_is_by_person_and_the_datasets_own(data):
    from deepfid.data.datasets import read_clips
    split = london_split()
    assert [list(split.values()).count(s) for s in ('train', 'valid', 'test')]==[72, 10, 20]
    assert split=={c.identity: c.split for c in read_clips('london', data)} and split!=london_split(1)
    assert {f.identity for f in london_faces(32, split='valid')}==london_people('valid')

def test_file_is_small_and_has_its_licence():
    files = read_london_archive()
    assert sum(p.stat().st_size for p in london_path().parent.iterdir())<=6e6 and file_hash(london_path())==LONDON_SHA256
    assert (london_path().parent/'LICENSE').read_bytes()==files['LICENSE']
    for words in ('CC BY 4.0', '10.6084/m9.figshare.5047666', 'signed consent', 'DeBruine', 'Changes'): assert words in files['LICENSE'].decode()
    assert json.loads(files['faces.json'])['credit']==LONDON_CREDIT and len(files)==206

def test_credit_is_below_image_and_figure(faces):
    from deepfid.plotting import new_figure
    image = add_london_credit(faces[0].image, 'Altered by swap.')
    assert image.shape[1]==256 and image.shape[0]>280 and np.array_equal(image[:256], faces[0].image) and image[256:].min()<128
    import matplotlib.pyplot as plt
    for fig, ax in (new_figure(), plt.subplots()):
        np.ravel(ax)[0].set_xlabel('below the axis')
        [text] = [t for t in add_london_credit(fig).findobj(lambda o: 'DeBruine' in getattr(o, 'get_text', str)())]
        assert LONDON_CREDIT==' '.join(text.get_text().split())
        fig.draw_without_rendering()
        assert text.get_window_extent().y1<np.ravel(ax)[0].xaxis.label.get_window_extent().y0
    plt.close('all')

def test_needs_no_network_data_or_heavy_libraries():
    code = '''if True:
        import sys, deepfid.data.london
        assert not {'torch', 'pandas', 'matplotlib', 'fastai', 'timm'} & set(sys.modules)
        import socket
        socket.socket = None
        print(len(deepfid.data.london.london_faces(32)))'''
    env = {k: v for k, v in os.environ.items() if k!='DEEPFID_DATA'}
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.split()==['204']

def test_refused(tmp_path):
    for wrong in (dict(margin=1.7), dict(expressions='angry'), dict(split='all'), dict(size=2)):
        with pytest.raises(DeepfidError, match=next(iter(wrong))[:6]): london_faces(**wrong)
    with pytest.raises(WeightsError, match='no such file'): read_london_archive(tmp_path/'x.zip')
    (tmp_path/'x.zip').write_bytes(b'no zip')
    with pytest.raises(WeightsError, match='sha256'): read_london_archive(tmp_path/'x.zip')

def test_a_crop_is_made_again_byte_for_byte(data):
    "Of the half-size copies that the file was made from; the published photographs are twice as large. All of them: the notebook"
    from deepfid.data.datasets import london
    from deepfid.data.london import _crop_photograph
    from deepfid.io import read_image
    files, photographs = read_london_archive(), london(data)
    if read_image(photographs[0].path).shape[0]!=675: pytest.skip('not the half-size copies')
    entries = {e['file']: e for e in json.loads(files['faces.json'])['faces']}
    for photograph in (photographs[7], photographs[-7]):
        made = _crop_photograph(photograph, FaceFinder())
        assert made['jpeg']==files[made['file']] and made['points'].tolist()==entries[made['file']]['points']
