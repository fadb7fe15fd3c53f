"Readers of photographs: what is there, who consented, what is said when nothing is there"
import numpy as np, pytest
from deepfid.core import ConsentError, DataMissingError, DeepfidError, five_points
from deepfid.data.datasets import landmarks68, london, london_info, portraits, read_template
from deepfid.data.faces import find_face
from deepfid.data.forge import forge
from deepfid.data.manifest import build_pairs

def test_missing_sets_say_what_to_get(tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='figshare'): london()
    with pytest.raises(DataMissingError, match='us-house'): portraits(tmp_path)
    (tmp_path/'portraits').mkdir()
    with pytest.raises(DataMissingError, match='436'): portraits(tmp_path)

def test_bad_template(tmp_path):
    (tmp_path/'a.tem').write_text('3\n1 2\n3 4\n')
    with pytest.raises(DeepfidError, match='a.tem'): read_template(tmp_path/'a.tem')
    with pytest.raises(DataMissingError, match='b.tem'): read_template(tmp_path/'b.tem')

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
        apart = np.linalg.norm(points[1]-points[0])
        assert np.abs(template[:2]-points[:2]).max()<.06*apart # the first two points of a template are the pupils
        assert np.abs(find_face(s.path).points-points).max()<.15*apart

def test_portraits_are_only_self_blended(data, tmp_path):
    people = portraits(data)
    assert len(people)==436 and not any(s.consent or s.landmarks for s in people)
    with pytest.raises(ConsentError): forge(people[0].load(160), 'resynth', 0)
    m = build_pairs(people[:20], tmp_path/'set', pairs=(6, 2, 2), workers=1)
    assert set(m.table['method'])=={'real', 'selfblend'} and not m.table['consent'].any()
    with pytest.raises(DeepfidError, match='consent'): build_pairs(people[:20], tmp_path/'other', methods=['swap'], pairs=(6, 2, 2), workers=1)
    assert not (tmp_path/'other').exists()
