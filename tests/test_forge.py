"Manipulation methods: exact masks, consent, and no shortcut that separates real from fake"
import json
import cv2, numpy as np, pytest
from deepfid.core import ConsentError, DeepfidError, Face
from deepfid.data.faces import alignment_matrix, warp_crop
from deepfid.data.forge import (FORGERS, REGIONS, STRENGTHS, allowed_forgers, alpha_blend, face_axes, feather_mask, forge, global_statistics,
    one_sided, region_size, regions, shortcut_probe)
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
    stats = np.array([pair_statistics(k) for k in range(n)])
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

# -- one side, one region --
@pytest.mark.parametrize('side', ['left', 'right', 'random'])
def test_one_sided_forgery_leaves_the_other_side_as_it_was(side):
    for seed, method in enumerate(FORGERS):
        face = synthetic_face(seed, size=112)
        whole = forge(face, method, seed, synthetic_face(50+seed, size=112))
        f = one_sided(whole, side, seed)
        np.testing.assert_array_equal(f.real[f.mask==0], f.fake[f.mask==0])
        centre, across, unit = face_axes(face)
        y, x = np.mgrid[:112, :112]
        away = (x-centre[0])*across[0]+(y-centre[1])*across[1]
        shares = [f.mask[away<0].sum()/whole.mask[away<0].sum(), f.mask[away>0].sum()/whole.mask[away>0].sum()]
        assert max(shares)>.9 and min(shares)<.2
        if side!='random': assert (shares[0]>shares[1])==(side=='left')
    assert one_sided(whole, 'both') is whole
    assert len({one_sided(whole, 'random', s).fake.tobytes() for s in range(12)})==2
    with pytest.raises(DeepfidError, match="side='up'"): one_sided(whole, 'up')

def test_regions_lie_where_they_say():
    face, centres = synthetic_face(3, size=160), {}
    for region in REGIONS:
        found = [regions(face, seed, region=region) for seed in range(6)]
        for f in found:
            np.testing.assert_array_equal(f.real[f.mask==0], f.fake[f.mask==0])
            assert f.mask.max()>.5 and np.abs(f.real.astype(int)-f.fake)[f.mask>.5].mean()>1
        centres[region] = [np.argwhere(f.mask>.5).mean(0)[::-1] for f in found]
    eyes, unit = face.points[:2], np.linalg.norm(face.points[1]-face.points[0])
    assert all(np.linalg.norm(eyes-c, axis=1).min()<.15*unit for c in centres['eye'])
    assert all(np.linalg.norm(face.points[2]-c)<.4*unit for c in centres['nose'])
    masks = np.stack([regions(face, s).mask>.5 for s in range(60)]).astype(float)
    assert len({regions(face, s).mask.tobytes() for s in range(20)})==20
    mean = masks.mean(0)>.5 # the mean mask is worth little here
    iou = [(mean&(m>0)).sum()/max((mean|(m>0)).sum(), 1) for m in masks]
    assert np.mean(iou)<.3

def test_pairs_of_one_side(tmp_path):
    from deepfid.data.pairs import build_pairs, synthetic_sources
    made = {side: build_pairs(synthetic_sources(8, 2, 5), tmp_path/side, ('swap',), (4, 0, 0), 64, workers=1, side=side)
        for side in ('both', 'left')}
    both, left = ([m.mask(i) for i in range(len(m)) if m.table['mask'][i]] for m in made.values())
    assert sum(m[:, 32:].sum() for m in left)<.2*sum(m[:, 32:].sum() for m in both)
    assert sum(m[:, :32].sum() for m in left)>.8*sum(m[:, :32].sum() for m in both)
    assert (made['both'].image(0)==made['left'].image(0)).all() # the real face
