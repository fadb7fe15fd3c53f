"Manipulation methods: exact masks, consent, and no shortcut that separates real from fake"
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import cv2, numpy as np, pytest
from deepfid.core import ConsentError, DeepfidError, Face
from deepfid.data.faces import alignment_matrix, warp_crop
from deepfid.data.forge import FORGERS, STRENGTHS, allowed_forgers, alpha_blend, feather_mask, forge, global_statistics, region_size, shortcut_probe
from deepfid.data.synth import simulate_camera, synthetic_face

@pytest.mark.parametrize('method', FORGERS)
def test_nothing_changes_where_the_mask_is_zero(method):
    for seed in range(6):
        f = forge(synthetic_face(seed, size=112), method, seed, synthetic_face(50+seed, size=112))
        assert f.method==method and f.mask.dtype==np.float32 and f.mask.shape==f.fake.shape[:2]
        assert 0<=f.mask.min() and f.mask.max()<=1 and f.mask.max()>.9 and (f.mask==0).mean()>.3
        np.testing.assert_array_equal(f.real[f.mask==0], f.fake[f.mask==0])
        assert np.abs(f.real.astype(int)-f.fake)[f.mask>.9].mean()>1

@pytest.mark.parametrize('method', FORGERS)
def test_deterministic_by_seed(method):
    face, donor = synthetic_face(1, size=96), synthetic_face(2, size=96)
    a, b, c = (forge(face, method, s, donor).fake for s in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert (a!=c).any()

def test_only_selfblend_without_consent():
    face = synthetic_face(1, size=96)
    person = Face(face.image, landmarks=face.landmarks, consent=False, identity='somebody')
    assert allowed_forgers(person)==['selfblend']
    forge(person, 'selfblend', 1)
    for method in set(FORGERS)-{'selfblend'}:
        with pytest.raises(ConsentError, match='somebody'): forge(person, method, 1, face)
    with pytest.raises(ConsentError, match='somebody'): forge(face, 'swap', 1, person)

def test_five_points_are_enough_for_three():
    face = synthetic_face(1, size=96)
    points = Face(face.image, points=face.points, consent=True)
    assert allowed_forgers(points)==['resynth', 'mouth', 'selfblend']
    for method in allowed_forgers(points): forge(points, method, 1)
    for method in ('swap', 'reenact'):
        with pytest.raises(DeepfidError, match='68 landmarks'): forge(points, method, 1, face)

def test_unknown_method_and_missing_donor():
    with pytest.raises(DeepfidError, match="'morph'.*selfblend"): forge(synthetic_face(1, size=64), 'morph')
    with pytest.raises(DeepfidError, match='donor'): forge(synthetic_face(1, size=64), 'swap')

def test_strengths_are_json():
    assert json.loads(json.dumps(STRENGTHS))['colour_shift']==list(STRENGTHS['colour_shift'])

def pair_statistics(k):
    "Global statistics of one pair, forged, cropped and photographed as `build_pairs` does"
    cv2.setNumThreads(1)
    method, face = list(FORGERS)[k%5], synthetic_face(70_000+k, size=160, identity=k//2)
    f = forge(face, method, 3*k+1, synthetic_face(800_000+k, size=160) if method=='swap' else None)
    m = alignment_matrix(face.points, 112)
    return [global_statistics(simulate_camera(warp_crop(i, m, 112), k), warp_crop(face.region, m, 112)) for i in (f.real, f.fake)]

def test_no_shortcut_separates_real_from_fake():
    n = 1800
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool: stats = np.array(list(pool.map(pair_statistics, range(n), chunksize=50)))
    k = np.arange(n)
    train = (k//2)%3!=0 # people, not images
    pooled = shortcut_probe(stats[:, 0], stats[:, 1], train)
    assert pooled['pairs']>=600 and pooled['high']<=.60, pooled
    for j, method in enumerate(FORGERS):
        own = shortcut_probe(stats[k%5==j, 0], stats[k%5==j, 1], train[k%5==j])
        assert own['high']<=.65, (method, own)

def test_the_probe_finds_a_shortcut():
    rng = np.random.default_rng(0)
    reals = rng.normal(size=(600, 17))
    assert shortcut_probe(reals, reals+.6, np.arange(600)<400, n_boot=200)['low']>.6

def test_public_doors_refuse_what_is_no_image_or_mask():
    image, mask = synthetic_face(1, size=64).image, np.zeros((64, 64), np.float32)
    for bad in (image/255, image[..., 0], image[:0]):
        with pytest.raises(DeepfidError, match='image: give an RGB image'): alpha_blend(bad, image, mask)
        with pytest.raises(DeepfidError, match='image: give an RGB image'): global_statistics(bad, mask)
    for bad in (np.full((64, 64), 255, np.uint8), mask[:5], mask-1, mask*np.nan):
        with pytest.raises(DeepfidError, match='^mask: '): alpha_blend(image, image, bad)
    for bad in (np.full((64, 64), 255, np.uint8), mask-1):
        with pytest.raises(DeepfidError, match='^mask: '): region_size(bad)
        with pytest.raises(DeepfidError, match='^mask: '): feather_mask(bad, 2.)
    for seed, strength in ((-1, 1), (1.5, 1), (0, -1), (0, float('nan'))):
        with pytest.raises(DeepfidError, match='^seed=|^strength='): forge(synthetic_face(1, size=64), 'selfblend', seed, strength=strength)
    assert region_size(mask>-1)==64
