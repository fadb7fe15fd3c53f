"""What must not change: scores of detectors saved by version 0.1.0, texts of the recorded tables, and the homes of public names

`tests/golden` was recorded with version 0.1.0: `scores.json` by its bundled detectors (kept in `detectors`) on 20 synthetic faces and 20 London crops,
`records` are some of its records and their texts (words since renamed), `tables/*.md` the texts of those of today, `names.json` maps each of its public names to the one of today (null: gone or private).
"""
import hashlib, json
from importlib import import_module
import numpy as np, pytest
from deepfid.data.faces import FaceFinder, face_crop_matrix, warp_crop
from deepfid.data.synth import camera_jpeg, synthetic_face
from deepfid.experiments.registry import get_table
from deepfid.experiments.records import read_record
from deepfid.experiments.markdown import record_markdown
from deepfid.inference.hub import load
from deepfid.io import read_image

@pytest.fixture(scope='module')
def golden(repo): return repo/'tests'/'golden'

@pytest.fixture(scope='module')
def scores(golden): return json.loads((golden/'scores.json').read_text(encoding='utf-8'))

def synthetic_faces(): return [read_image(camera_jpeg(synthetic_face(seed, 112).image, seed)) for seed in range(20)]

def london_crops(data):
    finder, crops = FaceFinder(), []
    for path in sorted((data/'london/neutral_front').glob('*.jpg'))[:20]:
        image = read_image(path)
        largest = max(finder.find(image), key=lambda d: d.box[2]*d.box[3])
        crops.append(warp_crop(image, face_crop_matrix(largest, 128), 128))
    return crops

def check(faces, scores, key, golden):
    same_pixels = [hashlib.sha256(f.tobytes()).hexdigest()[:16] for f in faces]==scores['pixels'][key]
    tolerance = 1e-6 if same_pixels else .02 # another JPEG or resampling code gives other last digits of the pixels
    for name in ('deepfidelity', 'local_similarity', 'lisiam'):
        want, detector = scores[name][key], load(golden/'detectors'/name)
        predictions = detector.predict(faces, 20)
        np.testing.assert_allclose([p.fidelity for p in predictions], want['fidelity'], atol=tolerance)
        np.testing.assert_allclose(detector.features(faces, 20).mean(1), want['features_mean'], atol=10*tolerance)
        if want['mask_mean'][0] is not None:
            np.testing.assert_allclose([p.mask.mean() for p in predictions], want['mask_mean'], atol=tolerance)

def test_scores_of_synthetic_faces(scores, golden): check(synthetic_faces(), scores, 'synthetic', golden)
def test_scores_of_london_crops(scores, data, golden): check(london_crops(data), scores, 'london', golden)

@pytest.mark.parametrize('folder, texts', [('nbs/results', 'tables'), ('tests/golden/records', 'records')])
def test_recorded_tables(repo, golden, folder, texts):
    "Those that the notebooks show, and some of version 0.1, whose numbers are no longer quoted: they must still be read"
    paths = sorted((repo/folder).glob('table-*.json'))
    assert {p.stem for p in paths}=={p.stem for p in (golden/texts).glob('*.md')} and paths
    for path in paths:
        record = read_record(path)
        text = record_markdown(record, get_table(record['config']['table']))
        assert text+'\n'==(golden/texts/f'{path.stem}.md').read_text(encoding='utf-8'), path.stem

def test_every_public_name_has_its_home(golden):
    names = json.loads((golden/'names.json').read_text(encoding='utf-8'))
    homes = [home for home in names.values() if home]
    assert len(homes)>.8*len(names)
    for home in homes:
        module, _, name = home.partition(':')
        assert hasattr(import_module(module), name), home
