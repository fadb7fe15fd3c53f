"DeepFidelity end to end on pictures made on the spot: training, saving, refusing what is wrong"
import json, shutil
import cv2, numpy as np, pandas as pd, pytest
from deepfid.core import DeepfidError, ManifestError, WeightsError
from deepfid.data.manifest import Manifest
from deepfid.evaluate.metrics import auc
from deepfid.models.deepfidelity.detector import DeepFidelity

def texture(rng, size=64):
    "A picture with detail everywhere"
    return cv2.GaussianBlur(rng.integers(0, 256, (size, size, 3)).astype(np.uint8), (0, 0), 1.)

def blurred_inside(image):
    "Its forgery: the middle has lost its detail"
    fake, n = image.copy(), len(image)
    fake[n//4:-n//4, n//4:-n//4] = cv2.GaussianBlur(image, (0, 0), 1.5)[n//4:-n//4, n//4:-n//4]
    return fake

@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    folder, rng, rows = tmp_path_factory.mktemp('faces'), np.random.default_rng(0), []
    for i in range(90):
        split = 'train' if i<50 else 'valid' if i<70 else 'test'
        real = texture(rng)
        for label, image in ((1, real), (0, blurred_inside(real))):
            cv2.imwrite(str(folder/f'{i}_{label}.png'), image)
            rows.append(dict(path=f'{i}_{label}.png', label=label, identity=f'p{i}', split=split, pair=str(i), quality=rng.normal(),
                             method='real' if label else 'blur'))
    return Manifest(pd.DataFrame(rows), folder).check()

@pytest.fixture(scope='module')
def detector(manifest): return DeepFidelity(epochs=6, size=64, bs=20, ema=.8).fit(manifest, 'tiny')

def images(manifest, split='test'):
    part = manifest.of(split)
    return [part.image(i) for i in range(len(part))], part.table['label'].to_numpy()

def scores(detector, faces): return np.array([p.fidelity for p in detector.predict(faces)])

def test_it_learns_what_was_done(manifest, detector):
    faces, label = images(manifest)
    assert auc(scores(detector, faces), label)>.8

def test_threshold_is_where_probability_is_half(manifest, detector):
    faces, _ = images(manifest)
    np.testing.assert_array_equal(detector.predict_proba(faces)>=.5, scores(detector, faces)>=detector.threshold)

def test_same_seed_same_scores(manifest):
    faces, _ = images(manifest)
    a, b, c = (scores(DeepFidelity(epochs=1, size=64, bs=20, seed=s).fit(manifest, 'tiny'), faces) for s in (3, 3, 4))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a-c).max()>1e-3

def test_saved_and_loaded_scores_agree(manifest, detector, tmp_path):
    faces, _ = images(manifest)
    detector.save(tmp_path/'d')
    again = DeepFidelity.load(tmp_path/'d')
    np.testing.assert_allclose(scores(again, faces), scores(detector, faces), atol=1e-6)
    assert again.threshold==detector.threshold and not list((tmp_path/'d').rglob('*.pkl'))

def test_head_alone_is_a_probability(manifest):
    faces, _ = images(manifest)
    plain = scores(DeepFidelity(epochs=1, size=64, bs=20, mapping=None, ssaa_blocks=0).fit(manifest, 'tiny'), faces)
    assert 0<=plain.min() and plain.max()<=1

@pytest.mark.parametrize('spoil, says', [
    (lambda d: (d/'network.safetensors').unlink(), 'no such file'),
    (lambda d: (d/'network.safetensors').write_bytes((d/'network.safetensors').read_bytes()[:-1]+b'!'), 'sha256'),
    (lambda d: (d/'detector.json').unlink(), 'detector.json'),
    (lambda d: (d/'detector.json').write_text('{'), 'detector.json'),
    (lambda d: (d/'detector.json').write_text('{}'), 'detector.json'),
    (lambda d: (d/'regressor'/'regressor.safetensors').unlink(), 'regressor.safetensors'),
    (lambda d: (d/'detector.json').write_text((d/'detector.json').read_text().replace('ssaaformer_tiny', 'ssaaformer_small')), 'network'),
], ids=['no weights', 'changed weights', 'no settings', 'broken settings', 'empty settings', 'no regressor', 'another network'])
def test_bad_folder_is_refused_in_one_line(detector, tmp_path, spoil, says):
    detector.save(tmp_path/'d')
    spoil(tmp_path/'d')
    with pytest.raises(WeightsError, match=says) as e: DeepFidelity.load(tmp_path/'d')
    assert '\n' not in str(e.value)

def test_wrong_shape_is_named(detector, tmp_path):
    from safetensors.torch import load_file, save_file
    from deepfid.core import file_hash
    detector.save(tmp_path/'d')
    path = tmp_path/'d'/'network.safetensors'
    weights = load_file(path)
    weights['head.weight'] = weights['head.weight'][:1]
    save_file(weights, path)
    about = json.loads((tmp_path/'d'/'detector.json').read_text())
    (tmp_path/'d'/'detector.json').write_text(json.dumps(about | dict(sha256=file_hash(path))))
    with pytest.raises(WeightsError, match='head.weight has shape'): DeepFidelity.load(tmp_path/'d')

def test_unknown_settings_are_refused():
    with pytest.raises(DeepfidError, match='epoch_count'): DeepFidelity(epoch_count=3).configure('tiny')
    with pytest.raises(DeepfidError, match='recipe'): DeepFidelity().configure('tiny', recipe='none')
    with pytest.raises(DeepfidError, match='not trained'): DeepFidelity().predict([np.zeros((64, 64, 3), np.uint8)])
    with pytest.raises(DeepfidError, match='not trained'): DeepFidelity().save('nowhere')

def test_some_qualities_missing_is_refused_before_training(manifest):
    table = manifest.table.copy()
    table.loc[3, 'quality'] = np.nan
    with pytest.raises(DeepfidError, match='1 of 100 training faces have no quality'): DeepFidelity(epochs=1, size=64).fit(Manifest(table, manifest.folder), 'tiny')

def test_no_validation_rows_is_refused(manifest):
    with pytest.raises(ManifestError): DeepFidelity(epochs=1, size=64).fit(manifest.of('train'), 'tiny')
